"""Settings that cannot work are refused in one sentence before a picture is read, whatever way they come."""
import json
import random
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hcd_nb.configs import CHOICES, PRESETS, RANGES, RunConfig, choose_device, config_from, make_config, setting_types, settled
from hcd_nb.dynamics import ClusterDynamics
from hcd_nb.label_bank import LabelBank

# (settings, words of the sentence): each failed late, hung, or did something else in silence
REFUSED = [
    (dict(eps=0), "eps"), (dict(eps=1), "eps"), (dict(eps=.6, eps_step=.3, levels=3), "0.299"), (dict(eps="nan"), "eps"), (dict(eps=-.1), "eps"),
    (dict(levels=1e9), "from 1 to 32"), (dict(height=1e6), "height"), (dict(width=0), "width"), (dict(batch_size=1e9), "batch_size"),
    (dict(weight_decay=1e300), "weight_decay"), (dict(learning_rate=0), "learning_rate"), (dict(learning_rate="inf"), "learning_rate"),
    (dict(batch_size=1), "batch_size"), (dict(batch_size=2, n_instances=4), "n_instances"), (dict(bn_group=1), "bn_group"), (dict(bn_group=24), "divisor"),
    (dict(bn_group=128), "divisor"), (dict(method="moco", batch_size=30), "multiple of 4"), (dict(method="moco", batch_size=4), "multiple of 4"),
    (dict(method="moco", queue=63), "queue"), (dict(method="moco_v2", batch_size=30), "moco_v2"), (dict(method="moco_v2", queue=63), "queue"), (dict(method="spcl", eps=.99), "gap"), (dict(method="spcl", eps=.3, gap=.3), "gap"),
    (dict(method="odc", n_classes=1), "n_classes"), (dict(mutual_k=1), "mutual_k"), (dict(nn_mutual_k=1), "nn_mutual_k"), (dict(n_neighbours=1), "n_neighbours"),
    (dict(n_anchors=0), "n_anchors"), (dict(k1=0), "k1"), (dict(k2=0), "k2"), (dict(min_samples=0), "min_samples"), (dict(momentum=1), "momentum"),
    (dict(alpha_s=1), "alpha_s"), (dict(alpha_m=1), "alpha_m"), (dict(temperature=0), "temperature"), (dict(ema=1), "ema"), (dict(test_share=1), "test_share"),
    (dict(cut=1), "cut"), (dict(sigma=-1), "sigma"), (dict(join=2), "join"), (dict(confirm="-inf"), "confirm"), (dict(jitter=1e9), "jitter"),
    (dict(seed=2**32), "seed"), (dict(seed=-1), "seed"), (dict(iterations=10**8), "iterations"), (dict(save_every=0), "save_every"),
    (dict(evaluate_every=0), "evaluate_every"), (dict(label_every=0), "label_every"), (dict(epoch=-1), "epoch"), (dict(lr_drops=-1), "lr_drops"),
    (dict(levels=2.5), "whole number"), (dict(levels="2.5"), "whole number"), (dict(levels=True), "whole number"), (dict(levels=None), "whole number"),
    (dict(seed="1e400"), "whole number"), (dict(seed=10**400), "from 0"), (dict(seed=-10**4000), "from 0"), (dict(sigma=True), "a number"), (dict(sigma=10**400), "a number"), (dict(sigma=[.3]), "a number"),
    (dict(splits=2), "true or false"), (dict(splits=1.5), "true or false"), (dict(target=None), "text"), (dict(target=["a"]), "text"), (dict(target=b"a"), "text"),
    (dict(target="a\0b"), "text"), (dict(source="a\nb"), "text"), (dict(encoder=50), "text"), (dict(weights=0), "text"), (dict(method="magic"), "oracle"),
    (dict(method="direct"), "--source"), (dict(index="flat"), "ivf"), (dict(scale="none"), "spread"), (dict(precision="fp16"), "bf16"), (dict(on_collapse=""), "reinit"),
    (dict(loss_levels="bottom"), "top"), (dict(neighbour="next"), "nearest"), (dict(node0="middle"), "centre"), (dict(anchors="all"), "density"), (dict(dynamics="new"), "paper"),
]


def sentence(f, *args, **kwargs):
    with pytest.raises(ValueError) as error: f(*args, **kwargs)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900
    return str(error.value)


