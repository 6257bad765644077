"""Nothing of a run is lost, nothing of another is taken: what a folder holds after damage, errors and second starts."""
import json
import os
import shutil
import stat
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pandas as pd
import pytest
import torch
from hcd_nb.checks import is_known
from hcd_nb.command import configure, main, parser
from hcd_nb.configs import settled
from hcd_nb.feature_bank import FeatureBank
from hcd_nb.files import Damaged, read_metadata, read_tensors, tensors_digest, write_tensors
from hcd_nb.training import CHECKPOINT, HCD, PREVIOUS, REMEDY, Run, held, newest, read_checkpoint, save_checkpoint, train
from safetensors.torch import load_file
from test_command import TINY, person, same_results, world  # noqa: F401 (world is a fixture)
from test_processes import torchrun


@pytest.fixture(scope="module")
def config(world):  # noqa: F811
    return configure(parser().parse_args([*TINY, "--target", str(world/"target"), "--source", str(world/"source"), "--iterations", "14", "--pretrain", "6"]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The unbroken run that others are held against."""
    out = tmp_path_factory.mktemp("whole")/"run"
    assert train(config, out, progress=False).done
    return out


def stopped(config, out, at=17):
    assert not train(config, out, progress=False, stop_at=at).done
    return out


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def refused(config, out, **more):
    with pytest.raises(ValueError) as e: train(config, out, progress=False, **more)
    return str(e.value)


# ---------------------------------------------------------------- damage

@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", ["a bit of a tensor", "a bit of the header", "gone", "cut"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_taken(config, whole, tmp_path, damage, capsys):
    out = stopped(config, tmp_path/"run")
    file = out/CHECKPOINT
    assert [read_checkpoint(f, whole=False)["iteration"] for f in (out/PREVIOUS, file)] == [15, 17]
    if damage == "gone": file.unlink()
    elif damage == "cut": os.truncate(file, file.stat().st_size//2)
    else: flip(file, 200 if "header" in damage else file.stat().st_size - 1000)
    assert main(["--resume", str(out)]) == 0 and "went on from iteration 15" in capsys.readouterr().out
    same_results(whole, out)
    assert any("went on from iteration 15" in note for note in json.loads((out/"record.json").read_text())["notes"])


def test_two_damaged_checkpoints_are_one_sentence(config, tmp_path, capsys):
    out = stopped(config, tmp_path/"run")
    for name in (CHECKPOINT, PREVIOUS): flip(out/name, (out/name).stat().st_size - 1000)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert "damaged" in said and REMEDY in said and len(said.splitlines()) == 1
    assert {name: (out/name).read_bytes() for name in before if name != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


def test_a_history_that_was_edited_is_noticed_and_may_be_given_up(config, whole, tmp_path):
    out = stopped(config, tmp_path/"run")
    rows = (out/"history.jsonl").read_text()
    (out/"history.jsonl").write_text(rows.replace('"iteration":0', '"iteration":9', 1))
    assert "history.jsonl is damaged" in refused(config, out, resume=True)
    (out/"history.jsonl").unlink()
    run = train(config, out, progress=False, resume=True)
    assert [row["iteration"] for row in run.trainer.history] == [17, 18, 19]
    assert any("history.jsonl is missing" in note for note in run.domain.notes)
    same_results(whole, out)


def test_what_a_killed_run_wrote_behind_the_history_counts_for_nothing(config, whole, tmp_path):
    out = stopped(config, tmp_path/"run")
    with open(out/"history.jsonl", "a") as f: f.write('{"iteration":17,"target_los')
    train(config, out, progress=False, resume=True)
    same_results(whole, out)
    drop = lambda folder: pd.read_parquet(folder/"history.parquet").drop(columns="seconds")
    pd.testing.assert_frame_equal(drop(out), drop(whole))


def forged(file, change, new):
    """A checkpoint whose digests are right and whose content is not."""
    tensors, about = read_tensors(file)
    tree = change(json.loads(about["state"]), tensors)
    text = json.dumps(tree)
    write_tensors(tensors, new, state=text, state_digest=tensors_digest({}, text))


ODD = (None, True, -1, 1e9, "text", [], [1], {}, {"tensor": "nowhere"}, {"a": {"b": 1}}, float("nan"))


def changed(tree, tensors, g):
    """One place of the state holds something else, or one tensor has another shape."""
    pick = lambda n: int(torch.randint(n, (), generator=g))
    if pick(4) == 0:
        name = sorted(tensors)[pick(len(tensors))]
        t = tensors[name]
        tensors[name] = [t.flatten(), t[..., None].contiguous(), t[:0] if t.ndim else t[None], t.double() if t.is_floating_point() else t.float(), t*0 - 1 if t.dtype == torch.int64 else t[None].contiguous()][pick(5)]
        return tree
    here = tree
    while True:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = keys[pick(len(keys))]
        below = here[key]
        if not isinstance(below, (dict, list)) or not below or pick(3) == 0: break
        here = below
    if pick(2) and isinstance(here, dict): del here[key]
    else: here[key] = ODD[pick(len(ODD))]
    return tree


@pytest.mark.timeout(600)
def test_forged_checkpoints_are_sentences(config, tmp_path):
    """What holds another state under a right digest is refused, or taken; a trace is neither."""
    out = stopped(config, tmp_path/"run", 9)
    (out/PREVIOUS).unlink()
    run, counts, g = Run(settled(config), out), {"accepted": 0, "sentences": 0}, torch.Generator().manual_seed(0)
    kept = (out/CHECKPOINT).rename(tmp_path/"kept")
    for _ in range(150):
        forged(kept, lambda tree, tensors: changed(tree, tensors, g), out/CHECKPOINT)
        try:
            run.load()
            counts["accepted"] += 1
        except ValueError as e:
            assert len(str(e)) < 600 and "\n" not in str(e)
            counts["sentences"] += 1
    assert counts["sentences"] > 50, counts


# ---------------------------------------------------------------- errors

class Spoiled(HCD):
    """Plain HCD with a loss, or a gradient, that is no number in one iteration; or with an error of its own."""
    at, what = 14, "loss"
    def loss(self, t, centres, classes):
        loss, features, batch = super().loss(t, centres, classes)
        if t.iteration != self.at: return loss, features, batch
        if self.what == "error": raise RuntimeError("a fault of my own")
        if self.what == "loss": return loss*torch.nan, features, batch
        return loss + (loss - loss).sqrt(), features, batch    # the slope of a root at 0 is infinite, and 0 times it is NaN


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["loss", "gradient", "error"])
def test_the_last_good_checkpoint_stands_after_an_error(config, whole, tmp_path, monkeypatch, capsys, what):
    """The iteration before a save: it would have been the one that is written."""
    monkeypatch.setattr(Spoiled, "what", what)
    out = tmp_path/"run"
    with pytest.raises(RuntimeError if what == "error" else ValueError) as e: train(config, out, progress=False, method=Spoiled)
    said = capsys.readouterr().err if what == "error" else str(e.value)
    assert "checkpoint of iteration 10 is kept" in said and "--resume" in said
    if what != "error": assert f"the {'target loss' if what == 'loss' else 'gradient'} of 01" in said and "01" in said and ".jpg" in said
    assert all(t.isfinite().all() for t in load_file(out/CHECKPOINT).values() if t.is_floating_point())
    monkeypatch.setattr(Spoiled, "at", -1)
    assert train(config, out, progress=False, resume=True, method=Spoiled).done
    same_results(whole, out)


@pytest.mark.timeout(600)
def test_nothing_is_saved_of_labels_that_moved_before_a_bad_gradient(config, tmp_path, monkeypatch):
    saved, moved, runs = [], [], []
    class Noted(Spoiled):
        what = "gradient"
        def relabel(self, t, batch):
            moved.append(t.iteration)
            return super().relabel(t, batch)
    monkeypatch.setattr("hcd_nb.training.save_checkpoint", lambda t, *args, **more: (saved.append(t.iteration), save_checkpoint(t, *args, **more)))
    with pytest.raises(ValueError, match="the gradient of .* so no step was made"): train(config, tmp_path/"run", progress=False, method=Noted, before=runs.append)
    t = runs[0].trainer
    assert saved == [5, 6, 10] and moved == list(range(6, 15)) and t.iteration == 14 and len(t.history) == 14
    assert read_checkpoint(tmp_path/"run"/CHECKPOINT, whole=False)["iteration"] == 10


# ---------------------------------------------------------------- the order of an iteration

@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", [True, False])
def test_labels_move_between_the_gradient_and_the_step(config, tmp_path, monkeypatch, source):
    """So that a GPU has something to do meanwhile: gradient, rows of the bank, labels, step, in every iteration."""
    notes = []
    class Noted(HCD):
        def relabel(self, t, batch):
            if t.since_start() >= 0: notes.append("labels")
            return super().relabel(t, batch)
        def update(self, t, batch):
            notes.append("update")
            return super().update(t, batch)
    def listen(run):
        for p in run.trainer.encoder.parameters():
            if p.requires_grad: p.register_post_accumulate_grad_hook(lambda p: notes.append("gradient"))
        run.trainer.optimiser.register_step_pre_hook(lambda *args: notes.append("step"))
    for name in ("update", "update_source"):
        def noted(*args, do=getattr(FeatureBank, name)): notes.append("bank"); return do(*args)
        monkeypatch.setattr(FeatureBank, name, noted)
    assert train(replace(config, source=config.source*source), tmp_path/"run", progress=False, method=Noted, before=listen).done
    learning, still, moving = (["gradient", "bank", *rest] for rest in (["step"], ["step", "update"], ["labels", "step", "update"]))
    pretrain = config.pretrain*source
    assert [name for name, _ in groupby(notes)] == learning*pretrain + still*config.label_start + moving*(config.iterations - config.label_start)


@pytest.mark.timeout(600)
def test_after_pretraining_without_clusters_another_radius_can_be_tried(config, tmp_path):
    blind = replace(config, eps=.02, min_samples=20, save_every=1000)
    said = refused(blind, tmp_path/"run")
    assert "finds no cluster" in said and "--set eps=" in said and read_checkpoint(tmp_path/"run"/CHECKPOINT, whole=False)["iteration"] == 6
    assert train(replace(blind, eps=config.eps, min_samples=config.min_samples), tmp_path/"run", progress=False, resume=True).done


def test_sixteen_pictures_are_told_what_would_work(tmp_path, capsys):
    (tmp_path/"crops").mkdir()
    for k in range(4):
        for shot in range(4): person(k, 1, shot).save(tmp_path/"crops"/f"crop_{k*4 + shot:03d}.png")
    words = f"--preset demo --set height=32 --set width=16 --set batch_size=8 --iterations 2 --set label_start=0 --target {tmp_path}/crops".split()
    main([*words, "--out", str(tmp_path/"run")])
    assert "--set k1=4 --set k2=2" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path/"small"), "--set", "k1=4", "--set", "k2=2"]) == 0
    assert "k1=4" not in capsys.readouterr().out


# ---------------------------------------------------------------- another method, another start, another folder

@pytest.mark.timeout(600)
def test_a_run_goes_on_with_its_own_method_alone(config, tmp_path, capsys):
    class Mine(HCD): pass
    out = tmp_path/"run"
    assert not train(config, out, progress=False, stop_at=8, method=Mine).done
    assert main(["--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert "Mine" in said and "resume=True, method=" in said and len(said.splitlines()) == 1
    train(config, out, progress=False, resume=True, method=Mine)
    assert json.loads((out/"record.json").read_text())["method"].endswith("Mine")


@pytest.mark.timeout(600)
def test_a_finished_run_stays_as_it_is_when_it_is_resumed(config, tmp_path, capsys):
    out = tmp_path/"run"
    assert main([*TINY, "--target", config.target, "--iterations", "4", "--out", str(out)]) == 0
    (out/"pseudo_identities.csv").write_text("path,identity\nmine.jpg,1\n")
    (out/"curves.png").write_bytes(b"mine")
    (out/"evaluations.csv").unlink()
    stay = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir() if p.name not in (".lock", "evaluations.csv") and "checkpoint" not in p.name}
    assert main(["--resume", str(out)]) == 0 and "had come to its end" in capsys.readouterr().out
    assert {name: ((out/name).read_bytes(), (out/name).stat().st_mtime_ns) for name in stay} == stay
    assert pd.read_csv(out/"evaluations.csv")["stage"].tolist() == ["before", "after"]


def test_a_folder_that_is_held_or_holds_a_run_is_refused_before_pictures_are_read(config, whole, tmp_path, capsys):
    nowhere = ["--preset", "demo", "--target", "no/such/set"]
    with held(tmp_path/"held"): assert main([*nowhere, "--out", str(tmp_path/"held")]) == 2
    assert "Another run is writing into" in capsys.readouterr().err
    assert main([*nowhere, "--out", str(whole)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert "holds a run already" in refused(config, whole)
    (tmp_path/"file").write_text("")
    for place in ("file", "file/run", "\0"):
        assert main([*nowhere, "--out", str(tmp_path/place)]) == 2
        said = capsys.readouterr().err
        assert "no/such/set:" not in said and len(said.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told_before_pictures_are_read(tmp_path, capsys):
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/".lock").write_text("")
    (tmp_path/"run").chmod(0o500)
    assert main(["--preset", "demo", "--target", "no/such/set", "--out", str(tmp_path/"run")]) == 2
    assert "cannot be written (permission denied)" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_what_the_first_process_is_refused_ends_all(world, tmp_path):  # noqa: F811
    (tmp_path/"go.py").write_text("import sys; from hcd_nb.command import main; sys.exit(main())")
    with held(tmp_path/"run"):
        status, out, err = torchrun(tmp_path/"go.py", *TINY, "--target", world/"target", "--out", tmp_path/"run")
    assert status != 0 and "Another run is writing into" in err and "another process of this run has ended" not in err


@pytest.mark.timeout(600)
def test_a_relative_target_is_found_from_another_folder(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(world)
    relative = configure(parser().parse_args([*TINY, "--target", "target", "--iterations", "6"]))
    out = stopped(relative, tmp_path/"run", 3)
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "run"]) == 0
    assert f"target is taken from {world}" in capsys.readouterr().out
    assert str(world) not in (out/"record.json").read_text() + (out/"config.json").read_text()
    assert pd.read_csv(out/"pseudo_identities.csv")["path"].str.startswith("bounding_box_train/").sum() == 96


@pytest.mark.timeout(600)
def test_one_byte_of_a_picture_is_noticed(world, tmp_path):  # noqa: F811
    shutil.copytree(world/"target", tmp_path/"set")
    mine = configure(parser().parse_args([*TINY, "--target", str(tmp_path/"set"), "--iterations", "6"]))
    out = stopped(mine, tmp_path/"run", 3)
    picture = sorted((tmp_path/"set"/"bounding_box_train").iterdir())[5]
    flip(picture, picture.stat().st_size - 30)
    assert "bytes or cameras differ" in refused(mine, out, resume=True)


# ---------------------------------------------------------------- what is written

def test_files_are_readable_as_the_umask_says(config, tmp_path):
    before = os.umask(0o027)
    try: train(replace(config, pretrain=2, iterations=2, label_history=True), tmp_path/"run", progress=False)
    finally: os.umask(before)
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (tmp_path/"run").iterdir() if p.name != ".lock"}
    assert set(modes.values()) == {"0o640"}, modes


def test_a_save_costs_the_same_however_long_the_run_is(config, whole, tmp_path):
    run = Run(settled(config), tmp_path/"run")
    run.trainer.start_banks()
    run.save()
    size = lambda: (run.out/CHECKPOINT).stat().st_size
    first, rows = size(), pd.read_parquet(whole/"history.parquet").to_dict("records")
    run.trainer.history = rows*5000    # 100,000 iterations
    run.changes = [torch.zeros(5000, 3, dtype=torch.int32)]*100
    run.save()
    assert abs(size() - first) < 200
    length = (run.out/"history.jsonl").stat().st_size
    run.trainer.history += rows
    run.save()
    added = (run.out/"history.jsonl").stat().st_size - length
    assert added == length/5000
    again = Run(settled(config), tmp_path/"run")
    again.load()
    assert len(again.trainer.history) == 100020 and len(again.changes[0]) == 500000


def test_a_row_for_every_picture(config, whole):
    table = pd.read_csv(whole/"pseudo_identities.csv")
    run = Run(settled(config), whole)
    d = run.domain
    assert [str(Path(config.target)/p) for p in table["path"]] == [p for s in (d.train, d.query, d.gallery) for p in s.paths]
    assert table["camera"].tolist() == [c for s in (d.train, d.query, d.gallery) for c in s.cameras.tolist()]
    trained = table[table["part"] == "train"]
    labels = load_file(whole/"label_bank.safetensors")["labels"]
    assert trained[[f"level_{h}" for h in (1, 2, 3)]].T.to_numpy().tolist() == labels.tolist() and (table["identity"] == table["level_3"]).all()
    assert set(trained["how"]) == {"trained"} and set(table[table["part"] != "train"]["how"]) == {"nearest"}
    sizes = trained["identity"].value_counts()
    assert (table["size"] == table["identity"].map(sizes)).all() and set(table["identity"]) == set(trained["identity"])


@pytest.mark.timeout(600)
def test_held_out_pictures_get_the_labels_of_the_nearest(config, whole):
    """Checked by hand: all cosines, without the camera's mean."""
    run = Run(settled(config), whole)
    run.load()
    t, table = run.trainer, pd.read_csv(whole/"pseudo_identities.csv")
    features = run.encode_test_sets()
    for part in ("query", "gallery"):
        f, cameras = features[part], getattr(run.domain, part).cameras
        means = {c: t.views.means[t.views.mean_of[t.target_cameras == c][0]] for c in cameras.unique().tolist()}
        rows = torch.nn.functional.normalize(torch.stack([x - means[c] for x, c in zip(f, cameras.tolist())]), dim=1)
        near = (rows @ t.label_rows.T).argmax(1)
        assert (table[table["part"] == part]["level_1"].to_numpy() == t.label_bank.labels[0][near].numpy()).mean() > .9


def test_an_oracle_gives_nobody_a_label_of_their_own(config, tmp_path):
    run = Run(settled(replace(config, method="oracle", pretrain=0)), tmp_path/"run")
    people = run.domain.train.identities
    people[:4] = torch.tensor([0, 0, -1, -1])
    run.start_target()
    top = run.trainer.label_bank.labels[-1]
    assert top[:4].unique().numel() == 4 and not torch.isin(top[:4], top[4:]).any()
    assert run.watch()["ari_3"] == 1 and is_known(people).sum() == len(people) - 4


def test_metadata_hold_no_more_than_the_state(whole):
    assert set(read_metadata(whole/CHECKPOINT)) == {"state", "state_digest", "sha256"}
    assert newest(whole)[1] == ""
    with pytest.raises(Damaged): read_checkpoint(whole/"encoder.safetensors")
