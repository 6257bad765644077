"""What a run leaves behind, and what is made of it: encoders, exports, tables of features, matches, pages. Right answers, and one sentence for everything else."""
import json
import os
import pickle
import shutil
import stat
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from hcd_nb import export, hierarchy, search, tables
from hcd_nb.catalog import Doctor
from hcd_nb.data import read_domain
from hcd_nb.encoder import Encoder, build_encoder, encoder_digest, load_encoder, read_weights, save_encoder
from hcd_nb.results import read_record, write_table, embedded_world

SIZE = (32, 16)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder("resnet10s", image_size=SIZE).eval()


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_encoder(encoder, folder/"encoder.safetensors")
    return folder


def picture(file, seed=0, size=(16, 32)):
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def sentence(f, *args, **kwargs):
    """The one sentence that a call ends in."""
    with pytest.raises(ValueError) as said: f(*args, **kwargs)
    text = str(said.value)
    assert text and "\n" not in text and "Traceback" not in text, text
    return text


# ---- search

@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 3), st.integers(1, 12), st.integers(0, 10**6))
def test_matches_are_counted_after_the_query_and_what_is_gone_are_left_out(others, links, gone, top, seed):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        query = picture(folder/"q.png", seed)
        for k in range(links): (folder/f"{'az'[k % 2]}{k}.png").symlink_to(query)
        os.link(query, folder/"hard.png")
        for k in range(others): picture(folder/f"m{k}.png", seed + 1 + k)
        encoder = build_encoder("resnet10s", image_size=SIZE).eval()
        table, features = search.embed(encoder, search.list_images(folder, Doctor(folder)), Doctor(folder))
        for k in range(min(gone, others)): (folder/f"m{k}.png").unlink()
        doctor = Doctor(folder)
        found = search.best_matches(query, table, features, encoder, top, doctor)
        left = [k for k in range(others) if k >= gone]
        truth = (features.double() @ features[table.shown.tolist().index("q.png")].double()).tolist()
        ranked = sorted((f"m{k}.png" for k in left), key=lambda n: -truth[table.shown.tolist().index(n)])
        assert found.shown.tolist() == ranked[:top] and found["rank"].tolist() == list(range(1, len(found) + 1))
        if len(left) < min(top, others): assert "cannot be shown" in doctor.notes[0]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 40), st.sampled_from([1, 3, 7, 24, 256]), st.integers(0, 10**6))
