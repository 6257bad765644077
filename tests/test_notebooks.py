"""Every notebook runs top to bottom, is committed with its outputs, and the library is exactly what they export."""
import ast
import difflib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbdev.test
import pytest
from nbdev.export import nb_export
from nbdev.test import test_nb as run_notebook

root = Path(__file__).parents[1]
notebooks = sorted((root/"nbs").glob("*.ipynb"))
modules = {m[1]: nb for nb in notebooks if (m := re.search(r"#\| default_exp (\w+)", nb.read_text(encoding="utf-8")))}
run_notebook.__test__ = False


def cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def reads_records(notebook):
    "Whether code of a page reads what is kept in data/: its outputs are then those of the records, whoever runs it"
    code = "\n".join("".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "code")
    return bool(re.search(r"\bdata/(runs|benchmarks|tables)\b|\b(find_records|embedded_world|labels_of)\(", code))


def told(cell):
    """What the outputs of a cell say, in lines; pictures are left out, and plain text where the same is there as a table
    or Markdown: its width is the terminal's"""
    printed, shown = {}, []
    for o in cell.get("outputs") or []:
        if o["output_type"] == "stream": printed[o["name"]] = printed.get(o["name"], "") + "".join(o["text"])
        elif not any(kind.startswith("image/") for kind in o["data"]):
            texts = {kind: "".join(text) for kind, text in o["data"].items() if kind.startswith("text/")}
            if len(texts) > 1: texts.pop("text/plain", None)
            shown += [f"{kind}\n{text}" for kind, text in sorted(texts.items())]
    text = "\n".join([*(printed[name] for name in sorted(printed)), *shown])
    return re.sub(r"data:image/\w+;base64,[\w+/=]+", "a picture", text).splitlines()


def run_page(notebook, skip, kept):
    "Run a page as nbdev does; what came out goes into the list `kept` instead of the file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbdev.test, "write_nb", lambda page, file: kept.append(page))
        return run_notebook(notebook, skip_flags=skip, save=True)[0]


def differences(notebook, page):
    "Where a page says something else than its file; cells that say that what they need is not here are passed over"
    found = []
    for stored, cell in zip(cells(notebook), page.cells, strict=True):
        then, now = told(stored), told(cell) if cell.cell_type == "code" else []
        if then == now or cell.cell_type != "code" or now and re.match("skipped|renderer not installed", now[0]): continue
        found += [f"cell {stored['id']}:", *difflib.unified_diff(then, now, "committed", "run again", lineterm="", n=0)]
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", [pytest.param(p, id=p.stem, marks=[pytest.mark.records]*reads_records(p))
                                      for p in notebooks])
def test_runs(notebook, request, capsys):
    "Pages of records say what they said when they were committed"
    skip = [flag for flag in ("slow", "cuda") if not request.config.getoption(f"--{flag}")]
    assert run_page(notebook, skip, kept := []), f"{notebook.name} stopped with the error printed above"
    if reads_records(notebook):
        found = differences(notebook, kept[0])
        assert not found, "\n".join(["run it anew and commit its outputs, or mend what differs", *found])


@pytest.mark.records
def test_pages_of_records_are_found():
    found = {p.stem for p in notebooks if reads_records(p)}
    assert {"index", "24_situations", "50_s_tab1", "51_s_tab2", "52_s_tab3", "53_s_fig1", "54_claims", "55_why",
            "60_own_data", "70_benchmarks"} <= found
    assert not found & {"00_notation", "10_feature_bank", "16_dynamics"}


def printed(name, text): return dict(output_type="stream", name=name, text=[text])
def shown(**data): return dict(output_type="execute_result", execution_count=1, metadata={}, data={f"text/{k}": [v] for k, v in data.items()})


PAGE = {  # cells of a small page: source and outputs
    "a": ("print(1 + 1)\nprint(3, file=__import__('sys').stderr)", [printed("stdout", "2\n"), printed("stderr", "3\n")]),
    "b": ("from IPython.display import Markdown\nMarkdown('mAP 45.2')", [shown(plain="<IPython object>", markdown="mAP 45.2")]),
    "c": ("import pandas as pd\npd.DataFrame({'mAP': [45.2]}).style.format(precision=1).set_uuid('t')", []),
    "d": ("from PIL import Image\nImage.new('RGB', (2, 2))", [dict(shown(), data={"text/plain": ["a picture"], "image/png": "AAAA"})]),
    "e": ("print('skipped: not here')", [printed("stdout", "what was there\n")]),
    "f": ("#| slow\nprint('an hour later')", [printed("stdout", "an hour later\n")]),
    "g": ("45.2", [shown(plain="45.2")])}


