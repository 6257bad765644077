"""DeepCluster and local aggregation in the common loop: stopped right after a clustering, on a GPU."""
import pandas as pd
import pytest
import torch
from hcd_nb.configs import make_config, settled
from hcd_nb.deepcluster import DeepCluster
from hcd_nb.local_aggregation import LocalAggregation
from hcd_nb.training import train
from pretend import PretendedGPU
from test_command import TINY, same_results, world  # noqa: F401 (world is a fixture)

METHODS = [DeepCluster, LocalAggregation]
SETTINGS = dict(word.split("=") for word in TINY if "=" in word) | dict(iterations=16, n_classes=10, epoch=4)


def config(world, **changes):  # noqa: F811
    """The schedule of `dbscan`; the class is given beside it."""
    return settled(make_config("demo", method="dbscan", target=str(world/"target"), **{**SETTINGS, "pretrain": 0, **changes}))


def history(folder): return pd.read_parquet(folder/"history.parquet").drop(columns="seconds")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stop_at", [3, 5], ids=["before the first renewal", "right after it"])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_equals_an_unbroken_run(world, tmp_path, method, stop_at):  # noqa: F811
    go = lambda name, **more: train(config(world), tmp_path/name, progress=False, method=method, **more)
    whole = go("whole")
    assert whole.done and not go("broken", stop_at=stop_at).done
    broken = go("broken", resume=True)
    assert broken.done
    same_results(tmp_path/"whole", tmp_path/"broken")
    pd.testing.assert_frame_equal(history(tmp_path/"whole"), history(tmp_path/"broken"), check_dtype=False)
    ours, theirs = (run.trainer.method.state_dict() for run in (whole, broken))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert history(tmp_path/"whole")["moved"].notna().sum() == 3


@pytest.mark.timeout(300)
def test_with_a_source(world, tmp_path):  # noqa: F811
    for method in METHODS:
        run = train(config(world, source=str(world/"source"), pretrain=4, iterations=8), tmp_path/method.__name__, progress=False, method=method)
        assert run.done and history(tmp_path/method.__name__)[["target_loss", "source_loss"]].iloc[-1].notna().all()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_a_pretended_gpu(world, tmp_path, method):  # noqa: F811
    go = lambda name, device: train(config(world, iterations=8, precision="fp32"), tmp_path/name, device, progress=False, method=method)
    here = go("here", "cpu")
    with PretendedGPU():
        there = go("there", "cuda")
        assert {p.device.type for p in there.trainer.method.state_dict().values()} == {"cuda"}
    assert here.done and there.done
    pd.testing.assert_frame_equal(history(tmp_path/"here"), history(tmp_path/"there"), check_dtype=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", METHODS)
def test_too_few_images_get_a_sentence(world, tmp_path, method):  # noqa: F811
    with pytest.raises(ValueError, match=r"500 classes need 1000 images, .* the target has 96: lower n_classes"):
        train(config(world, n_classes=500), tmp_path/"run", progress=False, method=method)
