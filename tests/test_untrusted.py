"""Files from strangers: no code in them is run, nothing is written elsewhere, and their names are neither markup nor formulas."""
import csv
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mutate import outcome
from PIL import Image
from safetensors.torch import save
from test_command import TINY, hcd_train, person
from test_fuzz import linked, small_run, write_set

# ---- nine ways for a pickle to run a command

short = lambda text: b"\x8c" + bytes([len(text)]) + text.encode()
long = lambda text: b"X" + struct.pack("<I", len(text)) + text.encode()
line = lambda text: b"S'" + text.encode() + b"'\n"
called = lambda module, name, *arguments: f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(long, arguments)) + b"tR"
PAYLOADS = {
    "os.system": lambda c: called("os", "system", c),
    "posix.system, of another name": lambda c: called("posix", "system", c),
    "subprocess, by a list": lambda c: b"csubprocess\ncheck_call\n((" + b"".join(map(long, ("sh", "-c", c))) + b"ltR",
    "eval": lambda c: called("builtins", "eval", f"__import__('os').system({c!r})"),
    "exec": lambda c: called("builtins", "exec", f"import os; os.system({c!r})"),
    "text, as protocol 0 has it": lambda c: b"cos\nsystem\n(" + line(c) + b"tR",
    "INST": lambda c: b"(" + line(c) + b"ios\nsystem\n",
    "OBJ": lambda c: b"(cos\nsystem\n" + long(c) + b"o",
    "getattr of what is allowed": lambda c: short("builtins") + short("getattr") + b"\x93(" + called("builtins", "__import__", "os") + long("system") + b"tR(" + long(c) + b"tR"}

# ---- seven kinds of file around one


def zipped(pickled, more=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in (("archive/data.pkl", pickled), ("archive/version", b"3\n"), ("archive/byteorder", b"little"), ("archive/data/0", bytes(16)), ("../../outside.txt", b"x"), *more): z.writestr(name, content)
    return out.getvalue()


def legacy(pickled):
    return b"".join(pickle.dumps(x, 2) for x in (0x1950a86a20f9469cfc6c, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={}))) + pickled + pickle.dumps([], 2)


def npy(pickled):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr="|O", fortran_order=False, shape=(1,)))
    return out.getvalue() + pickled


def torchscript(pickled): return zipped(pickled, (("archive/constants.pkl", pickled), ("archive/code/__torch__.py", b"class M(Module):\n  pass\n")))
def safetensors(pickled): return save({"backbone.conv1.weight": torch.frombuffer(bytearray(pickled), dtype=torch.uint8)}, metadata={"format": "pt", "hcd_nb": pickled.decode("latin1"), "state": pickled.decode("latin1")})


FORMS = {"zip": lambda body: zipped(b"\x80\2" + body + b"."), "before the zip": lambda body: legacy(b"\x80\2" + body + b"."), "in a state dict": lambda body: zipped(b"\x80\2}(" + short("state_dict") + b"}(" + short("a.weight") + body + b"uu."),
         "TorchScript": lambda body: torchscript(b"\x80\2" + body + b"."), "npy": lambda body: npy(b"\x80\2" + body + b"."), "safetensors": lambda body: safetensors(b"\x80\2" + body + b"."), "the pickle alone": lambda body: b"\x80\2" + body + b"."}

# ---- all that takes a file


def loaders(world, here):
    "Name → (name of the file, what reads it)"
    from hcd_nb import command, export, hierarchy, results, search, training
    from hcd_nb.data import read_domain
    from hcd_nb.doctor import examine
    from hcd_nb.encoder import build_encoder, described, load_encoder
    from hcd_nb.images import read_image
    weights = lambda file: build_encoder("resnet10s", file, image_size=(32, 16))
    table = lambda file: read_domain(file)
    def labels(file):
        other = {"label_history.parquet", "pseudo_identities.csv"} - {file.name}
        for name in other: shutil.copy(world/"run"/name, file.parent)
        return hierarchy.labels_of(file.parent.name, file.parent.parent.name, file.parent.parent.parent)
    def cuhk(file):
        (file.parent/"images_detected").mkdir()
        return read_domain(file.parent)
    def status(main, *words):
        def read(file):
            import contextlib
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()): code = main([str(w) if w else str(file) for w in words])
            assert code and len(said.getvalue().splitlines()) == 1 and "Traceback" not in said.getvalue(), f"exit status {code}: {said.getvalue()}"
            raise ValueError(said.getvalue().strip())
        return read
    resumed = lambda file: status(command.main, "--resume", file.parent)(file)
    return {"weights .pth": ("w.pth", weights), "weights .pt": ("w.pt", weights), "weights .bin": ("w.bin", weights), "weights .safetensors": ("w.safetensors", weights), "encoder": ("encoder.safetensors", load_encoder), "its header": ("encoder.safetensors", described),
            "checkpoint": ("checkpoint.safetensors", training.read_checkpoint), "its header alone": ("checkpoint.safetensors", lambda f: training.read_checkpoint(f, whole=False)), "--resume": ("checkpoint.safetensors", resumed), "record": ("record.json", results.read_record),
            "features": ("features.parquet", search.load_features), "table": ("table.csv", table), "doctor": ("table.csv", examine), "history": ("label_history.parquet", labels), "pseudo-identities": ("pseudo_identities.csv", labels), "cuhk": ("cuhk03_new_protocol_config_detected.mat", cuhk), "picture": ("a.png", read_image),
            "hcd_export": ("encoder.safetensors", status(export.main, None)), "hcd_embed": ("encoder.safetensors", status(search.main_embed, None, world/"set")), "hcd_search in it": ("features.npy", status(search.main_search, world/"run", world/"set"/"query"/"0108_c1s1_000000_00.jpg", None)),
            "hcd_search by it": ("a.jpg", status(search.main_search, world/"run", None, world/"set")), "hcd_train --weights": ("w.pth", status(command.main, *TINY[:2], "--target", world/"set", "--weights", None, "--out", here/"never"))}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")/"world"
    write_set(folder/"set")
    small_run(folder/"set", folder/"run")
    return folder


