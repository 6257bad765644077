"""Every reader and loader on thousands of damaged files: taken, or refused in one sentence; never a stack trace, a hang, or more than 2 GB.

One case alone: `python tests/test_fuzz.py READER NUMBER` says what came of it and leaves the file in a folder that it names."""
import collections
import copy
import csv
import io
import json
import os
import random
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from mutate import NAMES, NASTY, Reader, changed_bytes, changed_csv, changed_header, changed_json_file, changed_lines, changed_metadata, closed, json_bytes, opened, outcome, place_of, serve

# How many cases of each reader in the fast form; the slow form has twelve times as many.
COUNTS = dict(pictures=250, large=5, doctor=8, folder=50, csv=90, msmt=50, cuhk=50, encoder=80, weights=80, checkpoint=50, checkpoint_header=40, journal=20, config=60, record=70, features=50, labels=40, label_bank=20,
              published=20, manifest=15, environment=15, search=3)
assert sum(COUNTS.values()) >= 1000


# ---- what is damaged: made once, by the first process that needs it

def person(k, camera, shot):
    from test_command import person
    return person(k, camera, shot)


def write_set(folder):
    "36 pictures to train on, of six people, and three people to test on, in Market-1501's layout"
    from test_command import write_domain
    write_domain(folder, 101, identities=9)


def small_run(target, out):
    "A run of four iterations that keeps everything which a run can keep"
    from hcd_nb.configs import make_config
    from hcd_nb.training import train
    config = make_config("demo", target=str(target), pretrain=0, iterations=4, height=32, width=16, batch_size=16, k1=6, k2=2, label_start=1, evaluate_every=100, save_every=2, label_history=True, on_collapse="continue")
    return train(config, out, progress=False)


def png(width, height, kind=2, depth=8, rows=b""):
    "A PNG of any header over any rows"
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def empty_rows(n, length):
    "Many rows of zeros, compressed"
    c = zlib.compressobj(1)
    return b"".join(c.compress(bytes(length)) for _ in range(n)) + c.flush()


def write_pictures(folder):
    "One picture of each kind that is read"
    import numpy as np
    from PIL import Image
    folder.mkdir()
    rgb, grey = person(3, 1, 0), person(3, 1, 0).convert("L")
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010e] = "x"*100
    sixteen = Image.fromarray((np.asarray(grey).astype("uint16") << 8))
    for name, image, options in (("a.jpg", rgb, dict(exif=exif)), ("progressive.jpg", rgb, dict(progressive=True)), ("grey.jpg", grey, {}), ("cmyk.jpeg", rgb.convert("CMYK"), {}), ("a.png", rgb, {}), ("palette.png", rgb.convert("P"), dict(transparency=3)),
                                 ("alpha.png", rgb.convert("RGBA"), {}), ("one.png", rgb.convert("1"), {}), ("sixteen.png", sixteen, {}), ("a.bmp", rgb, {}), ("palette.bmp", rgb.convert("P"), {}), ("a.webp", rgb, {}), ("lossless.webp", rgb.convert("RGBA"), dict(lossless=True, exif=exif)),
                                 ("a.tif", rgb, {}), ("lzw.tif", rgb, dict(compression="tiff_lzw")), ("jpeg.tif", rgb, dict(compression="jpeg")), ("deflate.tiff", rgb, dict(compression="tiff_adobe_deflate")), ("fax.tif", rgb.convert("1"), dict(compression="group4")),
                                 ("sixteen.tif", sixteen, {}), ("float.tif", Image.fromarray(np.asarray(grey).astype("float32")), {}), ("int.tif", Image.fromarray(np.asarray(grey).astype("int32")), {}), ("lab.tif", rgb.convert("LAB"), {})):
        image.save(folder/name, **options)


def write_lists(folder):
    "A small MSMT17"
    for part in ("train", "test"):
        for k in range(12):
            (folder/part/f"{k:04d}").mkdir(parents=True)
            for c in (1, 2): person(k, c, 0).save(folder/part/f"{k:04d}"/f"{k:04d}_000_{c:02d}_0303morning_0000_0.jpg")
    line = lambda k, c: f"{k:04d}/{k:04d}_000_{c:02d}_0303morning_0000_0.jpg {k}\n"
    for name, kept in dict(train=[(k, c) for k in range(11) for c in (1, 2)], val=[(11, 1), (11, 2)], query=[(k, 1) for k in range(12)], gallery=[(k, 2) for k in range(12)]).items():
        (folder/f"list_{name}.txt").write_text("".join(line(*x) for x in kept))


