"""The baselines in the common loop: stopped and resumed they end alike, and two processes train as one."""
import json

import pandas as pd
import pytest
from hcd_nb.command import configure, method_class, parser
from hcd_nb.methods import KNOWN_METHODS
from hcd_nb.training import Method, train
from test_command import TINY, hcd_train, same_results, world  # noqa: F401 (world is a fixture)
from test_processes import torchrun


def words(world, method, source=True):  # noqa: F811
    return [*TINY, "--method", method, "--target", str(world/"target"), "--pretrain", "6", "--iterations", "16", "--set", "n_classes=10", "--set", "epoch=4",
            *(["--source", str(world/"source")] if source else [])]


@pytest.mark.parametrize("method", KNOWN_METHODS)
def test_every_name_has_its_class(method):
    assert issubclass(method_class(method), Method)
    assert configure(parser().parse_args(["--method", method, "--target", "x", "--source", "y"])).method == method


LABELS = {"proxies": ["camera_proxies=.5", "epoch=0"], "ranks": ["scale=rank", "k1=8", "k2=3", "epoch=0"], "clusterings": ["epoch=2", "camera_proxies=.5"]}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", LABELS)
def test_options_of_hcd_stopped_and_resumed(world, tmp_path, what):  # noqa: F811
    more = [word for setting in LABELS[what] for word in ("--set", setting)]
    config = configure(parser().parse_args([*words(world, "hcd"), *more]))
    whole = train(config, tmp_path/"whole", progress=False)
    assert whole.done and not train(config, tmp_path/"broken", progress=False, stop_at=13).done
    assert train(config, tmp_path/"broken", progress=False, resume=True).done
    same_results(tmp_path/"whole", tmp_path/"broken")
    history = pd.DataFrame(whole.trainer.history)
    assert ("reclustered" in history) == (what == "clusterings")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method, source", [("spcl", True), ("odc", True), ("moco", False), ("byol", True), ("byol", False), ("instance", False), ("simclr", False), ("moco_v2", True),
                                            ("mmt", True), ("mmt", False), ("deepcluster", True), ("local_aggregation", False)])
def test_stopped_and_resumed_equals_an_unbroken_run(world, tmp_path, method, source):  # noqa: F811
    config = configure(parser().parse_args(words(world, method, source)))
    go = lambda name, **more: train(config, tmp_path/name, progress=False, method=method_class(method), **more)
    whole, broken = go("whole"), go("broken", stop_at=13)
    assert whole.done and not broken.done
    assert go("broken", resume=True).done
    same_results(tmp_path/"whole", tmp_path/"broken")
    columns = pd.read_parquet(tmp_path/"whole"/"history.parquet").drop(columns="seconds")
    pd.testing.assert_frame_equal(columns, pd.read_parquet(tmp_path/"broken"/"history.parquet").drop(columns="seconds"), check_dtype=False)
    assert columns["target_loss"].notna().sum() == 16
    assert ("source_loss" in columns) == source


ALL_RUNS = """
import json, sys, torch
torch.set_default_dtype(torch.float64)
from hcd_nb.command import configure, method_class, parser
from hcd_nb.processes import started
from hcd_nb.training import train

folder, words = sys.argv[1], json.load(open(sys.argv[2]))
with started("cpu") as device:
    for name, of in words.items():
        config = configure(parser().parse_args(of))
        train(config, f"{folder}/{name}", device, progress=False, method=method_class(config.method))
"""


@pytest.mark.timeout(1200)
def test_two_processes_equal_one(world, tmp_path):  # noqa: F811
    """In double precision, where Adam does not blow a last digit up to a different run; all runs in one start of each kind, which is what takes long."""
    runs = {method: words(world, method) for method in KNOWN_METHODS if method not in ("odc", "direct", "oracle", "instance", "dbscan", "hcd")}
    for what in ("ranks", "clusterings"): runs[what] = [*words(world, "hcd"), *(word for setting in LABELS[what] for word in ("--set", setting))]
    (tmp_path/"go.py").write_text(ALL_RUNS)
    (tmp_path/"runs.json").write_text(json.dumps(runs))
    for n in (1, 2):
        status, out, err = torchrun(tmp_path/"go.py", tmp_path/str(n), tmp_path/"runs.json", n=n, seconds=1000)
        assert status == 0, err[-3000:]
    for name in runs:
        one, two = (pd.read_parquet(tmp_path/str(n)/name/"history.parquet").drop(columns="seconds") for n in (1, 2))
        pd.testing.assert_frame_equal(one, two, rtol=1e-4, obj=name)


@pytest.mark.timeout(300)
def test_odc_says_that_it_runs_in_one_process(world, tmp_path):  # noqa: F811
    (tmp_path/"go.py").write_text("import sys; from hcd_nb.command import main; sys.exit(main())")
    status, out, err = torchrun(tmp_path/"go.py", *words(world, "odc"), "--out", tmp_path/"run")
    assert status != 0 and "Method odc runs in one process" in err


@pytest.mark.timeout(300)
def test_a_baseline_from_the_command_line(world, tmp_path):  # noqa: F811
    status, out, err = hcd_train(*words(world, "byol", source=False), "--out", tmp_path/"run")
    assert status == 0, err
    assert "after" in out and (tmp_path/"run"/"record.json").exists()