def write_page(file, outputs):
    code = [dict(cell_type="code", id=i, metadata={}, execution_count=1, source=source.splitlines(True), outputs=outputs[i])
            for i, (source, _) in PAGE.items()]
    text = dict(cell_type="markdown", id="h", metadata={}, source=["A sentence."])
    file.write_text(json.dumps(dict(cells=[text, *code], metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.mark.records
def test_a_changed_output_is_noticed(tmp_path, monkeypatch):
    "Text, Markdown, tables and values; not pictures, not what cannot be run here"
    monkeypatch.setattr(nbdev.test, "get_config", lambda *_: type("Config", (), dict(exec_profile=False)))
    page, outputs = tmp_path/"page.ipynb", {i: out for i, (_, out) in PAGE.items()}
    def again():
        write_page(page, outputs)
        before = page.read_bytes()
        assert run_page(page, ["slow"], kept := []) and page.read_bytes() == before
        return differences(page, kept[0]), kept[0]
    found, ran = again()
    assert [line for line in found if line.startswith("cell")] == ["cell c:"] and "45.2" in "".join(found)
    outputs["c"] = json.loads(json.dumps(ran.cells[3].outputs))
    assert again()[0] == []
    for i, right, wrong in (("a", "2", "4"), ("a", "3", "4"), ("b", "45.2", "45.3"), ("c", "45.2", "45.3"), ("g", "45.2", "45.3")):
        kept = outputs[i]
        outputs[i] = json.loads(json.dumps(kept).replace(right, wrong, 1))
        found = again()[0]
        assert found[0] == f"cell {i}:", found
        assert any(line[0] == "-" and wrong in line for line in found) and any(line[0] == "+" and right in line for line in found)
        outputs[i] = kept


@pytest.mark.records
@pytest.mark.skipif(not shutil.which("make"), reason="make is missing")
def test_readme_is_the_front_page():
    command = ["make", "--silent", "--no-print-directory", "-C", root, "readme", f"BIN={Path(sys.executable).parent}"]
    made = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert made.returncode == 0, made.stderr
    kept = (root/"README.md").read_text(encoding="utf-8")
    assert made.stdout.splitlines() == kept.splitlines(), "run `make --silent readme > README.md`"


@pytest.mark.parametrize("notebook", notebooks, ids=lambda p: p.stem)
def test_outputs_are_committed_and_clean(notebook):
    code = [c for c in cells(notebook) if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in code), "no outputs: run `make notebooks`"
    outputs = json.dumps([{k: v for k, v in o.items() if k != "data"} if "data" not in o else
                          {k: v for k, v in o["data"].items() if not k.startswith("image/")} for c in code for o in c["outputs"]])
    assert '"error"' not in outputs and "Traceback" not in outputs
    for word, what in ((r"/(root|home|tmp|mnt|work|Users)/", "a machine path"), (r"Warning", "a warning"), (r"it/s|s/it", "a progress bar")):
        assert not re.search(word, outputs), f"{what} in the outputs"


@pytest.mark.parametrize("module", modules)
def test_library_is_what_the_notebook_exports(module, tmp_path):
    nb_export(modules[module], lib_path=tmp_path/"hcd_nb")
    strip = lambda text: re.sub(r"(?m)^# (%%|AUTOGENERATED).*$", "", text)
    exported, committed = (tmp_path/"hcd_nb"/f"{module}.py").read_text(), (root/"hcd_nb"/f"{module}.py").read_text()
    assert strip(exported) == strip(committed), "run nbdev-export"


@pytest.mark.parametrize("module", modules)
def test_modules_import_only_from_notebooks_before_theirs(module):
    tree = ast.parse((root/"hcd_nb"/f"{module}.py").read_text())
    used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1}
    assert all(modules[u].name < modules[module].name for u in used), f"{module} imports {used}"


@pytest.mark.parametrize("notebook", notebooks, ids=lambda p: p.stem)
def test_export_cells_are_small(notebook):
    exports = ["".join(c["source"]).splitlines() for c in cells(notebook) if c["cell_type"] == "code" and re.search(r"(?m)^#\| exporti?s?\b", "".join(c["source"]))]
    sizes = [sum(bool(l.strip()) and not l.startswith("#|") for l in c) for c in exports]
    assert not sizes or max(sizes) <= 30, f"an export cell of {max(sizes)} lines"


def test_every_module_has_a_notebook():
    files = {p.stem for p in (root/"hcd_nb").glob("[!_]*.py")}
    assert files == set(modules)