@pytest.mark.parametrize("changes, words", REFUSED, ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_what_cannot_work_is_refused_however_it_comes(changes, words):
    name = next(iter(changes))
    for come in (lambda: settled(make_config(**changes)), lambda: settled(RunConfig(**changes)), lambda: config_from({**asdict(RunConfig()), **changes})):
        said = sentence(come)
        assert words in said and (len(changes) > 1 or name in said.lower()), said


def test_every_number_has_two_ends_that_are_said():
    assert set(RANGES) == {f.name for f in fields(RunConfig) if type(f.default) in (int, float)}
    for name, ends in RANGES.items():
        for bad in (ends[0] - 1, ends[1]*2 + 1, float("inf"), float("-inf"), float("nan"), 1e300):
            assert name in sentence(settled, RunConfig(**{name: bad}))


def test_numbers_are_what_they_are_in_every_spelling():
    for spelling in (2400, 2400., "2400", "2400.0", "2.4e3", " 2400 ", np.int32(2400), np.float32(2400)):
        c = settled(RunConfig(iterations=spelling))
        assert c.iterations == 2400 and type(c.iterations) is int
    for spelling in (.25, ".25", "2.5e-1", np.float64(.25)): assert settled(RunConfig(sigma=spelling)).sigma == .25
    assert settled(RunConfig(target=Path("my")/"crops")).target == str(Path("my")/"crops")
    json.dumps(asdict(settled(RunConfig(levels=np.int64(2), sigma=np.float32(.5), splits=np.True_))))


def test_the_records_of_the_repository_are_taken_as_they_are():
    records = [json.loads(f.read_text()) for f in sorted((Path(__file__).parents[1]/"data").rglob("*.json"))]
    known = [r["config"] for r in records if isinstance(r, dict) and "method" in r.get("config", {}) and r["config"].get("scale") != "levels"]    # levels: a word of an earlier version
    for kept in known: assert kept.items() <= asdict(config_from(kept)).items()
    assert len(known) > 100


def test_what_is_in_range_runs(tmp_path):
    """Algorithm 1 and DBSCAN at both ends of each of their settings."""
    g = torch.Generator().manual_seed(0)
    who = torch.arange(60)//6
    rows = normalize(torch.randn(10, 16, generator=g)[who] + .5*torch.randn(60, 16, generator=g), dim=1)
    for name in ("sigma", "alpha_s", "alpha_m", "n_anchors", "n_neighbours", "mutual_k", "nn_mutual_k", "cut", "confirm", "join"):
        for form in ("default", "paper"):
            for end in RANGES[name]:
                bank = LabelBank.from_labels(who*3 + torch.randint(3, (60,), generator=g), 2)
                ClusterDynamics.of(settled(RunConfig(**{"dynamics": form, name: end})))(rows, bank, torch.randint(60, (16,), generator=g))
                bank.check()
    for name in ("k1", "k2", "levels", "min_samples"):
        for end in RANGES[name]:
            found = {**dict(k1=6, k2=2, levels=3, min_samples=2), name: end}
            try: LabelBank.from_features(rows, eps=.6, **found)
            except ValueError as error: assert "Training cannot start" in str(error)    # no clusters at this end: a sentence with what would work


def test_devices_are_named_or_refused():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == "cpu"
    for bad in ("", "warp", "meta", "hpu", "mps:9", "privateuseone", "cuda:99", "cpu\0", -1, 3, 3.5, b"cpu", ["cpu"]): assert "evice" in sentence(choose_device, bad)


def mutated(rng):
    content = asdict(make_config(rng.choice(list(PRESETS))))
    kinds = [lambda: rng.choice([None, True, {}, [], [3], {"a": [[]]}, "", "nan", "1e999", "\0", "\ud880", "true", "paper", "-1", "1e3", 10**400, float("inf"), float("nan")]),
             lambda: rng.randint(-2, 40), lambda: rng.choice([rng.random(), 10**rng.uniform(-20, 20)]), lambda: "".join(rng.choices("aZ9.-\n\udc80é", k=4))]
    for _ in range(rng.randint(1, 3)): content[rng.choice([*content]*9 + ["levle", "", "x"*9999])] = rng.choice(kinds)()
    if rng.random() < .1: del content[rng.choice([*content])]
    return content if rng.random() < .98 else rng.choice(kinds)()


@pytest.mark.parametrize("n", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_settings_are_a_configuration_or_a_sentence(n):
    rng, counts, types = random.Random(1), dict(accepted=0, sentences=0), setting_types()
    for _ in range(n):
        content = mutated(rng)
        try: found = config_from(content)
        except ValueError as error:
            assert 10 < len(str(error)) < 900 and "\n" not in str(error), error
            counts["sentences"] += 1
        else:
            assert all(type(v) is types[k] for k, v in asdict(found).items())
            assert config_from(json.loads(json.dumps(asdict(found)))) == found
            counts["accepted"] += 1
    print(counts)
    assert min(counts.values()) > n/50


def test_choices_are_all_known():
    for name, known in CHOICES.items():
        for word in known: assert getattr(config_from({name: word, **({"source": "s"} if word == "direct" else {})}), name) == word
        for bad in (known[0] + "x", known[0].upper(), " " + known[0]): assert name in sentence(config_from, {name: bad})