def test_equal_rows_have_equal_cosines_in_any_order(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    few = torch.nn.functional.normalize(torch.randn(3, d, generator=g), dim=1)
    which = torch.randint(0, 3, (n,), generator=g)
    c = search.cosines(few[0], few[which])
    assert all(len(c[which == k].unique()) <= 1 for k in range(3))
    order = torch.randperm(n, generator=g)
    assert torch.equal(search.cosines(few[0], few[which][order]), c[order])
    assert torch.allclose(c, few[which] @ few[0], atol=1e-6)


def test_exact_copies_come_in_the_order_of_the_table(encoder, tmp_path):
    for k in range(12): shutil.copy(picture(tmp_path/"one.png"), tmp_path/f"c{k:02d}.png")
    table = search.list_images(tmp_path, Doctor(tmp_path))
    row = search.encode(encoder, search.read_image(tmp_path/"one.png", SIZE)[None])
    found = search.best_matches(tmp_path/"one.png", table, row.repeat(13, 1), encoder, 5)
    assert found.shown.tolist() == [f"c{k:02d}.png" for k in range(5)]


def test_pictures_passed_over_are_counted_and_named(run, tmp_path, capsys):
    folder = tmp_path/"set"
    for k in range(3): picture(folder/f"{k}.png", k)
    for name in ("a.heic", "b.gif", "c.gif"): (folder/name).write_bytes(b"")
    picture(folder/"old/curves.png"); (folder/"old/config.json").write_text("{}"); (folder/"old/record.json").write_text("{}")
    assert search.main_embed([str(run), str(folder), "--out", str(tmp_path/"f.parquet")]) == 0
    embedded = capsys.readouterr().out
    assert search.main_search([str(run), str(folder/"0.png"), str(folder), "--out", str(tmp_path/"m.png")]) == 0
    for said in (embedded, capsys.readouterr().out):
        assert "(.gif, .heic): 3, " in said and "folders of runs, whose pictures are not read: 1" in said, said
    assert pq.read_table(tmp_path/"f.parquet")["path"].to_pylist() == ["0.png", "1.png", "2.png"]


def test_names_are_drawn_as_they_are(run, tmp_path, capsys):
    names = ["$$.png", "$a_{1.png", "日本.png", "a\nb.png", "\\frac{}.png", "<b>&amp;.png", "%s{}.png", "_x.png"]
    for k, n in enumerate(names): picture(tmp_path/"set"/n, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for query, out in zip(names, ("m.png", "m.svg", "m.pdf")):
            assert search.main_search([str(run), str(tmp_path/"set"/query), str(tmp_path/"set"), "--out", str(tmp_path/out)]) == 0, capsys.readouterr().err


# ---- identities and names as in training

def market(folder):
    for part, shots in (("bounding_box_train", range(0, 16)), ("query", range(16, 20)), ("bounding_box_test", range(16, 24))):
        for k in shots: picture(folder/part/f"{k:04d}_c{1 + (part == 'query')}s1_{k:06d}_00.jpg", k)

def people(folder):
    for k in range(48): picture(folder/f"person {'abcdefgh'[k % 8]}"/f"c{k % 3}_{k}.png", k)

def msmt17(folder):
    for part, lists in (("train", ("list_train", "list_val")), ("test", ("list_query", "list_gallery"))):
        for n, name in enumerate(lists):
            lines = []
            for k in range(16):
                file = f"{k:04d}/{k:04d}_{n:03d}_{1 + n:02d}_0303morning_0015_{k}.jpg"
                picture(folder/part/file, k); lines.append(f"{file} {k}")
            (folder/f"{name}.txt").write_text("\n".join(lines))

def listed(folder):
    rows = [f"../elsewhere/{k}.png,p{k % 6},{k//6 % 3}" for k in range(48)]
    for k in range(48): picture(folder/f"../elsewhere/{k}.png", k)
    folder.mkdir(exist_ok=True); (folder/"table.csv").write_text("path,identity,camera\n" + "\n".join(rows))


@pytest.mark.parametrize("layout", [market, people, msmt17, listed])
def test_embed_knows_whom_training_knows(layout, tmp_path):
    layout(tmp_path/"set")
    where = tmp_path/"set/table.csv" if layout is listed else tmp_path/"set"
    d = read_domain(where)
    trained = {p: (int(i), int(c)) for s in (d.train, d.query, d.gallery) if s is not None for p, i, c in zip(s.paths, s.identities, s.cameras)}
    table = search.list_images(where, Doctor(where))
    assert {p: (i, c) for p, i, c in zip(table.path, table.identity, table.camera)} == trained and max(i for i, _ in trained.values()) > 0
    base = tmp_path/"set"
    assert all(os.path.samefile(base/name, p) and "\\" not in name for name, p in zip(table.shown, table.path))


def test_a_claim_holds_for_embed_as_for_training(tmp_path):
    market(tmp_path/"set")
    assert "not Market-1501 as published" in sentence(search.list_images, f"market1501:{tmp_path/'set'}", Doctor("set"))


def test_few_pictures_that_training_would_refuse_are_embedded(run, tmp_path, capsys):
    for name in ("a/1.png", "a/2.png", "0007_c2.png"): picture(tmp_path/"set"/name)
    assert search.main_embed([str(run), str(tmp_path/"set"), "--out", str(tmp_path/"f.parquet")]) == 0
    assert "identities are read from names alone" in capsys.readouterr().out
    assert pq.read_table(tmp_path/"f.parquet").drop_columns("feature").to_pylist() == [dict(path="0007_c2.png", identity=7, camera=2), *[dict(path=f"a/{k}.png", identity=-1, camera=-1) for k in (1, 2)]]


def test_no_cell_is_a_formula_and_tables_join(run, tmp_path):
    names = ["+1.png", "-2.png", "=A1.png", "@x.png", "plain.png"]
    for k, n in enumerate(names): picture(tmp_path/"set"/n, k)
    for out in ("f.parquet", "f.npy"): assert search.main_embed([str(run), str(tmp_path/"set"), "--out", str(tmp_path/out)]) == 0
    table = pd.read_csv(tmp_path/"f.names.csv")
    assert table.path.tolist() == pq.read_table(tmp_path/"f.parquet")["path"].to_pylist()
    assert not any(p[0] in "=+-@" for p in table.path) and {Path(p).name for p in table.path} == set(names)
    assert search.main_search([str(run), str(tmp_path/"set/+1.png"), str(tmp_path/"f.parquet"), "--out", str(tmp_path/"m.png")]) == 0


# ---- encoders and weights

def test_equal_encoders_have_equal_files_and_every_bit_counts(encoder, tmp_path):
    save_encoder(encoder, tmp_path/"a.safetensors"); save_encoder(load_encoder(tmp_path/"a.safetensors"), tmp_path/"b.safetensors")
    whole = (tmp_path/"a.safetensors").read_bytes()
    assert whole == (tmp_path/"b.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in np.random.default_rng(0).integers(header, len(whole), 12):
        turned = bytearray(whole); turned[at] ^= 1 << int(at) % 8
        (tmp_path/"x.safetensors").write_bytes(turned)
        assert "digest differs" in sentence(load_encoder, tmp_path/"x.safetensors")


def test_a_run_written_again_is_searched_with_its_table(run, tmp_path, capsys):
    for k in range(3): picture(tmp_path/f"set/{k}.png", k)
    shutil.copytree(run, tmp_path/"run")
    words = [str(tmp_path/"set/0.png"), str(tmp_path/"f.parquet"), "--out", str(tmp_path/"m.png")]
    assert search.main_embed([str(tmp_path/"run"), str(tmp_path/"set"), "--out", str(tmp_path/"f.parquet")]) == 0
    file = tmp_path/"run/encoder.safetensors"    # as an earlier version laid it out: other bytes, the same encoder
    save_file(load_file(file), file, metadata={"hcd_nb": json.dumps(dict(name="resnet10s", n_domains=1, image_size=SIZE)), "format": "pt", "a": "b"})
    assert search.main_search([str(tmp_path/"run"), *words]) == 0, capsys.readouterr().err
    save_encoder(build_encoder("resnet10s", seed=1, image_size=SIZE), file)
    assert search.main_search([str(tmp_path/"run"), *words]) == 2 and "made with another encoder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e39])
def test_weights_that_are_no_numbers_are_named_when_they_are_loaded(encoder, tmp_path, number):
    state = {k: v.double().contiguous() if v.is_floating_point() else v for k, v in encoder.state_dict().items()}
    state["backbone.layer1.0.conv1.weight"][0, 0, 0, 0] = number
    torch.save({"model": {"state_dict": state}}, tmp_path/"w.pth"); save_file(state, tmp_path/"w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        said = sentence(build_encoder, "resnet10s", tmp_path/file)
        assert file in said and "NaN or infinity" in said and "layer1.0.conv1.weight" in said


def test_state_dicts_of_every_kind_are_weights_or_a_sentence(tmp_path):
    one, around = {"w": torch.ones(2)}, {}
    around["model"] = around
    deep = one
    for _ in range(200): deep = {"state_dict": deep}
    good = [one, {"state_dict": one}, {"model": {"state_dict": one}}, {**one, 0: torch.ones(1), 1.5: 3, None: torch.ones(1)}, {**one, "s": torch.ones(3).to_sparse()}]
    for state in good:
        torch.save(state, tmp_path/"w.pth")
        assert list(read_weights(tmp_path/"w.pth")) == ["w"]
    for state in (around, deep, {0: torch.ones(1)}, [], None, torch.ones(3), {"w": torch.ones(2, dtype=torch.complex64)}):
        torch.save(state, tmp_path/"w.pth")
        sentence(read_weights, tmp_path/"w.pth")


def test_a_header_that_asks_for_more_than_a_machine_holds_is_refused_at_once(encoder, tmp_path):
    state, began = {k: v.contiguous() for k, v in encoder.state_dict().items()}, time.perf_counter()
    for change in (dict(image_size=[9999, 9999]), dict(image_size=[10**9, 1]), dict(n_domains=10**6), dict(n_domains=64), dict(name="regnet_y_128gf"), dict(name="vit_h_14"), dict(name="x"*10**6)):
        save_file(state, tmp_path/"x.safetensors", metadata={"hcd_nb": json.dumps(dict(name="resnet10s", n_domains=1, image_size=SIZE) | change)})
        assert len(sentence(load_encoder, tmp_path/"x.safetensors")) < 1000
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("name,size,least", [("alexnet", (64, 32), (126, 63)), ("densenet121", (8, 8), (13, 13)), ("squeezenet1_1", (16, 8), None)])
def test_an_encoder_too_deep_for_its_crops_says_what_works(name, size, least):
    said = sentence(Encoder, name, image_size=size)
    assert f"the encoder {name} is too deep for crops of {size[0]}×{size[1]}" in said
    h, w = (int(n) for n in said.split("height=")[1].split(",")[0].split(" and width="))
    assert least in (None, (h, w))
    with torch.no_grad(): assert Encoder(name, image_size=(h, w)).eval()(torch.zeros(1, 3, h, w)).isfinite().all()


# ---- files and places

def test_files_are_readable_as_the_umask_says(run, tmp_path):
    shutil.copytree(run, tmp_path/"run")
    for k in range(3): picture(tmp_path/f"set/{k}.png", k)
    before = os.umask(0o022)
    try:
        save_encoder(load_encoder(run/"encoder.safetensors"), tmp_path/"run/encoder.safetensors")
        for form in export.FORMATS: export.export_encoder(tmp_path/"run", form)
        for out in ("f.parquet", "f.npy"): assert search.main_embed([str(run), str(tmp_path/"set"), "--out", str(tmp_path/out)]) == 0
        assert search.main_search([str(run), str(tmp_path/"set/0.png"), str(tmp_path/"set"), "--out", str(tmp_path/"m.png")]) == 0
        write_table("1", embedded_world(), {}, tmp_path/"tables")
    finally: os.umask(before)
    written = [*(tmp_path/"run").iterdir(), *(tmp_path/"tables").iterdir(), *(tmp_path/n for n in ("f.parquet", "f.npy", "f.names.csv", "m.png"))]
    assert len(written) == 12 and {stat.S_IMODE(f.stat().st_mode) for f in written} == {0o644}


def test_a_place_that_cannot_be_written_is_told_before_pictures_are_read(run, tmp_path, monkeypatch, capsys):
    picture(tmp_path/"set/0.png"); (tmp_path/"file").write_text("mine")
    def read(*a, **k): raise AssertionError("pictures were read")
    for owner, name in ((search, "read_image"), (search, "image_files"), (export, "read_image"), (tables, "read_domain")): monkeypatch.setattr(owner, name, read)
    for place in ("/proc/nowhere", tmp_path/"file"):
        assert search.main_embed([str(run), str(tmp_path/"set"), "--out", f"{place}/f.parquet"]) == 2
        assert search.main_search([str(run), str(tmp_path/"set/0.png"), str(tmp_path/"set"), "--out", f"{place}/m.png"]) == 2
        assert export.main([str(run), "--out", f"{place}/e.onnx"]) == 2
        assert tables.main(["--table", "1", "--runs", str(tmp_path), "--out", f"{place}/tables"]) == 2
        assert tables.main(["--table", "1", "--run", "--runs", f"{place}/runs", "--out", str(tmp_path/"tables")]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 10 and not said.out, said


def test_a_name_of_a_picture_does_not_blank_the_page(tmp_path):
    names = ["<!--<script>.jpg", "</script>.jpg", "a.jpg", "b.jpg"]
    for k, n in enumerate(names): picture(tmp_path/n.replace("/", "∕"), k)
    labels = hierarchy.Labels([n.replace("/", "∕") for n in names], torch.zeros(3, 4, dtype=torch.long), pd.DataFrame([(0, k, 0) for k in range(4)], columns=["iteration", "image", "label"]))
    images = read_domain_of([tmp_path/n for n in labels.pictures])
    page = tmp_path/"page.html"
    page.write_text(hierarchy.page_of([hierarchy.page_data("<!--<script></script>", labels, images)]), encoding="utf-8")
    data = page.read_text(encoding="utf-8").split("const DATA=")[1].split("\n")[0]
    assert "<" not in data and json.loads(data)[0]["images"]["0"]["name"] == names[0]
    if not (browser := shutil.which("chromium")): pytest.skip("no chromium here: the page was looked at as text alone")
    shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path/'profile'}", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "Cluster 0: 4 pictures" in shown and shown.count("<figure") == 4 and 'alt="&lt;!--&lt;script&gt;.jpg"' in shown.replace("<!--<script>", "&lt;!--&lt;script&gt;"), shown[:500]


def read_domain_of(paths):
    from hcd_nb.data import ImageSet
    return ImageSet(paths, torch.full((len(paths),), -1), torch.full((len(paths),), -1))


# ---- whatever lies in a file

def mutated(whole, g):
    """Some bytes changed, cut off, put in or written twice."""
    data, kind = bytearray(whole), g.integers(6)
    at = int(g.integers(len(data))) if g.integers(2) else int(g.integers(min(len(data), 2000)))
    if kind == 0: data[at] ^= 1 << int(g.integers(8))
    elif kind == 1: data[at:at + 8] = g.bytes(8)
    elif kind == 2: del data[at:]
    elif kind == 3: del data[at:at + int(g.integers(1, 40))]
    elif kind == 4: data[at:at] = g.bytes(int(g.integers(1, 40)))
    else: data[at:at] = data[at//2:at//2 + 30]
    return bytes(data)


def json_mutated(content, g):
    """One value in a JSON object replaced by something else."""
    odd = [None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", [], {}, [[]], {"a": 1}, "\0", [None], -2**63, "9"*300]
    content = json.loads(json.dumps(content))
    inside, key = content, None
    while isinstance(inside, (dict, list)) and inside:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key, holder = keys[g.integers(len(keys))], inside
        inside = holder[key]
        if g.integers(2): break
    if key is not None: holder[key] = odd[g.integers(len(odd))]
    return content


def read_features(file):
    table, features = search.load_features(file)
    search.picture_folder(file, None)


def readers(encoder, tmp_path):
    """Name → (whole bytes, ending, what reads them)"""
    save_encoder(encoder, tmp_path/"e.safetensors")
    rows = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    names = pd.DataFrame(dict(shown=[f"{k}.png" for k in range(6)], identity=[1]*6, camera=[2]*6))
    search.save_features(tmp_path/"f.parquet", names, rows, dict(digest="0"*64, folder=str(tmp_path), encoder="e", run="r"))
    torch.save({"state_dict": {"w": torch.ones(3), "b": torch.zeros(2)}}, tmp_path/"w.pth")
    torch.save({"w": torch.ones(3)}, tmp_path/"old.pth", _use_new_zipfile_serialization=False)
    pd.DataFrame(dict(path=["a.jpg", "b.jpg"], level_1=[0, 1], level_2=[0, 0])).to_csv(tmp_path/"l.csv", index=False)
    small = {k: v for k, v in load_file(tmp_path/"e.safetensors").items() if v.numel() < 600}
    save_file(small, tmp_path/"s.safetensors", metadata={"hcd_nb": json.dumps(dict(name="resnet10s", n_domains=1, image_size=SIZE))})
    read = {"e.safetensors": load_encoder, "s.safetensors": load_encoder, "f.parquet": read_features, "w.pth": read_weights, "old.pth": read_weights, "l.csv": hierarchy.read_labels}
    return {name: ((tmp_path/name).read_bytes(), Path(name).suffix, f) for name, f in read.items()}


def tried(n, encoder, tmp_path, seed=0):
    """How many of n mutated inputs were taken, and how many got a sentence; anything else ends the test."""
    g, found = np.random.default_rng(seed), {}
    files = readers(encoder, tmp_path)
    record = json.loads(next((Path(__file__).parents[1]/"data/runs/embedded").glob("target-hcd-0.json")).read_text())
    def note(kind, f, *args):
        try: f(*args); said = "taken"
        except ValueError as e:
            assert str(e) and len(str(e)) < 2000
            said = "sentence"
        found[kind, said] = found.get((kind, said), 0) + 1
    for k in range(n):
        for name, (whole, ending, read) in files.items():
            if name == "e.safetensors" and k % 10: continue
            file = tmp_path/f"m{ending}"
            file.write_bytes(mutated(whole, g))
            note(name, read, file)
        (tmp_path/"record.json").write_text(json.dumps(json_mutated(record, g)) if k % 2 else mutated(json.dumps(record).encode(), g).decode("utf-8", "replace"))
        note("record.json", use_record, tmp_path/"record.json")
        about = json_mutated(dict(name="resnet10s", n_domains=1, image_size=list(SIZE)), g)
        save_file({"w": torch.ones(1)}, tmp_path/"h.safetensors", metadata={"hcd_nb": json.dumps(about)})
        note("header", load_encoder, tmp_path/"h.safetensors")
        (tmp_path/"again").mkdir(exist_ok=True)
        (tmp_path/"again/config.json").write_text(json.dumps(json_mutated(dict(target=str(tmp_path/"none"), skip_bad=True, test_share=.5), g)))
        note("config.json", export.some_crops, file_in(tmp_path/"again", tmp_path/"e.safetensors"), SIZE)
    return found


def file_in(folder, encoder):
    if not (folder/"encoder.safetensors").exists(): shutil.copy(encoder, folder/"encoder.safetensors")
    return folder


def use_record(file):
    """What the tables do with a record."""
    from hcd_nb.results import differences, figures, runs_of, s_table_1
    record, world = read_record(file), embedded_world()
    planned = runs_of(s_table_1(world))["target-hcd-0"]
    differences(record, world, planned), figures(record, "after"), tables.minutes_of(planned, {"r": record}), tables.compared(record, record)


@pytest.mark.timeout(600)
def test_a_thousand_mutated_files_are_read_or_told_in_one_sentence(encoder, tmp_path):
    found = tried(130, encoder, tmp_path)
    assert sum(found.values()) > 1000 and {k for k, said in found if said == "sentence"} >= {"e.safetensors", "f.parquet", "w.pth", "record.json", "header"}, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_more_mutated_files(encoder, tmp_path):
    found = tried(1000, encoder, tmp_path, seed=1)
    print(found)
    assert sum(found.values()) > 8000
