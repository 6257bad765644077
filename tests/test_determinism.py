"""The table of `12_processes`: what changes a run of one seed on one machine, and what does not."""
import hashlib
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_command import world  # noqa: F401 (a fixture)


GO = """
import os, random, sys, time
import torch
from hcd_nb import images
from hcd_nb.configs import make_config
from hcd_nb.processes import started
from hcd_nb.training import train

def late(f):
    def waits(*args, **kwargs):
        time.sleep(random.random()*.02)
        return f(*args, **kwargs)
    return waits

folder, method, *names = sys.argv[1:]
if os.environ.get("LATE"): images.read_image, images.ImageStore.__getitem__ = late(images.read_image), late(images.ImageStore.__getitem__)
words = dict(method=method, source=folder + "/source", target=folder + "/target", height=32, width=16, batch_size=32, k1=6, k2=2, pretrain=2, iterations=4, label_start=1,
             epoch=2, evaluate_every=99, save_every=3)
with started("cpu") as device:
    for name in names:
        torch.set_num_threads(2 if "threads" in os.path.basename(name) else 1)
        train(make_config("demo", **words), name, device, progress=False)
"""


def trained(world, names, method="hcd", processes=1, hash_seed=0, late=False):  # noqa: F811
    """Runs of these names, one after the other: on two threads where the name says so, else on one."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    script = names[0].parent/"go.py"
    script.write_text(GO)
    done = subprocess.run([sys.executable, *launch, str(script), str(world), method, *map(str, names)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": str(hash_seed), "LATE": "1" if late else ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return names


def contents(run):
    """Every number that a run leaves, but for the time it took."""
    history, files = pd.read_parquet(run/"history.parquet").drop(columns="seconds"), [f for f in ("encoder", "label_bank") if (run/f"{f}.safetensors").exists()]
    tensors = {f"{file}/{name}": t for file in files for name, t in load_file(run/f"{file}.safetensors").items()}
    return {**tensors, "history": torch.tensor(history.to_numpy("float64")), "scores": torch.tensor(pd.read_csv(run/"evaluations.csv").drop(columns="stage").to_numpy("float64"))}


def differing(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    return [name for name in a if a[name].shape != b[name].shape or not torch.equal(a[name].nan_to_num(-9), b[name].nan_to_num(-9))]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs")
    at = lambda *names: [folder/name for name in names]
    names = "once", "two threads", "two threads again", "again", "two processes", "two processes again"
    runs = [*trained(world, at("once", "threads", "threads-again")), *trained(world, at("again"), hash_seed=4321, late=True),
            *trained(world, at("processes", "processes-again"), processes=2, hash_seed=1)]
    return dict(zip(names, runs))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("a, b", [("once", "again"), ("two threads", "two threads again"), ("two processes", "two processes again")],
                         ids=["one thread; another hash seed, and threads that fetch late", "two threads", "two processes"])
def test_the_same(runs, a, b):
    assert not differing(runs[a], runs[b])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("other", ["two threads", "two processes"])
def test_not_the_same_but_for_rounding(runs, other):
    """Sums over parts round in another way: the first step agrees up to it, and what grows from there does not."""
    assert differing(runs["once"], runs[other])
    a, b = (pd.read_parquet(runs[name]/"history.parquet") for name in ("once", other))
    assert a.source_loss[0] == pytest.approx(b.source_loss[0], rel=1e-4)
    a, b = (pd.read_csv(runs[name]/"evaluations.csv") for name in ("once", other))
    assert a.mAP[0] == pytest.approx(b.mAP[0], abs=.02)


# safetensors writes names in another order each time; files.write_tensors sorts them.
@pytest.mark.timeout(400)
@pytest.mark.parametrize("a, b", [("once", "again"), ("two threads", "two threads again"), ("two processes", "two processes again")])
def test_the_same_bytes(runs, a, b):
    for file in ("encoder.safetensors", "label_bank.safetensors"):
        assert len({hashlib.sha256((runs[name]/file).read_bytes()).hexdigest() for name in (a, b)}) == 1, file


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["hcd", "dbscan", "oracle", "instance", "direct"])
@pytest.mark.parametrize("kind, processes", [("one", 1), ("two-threads", 1), ("two-processes", 2)])
def test_every_method_of_the_loop_twice(world, tmp_path, method, kind, processes):  # noqa: F811
    """Each run in a process of its own, under another hash seed, with threads that fetch late in the second."""
    a, b = (trained(world, [tmp_path/f"{kind}-{k}"], method, processes, hash_seed=k, late=k > 0)[0] for k in range(2))
    assert not differing(a, b)
