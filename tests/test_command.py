"""hcd_train as a user meets it: a whole run, Ctrl-C and --resume, own folders, and every refusal in one sentence."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_package import python_each

TINY = "--preset demo --set height=32 --set width=16 --set batch_size=32 --set k1=6 --set k2=2 --set label_start=4 --set evaluate_every=8 --set save_every=5".split()
PIECES = ("encoder.safetensors", "label_bank.safetensors")


def person(identity, camera, shot):
    """A figure of two colours, tinted by its camera: enough for a clustering to find something."""
    g = torch.Generator().manual_seed(identity)
    top, bottom = (tuple(torch.randint(30, 226, (3,), generator=g).tolist()) for _ in range(2))
    image = Image.new("RGB", (32, 64), (90 + 20*camera, 110, 130 - 15*camera))
    draw = ImageDraw.Draw(image)
    draw.rectangle((8 + shot, 12, 24 + shot, 34), fill=top)
    draw.rectangle((10 + shot, 34, 22 + shot, 60), fill=bottom)
    draw.ellipse((12 + shot, 2, 20 + shot, 12), fill=(200, 160, 130))
    return image


def write_domain(folder, first, identities=24):
    """A set in Market-1501's layout: half of the identities to train on, half to test on."""
    for part in ("bounding_box_train", "query", "bounding_box_test"): (folder/part).mkdir(parents=True)
    for k in range(identities):
        for camera in (1, 2, 3):
            for shot in (0, 1):
                part = "bounding_box_train" if k < identities*2//3 else "query" if shot == 0 else "bounding_box_test"
                person(first + k, camera, shot).save(folder/part/f"{first + k:04d}_c{camera}s1_{shot:06d}_00.jpg")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_domain(folder/"source", 1)
    write_domain(folder/"target", 101)
    return folder