def cuhk_fields():
    import numpy as np
    names = np.empty((36, 1), dtype=object)
    names[:, 0] = [f"{k//2:03d}_{k%2}.png" for k in range(36)]
    whole = lambda x: np.array(list(x), dtype="uint16")[:, None]
    return dict(filelist=names, labels=whole(k//2 + 1 for k in range(36)), camId=whole(k%2 + 1 for k in range(36)), train_idx=whole(range(1, 21)), query_idx=whole(range(21, 37, 2)), gallery_idx=whole(range(22, 37, 2)))


def write_cuhk(folder):
    "A small CUHK03 with its .mat file"
    from scipy.io import savemat
    (folder/"images_detected").mkdir(parents=True)
    for k in range(36): person(k//2, k%2, 0).save(folder/"images_detected"/f"{k//2:03d}_{k%2}.png")
    savemat(folder/"cuhk03_new_protocol_config_detected.mat", cuhk_fields())


def write_plain(folder):
    "The crops of 10 people, without folders, and a table of them"
    folder.mkdir()
    rows = [["path", "identity", "camera", "split"]]
    for k in range(10):
        for c in (1, 2, 3):
            person(k, c, 0).save(folder/f"{k:04d}_c{c}_0.jpg")
            rows.append([f"{k:04d}_c{c}_0.jpg", k + 1, c, "train" if k < 7 else "query" if c == 1 else "gallery"])
    with open(folder/"table.csv", "w", newline="") as f: csv.writer(f).writerows(rows)


def make(world):
    "All files, undamaged"
    import torch
    from hcd_nb.pedestrians import write_manifest
    from hcd_nb.search import embed_folder, save_features
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir(parents=True)
    write_set(world/"set"); write_pictures(world/"pictures"); write_lists(world/"MSMT17_V1"); write_cuhk(world/"cuhk03"); write_plain(world/"plain")
    run = small_run(world/"set", world/"run")
    torch.save(run.trainer.encoder.state_dict(), world/"weights.pth")
    torch.save(run.trainer.encoder.state_dict(), world/"old.pth", _use_new_zipfile_serialization=False)
    table, features, about, _ = embed_folder(world/"run", world/"plain")
    save_features(world/"features.parquet", table, features, dict(about, folder=str((world/"plain").absolute())))
    (world/"rendered").mkdir()
    import hashlib
    files = sorted((world/"plain").glob("*.jpg"))
    for f in files: shutil.copy(f, world/"rendered")
    write_manifest([dict(file=f.name, sha256=hashlib.sha256(f.read_bytes()).hexdigest(), identity=n) for n, f in enumerate(files)], world/"rendered")
    shutil.copy(Path(__file__).parents[1]/"data"/"published.csv", world)
    (world/"made").touch()


# ---- helpers of the readers

def linked(folder, to):
    "A copy of a folder that costs nothing: the same files under new names"
    shutil.copytree(folder, to, copy_function=os.link)
    return to


def put(file, content):
    "Give a file other bytes, without those that it shares them with"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return file


def flat(x, at=""):
    "A nested state as text by place"
    import torch
    if torch.is_tensor(x): return {at: f"{x.dtype}{tuple(x.shape)}{hash(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()) if x.numel() else 0}"}
    if isinstance(x, dict): return {k: v for n, y in x.items() for k, v in flat(y, f"{at}/{n}").items()}
    if isinstance(x, (list, tuple)): return {k: v for n, y in enumerate(x) for k, v in flat(y, f"{at}/{n}").items()}
    return {at: repr(x)}


class Changed(Exception):
    "What was read is not what was written, and nobody said so"


def same(read, kept, name):
    "Raise Changed where a file that carries a digest gives another content than was written"
    read, kept = flat(read), flat(kept)
    differ = [k for k in kept if read.get(k) != kept[k]] + [k for k in read if k not in kept]
    if differ: raise Changed(f"{name}: {len(differ)} of {len(kept)} values are not those that were written ({differ[0]}, for one)")


# ---- the readers: each damages one thing in a folder of its own, and reads it

class Readers:
    def __init__(self, world, scratch):
        self.world, self.scratch = Path(world), Path(scratch)
        if not (self.world/"made").exists(): make(self.world)
        self.kept = {}

    def once(self, name, make):
        if name not in self.kept: self.kept[name] = make()
        return self.kept[name]

    def content(self, name): return self.once(name, (self.world/name).read_bytes)

    def fresh(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return self.scratch

    # pictures

    def pictures(self, r):
        files = self.once("files", lambda: sorted((self.world/"pictures").iterdir()))
        file, here = r.choice(files), self.fresh()
        b = self.content(f"pictures/{file.name}")
        how = r.random()
        if how < .95: b = changed_bytes(b, r)
        else: b, file = self.content(f"pictures/{r.choice(files).name}"), here/r.choice(NAMES)
        return self.picture(put(here/file.name, b))

    def picture(self, place):
        def read():
            from hcd_nb.images import image_fault, read_image
            fault = image_fault(place)
            assert fault is None or isinstance(fault, str) and len(fault.splitlines()) == 1, fault
            assert read_image(place, (32, 16)).shape == (3, 32, 16)
            assert fault is None, f"{fault}, and yet it was read"
        return read

    def large(self, r):
        "Pictures that say they are large; some of them are"
        return self.picture(put(self.fresh()/r.choice(("a.png", "a.bmp", "a.tif")), self.large_content(r)))

    def large_content(self, r):
        side = r.choice((13_300, 12_000, 9_000, 20_000, 40_000, 2**31 - 1, 2**32 - 1))
        if side < 2**15 and r.random() < .4: return self.once(f"rows{side}", lambda: png(side, side, 0, 1, empty_rows(side, 1 + (side + 7)//8)))
        if side == 13_300 and r.random() < .5: return self.once("colours", lambda: png(side, side, 2, 8, empty_rows(side, 1 + 3*side)))
        if r.random() < .5: return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, side % 2**31, r.choice((1, -1))*(side % 2**31), 1, r.choice((1, 8, 24, 32)), r.choice((0, 1, 2)), 0, 1, 1, 0, 0) + bytes(64)
        return png(side, r.choice((1, side)), r.choice((0, 2, 3, 6)), 8, zlib.compress(bytes(1000)))

    # sets

    def odd_names(self, folder, r):
        "Some pictures of a set damaged, renamed, moved, or replaced by what is none"
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix == ".jpg")
        for _ in range(r.choice((1, 1, 2, 4))):
            file, how = r.choice(files), r.randrange(14)
            if not os.path.lexists(file) or not file.is_file(): continue
            if how < 2: put(file, changed_bytes(file.read_bytes(), r))
            elif how < 6: self.rename(file, file.parent/r.choice(NAMES))
            elif how == 6: self.rename(file, folder/r.choice(NAMES))
            elif how == 7: self.rename(file.parent, file.parent.with_name(r.choice(("cam1", "train", "日本", "$x$", "<b>", "a\nb", "-1", "0", "1_000", "é"*100)))) if file.parent != folder else None
            elif how == 8: file.unlink(); file.mkdir()
            elif how == 9: file.unlink(); file.symlink_to(r.choice((file.name, "nowhere", "/dev/null", "..", "/etc/passwd")))
            elif how == 10: put(file, b"")
            elif how == 11: os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/" + r.choice((b"\xff\xfe.jpg", b"0001_c1s1_\xe9.jpg")))
            elif how == 12: (folder/r.choice(("list_train.txt", "query", "images_detected", "cuhk-03.mat", ".hidden", "deep/"*40))).mkdir(parents=True, exist_ok=True)
            else: file.unlink()
        return folder

    def rename(self, a, b):
        try:
            if not os.path.lexists(b): os.rename(a, b)
        except OSError: pass

    def a_set(self, r):
        "A folder in one of the layouts, something in it damaged"
        here, kind = self.fresh()/"set", r.randrange(3)
        if kind == 0: linked(self.world/"set", here)
        elif kind == 1: linked(self.world/"plain", here)
        else:
            for f in sorted((self.world/"plain").glob("*.jpg")):
                (here/f.name[:4]).mkdir(parents=True, exist_ok=True)
                os.link(f, here/f.name[:4]/f.name)
        return self.odd_names(here, r)

    def folder(self, r):
        here, skip, labelled = self.a_set(r), r.random() < .5, r.random() < .2
        def read():
            from hcd_nb.data import read_domain
            read_domain(here, skip_bad=skip, labelled=labelled).table()
        return read

    def doctor(self, r):
        here = self.a_set(r)
        def read():
            from hcd_nb.doctor import examine, words
            found = examine(here)
            page, said = found.page(), json.loads(json.dumps(found.summary(), allow_nan=False))
            page.encode(), words(found).encode(), json.dumps(said).encode()
            assert "<script" not in page and "<!--" not in page, "names are markup in the page"
        return read

    def csv(self, r):
        here = linked(self.world/"plain", self.fresh()/"set")
        put(here/"table.csv", changed_csv(self.content("plain/table.csv"), r))
        skip, deep = r.random() < .5, r.random() < .1
        def read():
            from hcd_nb.data import read_domain
            from hcd_nb.doctor import examine
            examine(here/"table.csv").summary() if deep else read_domain(here/"table.csv", skip_bad=skip).table()
        return read

    def msmt(self, r):
        here = linked(self.world/"MSMT17_V1", self.fresh()/"MSMT17_V1")
        name = f"list_{r.choice(('train', 'val', 'query', 'gallery'))}.txt"
        if r.random() < .1: (here/name).unlink()
        elif r.random() < .1: shutil.rmtree(here/r.choice(("train", "test")))
        else: put(here/name, changed_lines(self.content(f"MSMT17_V1/{name}"), r))
        skip = r.random() < .5
        def read():
            from hcd_nb.data import read_domain
            read_domain(here, skip_bad=skip).table()
        return read

    def cuhk(self, r):
        here, name = linked(self.world/"cuhk03", self.fresh()/"cuhk03"), "cuhk03_new_protocol_config_detected.mat"
        put(here/name, changed_bytes(self.content(f"cuhk03/{name}"), r)) if r.random() < .5 else self.other_fields(here/name, r)
        skip = r.random() < .5
        def read():
            from hcd_nb.data import read_domain
            read_domain(here, skip_bad=skip).table()
        return read

    def other_fields(self, file, r):
        import numpy as np
        from scipy.io import savemat
        m = cuhk_fields()
        key = r.choice(sorted(m))
        values = [np.zeros((0, 0)), np.array([[np.nan]]), np.array([[-1.]]), np.array([[0]]), np.array([[10**6]]), np.array([[1e300]]), np.array([[1 + 2j]]), "text", np.array([["a", "b"]]), {"a": 1}, np.array([[1.5, 2.5]]), m["filelist"], m["labels"][:3], m["train_idx"].T, m["labels"]*0 - 1., np.full((36, 1), 70_000)]
        other = np.array(m["filelist"]); other[r.randrange(36), 0] = r.choice(("", "../../../etc/passwd", "x"*300, "a\nb", "日本.png", 3., np.zeros((0, 0)), np.array(["a", "b"], dtype=object)))
        if r.random() < .15: del m[key]
        elif r.random() < .3: m["filelist"] = other
        else: m[key] = r.choice(values)
        file.unlink()
        savemat(file, m)

    # encoders and weights

    def encoder(self, r):
        from hcd_nb.encoder import load_encoder
        b, forged, here = self.content("run/encoder.safetensors"), r.random() < .35, self.fresh()
        kept = self.once("state", lambda: dict(load_encoder(self.world/"run"/"encoder.safetensors").state_dict()))
        if forged: b = self.forged(b, r)
        else: b = r.choice((changed_bytes, changed_header, changed_metadata))(b, r)
        file = put(here/"encoder.safetensors", b)
        def read():
            from hcd_nb.encoder import described
            from hcd_nb.encoder import load_encoder
            described(file)
            encoder = load_encoder(file)
            if not forged: same(dict(encoder.state_dict(), size=tuple(encoder.image_size), name=encoder.name), dict(kept, size=(32, 16), name="resnet10s"), file.name)
        return read

    def forged(self, b, r):
        "Written by somebody with a purpose: other settings or tensors, and no digest, as older files are"
        if r.random() < .5: return changed_metadata(b, r, forge=("sha256",))
        header, tensors = opened(b)
        header["__metadata__"].pop("sha256", None)
        about = header["__metadata__"]
        if r.random() < .5 and "hcd_nb" in about:
            made = json.loads(about["hcd_nb"])
            made[r.choice(sorted(made))] = r.choice((*NASTY, "resnet50", "vit_b_16", "alexnet", "densenet121", "inception_v3", "timm/x", "os.system", 2, 9999, [9999, 9999], [9999, 1], [1, 1], [8, 8], [64, 64]))
            about["hcd_nb"] = json_bytes(made).decode()
            return closed(header, tensors)
        return changed_header(closed(header, tensors), r)

    def weights(self, r):
        from hcd_nb.encoder import build_encoder, load_weights, read_weights
        here, how = self.fresh(), r.random()
        if how < .25: file = put(here/"w.safetensors", r.choice((changed_bytes, changed_header))(self.content("run/encoder.safetensors"), r))
        elif how < .5: file = put(here/r.choice(("w.pth", "w.pt", "w.bin")), changed_bytes(self.content(r.choice(("weights.pth", "old.pth"))), r))
        else: file = self.other_state(here/"w.pth", r)
        encoder = self.once("fresh encoder", lambda: build_encoder("resnet10s", image_size=(32, 16)))
        def read():
            filled = copy.deepcopy(encoder)
            str(load_weights(filled, read_weights(file), file.name))
            assert all(t.isfinite().all() for t in filled.state_dict().values() if t.is_floating_point()), "weights without numbers were taken"
        return read

    def other_state(self, file, r):
        import torch
        state = dict(self.once("plain state", lambda: torch.load(self.world/"weights.pth", weights_only=True)))
        names = [k for k in state if k.endswith("weight")]
        for _ in range(r.choice((1, 1, 3))):
            k = r.choice([k for k in names if k in state] or [next(iter(state))])
            t = state[k]
            odd = [lambda: t.long() if torch.is_tensor(t) else 0, lambda: t*float("nan"), lambda: t/0, lambda: t.double()*1e300, lambda: t.to(torch.complex64), lambda: t.half(), lambda: t.to(torch.float8_e4m3fn), lambda: t > 0, lambda: t.flatten()[:1].to_sparse(), lambda: torch.zeros(1).expand(2**40), lambda: torch.zeros(1).expand(t.shape),
                   lambda: t.flatten(), lambda: torch.zeros(0), lambda: torch.empty(t.shape, device="meta"), lambda: torch.quantize_per_tensor(t.float(), .1, 0, torch.qint8), lambda: t.tolist(), lambda: None, lambda: "text", lambda: {"a": t}, lambda: torch.nn.Parameter(t.float())]
            how = r.random()
            try:
                if how < .65: state[k] = r.choice(odd)()
                elif how < .75: state[r.choice((3, 2.5, None, (1, 2), True, b"x", "", "x"*5000, "module." + k, "a.b.c"))] = state.pop(k)
                elif how < .8: state = r.choice(({"state_dict": state}, {"model": state}, {"state_dict": 3}, {"state_dict": {"model": state}}, {}, {"model": None, **state}, {3: state[k]}))
                else: del state[k]
            except (RuntimeError, NotImplementedError, AttributeError, TypeError): pass
            if k not in state or len(state) < 3: break
        if r.random() < .08: state = r.choice(([1, 2], [state], None, 3, "x", torch.zeros(3), (), {"state_dict": [state]}))
        torch.save(state, file, _use_new_zipfile_serialization=r.random() < .7)
        return file

    # runs

    def run_folder(self):
        "A run with what it needs to go on, and no earlier checkpoint"
        here = self.fresh()
        for f in sorted((self.world/"run").iterdir()):
            if not ("checkpoint" in f.name and f.name != "checkpoint.safetensors" or f.name == ".lock"): os.link(f, here/f.name)
        return here

    def run(self):
        "The run, read from where all cases lie, and its state"
        from hcd_nb.command import kept_settings
        from hcd_nb.configs import RunConfig
        from hcd_nb.training import Run
        here = self.run_folder()
        run = Run(RunConfig(**kept_settings(here)), here)
        run.load()
        return run, self.state_of(run)

    def state_of(self, run):
        return flat(dict(run.trainer.state_dict(), seconds=run.seconds, evaluations=run.evaluations, changes=list(getattr(run, "changes", [])), rows=run.trainer.history))

    def going_on(self, forged):
        "Take up the run that lies where all cases lie"
        run, kept = self.once("run", self.run)
        def read():
            run.load()
            if not forged: same(self.state_of(run), kept, "checkpoint.safetensors")
        return read

    def checkpoint(self, r):
        read, here = self.going_on(False), self.run_folder()
        put(here/"checkpoint.safetensors", r.choice((changed_bytes, changed_header))(self.content("run/checkpoint.safetensors"), r))
        return read

    def checkpoint_header(self, r):
        forged = r.random() < .8
        read, here = self.going_on(forged), self.run_folder()
        put(here/"checkpoint.safetensors", self.forged_checkpoint(r) if forged else changed_metadata(self.content("run/checkpoint.safetensors"), r))
        return read

    def forged_checkpoint(self, r):
        "Other settings and numbers under digests that are right, or under none, as in older files"
        from hcd_nb import files
        b = changed_metadata(self.content("run/checkpoint.safetensors"), r, ("sha256",))
        try: about = opened(b)[0].get("__metadata__")
        except RecursionError: return b    # nested too deeply to be forged
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()) or r.random() < .2: return b
        if "state_digest" in about: about["state_digest"] = files.tensors_digest({}, about.get("state", ""))
        place = self.scratch.with_name("forged.safetensors")
        try: files.write_tensors(self.once("tensors of the run", lambda: files.read_tensors(self.world/"run"/"checkpoint.safetensors")[0]), place, **{k: v for k, v in about.items() if k})
        except (ValueError, TypeError): return b
        return place.read_bytes()

    def journal(self, r):
        "What a checkpoint counts on in files beside it"
        read, here = self.going_on(False), self.run_folder()
        results = {"config.json", "encoder.safetensors", "evaluations.csv", "history.parquet", "label_bank.safetensors", "label_history.parquet", "pseudo_identities.csv", "record.json", "checkpoint.safetensors"}
        beside = sorted(f.name for f in here.iterdir() if f.name not in results and f.suffix != ".png")
        if beside: put(here/(name := r.choice(beside)), changed_bytes(self.content(f"run/{name}"), r))
        return read

    def older_checkpoint(self):
        "One without settings, as versions before kept them: config.json is then what counts"
        header, tensors = opened(self.content("run/checkpoint.safetensors"))
        header["__metadata__"].pop("sha256", None)
        state = json.loads(header["__metadata__"]["state"])
        state["more"].pop("settings", None)
        header["__metadata__"]["state"] = json.dumps(state)
        return closed(header, tensors)

    def config(self, r):
        here = self.fresh()/"runs"/"embedded"/"target-hcd-0"
        here.mkdir(parents=True)
        os.link(self.world/"run"/"encoder.safetensors", here/"encoder.safetensors")
        put(here/"config.json", changed_json_file(self.content("run/config.json"), r))
        if r.random() < .8: put(here/"checkpoint.safetensors", self.once("older", self.older_checkpoint))
        which = r.randrange(4)
        def read():
            from hcd_nb import command, export, results, situations, tables
            if which == 0: command.resumed(command.parser().parse_args(["--resume", str(here)]))
            elif which == 1: export.some_crops(here, (32, 16))
            elif which == 2: situations.config_of(here)
            else:
                world = results.embedded_world()
                tables.check_place(results.adapted_run(world, "target", 0, "hcd", method="hcd"), world, self.scratch/"runs")
        return read

    def record(self, r):
        here = self.fresh()/"runs"/"embedded"/"target-hcd-0"
        here.mkdir(parents=True)
        os.link(self.world/"run"/"encoder.safetensors", here/"encoder.safetensors")
        put(here/"record.json", changed_json_file(self.content("run/record.json"), r))
        def read():
            from hcd_nb import export, results, tables
            from hcd_nb.encoder import load_encoder
            export.description(self.once("encoder itself", lambda: load_encoder(self.world/"run"/"encoder.safetensors")), here)
            world = results.embedded_world()
            run = results.adapted_run(world, "target", 0, "hcd", method="hcd")
            records = results.find_records(world, self.scratch/"runs")
            record = records["target-hcd-0"]
            for stage in ("before", "after"): results.figures(record, stage)
            results.differences(record, world, run)
            tables.minutes_of(run, records)
            tables.compared(record, record)
            results.as_markdown(results.wide_table(results.long_table([results.Cell("HCD", "T", (run,))], world, records)))
        return read

    def features(self, r):
        here, how = self.fresh(), r.random()
        file = here/"features.parquet"
        if how < .45: put(file, changed_bytes(self.content("features.parquet"), r))
        else: self.other_table(file, r)
        def read():
            from hcd_nb.search import load_features, made_of, picture_folder
            made_of(file)
            table, features = load_features(file, made_of(self.world/"features.parquet") if r.random() < .3 else None)
            assert len(table) == len(features) and features.isfinite().all()
            picture_folder(file, None)
        return read

    def other_table(self, file, r):
        import pyarrow as pa
        import pyarrow.parquet as pq
        whole = self.once("table", lambda: pq.read_table(self.world/"features.parquet"))
        n, how = len(whole), r.randrange(9)
        about = dict(whole.schema.metadata)
        column = r.choice(whole.column_names)
        odd = [pa.nulls(n), pa.array(["x"]*n), pa.array([1]*n), pa.array([float("nan")]*n), pa.array([[1.]]*n), pa.array([[1., 2.][:i%3] for i in range(n)]), pa.array([b"\xff"]*n), pa.array([{"a": 1}]*n), pa.array([True]*n), pa.array([2**63 - 1]*n), pa.array(["../../x", "=cmd", "a\nb"]*(n//3))[:n], pa.array(["x"]*n).dictionary_encode(),
               pa.FixedSizeListArray.from_arrays(pa.array([0.]*n*4, pa.float32()), 4), pa.FixedSizeListArray.from_arrays(pa.array([float("nan")]*n*4, pa.float32()), 4), pa.FixedSizeListArray.from_arrays(pa.array([2.]*n, pa.float32()), 1), pa.array([[]]*n)]
        if how < 4: about[b"hcd_nb"] = changed_json_file(about[b"hcd_nb"], r)
        elif how == 4: about = {r.choice((b"hcd_nb", b"pandas", b"ARROW:schema", b"")): r.choice((b"", b"{}", b"[]", b"x", b"null", b"\xff", b'{"digest":1}', b'{"digest": 1, "folder": 3}', b'{"digest": [], "folder": "/"}', b'{"digest": {}, "folder": "a\\u0000b"}'))}
        elif how == 5: about[b"pandas"] = r.choice((b"{}", b"[]", b"x", b'{"index_columns": [3]}', b'{"index_columns": ["path"], "columns": [], "column_indexes": []}', b'{"columns": [{"name": "path", "pandas_type": "datetimetz", "numpy_type": "x", "metadata": null, "field_name": "path"}], "index_columns": [], "column_indexes": []}'))
        elif how == 6: whole = whole.drop_columns(column)
        elif how == 7: whole = whole.slice(0, r.choice((0, 1))) if r.random() < .5 else whole.append_column(r.choice((column, "x")), pa.array(range(n)))
        else:
            new = r.choice(odd)
            whole = whole.set_column(whole.column_names.index(column), column, new if len(new) == n else pa.nulls(n))
        pq.write_table(whole.replace_schema_metadata(about), file, write_page_checksum=r.random() < .5)

    def labels(self, r):
        here = self.fresh()/"runs"/"embedded"/"x"
        here.mkdir(parents=True)
        names = ("pseudo_identities.csv", "label_history.parquet")
        for n in names: put(here/n, self.content(f"run/{n}"))
        name = r.choice(names)
        if name.endswith("csv"): put(here/name, changed_csv(self.content(f"run/{name}"), r))
        elif r.random() < .4: put(here/name, changed_bytes(self.content(f"run/{name}"), r))
        else: self.other_history(here/name, r)
        def read():
            from hcd_nb.data import read_domain
            from hcd_nb.hierarchy import labels_of, page_data, page_of
            labels = labels_of("x", runs=self.scratch/"runs")
            images = self.once("images", lambda: read_domain(self.world/"set").train)
            page = page_of([page_data("x", labels, images)])
            assert "<!--" not in page and "<script" not in page.split("<script>", 1)[1], "names are markup in the page"
        return read

    def other_history(self, file, r):
        import pandas as pd
        t = pd.read_parquet(self.world/"run"/"label_history.parquet")
        column, how = r.choice(list(t)), r.randrange(8)
        if how == 0: t = t.drop(columns=column)
        elif how == 1: t = t.rename(columns={column: "x"})
        elif how == 2: t[column] = r.choice(("x", 1.5, float("nan"), -1, 2**31 - 1, 10**6, b"\xff", None, True))
        elif how == 3: t[column] = t[column] + r.choice((.5, 10**6, -10**6))
        elif how == 4: t = t[:r.choice((0, 1, len(t)//2))]
        elif how == 5: t = t.sample(frac=1, random_state=r.randrange(2**31))
        elif how == 6: t = pd.concat([t, t])
        else: t = t.set_index(column)
        t.to_parquet(file)

    def label_bank(self, r):
        here, name = self.fresh(), "label_bank.safetensors"
        file = put(here/name, r.choice((changed_bytes, changed_header, changed_metadata) if b"sha256" in self.content(f"run/{name}") else (changed_bytes, changed_header))(self.content(f"run/{name}"), r))
        def read():
            from hcd_nb.files import read_tensors
            same(read_tensors(file)[0], self.once("labels", lambda: read_tensors(self.world/"run"/name)[0]), name)
        return read

    # the project's own

    def published(self, r):
        here = self.fresh()
        put(here/"published.csv", changed_csv(self.content("published.csv"), r))
        def read():
            from hcd_nb import results
            os.environ["HCD_NB_DATA"] = str(here)
            try:
                world = results.embedded_world()
                cells = results.s_table_1(world)
                results.as_latex(results.wide_table(results.long_table(cells, world, results.find_records(world, ""))))
            finally: del os.environ["HCD_NB_DATA"]
        return read

    def manifest(self, r):
        here = linked(self.world/"rendered", self.fresh()/"rendered")
        if r.random() < .8: put(here/"manifest.csv", changed_csv(self.content("rendered/manifest.csv"), r))
        else: self.odd_names(here, r)
        def read():
            from hcd_nb.pedestrians import report_check
            report_check(here)
        return read

    def environment(self, r):
        here = self.a_set(r)
        name = r.choice(("HCD_NB_DATA", "HCD_NB_DATA", "WORLD_SIZE", "RANK"))
        value = r.choice(("", "x", "-1", "0", "1.5", "1e9", "9"*30, "/dev/null", "/nowhere", "~", str(here), "$$", "日本"))
        def read():
            from hcd_nb.data import embedded_root, read_domain
            from hcd_nb.processes import started
            from hcd_nb.results import embedded_world, find_records, published
            before = dict(os.environ)
            os.environ[name] = value
            if name == "RANK": os.environ["WORLD_SIZE"] = r.choice(("x", "1", "", "1.0"))
            try:
                if name == "HCD_NB_DATA": r.choice((lambda: read_domain("pedestrians/target"), published, lambda: find_records(embedded_world(), "")))()
                else:
                    with started("cpu"): pass
            finally: os.environ.clear(); os.environ.update(before)
        return read

    def search(self, r):
        here = self.a_set(r)
        query = self.scratch/(r.choice([n for n in NAMES if n.endswith((".png", ".jpg")) and "/" not in n and len(n.encode()) < 255]))
        shutil.copy(self.world/"plain"/"0001_c1_0.jpg", query)
        out = self.scratch/r.choice(("matches.png", "$x$.png", "日本.png"))
        def read():
            import contextlib
            import warnings
            from hcd_nb.search import main_embed, main_search
            said = io.StringIO()
            with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("error")
                status = main_search([str(self.world/"run"), str(query), str(here), "--skip-bad", "--top", "3", "--out", str(out)])
                if not status: status = main_embed([str(self.world/"run"), str(here), "--skip-bad", "--out", str(self.scratch/"f.parquet")])
                if not status: status = main_search([str(self.world/"run"), str(query), str(self.scratch/"f.parquet"), "--top", "3", "--out", str(out)])
            if status: assert status == 2 and len(said.getvalue().strip().splitlines()) == 1, said.getvalue()
        return read


# ---- all of it

MODULES = ("pyarrow.parquet", "scipy.io", "hcd_nb.command", "hcd_nb.doctor", "hcd_nb.pedestrians", "hcd_nb.search", "hcd_nb.situations", "hcd_nb.tables", "hcd_nb.training")    # imported before the first case, whose time is then its own


def answering():
    "A function of reader and number: what came of the case"
    from importlib import import_module
    from tempfile import mkdtemp
    for module in MODULES: import_module(module)
    readers = Readers(os.environ["HCD_FUZZ_WORLD"], Path(mkdtemp(prefix="case-", dir=Path(os.environ["HCD_FUZZ_WORLD"]).parent))/"here")
    readers.once("run", readers.run)
    def answer(reader, number):
        try: read = getattr(readers, reader)(random.Random(f"{reader} {number}"))
        except Exception as e: return ["crash", type(e).__name__, f"the case cannot be made: {e}"[:300], place_of(e)]
        kind, name, said, place, _ = outcome(read)
        return ["unnoticed" if name == "Changed" else kind, name, said, place]
    return answer


def work():
    serve(answering)


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    if not Path("/proc/self/statm").exists(): pytest.skip("memory is watched by way of /proc")
    os.environ["HCD_FUZZ_WORLD"] = str(tmp_path_factory.mktemp("fuzz")/"world")
    reader = Reader("import test_fuzz; test_fuzz.work()")
    yield reader
    reader.end()


KINDS = ("accepted", "sentence", "trace", "unnoticed", "hang", "crash", "memory")


def carry_out(reader, cases):
    "Counts of what came of the cases, by reader, and what must not be, each kind once"
    counts, faults = collections.defaultdict(collections.Counter), {}
    for name, number in cases:
        kind, error, said, place = reader.ask(name, number)
        counts[name][kind] += 1
        if kind not in ("accepted", "sentence"): faults.setdefault((name, kind, error, place), []).append((number, said))
    return counts, faults


def table_of(counts):
    rows = [f"{'reader':18}{'cases':>8}" + "".join(f"{k:>11}" for k in KINDS)]
    whole = sum(counts.values(), collections.Counter())
    for name, c in [*counts.items(), ("all", whole)]: rows.append(f"{name:18}{c.total():8,}" + "".join(f"{c[k]:11,}" for k in KINDS))
    return "\n".join(rows)


def words_of(faults):
    return "\n".join(f"{len(found):4} × {name}: {kind} {error} at {place}: {found[0][1][:160]!r} (python tests/test_fuzz.py {name} {found[0][0]})" for (name, kind, error, place), found in sorted(faults.items(), key=lambda f: -len(f[1])))


def check(reader, times, capsys):
    cases = [(name, number) for name, n in COUNTS.items() for number in range(times[0]*n, times[1]*n)]
    counts, faults = carry_out(reader, cases)
    with capsys.disabled(): print(f"\n{table_of(counts)}", flush=True)
    assert not faults, f"{sum(map(len, faults.values()))} of {len(cases):,} cases are neither taken nor refused in one sentence:\n{words_of(faults)}"


@pytest.mark.timeout(600)
def test_a_thousand_damaged_files_are_taken_or_refused_in_a_sentence(reader, capsys):
    check(reader, (0, 1), capsys)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_damaged_files_are_taken_or_refused_in_a_sentence(reader, capsys):
    check(reader, (1, 12), capsys)


@pytest.mark.timeout(120)
def test_the_reading_process_is_watched(tmp_path):
    """What must not be is seen: an endless wait, an end without a word, and memory."""
    watched = Reader("""
import time, mutate
from hcd_nb.images import read_image
what = dict(fine=lambda: 1, hang=lambda: time.sleep(60), crash=lambda: mutate.os._exit(3), memory=lambda: bytearray(2**28).count(1), trace=lambda: {}["x"], sentence=lambda: read_image("nowhere"), foreign=lambda: int("x"))
mutate.serve(lambda: lambda k: mutate.outcome(what[k])[:4])""", limit=3, memory=2**27)
    assert {k: watched.ask(k)[0] for k in ("fine", "hang", "crash", "memory", "trace", "sentence", "foreign")} == dict(fine="accepted", hang="hang", crash="crash", memory="memory", trace="trace", sentence="sentence", foreign="trace")
    watched.end()


if __name__ == "__main__":
    os.environ.setdefault("HCD_FUZZ_WORLD", "/tmp/hcd-fuzz/world")
    answer = answering()
    for number in map(int, sys.argv[2:]): print(number, *answer(sys.argv[1], number), sep="\n  ")
