"""Nothing lost: runs killed at every stage of every write, stopped, short of room, damaged, or led to numbers that are none go on to the last bit."""
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from test_command import write_domain
from test_fuzz import write_set

HERE = Path(__file__).parent
WORDS = "--preset demo --set height=32 --set width=16 --set batch_size=16 --set k1=6 --set k2=2 --set label_start=1 --set evaluate_every=6 --set save_every=4 --set label_history=True --on-collapse continue".split()


class Jobs:
    "Commands in forks of one process; see kill_driver.py"
    def __init__(self, folder):
        self.folder, self.n = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
        self.process = subprocess.Popen([sys.executable, str(HERE/"kill_driver.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE)
        assert json.loads(self.process.stdout.readline()) == "ready"

    def ask(self, job):
        self.process.stdin.write(json.dumps(job) + "\n"); self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def begin(self, *words, command="hcd_nb.command:main", cwd=None, **more): # → number of the process, files of what it says
        self.n += 1
        files = {k: str(self.folder/f"{self.n}.{k}") for k in ("out", "err")}
        return self.ask(dict(command=command, words=list(map(str, words)), cwd=str(cwd or self.folder), **files, **{k: str(v) if isinstance(v, Path) else v for k, v in more.items()})), files

    def end(self, number, files): # → exit status (below 0: the signal that ended it), what it printed, what it complained of
        return (self.ask(dict(wait=number)), *(Path(files[k]).read_text() for k in ("out", "err")))

    def run(self, *words, **more): return self.end(*self.begin(*words, **more))


class Place:
    "Where the tests of this file work: pictures, a run that nothing happened to, and the process that runs others"
    def __init__(self, folder):
        self.folder = folder
        write_set(folder/"target")
        write_domain(folder/"source", 1)
        (folder/"said").mkdir()
        self.jobs = Jobs(folder/"said")
        self.words = [*WORDS, "--target", str(folder/"target"), "--iterations", "12"]
        self.moments = None

    def whole(self, words=()):
        "The unbroken run, and what happened to its files"
        name = self.folder/("whole-" + "".join(c for c in " ".join(map(str, words)) if c.isalnum())[-40:])
        if not name.exists():
            began = time.time()
            status, out, err = self.jobs.run(*self.words, *words, "--out", name, folder=name, log=name.with_suffix(".log"))
            assert status == 0, err
            self.seconds = time.time() - began
        return name

    def stages(self):
        return [json.loads(l) for l in self.whole().with_suffix(".log").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("kills"))
    yield place
    place.jobs.process.stdin.close()
    place.jobs.process.wait()


def tensors(file):
    with safe_open(file, "pt") as f: return {k: f.get_tensor(k) for k in f.keys()}


def without_times(x):
    "A record without what no two runs share, and what was said of a damaged checkpoint"
    return {k: [n for n in v if "checkpoint" not in n] if k == "notes" else v for k, v in x.items() if k not in ("seconds", "date", "command", "commit")}


def same_run(a, b):
    "Two runs are equal to the last bit: encoder, labels, their history, scores, record"
    for name in ("encoder.safetensors", "label_bank.safetensors"):
        one, two = tensors(a/name), tensors(b/name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    for name, read in (("history.parquet", pd.read_parquet), ("label_history.parquet", pd.read_parquet), ("pseudo_identities.csv", pd.read_csv), ("evaluations.csv", pd.read_csv)):
        assert (a/name).exists() == (b/name).exists(), name
        if (a/name).exists(): pd.testing.assert_frame_equal(*(read(x/name).drop(columns="seconds", errors="ignore") for x in (a, b)), check_exact=True, check_dtype=False, obj=name)
    one, two = (without_times(json.loads((x/"record.json").read_text())) for x in (a, b))
    assert one == two
    assert not [p.name for p in b.iterdir() if "part" in p.name], "what was half written is left"


def nothing_half(run):
    "Every file that has its name is whole"
    for file in run.iterdir() if run.exists() else ():
        if file.name == ".lock" or "part" in file.name or file.is_dir(): continue
        if file.suffix == ".safetensors": assert tensors(file)
        elif file.suffix == ".json": json.loads(file.read_text())
        elif file.suffix == ".parquet": assert len(pd.read_parquet(file))
        elif file.suffix == ".csv": assert len(pd.read_csv(file)) and file.read_bytes().endswith(b"\n")


def gone_on(place, run, words=()):
    "A run that ended early goes on, or begins again where nothing was saved yet, as a user would"
    begun = [f for f in run.glob("checkpoint*.safetensors")] if run.exists() else []
    status, out, err = place.jobs.run("--resume", run) if begun else place.jobs.run(*place.words, *words, "--out", run)
    assert status == 0, err
    same_run(place.whole(words), run)
    return out + err


def killed_at(place, run, k):
    status, out, err = place.jobs.run(*place.words, "--out", run, folder=run, at=k)
    assert status == -signal.SIGKILL, f"moment {k}: exit status {status}: {err}"
    nothing_half(run)
    gone_on(place, run)


def plain(name):
    "The name that a file has when it is written"
    while name.startswith(".part-"): name = name.removeprefix(".part-")
    return name


def chosen(stages):
    "The stages of a write, as numbers of moments: all of the first, the second and the last checkpoint, of the encoder and the record, and half of those of the other files"
    saves, others = [[]], collections.defaultdict(list)
    for k, (what, name) in enumerate(stages, 1):
        if "checkpoint" in name:
            saves[-1].append(k)
            if [what, name] == ["after replace", "checkpoint.safetensors"]: saves.append([])
        else: others[plain(name)].append(k)
    saves = [s for s in saves if s]
    picked = [k for s in saves[:2] + saves[-1:] for k in s]
    for name, found in others.items(): picked += found[::1 if "encoder" in name or "record" in name else 2]
    return sorted(set(picked))


@pytest.mark.timeout(300)
def test_the_stages_of_a_write_are_seen(place):
    """Else the kills below would miss them."""
    stages = place.stages()
    for name in ("checkpoint.safetensors", "encoder.safetensors", "record.json", "pseudo_identities.csv", "history.parquet", "label_bank.safetensors"):
        seen = {what for what, n in stages if plain(n) == name}
        assert {"half written", "before sync", "after sync", "before replace", "after replace"} <= seen, (name, seen)
    assert ["after sync", "."] in stages, "the folder is not brought to the disk after a rename"
    assert len(chosen(stages)) >= 28


FEW = [("half written", "checkpoint.safetensors", 1), ("after replace", "checkpoint.safetensors", 1), ("half written", "encoder.safetensors", 0), ("before replace", "record.json", 0)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what, name, n", FEW, ids=[f"{what} {name}" for what, name, _ in FEW])
def test_a_run_killed_in_a_write_goes_on(place, tmp_path, what, name, n):
    k = [k for k, (w, f) in enumerate(place.stages(), 1) if w == what and (f == name or w != "after replace" and plain(f) == name)][n]
    killed_at(place, tmp_path/"run", k)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_at_every_stage_of_a_write_go_on(place, tmp_path, capsys):
    stages, kills = place.stages(), 0
    for k in chosen(stages):
        killed_at(place, tmp_path/f"run-{k}", k)
        shutil.rmtree(tmp_path/f"run-{k}")
        kills += 1
    with capsys.disabled(): print(f"\n{kills} kills at stages of {len({n for _, n in stages})} files, all resumed to the last bit")
    assert kills >= 28


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("with_source", [False, True], ids=["algorithm3", "algorithm2"])
def test_runs_killed_at_random_moments_go_on(place, tmp_path, with_source, capsys):
    words = ["--source", place.folder/"source", "--pretrain", 6] if with_source else []
    r, kills, place.seconds = random.Random(with_source), 0, 0
    shutil.rmtree(place.whole(words)); place.whole(words)    # for its time
    seconds = place.seconds
    while kills < 8:
        run = tmp_path/f"run-{kills}"
        number, files = place.jobs.begin(*place.words, *words, "--out", run)
        time.sleep(r.uniform(.1, 1)*seconds)
        os.kill(number, signal.SIGKILL)
        if place.jobs.end(number, files)[0] == -signal.SIGKILL:
            nothing_half(run)
            gone_on(place, run, words)
            kills += 1
        shutil.rmtree(run, ignore_errors=True)
    with capsys.disabled(): print(f"\n{kills} kills at random moments, all resumed to the last bit")


# ---- stopped

def stopped(place, run, number, at=None):
    "A run that a signal reaches, once it has saved, or at a moment of its writes"
    if at is not None: status, out, err = place.jobs.run(*place.words, "--out", run, folder=run, at=at, number=int(number))
    else:
        process, files = place.jobs.begin(*place.words, "--out", run)
        while not (run/"checkpoint.safetensors").exists(): time.sleep(.01)
        os.kill(process, number)
        status, out, err = place.jobs.end(process, files)
    if status == 0: return same_run(place.whole(), run)    # it came in the last writes
    assert status == 130 or status == -signal.SIGTERM and at is not None, (status, out, err)    # TERM ends what is not training at once
    assert "Traceback" not in err, err
    gone_on(place, run)


@pytest.mark.timeout(300)
def test_a_run_that_is_told_to_end_is_saved(place, tmp_path): stopped(place, tmp_path/"run", signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_runs_that_are_told_to_end_within_a_write_are_saved(place, tmp_path, number):
    for k in chosen(place.stages())[1::7]: stopped(place, tmp_path/f"run-{k}", number, k)


def sentence(err):
    "What was complained of, besides the progress bar: one line"
    lines = [l for l in err.splitlines() if l.strip() and not re.search(r"\d+/\d+ \[", l)] # the bar counts it/s, and s/it while it is slow
    assert len(lines) == 1, err
    return lines[0]


# ---- no room

def full(status, err, *names):
    assert status == 2 and "cannot be written" in sentence(err) and any(n in err for n in names), (status, err)


@pytest.mark.timeout(300)
def test_a_checkpoint_that_finds_no_room_leaves_what_was_there(place, tmp_path):
    """No file above 8 MB, as on a full disk: the checkpoint is larger, the encoder is not."""
    status, out, err = place.jobs.run(*place.words, "--out", tmp_path/"run", file_size=8*2**20)
    full(status, err, "checkpoint.safetensors")
    nothing_half(tmp_path/"run")
    gone_on(place, tmp_path/"run")


@pytest.fixture
def disk(tmp_path):
    "A small disk: a function that makes it, or makes it larger"
    where = tmp_path/"disk"
    where.mkdir()
    mounted = []
    def of(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{'remount,' if mounted else ''}size={size}", "tmpfs", str(where)], capture_output=True, text=True)
        if done.returncode: pytest.skip("small disks can be mounted by root alone")
        mounted.append(1)
        return where
    yield of
    if mounted: subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("megabytes", [1, 8, 16, 20, 28, 32, 36, 46])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(place, disk, megabytes):
    run = disk(f"{megabytes}m")/"run"
    status, out, err = place.jobs.run(*place.words, "--out", run)
    if status == 0: return same_run(place.whole(), run)
    full(status, err, "safetensors", "parquet", "csv", "json", "png")
    nothing_half(run)
    disk("200m")
    gone_on(place, run)


OTHERS = {"hcd_doctor": ("hcd_nb.doctor:main", lambda p, d: [p.folder/"target", "--out", d/"report"]), "hcd_embed": ("hcd_nb.search:main_embed", lambda p, d: [p.whole(), p.folder/"target", "--out", d/"f.parquet"]),
          "hcd_embed, as .npy": ("hcd_nb.search:main_embed", lambda p, d: [p.whole(), p.folder/"target", "--out", d/"f.npy"]), "hcd_export": ("hcd_nb.export:main", lambda p, d: [p.whole(), "--format", "safetensors", "--out", d/"w.safetensors"]),
          "hcd_search": ("hcd_nb.search:main_search", lambda p, d: [p.whole(), next((p.folder/"target"/"query").iterdir()), p.folder/"target", "--out", d/"m.png"]), "hcd_tables": ("hcd_nb.tables:main", lambda p, d: ["--table", "1", "--runs", p.folder/"none", "--out", d/"tables"])}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", OTHERS)
def test_commands_on_a_full_disk_write_whole_files_or_none(place, disk, name):
    where, (command, words) = disk("8k"), OTHERS[name]
    place.whole()
    status, out, err = place.jobs.run(*words(place, where), command=command)
    left = [p for p in where.rglob("*") if p.is_file() and p.name != ".lock"]
    assert status == 2 and str(where) in sentence(err), (status, err)
    disk("200m")
    shutil.copytree(where, where/"kept")
    status, out, err = place.jobs.run(*words(place, where), command=command)
    assert status in (0, 1), err
    for p in left: assert (where/"kept"/p.relative_to(where)).stat().st_size == p.stat().st_size, f"{p.name} was half written"


# ---- damaged

def checkpoints(run): return sorted(p for p in run.rglob("*checkpoint*.safetensors") if "part" not in p.name)


def damaged(file, r, how):
    "One bit, or 4 KiB, of the tensors of a file, not of its header"
    b = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(b[:8], "little")
    at = r.randrange(start, len(b) - (4096 if how == "4 KiB" else 1))
    if how == "bit": b[at] ^= 1 << r.randrange(8)
    else: b[at:at + 4096] = r.randbytes(4096)
    file.unlink()
    file.write_bytes(bytes(b))


def half_way(place):
    "A run that was stopped after its second checkpoint"
    run = place.folder/"half"
    if not run.exists():
        status, out, err = place.jobs.run(*place.words, "--out", run, folder=run, at=1 + next(k for k, (w, n) in enumerate(place.stages(), 1) if w == "after replace" and n == "checkpoint.safetensors" and sum(x == ["after replace", n] for x in place.stages()[:k]) == 2))
        assert status == -signal.SIGKILL, err
    return run


def damage(place, run, k, how):
    r = random.Random(f"{how} {k}")
    shutil.copytree(half_way(place), run)
    damaged(run/"checkpoint.safetensors", r, how)
    others = [c for c in checkpoints(run) if c != run/"checkpoint.safetensors"]
    assert others, "the previous checkpoint is not kept"
    status, out, err = place.jobs.run("--resume", run)
    assert status == 0 and "checkpoint" in out + err and "damaged" in out + err, (status, out, err)
    same_run(place.whole(), run)
    shutil.rmtree(run)
    shutil.copytree(half_way(place), run)
    for c in checkpoints(run): damaged(c, r, how)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"}
    status, out, err = place.jobs.run("--resume", run)
    assert status == 2 and "damaged" in sentence(err) and "checkpoint" in err, (status, out, err)
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"}, "a refused run was changed"
    shutil.rmtree(run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how, k", [("bit", 0), ("4 KiB", 1), ("bit", 2)])
def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(place, tmp_path, how, k): damage(place, tmp_path/"run", k, how)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["bit", "4 KiB"])
def test_damage_is_told_wherever_it_lies(place, tmp_path, how):
    for k in range(9): damage(place, tmp_path/"run", k, how)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["encoder.safetensors", "label_bank.safetensors"])
def test_damage_of_what_a_run_wrote_is_told(place, tmp_path, name):
    from hcd_nb.encoder import load_encoder
    from hcd_nb.files import read_tensors
    for how in ("bit", "4 KiB"):
        if how == "4 KiB" and name.startswith("label"): continue    # it is smaller
        shutil.copy(place.whole()/name, tmp_path/name)
        damaged(tmp_path/name, random.Random(how), how)
        with pytest.raises(ValueError, match="damaged"): (load_encoder if name.startswith("encoder") else read_tensors)(tmp_path/name)


# ---- two at once

def held(place, tmp_path, *words):
    "A run that is held while it reads its pictures; what lets it go on"
    reached, until = tmp_path/"reached", tmp_path/"until"
    process, files = place.jobs.begin(*words, hold=["0102_c2s1_000000_00.jpg", str(reached), str(until)])
    while not reached.exists(): time.sleep(.02)
    def let_go():
        until.touch()
        return place.jobs.end(process, files)
    return let_go


@pytest.mark.timeout(300)
def test_a_second_run_into_a_folder_is_refused_while_the_first_still_reads(place, tmp_path):
    run = tmp_path/"run"
    let_go = held(place, tmp_path, *place.words, "--out", run)
    try: status, out, err = place.jobs.run(*place.words, "--out", run)
    finally: first = let_go()
    assert status == 2 and "Another run is writing into" in sentence(err), (status, out, err)
    assert first[0] == 0, first
    same_run(place.whole(), run)


@pytest.mark.timeout(300)
def test_a_second_run_that_goes_on_is_refused_while_the_first_still_reads(place, tmp_path):
    run = tmp_path/"run"
    shutil.copytree(half_way(place), run)
    let_go = held(place, tmp_path, "--resume", run)
    try: status, out, err = place.jobs.run("--resume", run)
    finally: first = let_go()
    assert status == 2 and "Another run is writing into" in err, (status, out, err)
    assert first[0] == 0, first
    same_run(place.whole(), run)


# ---- numbers that are none

def ruined(place, run, iteration, what):
    status, out, err = place.jobs.run(*place.words, "--set", "save_every=2", "--out", run, ruin=[iteration, what])
    assert status == 2, (status, out, err)
    assert any(w in sentence(err) for w in ("NaN", "finite", "no number")) and ".jpg" in err, f"neither the fault nor the pictures of the batch are named: {err}"
    for c in checkpoints(run): assert all(t.isfinite().all() for k, t in tensors(c).items() if t.is_floating_point() and "history" not in k), f"{c.name} is not finite"
    gone_on(place, run, ["--set", "save_every=2"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("iteration, what", [(5, "loss"), (7, "gradient")])
def test_a_loss_that_is_no_number_leaves_the_good_checkpoint(place, tmp_path, iteration, what): ruined(place, tmp_path/"run", iteration, what)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_losses_that_are_no_numbers_leave_the_good_checkpoint_wherever_they_come(place, tmp_path, what):
    for iteration in range(12): ruined(place, tmp_path/f"run-{iteration}", iteration, what)


# ---- open files and memory

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_open_files_and_memory_stay(place, tmp_path):
    code = f"""
import os, json
from pathlib import Path
from hcd_nb.command import configure, parser
from hcd_nb.training import HCD, train
words = {[*place.words[:-1], "2000", "--set", "save_every=250", "--set", "evaluate_every=500", "--set", "label_history=False"]!r}
seen = []
class Watched(HCD):
    def update(self, t, batch):
        row = super().update(t, batch)
        if t.iteration % 100 == 0: seen.append((t.iteration, len(os.listdir("/proc/self/fd")), int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])))
        return row
train(configure(parser().parse_args(words)), {str(tmp_path/"run")!r}, progress=False, method=Watched)
print(json.dumps(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)})
    assert done.returncode == 0, done.stderr
    seen = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]), columns=["iteration", "files", "kilobytes"]).set_index("iteration")
    settled = seen.loc[500:]
    assert settled["files"].max() <= settled["files"].iloc[0] + 2, settled
    growth = (settled["kilobytes"].iloc[-3:].mean() - settled["kilobytes"].iloc[:3].mean())/(len(settled) - 3)/100
    assert growth < 10, f"{growth:.1f} kB more in each iteration:\n{settled}"
