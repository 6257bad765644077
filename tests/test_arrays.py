"""Arrays as they come: ties that are ties, whatever the order, the tile or the threads; any type of number, or one sentence; unit rows."""
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from hcd_nb.checks import feature_rows, unit_rows, whole_rows
from hcd_nb.dynamics import ClusterDynamics
from hcd_nb.evaluation import bootstrap_interval, camera_means, cosines, evaluate, label_quality, normalise_cameras
from hcd_nb.feature_bank import FeatureBank, cluster_means
from hcd_nb.label_bank import LabelBank, contiguous, same_partition, singletons
from hcd_nb.losses import contrastive_loss
from hcd_nb.members import Members
from hcd_nb.neighbors import encoding, jaccard_distance, jaccard_neighbours, knn, ranking, recall
from hcd_nb.products import neighbourhoods
from hcd_nb.sampler import PseudoClassSampler
from hcd_nb.views import camera_views, hidden_views


@pytest.fixture
def wide(request):
    "How many times as much is tried with --slow"
    return 12 if request.config.getoption("--slow") else 1


def tied(kind, n, d, g):
    "Whole numbers (n, d) with many equal cosines"
    if kind == "one-hot": return torch.eye(d)[torch.randint(d, (n,), generator=g)]
    if kind == "quantised": return torch.randint(-2, 3, (n, d), generator=g).float()
    return torch.randint(-100, 101, (3, d), generator=g).float()[torch.randint(3, (n,), generator=g)]


def true_aps(q, q_ids, g, g_ids):
    "AP of each query that has a match, by fractions: of products p and squared norms n, p|p|/n orders cosines; distractors first among equals"
    norms, out = (g*g).sum(1).tolist(), []
    for products, i in zip((q @ g.T).tolist(), q_ids):
        similar = [Fraction(p*abs(p), n) if n else Fraction(0) for p, n in zip(products, norms)]
        hits = [n for n, (_, hit) in enumerate(sorted((-s, j == i) for s, j in zip(similar, g_ids)), 1) if hit]
        if hits: out.append(float(sum(Fraction(k, n) for k, n in enumerate(hits, 1))/len(hits)))
    return torch.tensor(out)


@pytest.mark.parametrize("kind", ["one-hot", "quantised", "copies"])
@pytest.mark.parametrize("d", [2, 24, 257])
def test_scores_with_ties_are_those_of_fractions(kind, d, wide):
    g, scored = torch.Generator().manual_seed(d), 0
    for n in [*range(1, 41)]*wide + [300]:
        q, x = tied(kind, 5, d, g), tied(kind, n, d, g)
        ids, who = torch.randint(1, 4, (5,), generator=g), torch.randint(-1, 4, (n,), generator=g)
        if not torch.isin(ids, who).any(): continue
        kept = who >= 0
        scores, scored = evaluate(q, ids, None, x, who, None), scored + 1
        torch.testing.assert_close(scores.ap, true_aps(q.long(), ids.tolist(), x.long()[kept], who[kept].tolist()), atol=1e-6, rtol=0)
        order = torch.randperm(n, generator=g)
        for other in (dict(), dict(tile=1), dict(tile=3)):
            again = evaluate(q, ids, None, x[order], who[order], None, **other)
            assert torch.equal(again.ap, scores.ap) and torch.equal(again.cmc, scores.cmc) and again.mINP == scores.mINP
    assert scored > 35


@pytest.mark.parametrize("d", [24, 256, 2048])
def test_scores_do_not_depend_on_threads_or_on_the_batch(d):
    g, threads = torch.Generator().manual_seed(d), torch.get_num_threads()
    x = torch.randn(300, d, generator=g)[torch.randint(300, (900,), generator=g)]       # many copies, of no special numbers
    who = torch.randint(1, 20, (900,), generator=g)
    one = evaluate(x[:60], who[:60], None, x, who, None)
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert torch.equal(evaluate(x[:60], who[:60], None, x, who, None).ap, one.ap)
    finally: torch.set_num_threads(threads)
    parts = [evaluate(x[i:i + 6], who[i:i + 6], None, x.flip(0), who.flip(0), None).ap for i in range(0, 60, 6)]
    assert torch.equal(torch.cat(parts), one.ap)
    whole = cosines(whole_rows(x[:60]), whole_rows(x))
    assert torch.equal(whole, torch.cat([cosines(whole_rows(x[i:i + 1]), whole_rows(x), 129) for i in range(60)]))
    assert (whole - normalize(x[:60].double(), dim=1) @ normalize(x.double(), dim=1).T).abs().max() < 1e-6