def everything(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_would_run(payload, tmp_path):
    """Else it proves nothing that none of them does."""
    pickle.loads(b"\x80\2" + PAYLOADS[payload](f"touch {tmp_path}/ran") + b".")
    assert (tmp_path/"ran").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", FORMS)
def test_no_code_in_a_file_is_run(form, world, tmp_path, monkeypatch):
    inside = tmp_path/"a"/"b"/"inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    known, faults, n = everything(world), [], 0
    for payload, body in PAYLOADS.items():
        content = FORMS[form](body(f"touch {tmp_path}/ran"))
        for name, (file, read) in loaders(world, inside).items():
            shutil.rmtree(inside/"case", ignore_errors=True)
            folder = inside/"case"/"world"/"run"
            folder.mkdir(parents=True)
            (folder/file).write_bytes(content)
            kind, error, said, place, _ = outcome(lambda: read(folder/file))
            n += 1
            if kind != "sentence" and not (error == "ValueError" and "test_untrusted" in place): faults.append(f"{payload}, {name}: {kind} {error} at {place}: {said[:160]}")
            assert not (tmp_path/"ran").exists(), f"{payload} was run by {name}"
    assert everything(world) == known and [p.name for p in tmp_path.iterdir()] == ["a"] and [p.name for p in (tmp_path/"a").rglob("*") if "outside" in p.name] == [] and not [p for p in (inside/"never").rglob("*") if p.name != ".lock"]
    assert n == 9*len(loaders(world, inside)) and not faults, f"{len(faults)} of {n} are not refused in a sentence:\n" + "\n".join(faults)


# ---- names

ODD = ["<!--<script>.jpg", "<img src=x onerror=alert(1)>.jpg", "$$.jpg", "$x_1^2$.png", "日本.png", "'\"&amp;.jpg", "+1.jpg", "=1+1.jpg", "-1.jpg", "@SUM(1).jpg", "\\frac{1}{2}.jpg", "%s.jpg", "{0}.jpg", "a,b.jpg", "a;b.png"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "40 crops of 10 people, some of odd names, and a run on them"
    folder = tmp_path_factory.mktemp("odd")
    (folder/"crops").mkdir()
    names = [*ODD, *(f"crop_{k:03d}.jpg" for k in range(40 - len(ODD)))]
    for k, name in enumerate(names): person(k//4, k % 3, 0).save(folder/"crops"/name)
    small_run(folder/"crops", folder/"runs"/"w"/"x")
    return folder


class Tags(HTMLParser):
    "Tags of a page, and what stands in their attributes"
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.texts += [v for _, v in attrs if v]
        assert not [k for k, _ in attrs if k.startswith("on")], attrs


def hierarchy_page(odd):
    from hcd_nb.data import read_domain
    from hcd_nb.hierarchy import labels_of, page_data, page_of
    labels, images = labels_of("x", "w", odd/"runs"), read_domain(odd/"crops").train
    labels.levels[-1] = 0    # all pictures in one cluster, so that all of them are shown
    for k in range(len(labels.levels)): labels.levels[k] = torch.arange(40)//4 if k < len(labels.levels) - 1 else 0
    return page_of([page_data("<!--<script>", labels, images, limit=40)])


def test_names_are_no_markup_in_the_page_of_the_hierarchy(odd):
    page = hierarchy_page(odd)
    script = page.split("<script>", 1)[1]
    assert script.count("</script") == 1 and "<!--" not in script and "<script" not in script
    data = json.loads(script.split("const DATA=", 1)[1].split("\n", 1)[0].rstrip(";"))
    assert set(ODD) <= {about["name"] for about in data[0]["images"].values()} and data[0]["title"] == "<!--<script>"


@pytest.mark.skipif(not (chromium := shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")), reason="a browser is needed: chromium is not here")
def test_a_browser_shows_the_page_of_the_hierarchy(odd, tmp_path):
    (tmp_path/"page.html").write_text(hierarchy_page(odd), encoding="utf-8")
    done = subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=60)
    assert "cluster 0: 40 pictures" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_names_are_no_markup_in_the_page_of_the_doctor(odd, tmp_path, monkeypatch):
    from hcd_nb.doctor import examine, main
    shutil.copytree(odd/"crops", tmp_path/"<b>crops")
    (tmp_path/"<b>crops"/"<!--<script>broken.jpg").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    assert main(["<b>crops", "--out", "out"]) == 1
    page = (tmp_path/"out"/"index.html").read_text(encoding="utf8")
    found = Tags(page)
    assert "script" not in found.tags and "b" not in found.tags and "<!--" not in page
    assert "<img src=x onerror=alert(1)>.jpg" in Tags(examine("<b>crops").page()).texts
    assert any("<!--<script>broken.jpg" in f for fault in json.loads((tmp_path/"out"/"report.json").read_text())["faults"] for f in fault["files"])


def test_the_doctor_stays_in_its_folder(odd, tmp_path, monkeypatch):
    """Its report is named after the set: a set of another name, such as '..', must not lead out."""
    from hcd_nb.doctor import main
    linked(odd/"crops", tmp_path/"set")
    (tmp_path/"set"/"here").mkdir()
    monkeypatch.chdir(tmp_path/"set"/"here")
    assert main([".."]) in (0, 1)
    assert [p.name for p in (tmp_path/"set"/"here").iterdir()] == ["doctor-set"] and len(list(tmp_path.iterdir())) == 1


def formulas(file):
    "Cells of a table that a spreadsheet would compute"
    def number(cell):
        try: return float(cell) is not None
        except ValueError: return False
    with open(file, newline="", encoding="utf-8") as f: return [c for row in csv.reader(f) for c in row if c[:1] in ("=", "+", "-", "@", "\t", "\r") and not number(c)]


def test_names_are_no_formulas_in_tables(odd, tmp_path, monkeypatch):
    """However the set is named: from its own folder, where a path begins with the name, too."""
    from hcd_nb.search import main_embed
    monkeypatch.chdir(odd/"crops")
    assert main_embed([str(odd/"runs"/"w"/"x"), ".", "--out", str(tmp_path/"features.npy")]) == 0
    small_run(".", tmp_path/"run")
    tables = [*odd.rglob("*.csv"), *tmp_path.rglob("*.csv")]
    assert {t.name for t in tables} >= {"pseudo_identities.csv", "features.names.csv"}
    assert not {t.name: f for t in tables if (f := formulas(t))}
    assert any("1+1.jpg" in p for p in pd.read_csv(tmp_path/"run"/"pseudo_identities.csv")["path"])


@pytest.mark.timeout(300)
def test_names_are_no_mathematics_in_pictures_and_reports(odd, tmp_path):
    code, out, err = hcd_train("--target", odd/"crops", *TINY, "--iterations", 2, "--out", tmp_path/"run")
    assert code == 0 and "Warning" not in err, err
    from hcd_nb.search import main_search
    for name in ("$$.jpg", "$x_1^2$.png", "日本.png", "\\frac{1}{2}.jpg"):
        assert main_search([str(odd/"runs"/"w"/"x"), str(odd/"crops"/name), str(odd/"crops"), "--out", str(tmp_path/name.replace(".jpg", ".png"))]) == 0
        with Image.open(tmp_path/name.replace(".jpg", ".png")) as image: image.load()


def test_a_table_names_no_file_that_is_shown(world, tmp_path):
    """A path that leads elsewhere is read as a picture and as nothing else: what lies there is not told."""
    (tmp_path/"secret.txt").write_text("the secret")
    (tmp_path/"set").mkdir()
    for k in range(20): person(k, 0, 0).save(tmp_path/"set"/f"{k}.jpg")
    (tmp_path/"set"/"t.csv").write_text("path\n" + "".join(f"{k}.jpg\n" for k in range(20)) + "../secret.txt\n/etc/passwd\n/dev/null\n")
    from hcd_nb.data import read_domain
    kind, _, said, _, _ = outcome(lambda: read_domain(tmp_path/"set"/"t.csv"))
    assert kind == "sentence" and "secret.txt (not an image)" in said and "the secret" not in said
