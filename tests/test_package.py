"""What a user installs: a wheel with every module, quick and silent to import, that needs no notebook tools."""
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
modules = sorted(p.stem for p in (root/"hcd_nb").glob("[!_]*.py"))


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_import_is_silent_and_light():
    done = python("import sys, hcd_nb; print('torch' in sys.modules, hcd_nb.__version__)")
    assert done.returncode == 0 and done.stderr == ""
    version = next(l.split("=")[1].strip() for l in (root/"settings.ini").read_text().splitlines() if l.startswith("version"))
    assert done.stdout.split() == ["False", version]


def test_help_needs_no_torch():
    done = python("import sys; from hcd_nb.command import parser; parser().format_help(); print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture(scope="session")
def imported():
    """What each module says when it is imported anew, alone, where nothing that it may not need is there."""
    blocked = ("nbdev", "execnb", "IPython", "jupyterlab", "anny", "warp", "faiss", "pytest", "hypothesis", "timm", "onnx", "onnxruntime", "onnxscript")
    done = python(f"""
import importlib, json, sys, warnings
sys.modules.update(dict.fromkeys({blocked!r}))
said = {{}}
for module in {modules!r}:
    for name in [n for n in sys.modules if n.split(".")[0] == "hcd_nb"]: del sys.modules[name]
    with warnings.catch_warnings(record=True) as warned:
        try: importlib.import_module("hcd_nb." + module)
        except Exception as e: warned.append(repr(e))
    said[module] = [str(w) for w in warned]
print(json.dumps(said))""")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", modules)
def test_modules_need_neither_notebooks_nor_extras(module, imported):
    assert imported[module] == []


@pytest.mark.timeout(600)
def test_wheel_holds_every_module(tmp_path):
    source = tmp_path/"source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(root), str(source)], check=True)
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"hcd_nb/{m}.py" for m in modules} <= set(names)
    assert not [n for n in names if n.startswith(("nbs/", "tests/", "data/"))]


scripts = [l.strip().replace(" = ", "=") for l in (root/"settings.ini").read_text().split("console_scripts =")[1].splitlines() if " = " in l]


@pytest.fixture(scope="session")
def explained():
    """What each command prints when it is asked for help."""
    done = python(f"""
import contextlib, importlib, io, json, sys
said, sys.argv = {{}}, ["x", "--help"]
for script in {scripts!r}:
    module, function = script.split("=")[1].split(":")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): getattr(importlib.import_module(module), function)()
    said[script] = out.getvalue()
print(json.dumps(said))""")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", scripts)
def test_every_command_explains_itself(script, explained):
    assert explained[script].startswith(f"usage: {script.split('=')[0]} ")
