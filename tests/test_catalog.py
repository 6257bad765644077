"""The published sets at their true size: trees of the right names around one tiny picture, read as a user would."""
import os
from pathlib import Path

import pytest
from PIL import Image
from scipy.io import loadmat

from hcd_nb.catalog import PUBLISHED, market_parts, veri_parts
from hcd_nb.data import read_domain
from hcd_nb.images import DataError

lists = Path(__file__).resolve().parents[2]/"shared/data/protocol_labels"
needs_lists = pytest.mark.skipif(not lists.exists(), reason="the published identity and camera lists are not beside the project")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


def plant(folder, names):
    """Files of these names, all of them one tiny picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in {os.path.dirname(n) for n in names}: (folder/parent).mkdir(parents=True, exist_ok=True)
    for k, n in enumerate(names):
        if k%30000: os.link(folder/names[k - k%30000], folder/n)
        else: Image.new("RGB", (4, 8), (90, 110, 130)).save(folder/n)


def labels(file, key=None):
    m = loadmat(lists/f"{file}.mat")
    return m[key or next(k for k in m if not k.startswith("__"))].ravel().astype(int).tolist()


def spread(name, cameras, first=1):
    """Identities and cameras of a part in the published numbers: everyone seen by two cameras at least."""
    images, people = name
    return [(first + i%people, 1 + (i + i//people)%cameras) for i in range(images)]


def parts_of(published, test_first=2000):
    p = PUBLISHED[published]
    return dict(train=spread(p.train, p.cameras), query=spread(p.query, p.cameras, test_first), gallery=spread(p.gallery, p.cameras, test_first))


def counts(domain):
    return {part: (int(row.images), int(row.identities)) for part, row in domain.table().iterrows()}


def published_counts(name):
    p = PUBLISHED[name]
    return dict(train=p.train, query=p.query, gallery=p.gallery)


def as_published(domain, name):
    assert counts(domain) == published_counts(name)
    assert domain.notes[0].startswith(f"these are the images of {PUBLISHED[name].title} as published")


def refusal(where, **options):
    with pytest.raises(DataError) as e: read_domain(where, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


@needs_lists
def test_market1501(place):
    folder = place/"Market-1501-v15.09.15"
    for part, who, seen in (("bounding_box_train", "mk_train_label", "mk_train_cam"), ("query", "mk_queryID", "mk_queryCam"), ("bounding_box_test", "mk_testID", "mk_testCam")):
        plant(folder/part, [f"{f'{i:04d}' if i >= 0 else i}_c{c}s1_{n:06d}_00.jpg" for n, (i, c) in enumerate(zip(labels(who), labels(seen)))])
    domain = read_domain(f"market1501:{folder}")
    as_published(domain, "market1501")
    assert int((domain.gallery.identities == -1).sum()) == 3819 and int((domain.gallery.identities == 0).sum()) == 2798
    assert domain.skipped == 0
    next((folder/"bounding_box_train").iterdir()).unlink()
    assert "train has 12,935 images instead of 12,936" in refusal(f"market1501:{folder}", check=False)
    assert "this looks like Market-1501, but train has 12,935 images instead of 12,936" in read_domain(folder, check=False).notes
    assert "not DukeMTMC-reID as published" in refusal(f"dukemtmc:{folder}", check=False)
    (folder/"query").rename(folder/"queries")
    assert "no folder query" in refusal(f"market1501:{folder}", check=False)


@needs_lists
@pytest.mark.parametrize("kind", ["detected", "labeled"])
def test_cuhk03_from_its_mat_file(place, kind):
    folder = place/f"cuhk03_{kind}"
    config = f"cuhk03_new_protocol_config_{kind}.mat"
    plant(folder/f"images_{kind}", [str(n[0]) for n in loadmat(lists/config)["filelist"].ravel()])
    (folder/config).write_bytes((lists/config).read_bytes())
    as_published(read_domain(f"cuhk03-np:{folder}", check=False), f"cuhk03-np-{kind}")


@needs_lists
def test_cuhk03_from_its_archive(place):
    folder = place/"cuhk03-np"
    for kind in ("detected", "labeled"):
        m = loadmat(lists/f"cuhk03_new_protocol_config_{kind}.mat")
        who, camera = m["labels"].ravel(), m["camId"].ravel()
        for split, part in market_parts.items(): plant(folder/kind/part, [f"{who[i]:04d}_c{camera[i]}_{i}.png" for i in m[f"{split}_idx"].ravel().astype(int) - 1])
    assert "both sets of boxes" in refusal(folder) and str(folder/"labeled") in refusal(folder)
    for kind in ("detected", "labeled"): as_published(read_domain(folder/kind, check=False), f"cuhk03-np-{kind}")


@pytest.mark.parametrize("name, folder, naming", [("dukemtmc", "DukeMTMC-reID", "{i:04d}_c{c}_f{n:07d}.jpg"), ("personx", "PersonX", "{i:04d}_c{c}s1_{n}.jpg")])
def test_in_the_layout_of_market(place, name, folder, naming):
    for split, who in parts_of(name).items(): plant(place/folder/market_parts[split], [naming.format(i=i, c=c, n=n) for n, (i, c) in enumerate(who)])
    as_published(read_domain(f"{name}:{place/folder}", check=False), name)
    as_published(read_domain(place/folder, check=False), name)


def test_personx_of_six_backgrounds(place):
    for split, who in parts_of("personx").items():
        for background in range(1, 7): plant(place/"PersonX_v1"/str(background)/market_parts[split], [f"{i:04d}_c{c}s1_{n}.jpg" for n, (i, c) in enumerate(who) if c == background])
    as_published(read_domain(f"personx:{place/'PersonX_v1'}", check=False), "personx")


@pytest.mark.parametrize("name", ["veri776", "veri776-37746"])
def test_veri776(place, name):
    folder = place/f"VeRi-{name}"
    for split, who in parts_of(name).items(): plant(folder/veri_parts[split], [f"{i:04d}_c{c:03d}_{n:08d}_0.jpg" for n, (i, c) in enumerate(who)])
    as_published(read_domain(f"veri776:{folder}", check=False), name)


@pytest.mark.parametrize("version, folders", [("msmt17-v1", ("train", "test")), ("msmt17-v2", ("mask_train_v2", "mask_test_v2"))])
def test_msmt17(place, version, folders):
    folder = place/f"MSMT17-{version}"
    entries = {part: [(f"{i:04d}/{i:04d}_{n:03d}_{c:02d}_0303morning_{n:04d}_{part}.jpg", i) for n, (i, c) in enumerate(who)] for part, who in parts_of(version, 0).items()}
    entries["train"] = [(n, i - 1) for n, i in entries["train"]]
    split = dict(list_train=entries["train"][:30248], list_val=entries["train"][30248:], list_query=entries["query"], list_gallery=entries["gallery"])
    for name, rows in split.items():
        plant(folder/folders[name not in ("list_train", "list_val")], [n for n, _ in rows])
        (folder/f"{name}.txt").write_text("".join(f"{n} {i}\n" for n, i in rows))
    domain = read_domain(f"msmt17:{folder}", check=False)
    as_published(domain, version)
    assert not set(domain.train.identities.tolist()) & set(domain.gallery.identities.tolist())
    (folder/folders[1]).rename(folder/"elsewhere")
    assert f"without {folders[1]}" in refusal(folder, check=False)
    (folder/"elsewhere").rename(folder/folders[1])
    (folder/"list_query.txt").unlink()
    assert "without list_query.txt" in refusal(folder, check=False)


def test_a_set_of_ones_own_in_the_same_layout_is_left_in_peace(place):
    for split, part in market_parts.items():
        ids = range(1, 21) if split == "train" else range(21, 41)
        plant(place/"shop"/part, [f"{i:04d}_c{c}_{split}.jpg" for i in ids for c in (1, 2)])
    assert read_domain(place/"shop").notes == []
    assert "not Market-1501 as published" in refusal(f"market1501:{place/'shop'}")
    assert "no folders of msmt17 here" in refusal(f"msmt17:{place/'shop/query'}")
    assert "there is no published set 'market'" in refusal(f"market:{place/'shop'}")
