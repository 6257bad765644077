"""What runs on a GPU: on a pretended one everywhere, and on a real one where there is one. The label bank stays in main memory."""
import pandas as pd
import pytest
import torch

from hcd_nb.benchmarks import features, over_split
from hcd_nb.command import configure, method_class, parser
from hcd_nb.dynamics import ClusterDynamics
from hcd_nb.evaluation import evaluate
from hcd_nb.label_bank import LabelBank, same_partition
from hcd_nb.neighbors import close_entries, jaccard_neighbours, knn, ranking
from hcd_nb.training import aside, side_stream, train
from pretend import PretendedGPU
from test_command import TINY, world  # noqa: F401 (world is a fixture)


@pytest.fixture(params=["pretended", "real"])
def gpu(request):
    if request.param == "pretended":
        with PretendedGPU() as mode: yield mode
    elif torch.cuda.is_available(): yield None
    else: pytest.skip("no GPU here: run this file where there is one")


def test_the_pretended_gpu_refuses_what_a_real_one_does():
    with PretendedGPU() as mode:
        x, i = torch.rand(3, 4).to("cuda"), torch.arange(2)
        assert x.device.type == "cuda" and x[i].device.type == x.sum(0).device.type == torch.zeros(2, device=x.device).device.type == "cuda"
        assert x.cpu().device.type == "cpu" and mode.waits == 1 and x.argmax().item() < 12 and mode.waits == 2
        for refused in (lambda: x + torch.rand(3, 4), lambda: torch.rand(4)[i.to("cuda")], lambda: x.index_select(0, i), lambda: torch.cat([x, x.cpu()])):
            with pytest.raises(RuntimeError, match="two devices"): refused()
        with pytest.raises(TypeError, match="numpy"): x.numpy()
        assert torch.equal(x + torch.tensor(2.), x + 2)


def some(images, seed, n=900):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:images]


FORMS = dict(default=ClusterDynamics(), paper=ClusterDynamics.paper(), sparse=ClusterDynamics(dense_images=10), density=ClusterDynamics(anchors="density"), random=ClusterDynamics(anchors="random"))


@pytest.mark.parametrize("form", FORMS)
def test_label_updates_are_the_same(gpu, form):
    rows, who = features(900, 64)
    labels = over_split(who, torch.Generator().manual_seed(0)).labels
    for x in (rows, rows.bfloat16()):
        here, memory, there = LabelBank(labels), LabelBank(labels), LabelBank(labels.to("cuda"))
        for batch in (some(64, seed) for seed in range(2)):
            one, two, three = FORMS[form](x, here, batch), FORMS[form](x.to("cuda"), memory, batch), FORMS[form](x.to("cuda"), there, batch.to("cuda"))
            assert vars(one) == vars(two) == vars(three)
        assert memory.labels.device.type == there.labels.device.type == "cpu"
        assert same_partition(here.labels, memory.labels) and same_partition(here.labels, there.labels)


@pytest.mark.parametrize("images", [32, 64, 128, 256])
@pytest.mark.parametrize("n", [900, 20_000])
def test_an_update_waits_for_the_gpu_a_few_times_for_any_number_of_images(n, images):
    rows, who = features(n, 16)
    bank, rule = over_split(who, torch.Generator().manual_seed(0)), ClusterDynamics()
    with PretendedGPU() as mode:
        there = rows.to("cuda")
        rule(there, bank, some(images, 0, n))    # measures the bank
        for seed in (1, 2, 3):
            mode.waits = 0
            rule(there, bank, some(images, seed, n))
            assert mode.waits <= 5 + bank.n_levels


def test_neighbours_and_scores_are_the_same(gpu):
    x, who = features(900, 64)
    assert (ranking(x, 20) == ranking(x.to("cuda"), 20)).mean() > .999
    here, there = jaccard_neighbours(x), jaccard_neighbours(x.to("cuda"))
    assert abs(here - there).max() < 1e-4
    cameras = torch.arange(900) % 6
    sides = lambda at: (x[:300].to(at), who[:300], cameras[:300], x.to(at), who, cameras)
    one, two = evaluate(*sides("cpu")), evaluate(*sides("cuda"))
    assert abs(one.mAP - two.mAP) < 1e-5 and abs(one.mINP - two.mINP) < 1e-5 and one.n_queries == two.n_queries


@pytest.mark.parametrize("n", [900, 100_000])
def test_a_search_waits_for_the_gpu_once(n):
    rows = torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    own = some(64, 0)
    top, column = knn(rows[own], rows, 64, own=own, check=False)
    assert close_entries(top, rows).any(), "nothing to settle"
    with PretendedGPU() as mode:
        there, own = rows.to("cuda"), own.to("cuda")
        queries, mode.waits = there[own], 0
        found = knn(queries, there, 64, own=own, check=False)
        assert mode.waits == 1
        assert torch.equal(found[0].cpu(), top) and torch.equal(found[1].cpu(), column)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method, source", [("hcd", True), ("spcl", True), ("odc", False), ("moco", False), ("simclr", False), ("moco_v2", False), ("mmt", True),
                                            ("deepcluster", False), ("local_aggregation", False)])
def test_training(gpu, world, tmp_path, method, source):  # noqa: F811
    words = [*TINY, "--method", method, "--target", str(world/"target"), "--pretrain", "2", "--iterations", "8", "--precision", "fp32", "--set", "n_classes=10", "--set", "epoch=4", *(["--source", str(world/"source")] if source else [])]
    config = configure(parser().parse_args(words))
    go = lambda name, device, **more: train(config, tmp_path/name, device, progress=False, method=method_class(method), **more)
    assert go("here", "cpu").done and not go("there", "cuda", stop_at=7).done
    run = go("there", "cuda", resume=True)
    assert run.done and run.trainer.label_bank.labels.device.type == "cpu" and next(run.trainer.encoder.parameters()).device.type == "cuda"
    one, two = (pd.read_parquet(tmp_path/name/"history.parquet").drop(columns="seconds") for name in ("here", "there"))
    assert list(one) == list(two) and len(one) == len(two)
    if gpu: pd.testing.assert_frame_equal(one, two, check_dtype=False)    # the same numbers: only the places are pretended


@pytest.mark.timeout(600)
def test_labels_that_move_aside_are_those_of_one_queue(gpu, world, tmp_path, monkeypatch):  # noqa: F811
    words = [*TINY, "--target", str(world/"target"), "--source", str(world/"source"), "--pretrain", "2", "--iterations", "8", "--precision", "fp32"]
    config = configure(parser().parse_args(words))
    def history(name):
        assert train(config, tmp_path/name, "cuda", progress=False).done
        return pd.read_parquet(tmp_path/name/"history.parquet").drop(columns="seconds")
    beside = history("beside")
    monkeypatch.setattr("hcd_nb.training.side_stream", lambda device: None)
    one, two = history("one"), history("two")
    assert beside["moved"].notna().any() and list(beside) == list(one)
    if not one.equals(two): pytest.skip("this GPU gives other numbers each time")
    pd.testing.assert_frame_equal(beside, one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: run this file where there is one")
def test_what_runs_aside_does_not_wait_for_what_is_launched():
    side = side_stream(torch.device("cuda"))
    for cycles in (1, 2**31):    # once to load what is called; then about a second
        x, y, done = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda"), torch.cuda.Event()
        def launch(): torch.cuda._sleep(cycles), y.add_(1), done.record()
        x.mul_(2)
        with aside(side, launch):
            assert torch.cuda.current_stream() == side and x.sum().item() == 2000
            waited = done.query()
            x.add_(1)
        assert (x + y).sum().item() == 4000 and done.query()
    assert not waited
