"""Sets as people have them: what each layout, table and file is understood as, written down by hand and not by the reader."""
import io
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from hcd_nb import doctor
from hcd_nb.catalog import Doctor, read_cuhk03_mat, read_known
from hcd_nb.data import ImageSet, read_csv, read_domain
from hcd_nb.files import atomic_write, writable_place
from hcd_nb.images import AVIF, DataError, image_fault, image_files, picture_digests, read_image

PEOPLE = range(1, 21)


def plant(folder, *patterns, people=PEOPLE, shots=2):
    """Pictures of these names ({p} person, {k} shot), hard links to a few, since what is on them does not matter."""
    for n, name in enumerate(dict.fromkeys(x.format(p=p, k=k) for x in patterns for p in people for k in range(shots))):
        file = folder/name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(file)
    return folder


# layout -> what it is: people, cameras and words of a note (None: no notes but that of the split), or words of the refusal
UNDERSTOOD = [
    # one sub-folder for each person
    (["{p:04d}/{k}.png"], (20, 0, None)),
    (["person {p}/{k}.png"], (20, 0, None)),
    (["{p:04d}/x_c1_{k}.png", "{p:04d}/x_c2_{k}.png"], (20, 2, None)),
    (["{p:04d}/c1/{k}.png", "{p:04d}/c2/{k}.png"], (20, 2, None)),
    (["{p:04d}/C1/{k}.png", "{p:04d}/C2/{k}.png"], (20, 2, None)),
    (["{p:04d}/c1/a/{k}.png", "{p:04d}/c2/b/{k}.png"], (20, 2, "whatever lies below it (a, b in several")),
    (["{p:04d}/cam1/{k}.png", "{p:04d}/cam2/{k}.png"], (20, 0, "named like cameras (cam1, cam2) in a way that is not read")),
    (["{p:04d}/camera_1/{k}.png", "{p:04d}/camera_2/{k}.png"], (20, 0, "named like cameras (camera_1, camera_2)")),
    (["{p:04d}/day1/{k}.png", "{p:04d}/day2/{k}.png"], (20, 0, "whatever lies below it (day1, day2")),
    (["{p:04d}/tracklet{k}/1.png"], (20, 0, "whatever lies below it (tracklet0, tracklet1")),
    (["{p:04d}/images/{k}.png"], (20, 0, "whatever lies below it (images")),
    (["{p:04d}/{p:04d}_c1s1_{k}.png", "{p:04d}/{p:04d}_c2s1_{k}.png"], (20, 2, None)),
    (["{p:04d}/{k}.png", "test/{k}.png"], (21, 0, "test is named like parts of a set")),
    (["{p:04d}/{k}.png", "cam_newton/{k}.png"], (21, 0, "cam_newton is named like cameras")),
    (["{p:04d}/{k}.png", "0000/{k}.png"], (20, 0, "sub-folder 0000 is read as distractors")),
    (["{p:04d}/{k}.png", "-1/{k}.png"], (20, 0, None)),
    (["{p:04d}/{k}.png", "nan/{k}.png"], (20, 0, "sub-folder nan is read as unknown")),
    (["{p}/{k}.png", "zoe/{k}.png"], (21, 0, "numbers are kept, and what is no whole number (zoe) is numbered from 21 on")),
    (["{p}/{k}.png", "01/{k}.png"], (21, 0, "one number is spelt in two ways (01 and 1)")),
    (["north/{p}_{k}.png", "south/{p}_{k}.png"], (2, 0, "each of the 2 sub-folders is read as one person")),
    # not one sub-folder for each person
    (["train/{p:04d}/{k}.png", "test/{p:04d}/{k}.png"], "named like parts of a set (test, train)"),
    (["train/{p:04d}/{k}.png", "val/{p:04d}/{k}.png", "test/{p:04d}/{k}.png"], "named like parts of a set"),
    (["Train/{p}_{k}.png", "Test/{p}_{k}.png"], "named like parts of a set"),
    (["probe/{p:04d}/{k}.png", "gallery/{p:04d}/{k}.png"], "named like parts of a set"),
    (["gallery/{p}_{k}.png", "queries/{p}_{k}.png", "train_all/{p}_{k}.png"], "named like parts of a set"),
    (["Bounding_Box_Train/{p:04d}_c1s1_{k}.png", "Query/{p:04d}_c2s1_{k}.png"], "named like parts of a set"),
    (["bounding_box_train2/{p:04d}_c1s1_{k}.png", "bounding_box_training/{p:04d}_c1s1_{k}.png"], "named like parts of a set"),
    (["train_v2/{p:04d}/{k}.png", "test2017/{p:04d}/{k}.png"], "named like parts of a set"),
    (["trainA/{p:04d}/{k}.png", "trainB/{p:04d}/{k}.png"], "named like parts of a set"),
    (["train/{p:04d}/{k}.png", "test/{p:04d}/{k}.png", "extras/{p:04d}/{k}.png"], "named like parts of a set"),
    (["query/{p:04d}/{k}.png", "gallery/{p:04d}/{k}.png"], "no folder bounding_box_train"),
    (["cam1/{p:04d}/{k}.png", "cam2/{p:04d}/{k}.png"], "named like cameras (cam1, cam2)"),
    (["cam01/{p}_{k}.png", "cam02/{p}_{k}.png", "cam03/{p}_{k}.png"], "named like cameras"),
    (["c1/{p}_{k}.png", "c2/{p}_{k}.png"], "named like cameras"),
    (["camera_3/{p}_{k}.png", "camera_4/{p}_{k}.png"], "named like cameras"),
    (["cam-2/{p}_{k}.png", "cam-3/{p}_{k}.png"], "named like cameras"),
    (["cam_a/person_{p:04d}/{k}.png", "cam_b/person_{p:04d}/{k}.png"], "named like cameras"),
    (["CAM A/{p}_{k}.png", "CAM B/{p}_{k}.png"], "named like cameras"),
    (["left camera/{p}_{k}.png", "right camera/{p}_{k}.png"], "named like cameras"),
    (["cam1/{p}_{k}.png", "cam2/{p}_{k}.png", "other/{p}_{k}.png"], "named like cameras"),
    (["multi_shot/cam_a/person_{p:04d}/{k}.png", "single_shot/cam_a/person_{p:04d}/{k}.png"], "the same 20 sub-folders"),
    (["Thermal/{p}/{k}.png", "Visible/{p}/{k}.png"], "the same 20 sub-folders"),
    (["a/{p:04d}/{k}.png", "b/{p:04d}/{k}.png", "c/{p:04d}/{k}.png"], "the same 20 sub-folders"),
    (["part1/{p:04d}_c1s1_{k}.png", "part2/{p:04d}_c2s1_{k}.png"], "the names of the files tell of 20 people"),
    (["images/{p:04d}/{k}.png"], "all images are in one sub-folder, images"),
    (["train/{p:04d}/{k}.png"], "all images are in one sub-folder, train"),
    (["{p:04d}/{k}.png", "-2/{k}.png"], "sub-folder -2"),
    (["{p:04d}/{k}.png", "stray.png"], "images both directly inside"),
    # names and crops
    (["{p:04d}_c1s1_{k}.png", "{p:04d}_c2s1_{k}.png", "0000_c1s1_{k}.png", "-1_c1s1_{k}.png"], (20, 2, None)),
    (["IMG_{p}_{k}.png"], (0, 0, "no identities")),
]


