"""What a user installs: a wheel with every module, quick and silent to import, that needs no notebook tools."""
import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
modules = sorted(p.stem for p in (root/"hcd_nb").glob("[!_]*.py"))


def python(code, seconds=300):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds)


def python_each(codes, folder):
    """Each of many codes by itself, in a fork of one process in which the large packages that the library requires are there already: name -> exit status, what it printed, what it complained of."""
    done = python(f"""
import os, sys, matplotlib.pyplot, numba, pandas, sklearn.cluster, torch, torchvision.models
for k, code in enumerate({list(codes.values())!r}):
    if not os.fork():
        for number, end in ((1, "out"), (2, "err")): os.dup2(os.open(f"{folder}/{{k}}.{{end}}", os.O_CREAT | os.O_WRONLY), number)
        exec(code, {{"__name__": "__main__"}})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)""", seconds=900)
    assert done.returncode == 0, done.stderr
    return {name: (int(status), *((folder/f"{k}.{end}").read_text() for end in ("out", "err"))) for k, (name, status) in enumerate(zip(codes, done.stdout.split(), strict=True))}


def test_import_is_silent_and_light():
    done = python("import sys, hcd_nb; print('torch' in sys.modules, hcd_nb.__version__)")
    assert done.returncode == 0 and done.stderr == ""
    version = next(l.split("=")[1].strip() for l in (root/"settings.ini").read_text().splitlines() if l.startswith("version"))
    assert done.stdout.split() == ["False", version]


def test_help_needs_no_torch():
    done = python("import sys; from hcd_nb.command import parser; parser().format_help(); print('torch' in sys.modules or 'numba' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_what_every_module_imports_is_required():
    told = (root/"settings.ini").read_text().split("\nrequirements =")[1].split("\ndev_requirements")[0]
    required, packages = set(re.findall(r"(?m)^ +([\w-]+)", told)), packages_distributions()
    for module in modules:
        imports = [n for n in ast.parse((root/"hcd_nb"/f"{module}.py").read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom)) and not getattr(n, "level", 0)]
        names = {name.split(".")[0] for n in imports for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])}
        for name in names - sys.stdlib_module_names - {"hcd_nb"}: assert {x.lower() for x in packages[name]} & required, f"{module} imports {name}"
    assert {"torch", "numba"} <= required


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    blocked = ("nbdev", "execnb", "IPython", "jupyterlab", "anny", "warp", "faiss", "pytest", "hypothesis", "timm", "onnx", "onnxruntime", "onnxscript")
    return python_each({m: f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import hcd_nb.{m}" for m in modules}, tmp_path_factory.mktemp("imported"))


@pytest.mark.timeout(900)    # all modules are imported before the first of them is asked
@pytest.mark.parametrize("module", modules)
def test_modules_need_neither_notebooks_nor_extras(module, imported):
    code, out, err = imported[module]
    assert code == 0 and err == "", err


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
def explained(tmp_path_factory):
    codes = {}
    for script in scripts:
        module, function = script.split("=")[1].split(":")
        codes[script] = f"import sys; sys.argv = ['x', '--help']; from {module} import {function}; {function}()"
    return python_each(codes, tmp_path_factory.mktemp("explained"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", scripts)
def test_every_command_explains_itself(script, explained):
    code, out, err = explained[script]
    assert code == 0 and out.startswith(f"usage: {script.split('=')[0]} "), err
