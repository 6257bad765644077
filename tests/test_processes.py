"""Two processes on one CPU: the same labels, the same training, and an end with a sentence when one of them dies."""
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_command import TINY, hcd_train, world  # noqa: F401 (world is a fixture)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*words, n=2, wait=True, seconds=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    if not wait: return process
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


SAME_LABELS = """
import torch
from torch.nn.functional import normalize
from hcd_nb.dynamics import ClusterDynamics
from hcd_nb.label_bank import LabelBank
from hcd_nb.processes import ShardedRows, share, started

with started("cpu"):
    for seed in range(24):
        g = torch.Generator().manual_seed(seed)
        n, copies = int(torch.randint(20, 200, (), generator=g)), int(torch.randint(0, 20, (), generator=g))
        who = torch.arange(n)*12//n
        rows = torch.randn(12, 32, generator=g)[who] + torch.rand((), generator=g)*2*torch.randn(n, 32, generator=g)
        rows[torch.randperm(n, generator=g)[:copies]] = rows[torch.randperm(n, generator=g)[:copies]]
        rows = normalize(rows, dim=1).to([torch.float32, torch.bfloat16][seed//3 % 2])
        labels = (who*3 + torch.randint(3, (n,), generator=g)).expand(3, -1)
        one, two = LabelBank(labels), LabelBank(labels)
        rule = [ClusterDynamics(), ClusterDynamics.paper(), ClusterDynamics(dense_images=10), ClusterDynamics(scale='rank', k1=8, k2=3)][seed % 4]
        shared = ShardedRows(rows[share(n)].clone())
        for _ in range(4):
            batch = torch.randint(n, (24,), generator=g)
            assert vars(rule(rows, one, batch)) == vars(rule(shared, two, batch)), seed
            assert torch.equal(one.labels, two.labels), seed
    print("same labels")
"""


@pytest.mark.timeout(300)
def test_label_updates_are_those_of_one_process(tmp_path):
    (tmp_path/"same.py").write_text(SAME_LABELS)
    status, out, err = torchrun(tmp_path/"same.py")
    assert status == 0, err[-3000:]
    assert out.count("same labels") == 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", [0, 8], ids=["whole batches", "groups of 8"])
def test_training_equals_one_process(world, tmp_path, group):  # noqa: F811
    """In double precision, where Adam does not blow a last digit up to a different run."""
    words = [*TINY, "--source", world/"source", "--target", world/"target", "--pretrain", 6, "--iterations", 12, "--bn-group", group]
    (tmp_path/"go.py").write_text("import sys, torch; torch.set_default_dtype(torch.float64); from hcd_nb.command import main; sys.exit(main())")
    for n, name in ((1, "one"), (2, "two")):
        status, out, err = torchrun(tmp_path/"go.py", *words, "--out", tmp_path/name, n=n)
        assert status == 0, err[-3000:]
        assert ("2 processes" in out) == (n == 2)
    one, two = (pd.read_parquet(tmp_path/name/"history.parquet").drop(columns="seconds") for name in ("one", "two"))
    assert one["splits_1"].notna().any()
    pd.testing.assert_frame_equal(one, two, rtol=1e-4)
    one, two = (pd.read_csv(tmp_path/name/"evaluations.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-4)
    one, two = (load_file(tmp_path/name/"encoder.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert torch.equal(*(load_file(tmp_path/name/"label_bank.safetensors")["labels"] for name in ("one", "two")))


@pytest.mark.timeout(300)
def test_a_killed_process_ends_the_others_within_a_minute(world, tmp_path):  # noqa: F811
    (tmp_path/"go.py").write_text("import os, sys; open(os.environ['RANK'], 'w').write(str(os.getpid())); from hcd_nb.command import main; sys.exit(main())")
    words = [*TINY, "--target", world/"target", "--iterations", 100000, "--out", "run"]
    os.chdir(tmp_path)
    process = torchrun(tmp_path/"go.py", *words, wait=False)
    while not (tmp_path/"run"/"checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(.2)
    os.kill(int((tmp_path/"1").read_text()), signal.SIGKILL)
    began = time.time()
    out, err = process.communicate(timeout=120)
    assert time.time() - began < 60
    assert process.returncode != 0
    assert "another process of this run has ended" in err, err[-3000:]