def hcd_train(*words, wait=True):
    command = [sys.executable, "-c", "import sys; from hcd_nb.command import main; sys.exit(main())", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return finished(process) if wait else process


def finished(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def same_results(a, b):
    for piece in PIECES:
        left, right = load_file(a/piece), load_file(b/piece)
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left), piece


@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", [True, False], ids=["algorithm2", "algorithm3"])
def test_stopped_and_resumed_run_equals_an_unbroken_one(world, tmp_path, source):
    words = [*TINY, "--target", world/"target", "--iterations", 40, "--pretrain", 10, *(["--source", world/"source"] if source else [])]
    code, out, err = hcd_train(*words, "--out", tmp_path/"whole")
    assert code == 0, err
    assert "after" in out and (tmp_path/"whole"/"curves.png").exists() and (tmp_path/"whole"/"tree.png").exists()

    process = hcd_train(*words, "--out", tmp_path/"broken", wait=False)
    while not (tmp_path/"broken"/"checkpoint.safetensors").exists() and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    code, out, err = finished(process)
    assert code == 130 and "To go on: hcd_train --resume" in out, out + err
    code, out, err = hcd_train("--resume", tmp_path/"broken")
    assert code == 0, err
    same_results(tmp_path/"whole", tmp_path/"broken")
    history = pd.read_parquet(tmp_path/"broken"/"history.parquet")
    assert history["iteration"].tolist() == list(range(len(history)))


@pytest.mark.timeout(900)
def test_killed_run_loses_at_most_the_last_checkpoint_interval(world, tmp_path):
    words = [*TINY, "--target", world/"target", "--iterations", 40]
    process = hcd_train(*words, "--out", tmp_path/"killed", wait=False)
    while not (tmp_path/"killed"/"checkpoint.safetensors").exists() and process.poll() is None: time.sleep(.05)
    process.kill()
    finished(process)
    assert hcd_train("--resume", tmp_path/"killed")[0] == 0
    assert hcd_train(*words, "--out", tmp_path/"whole")[0] == 0
    same_results(tmp_path/"killed", tmp_path/"whole")


@pytest.mark.timeout(600)
def test_crops_without_identities_train_and_report_clusters(tmp_path):
    (tmp_path/"crops").mkdir()
    for k in range(20):
        for shot in range(4): person(k, k % 3, shot).save(tmp_path/"crops"/f"crop_{k*4 + shot:03d}.png")
    code, out, err = hcd_train(*TINY, "--target", tmp_path/"crops", "--iterations", 6, "--out", tmp_path/"run")
    assert code == 0, err
    assert "nothing to score" in out
    table = pd.read_csv(tmp_path/"run"/"pseudo_identities.csv")
    assert len(table) == 80 and {"path", "level_1", "level_2", "level_3"} <= set(table) and table["silhouette"].between(-1, 1).all()


@pytest.mark.timeout(600)
def test_one_unreadable_image_is_refused_by_name_and_can_be_skipped(world, tmp_path):
    write_domain(tmp_path/"set", 201)
    victim = next((tmp_path/"set"/"bounding_box_train").iterdir())
    victim.write_bytes(victim.read_bytes()[:200])
    words = [*TINY, "--target", tmp_path/"set", "--iterations", 2, "--out", tmp_path/"run"]
    code, out, err = hcd_train(*words)
    assert code == 2 and victim.name in err and "--skip-bad" in err and "Traceback" not in err, err
    code, out, err = hcd_train(*words, "--skip-bad")
    assert code == 0 and "1" in out, out + err


WRONG = [
    (["--target", "no/such/folder"], "no/such/folder"),
    ([], "--target"),
    (["--target", "pedestrians/target", "--preset", "papper"], "the presets are"),
    (["--target", "pedestrians/target", "--set", "sigmma=1"], "the settings are"),
    (["--target", "pedestrians/target", "--preset", "demo", "--encoder", "resnet51"], "resnet50"),
    (["--target", "pedestrians/target", "--preset", "demo", "--weights", "no/such/file.pth"], "no/such/file.pth"),
    (["--resume", "no/such/run"], "no/such/run"),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    words_of = lambda k, words: ["hcd_train", *words, *([] if "--resume" in words else ["--out", str(folder/f"run-{k}")])]
    return python_each({k: f"import sys; sys.argv = {words_of(k, words)!r}; from hcd_nb.command import main; sys.exit(main())" for k, (words, _) in enumerate(WRONG)}, folder)


@pytest.mark.timeout(900)    # all are asked before the first answer is read
@pytest.mark.parametrize("k,says", [(k, says) for k, (_, says) in enumerate(WRONG)])
def test_what_is_typed_wrong_is_one_sentence(k, says, refused):
    code, out, err = refused[k]
    assert code == 2 and says in err, err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1, err


@pytest.fixture(scope="module")
def short_run(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("short")/"run"
    words = [*TINY, "--target", world/"target", "--iterations", 1, "--out", run]
    assert hcd_train(*words)[0] == 0
    return run, words


def test_a_run_is_never_overwritten(short_run):
    code, out, err = hcd_train(*short_run[1])
    assert code == 2 and "--resume" in err


def test_a_broken_checkpoint_is_one_sentence(short_run, tmp_path):
    shutil.copytree(short_run[0], tmp_path/"run")
    (tmp_path/"run"/"checkpoint.safetensors").write_bytes(b"not a checkpoint")
    code, out, err = hcd_train("--resume", tmp_path/"run")
    assert code == 2 and "checkpoint" in err and "Traceback" not in err


@pytest.mark.timeout(600)
def test_labels_that_run_away_stop_the_run_and_it_can_go_on(world, tmp_path):
    """The paper's form on an encoder that knows nothing: all rows are alike, and one cluster swallows the bank."""
    words = [*TINY, "--target", world/"target", "--weights", "none", "--iterations", 130, "--pretrain", 0, "--set", "dynamics=paper", "--set", "epoch=0", "--set", "label_start=0", "--set", "evaluate_every=1000"]
    code, out, err = hcd_train(*words, "--out", tmp_path/"run")
    said = err.strip().splitlines()[-1]
    assert code == 2 and "one cluster held at least" in said and "--on-collapse continue" in said, err
    assert (tmp_path/"run"/"checkpoint.safetensors").exists()
    code, out, err = hcd_train("--resume", tmp_path/"run", "--on-collapse", "continue")
    assert code == 0 and "one cluster held" in out, err


@pytest.mark.timeout(600)
def test_another_encoder_in_small_groups_and_what_comes_after_training(world, tmp_path):
    run = tmp_path/"run"
    code, out, err = hcd_train(*TINY, "--source", world/"source", "--target", world/"target", "--pretrain", 4, "--iterations", 6, "--encoder", "mobilenet_v3_small",
                               "--bn-group", 8, "--on-collapse", "continue", "--out", run)
    assert code == 0, err
    from hcd_nb import export, search
    assert export.main([str(run)]) == 0 and (run/"encoder.onnx").exists()
    query, index = next((world/"target/query").iterdir()), tmp_path/"target.parquet"
    assert search.main_embed([str(run), str(world/"target"), "--out", str(index)]) == 0
    assert search.main_search([str(run), str(query), str(index), "--out", str(tmp_path/"found.png")]) == 0 and (tmp_path/"found.png").exists()
    code, out, err = hcd_train(*TINY, "--target", world/"target", "--bn-group", 12, "--out", tmp_path/"never")
    assert code == 2 and "groups of 12" in err and not (tmp_path/"never").exists()