@pytest.mark.parametrize("patterns, expected", UNDERSTOOD, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_layouts(patterns, expected, tmp_path, capsys, monkeypatch):
    folder = plant(tmp_path/"set", *patterns)
    monkeypatch.chdir(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(DataError) as e: read_domain(folder, test_share=0)
        assert expected in str(e.value) and "\n" not in str(e.value) and "; " in str(e.value)
        assert doctor.main([str(folder), "--out", "report"]) == 2
        said = capsys.readouterr()
        assert expected in said.err and "Fit to train" not in said.out
        return
    people, cameras, note = expected
    domain = read_domain(folder, test_share=0)
    row = domain.table().loc["train"]
    assert (row.identities, row.cameras) == (people, cameras)
    assert row.distractors == 2*any(x.startswith("0000") for x in patterns) and row.unknown == (40 if not people else 2*any(x.startswith(("-1", "nan")) for x in patterns))
    rest = [n for n in domain.notes if "camera labels" not in n and "held out" not in n and "spelt" not in n or note and note in n]
    assert any(note in n for n in rest) if note else not rest, domain.notes


@given(st.lists(st.sampled_from(["1", "2", "9", "0", "-1", "", "zoe", "adam", "nan", "NA"]), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_table_keeps_numbers_and_names_what_it_understood(tmp_path_factory, words):
    file = tmp_path_factory.mktemp("t")/"set.csv"
    file.write_text("path,identity\n" + "".join(f"{n}.jpg,{w}\n" for n, w in enumerate(words)))
    told = Doctor("set.csv")
    found = read_csv(file, told).identity.tolist()
    numbers, names = {int(w) for w in words if w.lstrip("-").isdigit()}, sorted({"adam", "zoe"} & set(words))
    for word, number in zip(words, found):
        if word in ("1", "2", "9", "0", "-1"): assert number == int(word)
        elif word in ("", "nan", "NA"): assert number == -1
        else: assert number == max(numbers | {0}) + 1 + names.index(word)
    notes = " | ".join(told.notes)
    assert ("nan" in words or "NA" in words) == ("read as unknown" in notes) and ("0" in words) == ("distractors" in notes)
    assert (bool({"zoe", "adam"} & set(words)) and bool({"1", "2", "9"} & set(words))) == ("numbers are kept" in notes)


TABLES = [
    ("path,identity\na,0\nb,0\nc,5", [0, 0, 5], "identity 0 is read as distractors, who are not searched for (images: 2)"),
    ("path,identity\na,0000\nb,0.0\nc,5.0", [0, 0, 5], "identity 0.0, 0000 is read as distractors"),
    ("path,identity\na,7\nb,nan\nc,12", [7, -1, 12], "identity nan is read as unknown (images: 1)"),
    ("path,identity\na,7\nb,<NA>\nc,None", [7, -1, -1], "identity <NA>, None is read as unknown (images: 2)"),
    ("path,identity\na,zoe\nb,0\nc,adam", [2, 0, 1], "distractors"),
    ("path,identity\na,7\nb,1.5\nc,12", [7, 13, 12], "what is no whole number (1.5) is numbered from 13 on"),
    ("path,identity\na,7\nb,1e400\nc,12345678901234567890", [7, 9, 8], "numbered from 8 on"),
    ("path,identity\na,7\nb,-2", None, "identity -2; numbers below -1 mean nothing"),
    ("path,camera\na,7\nb,-3", None, "camera -3; numbers below -1 mean nothing"),
    ("path,identity\na,1\nb,01", [2, 1], "spelt in two ways (01 and 1)"),
    ("\ufeffPath , IDENTITY\r\na,3\r\nb,\r\n", [3, -1], None),
    ("path,identity\n\"a,b\",1\n'c',2", [1, 2], None),
    ("path,identity\n\"a\nb\",1", [1], None),
    ("path,identity\n\"a,1", None, "not a readable table"),
    ("path,identity\na,1,2", None, "not a readable table"),
    ("path\tidentity\na\t1", None, "no column named path among path�identity"),
    ("path,identity,identity\na,1,2", None, "two columns named identity"),
    ("path,split\na,train\nb,dev", None, "column split holds dev in row 2"),
    (",".join(map(str, range(10**5))) + "\na", None, "more than 1,000 columns"),
    ("pa\0th\na", None, "zero bytes"),
    ("", None, "not a readable table"),
    ("path", None, "no rows"),
]


@pytest.mark.parametrize("content, expected, said", TABLES, ids=lambda x: ascii(x)[:40] if isinstance(x, str) else "")
def test_tables(content, expected, said, tmp_path):
    (tmp_path/"set.csv").write_bytes(content.encode())
    told = Doctor("set.csv")
    if expected is None:
        with pytest.raises(DataError, match="(?s)^[^\n]*$") as e: read_csv(tmp_path/"set.csv", told)
        assert said in str(e.value)
    else:
        assert read_csv(tmp_path/"set.csv", told).identity.tolist() == expected
        assert any(said in n for n in told.notes) if said else not told.notes


def test_cameras_of_a_table_are_numbered_in_the_same_way(tmp_path):
    (tmp_path/"set.csv").write_text("path,camera\na,0\nb,3\nc,nan\nd,hall\n")
    told = Doctor("set.csv")
    assert read_csv(tmp_path/"set.csv", told).camera.tolist() == [0, 3, -1, 4]
    assert "camera nan is read as unknown" in told.notes[0] and "(hall) is numbered from 4 on" in told.notes[1] and len(told.notes) == 2


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30), st.sampled_from([list, np.array, torch.tensor, lambda x: torch.tensor(x).float(), lambda x: [None if i < 0 else i for i in x]]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_one_meaning_of_known(identities, kind):
    images = ImageSet([f"{n}.jpg" for n in range(len(identities))], kind(identities), [-1]*len(identities))
    somebody = [n for n, i in enumerate(identities) if i not in (0, -1)]
    assert images.identities.tolist() == identities and images.has_identities == bool(somebody)
    assert images.known().paths == [f"{n}.jpg" for n in somebody]
    if len(somebody) < len(identities):
        with pytest.raises(DataError, match=f"{len(identities) - len(somebody)} of {len(identities)} images have no identity"): images.classes()
    elif somebody: assert images.classes().tolist() == np.unique(identities, return_inverse=True)[1].tolist()


def test_avif_is_read_where_it_can_be_and_named_where_not(tmp_path):
    for name in ("a.jpg", "old.gif"): Image.new("RGB", (16, 32)).save(tmp_path/name)
    if AVIF: Image.new("RGB", (16, 32), "red").save(tmp_path/"b.avif")
    else: (tmp_path/"b.avif").write_bytes(b"x")
    notes = []
    assert [f.name for f in image_files(tmp_path, notes)] == (["a.jpg", "b.avif"] if AVIF else ["a.jpg"])
    assert ("(.gif): 1, old.gif" if AVIF else "(.avif, .gif): 2") in notes[0]
    if AVIF: assert read_image(tmp_path/"b.avif")[0].float().mean() > 200


def test_pictures_are_told_apart_by_their_bytes(tmp_path):
    for name in ("a.jpg", "b.jpg"): Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(tmp_path/name)
    same = picture_digests([tmp_path/"a.jpg", tmp_path/"b.jpg"])
    content = bytearray((tmp_path/"b.jpg").read_bytes())
    content[600:660] = bytes(b ^ 1 for b in content[600:660])
    (tmp_path/"b.jpg").write_bytes(content)
    assert same[0] == same[1] and picture_digests([tmp_path/"b.jpg"])[0] != same[0] and len(content) == os.path.getsize(tmp_path/"a.jpg")


LOOK = """import resource, sys
from hcd_nb.images import image_fault
for path in sys.argv[1:]: print(image_fault(path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1000, sep="|")"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units")
def test_too_many_pixels_take_no_memory(tmp_path):
    Image.new("RGB", (8, 16)).save(tmp_path/"small.png")
    Image.new("1", (13_300, 13_300)).convert("L").save(tmp_path/"large.tif", compression="tiff_deflate")
    Image.new("1", (20_000, 20_000)).save(tmp_path/"huge.png")
    Image.new("1", (1, 1_000_000)).save(tmp_path/"long.png")
    names = ["small.png", "large.tif", "huge.png", "long.png"]
    done = subprocess.run([sys.executable, "-c", LOOK, *(tmp_path/n for n in names)], capture_output=True, text=True)
    said, memory = zip(*(line.split("|") for line in done.stdout.splitlines()))
    for begin, fault in zip(["None", "13,300 × 13,300 pixels, more than", "400,000,000 pixels, more than", "1 × 1,000,000 pixels, a side longer"], said, strict=True): assert fault.startswith(begin)
    assert int(memory[-1]) - int(memory[0]) < 100 and not done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0 or subprocess.run(["mountpoint", "-q", "/proc"]).returncode != 0, reason="needs the right to mount a small disk")
def test_a_full_or_read_only_disk(tmp_path, capsys):
    folder, disk = plant(tmp_path/"set", "{p:04d}/x_c1_{k}.png", "{p:04d}/x_c2_{k}.png"), tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("mounting is not allowed here")
    try:
        (disk/"report").mkdir()
        for name in ("index.html", "report.json"): (disk/"report"/name).write_text("as it was")
        (disk/"filler").write_bytes(bytes(os.statvfs(disk).f_bavail*os.statvfs(disk).f_bsize - 2**14))
        assert doctor.main([str(folder), "--out", str(disk/"report")]) == 2
        assert f"{disk/'report'}" in (said := capsys.readouterr().err) and "cannot be written (no space left on device)" in said
        assert sorted((p.name, p.read_text()) for p in (disk/"report").iterdir()) == [("index.html", "as it was"), ("report.json", "as it was")]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for place, is_folder in ((disk/"new", True), (disk/"report", True), (disk/"x.csv", False)):
            with pytest.raises(ValueError, match="read-only file system"): writable_place(place, is_folder)
        assert doctor.main([str(tmp_path/"nowhere"), "--out", str(disk/"new")]) == 2
        assert "read-only" in capsys.readouterr().err    # said first: the set is not looked for
    finally: subprocess.run(["umount", disk], check=True)


def test_devices_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    with pytest.raises(ValueError, match="no file that could be replaced"):
        with atomic_write(tmp_path/"pipe"): raise AssertionError
    with pytest.raises(ValueError, match="a folder or a device"): writable_place(tmp_path/"pipe")


def damaged(content, g, tokens=()):
    """Some bytes changed, cut out, put in, or the end cut off."""
    content = bytearray(content)
    for _ in range(g.choice([1, 2, 8, 30])):
        at = g.randrange(len(content))
        if tokens and g.random() < .5: content[at:at] = g.choice(tokens)
        else: content[at] = g.choice([0, 255, g.randrange(256)])
    return bytes(content[:g.randrange(len(content))] if g.random() < .2 else content)


def some_pictures():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    for kind in ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"] + ["AVIF"]*AVIF:
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "F"):
            out = io.BytesIO()
            try: (image.convert("L").convert(mode) if mode != "P" else image.convert("P")).save(out, kind)
            except (OSError, ValueError): continue
            yield out.getvalue()
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        out = io.BytesIO(); image.save(out, "TIFF", compression=compression); yield out.getvalue()


def fuzz_pictures(n, folder, g):
    whole = list(some_pictures())
    for _ in range(n):
        (folder/"x.jpg").write_bytes(damaged(g.choice(whole), g))
        fault = image_fault(folder/"x.jpg")
        try: assert read_image(folder/"x.jpg", (16, 8)).shape == (3, 16, 8) and fault is None; yield "accepted"
        except DataError as e: assert fault and fault in str(e) and "\n" not in fault and len(fault) < 200; yield "sentence"


def fuzz_tables(n, folder, g):
    whole = b"\xef\xbb\xbfPath,Identity,camera,split\n" + b"".join(b'"img %d.jpg",%d,%d,%s\n' % (i, i % 7, i % 3, [b"train", b"query", b"gallery"][i % 3]) for i in range(12))
    tokens = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"nan", b"-2", b"1e400", b"\xe2\x80\xa8", b"9"*30, b"\x1b[31m", "٣".encode(), b"../"*50, b"a"*5000, b",,"*900]
    for _ in range(n):
        (folder/"x.csv").write_bytes(damaged(whole, g, tokens))
        told = Doctor("x.csv", skip_bad=g.random() < .5)
        try: rows = read_csv(folder/"x.csv", told); assert (rows[["identity", "camera"]] >= -1).all(axis=None) and "\n" not in "".join(told.notes); yield "accepted"
        except DataError as e: assert "\n" not in str(e) and len(str(e)) < 1000; yield "sentence"


def fuzz_lists(n, folder, g):
    whole = "".join(f"{p:04d}/{p:04d}_{k:03d}_{k + 1:02d}_0303morning_0008_0.jpg {p}\n" for p in range(4) for k in range(2)).encode()
    for line in whole.decode().splitlines():
        for place in ("train", "test"): (file := folder/"MSMT17_V1"/place/line.split()[0]).parent.mkdir(parents=True, exist_ok=True); file.touch()
    for name in ("train", "val", "query", "gallery"): (folder/f"MSMT17_V1/list_{name}.txt").write_bytes(whole)
    for _ in range(n):
        (folder/"MSMT17_V1/list_train.txt").write_bytes(damaged(whole, g, [b"\xff", b"\0", b"/"*300, b"9"*30, "²".encode(), b"\n", b" "]))
        try: read_known(folder/"MSMT17_V1", "msmt17", Doctor("MSMT17", skip_bad=True)); yield "accepted"
        except DataError as e: assert "\n" not in str(e) and len(str(e)) < 1000; yield "sentence"


def fuzz_mat(n, folder, g):
    from scipy.io import savemat
    names, config = [f"1_{p:03d}_{c}.png" for p in (1, 2, 3) for c in (1, 2)], folder/"cuhk03_new_protocol_config_labeled.mat"
    (folder/"images_labeled").mkdir(exist_ok=True)
    for name in names: (folder/"images_labeled"/name).touch()
    whole = []
    for compressed in (False, True):
        savemat(config, dict(filelist=np.array(names, dtype=object)[:, None], labels=np.repeat([1, 2, 3], 2)[:, None], camId=np.tile([1, 2], 3)[:, None],
                             train_idx=[[1], [2]], query_idx=[[3], [5]], gallery_idx=[[4], [6]]), do_compression=compressed)
        whole.append(config.read_bytes())
    for _ in range(n):
        config.write_bytes(damaged(g.choice(whole), g))
        try: assert (read_cuhk03_mat(folder, "labeled", Doctor("cuhk03", skip_bad=True)).identity > 0).all(); yield "accepted"
        except DataError as e: assert "\n" not in str(e) and len(str(e)) < 1000; yield "sentence"


FUZZ = dict(pictures=fuzz_pictures, tables=fuzz_tables, lists=fuzz_lists, mat=fuzz_mat)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:::PIL")    # pytest sets filters of its own
@pytest.mark.parametrize("n", [250, 2500])
@pytest.mark.parametrize("reader", FUZZ)
def test_damaged_inputs_are_read_or_refused_in_a_sentence(reader, n, request, tmp_path, capfd):
    if n > 1000 and not request.config.getoption("--slow"): pytest.skip("minutes: run with --slow")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = Counter(FUZZ[reader](n, tmp_path, random.Random(n)))
    assert ended.total() == n and ended["sentence"] > n/10
    if sys.platform == "linux": assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e6
    with capfd.disabled(): print(f"\n{reader}: {dict(ended)}, traces 0")