@pytest.mark.parametrize("d", [3, 24, 256, 2048])
def test_equal_distractors_rank_first(d):
    g = torch.Generator().manual_seed(d)
    for n in range(3, 41):
        picture, others = torch.randn(1, d, generator=g), torch.randn(n - 3, d, generator=g)
        place = torch.randperm(n, generator=g)
        x, who = torch.cat([others - 2*picture, picture.repeat(3, 1)])[place], torch.tensor([2]*(n - 1) + [1])[place]
        assert abs(evaluate(picture, [1], None, x, who, None).mAP - 1/3) < 1e-6


def test_a_collapsed_encoder_gets_the_worst_score():
    for n in range(2, 41):
        x, who = torch.full((n, 24), .3), torch.tensor([1] + [2]*(n - 1))
        assert abs(evaluate(x[:1], [1], None, x, who, None).mAP - 1/n) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("d", [2, 24, 256])
def test_copies_come_in_the_order_of_the_bank(d, dtype, wide):
    g = torch.Generator().manual_seed(d)
    for n in [*range(1, 41)]*wide + [60, 100, 1000]:
        few = normalize(torch.randn(max(2, n//6), d, generator=g), dim=1).to(dtype)
        which = torch.randint(len(few), (n,), generator=g)
        k = int(torch.randint(1, n + 1, (), generator=g))
        for tile in (1 if n < 50 else 64, 100, 2**22):
            for asked in (few, few[:1]):
                column = knn(asked, few[which], k, tile=tile)[1]
                for i in range(len(asked)):
                    copies = (few[which] == few[i]).all(1).nonzero()[:, 0]
                    if dtype == torch.bfloat16 and len(copies) > 2*k: continue           # the short list of half precision
                    found = column[i][torch.isin(column[i], copies)]
                    assert torch.equal(found, copies[:len(found)])
                    if d > 2: assert torch.equal(column[i, :min(k, len(copies))], copies[:k])


def test_equal_products_of_different_rows_come_in_order():
    for d in (8, 64, 100):
        bank = torch.eye(d)[torch.randperm(d, generator=torch.Generator().manual_seed(d))]
        asked = normalize(torch.ones(1, d), dim=1)
        for k in range(1, d + 1): assert knn(asked, bank, k)[1][0].tolist() == list(range(k))


@pytest.mark.parametrize("d", [24, 256])
def test_a_collapsed_bank_is_searched_in_order(d):
    bank = normalize(torch.randn(1, d, generator=torch.Generator().manual_seed(0)), dim=1).repeat(1200, 1)
    found = ranking(bank, 20)
    assert (found[:, 0] == np.arange(1200)).all()
    assert all(row[1:].tolist() == [j for j in range(20) if j != i][:19] for i, row in enumerate(found))


def test_half_precision_and_extreme_rows_pass_where_rows_are_scaled():
    for x in (torch.eye(2)*1e-30, torch.eye(2).double()*1e39, torch.eye(2).double()*1e300, np.eye(2)*1e-300, torch.eye(2).half()*60000):
        assert evaluate(x, [1, 2], None, x, [1, 2], None).mAP == 1
        assert torch.equal(unit_rows(x), torch.eye(2)) and torch.equal(FeatureBank(x).rows.float(), torch.eye(2))


WORLD = normalize(torch.eye(10).repeat(12, 8)[:, :64] + .3*torch.randn(120, 64, generator=torch.Generator().manual_seed(0)), dim=1)
TEN = torch.arange(120) % 10
NEEDS_UNIT_ROWS = dict(
    knn=lambda x: knn(x[:5], x, 3), bank_of_knn=lambda x: knn(WORLD[:5], x, 3), ranking=lambda x: ranking(x, 5), recall=lambda x: recall(x, 3, "exact"), encoding=lambda x: encoding(x, 4, 2),
    jaccard_neighbours=lambda x: jaccard_neighbours(x, 4, 2), jaccard_distance=lambda x: jaccard_distance(x, 4, 2), labels=lambda x: LabelBank.from_features(x, k1=8, k2=2),
    neighbourhoods=lambda x: neighbourhoods(torch.as_tensor(x), torch.arange(5), 9), update=lambda x: ClusterDynamics()(x, LabelBank.from_labels(TEN), [0, 1, 2]), paper=lambda x: ClusterDynamics.paper()(x, LabelBank.from_labels(TEN), [0, 1, 2]),
    camera_views=lambda x: camera_views(x, [1, 2]*60), hidden_views=lambda x: hidden_views(torch.cat([torch.as_tensor(x)]*2)),
    loss=lambda x: contrastive_loss(x[:3], [0, 1, 2], WORLD), state=lambda x: FeatureBank(WORLD).load_state_dict(dict(FeatureBank(WORLD).state_dict(), rows=torch.as_tensor(x))))


@pytest.mark.parametrize("name", NEEDS_UNIT_ROWS)
def test_rows_that_have_not_norm_1_are_refused_and_unit_rows_pass(name):
    call = NEEDS_UNIT_ROWS[name]
    for scale in (2, 10, 20, .5):
        with pytest.raises(ValueError, match=f"have not norm 1, the first is row .* with {scale:g}.*: scale them"): call(WORLD*scale)
    for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16): call(WORLD.to(kind))
    call(WORLD.bfloat16().float())
    call(WORLD.numpy())
    spoilt = WORLD.clone()
    spoilt[1, 3] = torch.nan
    if name not in ("loss", "bank_of_knn"):
        with pytest.raises(ValueError, match="NaN or infinite"): call(spoilt)


@pytest.mark.parametrize("scale", [2, 20, .1])
def test_where_rows_are_scaled_their_length_does_not_matter(scale):
    who, camera = TEN + 1, [1, 2]*60
    bank, same = FeatureBank.from_features(WORLD), FeatureBank.from_features(WORLD*scale)
    torch.testing.assert_close(bank.rows, same.rows)
    torch.testing.assert_close(normalise_cameras(WORLD, camera), normalise_cameras(WORLD*scale, camera))
    assert abs(evaluate(WORLD, who, None, WORLD, who, None).mAP - evaluate(WORLD*scale, who, None, WORLD*scale, who, None).mAP) < 1e-6


NUMBERS = dict(int32=lambda x: x.int(), int8=lambda x: x.to(torch.int8), uint8=lambda x: x.to(torch.uint8), float=lambda x: x.double(), list=lambda x: x.tolist(), numpy=lambda x: x.numpy(), numpy_float=lambda x: x.numpy().astype(float),
               series=lambda x: pd.Series(x.numpy()), nullable=lambda x: pd.array(x.tolist(), dtype="Int64"), tuple=lambda x: tuple(x.tolist()), objects=lambda x: np.array(x.tolist(), dtype=object))
who, cameras = TEN + 1, torch.arange(120) % 3 + 1


def updated(labels, batch):
    bank = LabelBank.from_labels(labels)
    ClusterDynamics()(WORLD, bank, batch)
    return bank.labels


def moved(index):
    bank = FeatureBank(WORLD)
    bank.update(index, WORLD.flip(0)[:4])
    return bank.rows


def changed(images):
    bank = LabelBank.from_labels(TEN)
    bank.detach(images)
    bank.adopt(images, TEN[:4].flip(0))
    bank.relabel(2, images, bank.fresh(2))
    return bank.labels


TAKES_NUMBERS = dict(
    evaluate=lambda f: evaluate(WORLD, f(who), f(cameras), WORLD, f(who), f(cameras)).ap, label_quality=lambda f: torch.tensor(list(label_quality(f(TEN), f(who)).values())),
    bootstrap=lambda f: torch.tensor(bootstrap_interval(torch.arange(120)/120, groups=f(who))), camera_means=lambda f: camera_means(WORLD, f(cameras))[0], normalise=lambda f: normalise_cameras(WORLD, f(cameras)),
    views=lambda f: camera_views(WORLD, f(cameras)).means, from_labels=lambda f: LabelBank.from_labels(f(TEN)).labels, singletons=lambda f: singletons(f(TEN)), contiguous=lambda f: contiguous(f(TEN))[0], members=lambda f: torch.from_numpy(Members(f(TEN)).of(range(10))[0]),
    sampler=lambda f: PseudoClassSampler(8, 2).batch(f(TEN), f(cameras)), cluster_means=lambda f: cluster_means(WORLD, f(TEN), 10), source=lambda f: FeatureBank.from_features(WORLD, WORLD, f(TEN)).rows,
    update=lambda f: moved(f(torch.arange(4))), dynamics=lambda f: updated(f(TEN), f(torch.arange(9))), changes=lambda f: changed(f(torch.arange(4))), own=lambda f: knn(WORLD[:9], WORLD, 5, own=f(torch.arange(9)))[1],
    loss=lambda f: contrastive_loss(WORLD[:9], f(torch.arange(9)), WORLD))


@pytest.mark.parametrize("name", TAKES_NUMBERS)
def test_every_type_of_whole_number_is_understood(name):
    call = TAKES_NUMBERS[name]
    truth = call(lambda x: x)
    for form in NUMBERS.values(): assert torch.equal(call(form), truth)


@pytest.mark.parametrize("name", TAKES_NUMBERS)
def test_what_is_no_whole_number_gets_a_sentence(name):
    call = TAKES_NUMBERS[name]
    for form in (lambda x: x + .5, lambda x: [f"person {i}" for i in x.tolist()], lambda x: x.double()*1e300, lambda x: x == 1, lambda x: [*x.tolist()[:-1], 1.7], lambda x: x[:, None], lambda x: [{}]*len(x)):
        with pytest.raises(ValueError) as e: call(form)
        assert len(str(e.value)) < 300 and "\n" not in str(e.value)


@pytest.mark.parametrize("name", [n for n in TAKES_NUMBERS if n not in ("from_labels", "singletons", "contiguous", "members")])
def test_other_lengths_get_a_sentence(name):
    with pytest.raises(ValueError):
        call, first = TAKES_NUMBERS[name], []
        def form(x):
            first.append(0)
            return x[:-1] if len(first) == 1 else x
        if name in ("sampler", "dynamics", "changes"): call(lambda x: x[:0])
        else: call(form)


def test_missing_people_are_nobody():
    half = torch.where(torch.arange(120) < 60, who, -1)
    for form in (half, torch.where(half < 0, torch.nan, half.double()), [None if i < 0 else i for i in half.tolist()], pd.array([pd.NA if i < 0 else i for i in half.tolist()], dtype="Int64"), [float("nan") if i < 0 else i for i in half.tolist()]):
        scores = evaluate(WORLD, form, None, WORLD, form, None)
        assert scores.n_without_match == 60
        assert label_quality(TEN, form)["ari"] == 1
        assert torch.equal(camera_means(WORLD, form)[1], camera_means(WORLD, half)[1])


FEATURES = dict(numpy=lambda x: x.numpy(), double=lambda x: x.double(), list=lambda x: x.tolist(), frame=lambda x: pd.DataFrame(x.numpy()))
TAKES_FEATURES = dict(
    evaluate=lambda f: evaluate(f(WORLD), who, None, f(WORLD), who, None).ap, mixed=lambda f: evaluate(f(WORLD), who, None, WORLD, who, None).ap, knn=lambda f: knn(f(WORLD), f(WORLD), 5)[1], mixed_knn=lambda f: knn(WORLD[:9], f(WORLD), 5)[1], mixed_queries=lambda f: knn(f(WORLD[:9]), WORLD, 5)[1],
    labels=lambda f: contiguous(LabelBank.from_features(f(WORLD), k1=8, k2=2).labels[0])[0], jaccard=lambda f: jaccard_distance(f(WORLD), 4, 2).round(decimals=4), bank=lambda f: FeatureBank(f(WORLD)).rows.float(), from_features=lambda f: FeatureBank.from_features(f(WORLD), f(WORLD), TEN).rows.float(),
    dynamics=lambda f: contiguous((lambda b: (ClusterDynamics()(f(WORLD), b, [0, 1, 2]), b.labels[0])[1])(LabelBank.from_labels(TEN)))[0], normalise=lambda f: normalise_cameras(f(WORLD), cameras), views=lambda f: camera_views(f(WORLD), cameras).means.float(), loss=lambda f: contrastive_loss(f(WORLD[:9]), torch.arange(9), WORLD).float())


@pytest.mark.parametrize("name", TAKES_FEATURES)
def test_features_may_be_any_table_of_numbers(name):
    call = TAKES_FEATURES[name]
    for form in FEATURES.values(): torch.testing.assert_close(call(form), call(lambda x: x), atol=1e-5, rtol=0)
    for wrong in ("features.npy", None, [[1, 2], [3]], [["a", "b"]], np.array([["a"]]), torch.ones(3), torch.ones(0, 4), torch.ones(2, 2).bool(), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError) as e: call(lambda x: wrong)
        assert "\n" not in str(e.value)


def test_nobody_is_nobody_in_label_quality():
    assert label_quality([0, 0, 1, 1, 2, 3, 4, 5], [1, 1, 2, 2, 0, 0, 0, 0])["ari"] == 1
    assert label_quality([0, 0, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 0, -1, None, 0]) == dict(ari=1, homogeneity=1, completeness=1, clusters=3, singletons=0)
    assert label_quality([-1, -1, 3, 3], [1, 1, 2, 2]) == label_quality([0, 1, 3, 3], [1, 1, 2, 2])


def test_two_partitions_in_other_types():
    assert same_partition([1, 1, 2], np.array([5, 5, 0], np.uint8)) and not same_partition([1, 1, 2], [1, 2, 2])
    assert feature_rows(pd.DataFrame([[1, 2]])).dtype == torch.float32
