"""dynamics"""
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple
import numpy as np
import torch
from fastcore.basics import patch
from .algorithm import farthest_first, first_largest, first_seen, merge, merge_candidates, nearest_neighbour, next_anchor, resolve_pointers, split, union
from .checks import feature_rows
from .label_bank import LabelBank, contiguous
from .members import compiled
from .neighbors import evenly
from .propagation import Graph, mutual, mutual_neighbours, nearest_lists
from .products import around, host, mean_readings, means_of, neighbourhoods, square, squares, Squares
from .scale import COSINE, calibrate, calibrated, kin_levels, links, readings_of, similarities

# ---- rules over batches
@compiled
def all_similarities(similar, cosines, read): # (B, k, k), (2, B, k)
    out = np.empty_like(cosines)
    for i in range(len(cosines)):
        a = read[:, i].copy()
        out[i] = similarities(similar, cosines[i], a, a)
    return out

@compiled
def linked_neighbours(similarity, cut):
    "Places to which a path above the cut leads from node 0"
    linked, todo, end = np.zeros(len(similarity), np.bool_), np.zeros(len(similarity), np.int64), 1
    linked[0] = True
    for at in range(len(similarity)):
        if at == end: break
        i = todo[at]
        for j in range(len(similarity)):
            if not linked[j] and similarity[i, j] > cut and similarity[j, i] > cut:
                linked[j], todo[end] = True, j
                end += 1
    return linked

@compiled
def part_of(similarity, places): # rows and columns
    out = np.empty((len(places), len(places)), similarity.dtype)
    for a in range(len(places)):
        for b in range(len(places)): out[a, b] = similarity[places[a], places[b]]
    return out

@compiled
def follow(similarity, k, cut, alpha, sigma): # (B, k, k) → places (B,), linked (B, k)
    place, linked = np.zeros(len(similarity), np.int64), np.zeros(similarity.shape[:2], np.bool_)
    for i in range(len(similarity)):
        linked[i] = linked_neighbours(similarity[i], cut)
        few = np.flatnonzero(linked[i])
        place[i] = few[nearest_neighbour(part_of(similarity[i], few), k, cut, alpha, sigma)]
    return place, linked

@compiled
def group_means(cosines, read, group, n):
    "Mean cosines between groups, mean readings, sizes"
    means, reading, size = np.zeros((n, n)), np.zeros((2, n)), np.zeros(n)
    for i in range(len(group)):
        size[group[i]] += 1
        reading[:, group[i]] += read[:, i]
        for j in range(len(group)): means[group[i], group[j]] += cosines[i, j]
    for a in range(n):
        reading[:, a] /= size[a]
        for b in range(n): means[a, b] /= size[a]*size[b]
    return means.astype(np.float32), reading.astype(np.float32), size.astype(np.float32)

@compiled
def average_linkage(similar, means, read, size, least):
    "Join groups by average link, closest first, while it is at least confirm"
    group = np.arange(len(size))
    while True:
        close = links(similar, means, read, size)
        for a in range(len(group)):
            for b in range(len(group)):
                if a == b or group[a] != a or group[b] != b: close[a, b] = -np.inf
        best = first_largest(close.ravel())
        a, b = min(best//len(group), best % len(group)), max(best//len(group), best % len(group))
        if not close[a, b] >= least: return group
        n = size[a] + size[b]
        means[a] = (size[a]*means[a] + size[b]*means[b])/n
        means[:, a] = means[a]
        read[:, a] = (size[a]*read[:, a] + size[b]*read[:, b])/n
        size[a] = n
        group[group == b] = a

@compiled
def density_peaks(similarity):
    "Units by density peak, the strongest first"
    n = len(similarity)
    density = np.exp(2*similarity.astype(np.float64) - 2).sum(1)
    rank = np.argsort(np.argsort(-density, kind='mergesort'), kind='mergesort')
    peak = np.empty(n)
    for i in range(n):
        nearest = -np.inf
        for q in range(n):
            if rank[q] < rank[i]: nearest = max(nearest, similarity[i, q])
        peak[i] = density[i]*(1 - (similarity[i].min() if rank[i] == 0 else nearest))
    return np.argsort(-peak, kind='mergesort')

@lru_cache
def lots(most, K, seed):
    "Random anchors for clusters of every number of units"
    out = np.zeros((most + 1, K), np.int64)
    for n in range(1, most + 1): out[n, :min(n, K)] = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:K]
    return out

class Options(NamedTuple):
    "numbers of a rule, as compiled loops take them"
    alpha_s: float; alpha_m: float; sigma: float; n_anchors: int; k: int; cut: float; split_cut: float; confirm: float; join: float
    anchors: int; min_units: int; min_images: int; sample: bool

@compiled
def choose_anchors(similarity, j, o, lots):
    if o.anchors == 0: return farthest_first(similarity, j, o.n_anchors)
    if o.anchors == 1: return lots[len(similarity), :min(len(similarity), o.n_anchors)].copy()
    return density_peaks(similarity)[:o.n_anchors].copy()

@compiled
def split_cluster(similar, cosines, read, unit, j, o, lots):
    "The group of each image of one cluster"
    n = unit.max() + 1
    if n < o.min_units or len(unit) < o.min_images: return np.zeros_like(unit)
    means, reading, _ = group_means(cosines, read, unit, n)
    similarity = similarities(similar, means, reading, reading)
    group = split(mutual_neighbours(similarity, o.k, o.split_cut), choose_anchors(similarity, unit[j], o, lots), o.alpha_s)[unit]
    if o.confirm > 1 or group.max() == 0: return group
    means, reading, size = group_means(cosines, read, group, group.max() + 1)
    return first_seen(average_linkage(similar, means, reading, size, o.confirm)[group])

@compiled
def split_all(similar, sq, block, place, images, start, unit, j, readings, o, lots):
    group = np.zeros_like(images)
    for c in range(len(j)):
        a, b = start[c], start[c + 1]
        if block[c] < 0 or b - a < 2: continue
        group[a:b] = split_cluster(similar, square(sq, block[c], place[a:b]), readings[:, a:b].copy(), unit[a:b], j[c], o, lots)
    return group

@compiled
def candidates_around(labels, near, linked):
    image, start, places, n = np.empty(len(near), np.int64), np.zeros(len(near) + 1, np.int64), np.empty(near.size, np.int64), 0
    for i in range(len(near)):
        found = merge_candidates(labels[near[i]], linked[i])
        if len(found) < 2: continue
        image[n], start[n + 1] = i, start[n] + len(found)
        places[start[n]:start[n + 1]] = found
        n += 1
    return image[:n], start[:n + 1], places[:start[n]]

@compiled
def merge_all(similar, around, image, places, similarity, own, o):
    wanted = np.zeros(len(places), np.bool_)
    for r in range(len(image)):
        a, b = around.start[r], around.start[r + 1]
        nodes, read = square(around.squares, r, np.arange(b - a + 1)), around.readings[:, a:b].copy()
        with_own = nodes[:-1, :-1].copy()
        link = links(similar, with_own, read, around.size[a:b])[0]
        if o.sample:
            with_own[0, 1:] = with_own[1:, 0] = nodes[-1, 1:-1]
            read[:, 0] = own[:, r]
        wanted[a:b] = merge(similarities(similar, with_own, read, read), part_of(similarity[image[r]], places[a:b]), o.k, o.cut, o.alpha_m, o.sigma) & (link >= o.join)
    return wanted

@compiled
def fits(similar, around, own):
    out = np.empty((2, len(around.start) - 1), np.float32)
    for i in range(out.shape[1]):
        c, n, read = square(around.squares, i, np.arange(3)), around.size[2*i], around.readings[:, 2*i:2*i + 2]
        c[2, 0] = (n*c[2, 0] - c[2, 2])/(n - 1)
        reading, size = np.empty((2, 3), np.float32), np.ones(3, np.float32)
        reading[:, 0], reading[:, 1], reading[:, 2] = (n*read[:, 0] - own[:, i])/(n - 1), read[:, 1], own[:, i]
        size[0], size[1] = n - 1, around.size[2*i + 1]
        out[:, i] = links(similar, c, reading, size)[2, :2]
    return out

# ---- class
@dataclass
class ClusterDynamics:
    alpha_s: float = .99
    alpha_m: float = .99
    sigma: float = .25
    n_anchors: int = 8
    n_neighbours: int = 64
    mutual_k: int = 10
    nn_mutual_k: int = 10
    cut: float = .45
    neighbour: str = 'propagated'
    node0: str = 'sample'
    anchors: str = 'farthest'
    splits: bool = True
    merges: bool = True
    min_split_units: int = 2
    min_split_samples: int = 2
    split_cut: float | None = .45
    stay: bool = True
    scale: str | None = 'spread'
    confirm: float | None = .6
    join: float | None = .7
    seed: int = 0
    dense_images: int = 512
    measured: int = 50_000

@patch(cls_method=True)
def paper(cls: ClusterDynamics, **options):
    return cls(**{**dict(mutual_k=30, nn_mutual_k=20, min_split_units=3, min_split_samples=5, split_cut=None, stay=False, scale=None, confirm=None, join=None), **options})

OPTIONS = dict(neighbour=('propagated', 'nearest'), node0=('sample', 'centre'), anchors=('farthest', 'random', 'density'), scale=('spread', 'auto', None))

@patch
def check(self: ClusterDynamics):
    for name, known in OPTIONS.items():
        if getattr(self, name) not in known: raise ValueError(f'{name} is {getattr(self, name)!r}: it is one of {", ".join(map(str, known))}.')
    if self.n_anchors < 1: raise ValueError(f'n_anchors is {self.n_anchors}: a split needs at least one anchor.')

@patch(as_prop=True)
def options(self: ClusterDynamics):
    none = lambda x, instead: instead if x is None else x
    return Options(self.alpha_s, self.alpha_m, self.sigma, self.n_anchors, self.mutual_k, self.cut, none(self.split_cut, -np.inf), none(self.confirm, 2.), none(self.join, -np.inf),
                   OPTIONS['anchors'].index(self.anchors), max(2, self.min_split_units), max(2, self.min_split_samples), self.node0 == 'sample')

@dataclass
class DynamicsReport:
    splits: list
    merges: list
    adoptions: int
    rejections: int
    moved: float

def share_moved(before, after):
    old, n = contiguous(before)
    new, m = contiguous(after)
    pair, count = torch.unique(new*n + old, return_counts=True)
    largest = torch.zeros(m, dtype=torch.long, device=new.device).scatter_reduce(0, pair//n, count, 'amax')
    return 1 - int(largest.sum())/len(new)

def checked_inputs(features, bank, indices):
    features = features if torch.is_tensor(features) and features.is_floating_point() or hasattr(features, 'fetch') else feature_rows(features)
    if features.ndim != 2 or len(features) != bank.n_images:
        raise ValueError(f'the features have shape {tuple(features.shape)} and the label bank {bank.n_images} images: give one row for each.')
    indices = bank.images(indices)
    if not len(indices): raise ValueError('the batch is empty: an update needs at least one image.')
    return features, indices

def calibration_images(batch, n, at_least=64):
    others = evenly(n, max(0, at_least - len(batch))).numpy()
    return np.concatenate([batch, others[~np.isin(others, batch)]])

@patch
def measure(self: ClusterDynamics, features):
    n = len(features)
    if n > self.measured: return torch.ones(2, n)
    b, loudest, r = calibrate(features, evenly(n, 256).numpy(), self.n_neighbours)[2]
    parts = [kin_levels(neighbourhoods(features, part, self.n_neighbours)[1], b, loudest) for part in np.split(np.arange(n), range(256, n, 256))]
    return torch.from_numpy(np.concatenate([readings_of(levels, b, r) for levels in parts], 1))

@patch
def see(self: ClusterDynamics, features, bank, batch):
    "near, similarity, similar, readings"
    n = len(batch)
    if self.scale is None:
        near, cosines, _ = neighbourhoods(features, batch, self.n_neighbours)
        return near, cosines, COSINE, np.ones((2, len(features)), np.float32)
    if bank.reach is None or len(bank.reach) != 2: bank.reach = self.measure(features)
    near, cosines, (b, loudest, r), levels = calibrate(features, calibration_images(batch, len(features)), self.n_neighbours)
    readings, similar = bank.reach.numpy(), calibrated(b, loudest, r)
    readings[:, batch] = readings_of(levels, b, r)[:, :n]
    if self.scale == 'auto': readings = np.stack([readings[0], np.full_like(readings[1], 2)])
    return near[:n], all_similarities(similar, cosines[:n], readings[:, near[:n]]), similar, readings

@patch
def stays(self: ClusterDynamics, features, bank, batch, p, similar, readings):
    stay = np.zeros(len(batch), bool)
    if not self.stay or self.confirm is None: return stay
    top, lists, nobody = bank.labels[-1].numpy(), bank.index(-1), p == batch
    ask = np.flatnonzero((nobody | (top[batch] != top[p])) & (lists.count[top[batch]] > 1))
    if not len(ask): return stay
    both = top[np.stack([batch[ask], p[ask]], 1)].ravel()
    own, other = fits(similar, around(features, lists, both, np.arange(0, len(both) + 1, 2), batch[ask], readings), readings[:, batch[ask]])
    stay[ask] = (own >= self.confirm) & ((own >= other) | nobody[ask])
    return stay

def relabel(bank, h, images, labels):
    if bank.journal is not None and h == bank.n_levels - 1: bank.journal.append((images, bank.labels[h].numpy()[images]))
    bank.index(h).move(images, labels)

def take_labels(bank, batch, ends):
    inside = np.isin(ends, batch)
    alone, which = np.unique(ends[inside], return_inverse=True)
    for h in range(bank.n_levels):
        labels = bank.labels[h].numpy()[ends]
        labels[inside] = bank.fresh(h, len(alone)).numpy()[which]
        relabel(bank, h, batch, labels)

class Touched(NamedTuple):
    "The largest clusters of each image of a batch that are small enough to be looked at whole"
    level: np.ndarray # (B,) their level, -1 where none is
    block: np.ndarray # (B,) their square
    images: np.ndarray
    start: np.ndarray
    squares: Squares

def touched(features, bank, batch, most):
    labels = bank.labels.numpy()[:, batch]
    level = sum((bank.index(h).count[labels[h]] <= most).astype(int) for h in range(bank.n_levels)) - 1
    names, block = np.unique(np.stack([level, np.where(level < 0, 0, labels[level, np.arange(len(batch))])]), axis=1, return_inverse=True)
    sets = [bank.index(h).of(np.array([label]))[0] if h >= 0 else np.empty(0, np.int64) for h, label in names.T]
    images, start = np.concatenate(sets), np.concatenate([[0], np.cumsum([len(s) for s in sets])])
    return Touched(level, block.ravel(), images, start, squares(features, images, start))

@compiled
def places_in(images, start, block, own, begin):
    "Where images stand in their block"
    place = np.zeros_like(own)
    for c in range(len(block)):
        if block[c] >= 0: place[begin[c]:begin[c + 1]] = np.searchsorted(images[start[block[c]]:start[block[c] + 1]], own[begin[c]:begin[c + 1]])
    return place

@compiled
def units_of(lower, start):
    unit = np.empty_like(lower)
    for c in range(len(start) - 1): unit[start[c]:start[c + 1]] = first_seen(lower[start[c]:start[c + 1]])
    return unit

@patch
def split_large(self: ClusterDynamics, features, images, unit, j, similar, readings):
    "As split_cluster, for a cluster of thousands, a tile of similarities at a time"
    o, n, where = self.options, unit.max() + 1, features.device
    if n < o.min_units: return np.zeros_like(unit)
    order = unit.argsort(kind='stable')
    start = np.concatenate([[0], np.bincount(unit).cumsum()])
    rows, read = means_of(features, images[order], start), mean_readings(readings, start, images[order])
    def rows_of(some): return similarities(similar, host((rows[some] @ rows.T).float())[0], read[:, some].copy(), read)
    anchors, nearest = [j], np.full(n, -np.inf)
    while len(anchors) < min(o.n_anchors, n):
        far = next_anchor(nearest, rows_of(slice(anchors[-1], anchors[-1] + 1))[0], anchors[-1])
        if far < 0: break
        anchors.append(far)
    if len(anchors) == 1: return np.zeros_like(unit)
    tiles = [nearest_lists(rows_of(slice(i, i + 256)), i, o.k, o.split_cut) for i in range(0, n, 256)]
    ends = np.cumsum(np.concatenate([[0], *(np.diff(t.start) for t in tiles)]))
    graph = mutual(Graph(ends, *(np.concatenate(x) for x in zip(*((t.column, t.value) for t in tiles)))))
    group = split(graph, np.array(anchors), o.alpha_s)[unit]
    if o.confirm > 1 or group.max() == 0: return group
    order, start = group.argsort(kind='stable'), np.concatenate([[0], np.bincount(group).cumsum()])
    means = means_of(features, images[order], start)
    joined = average_linkage(similar, host((means @ means.T).float())[0].copy(), mean_readings(readings, start, images[order]), np.diff(start).astype(np.float32), o.confirm)
    return first_seen(joined[group])

@patch
def split_level(self: ClusterDynamics, features, bank, batch, h, similar, readings, seen):
    clusters, first = np.unique(bank.labels[h].numpy()[batch], return_index=True)
    images, start = bank.index(h).of(clusters)
    unit = units_of(bank.labels[h - 1].numpy()[images] if h else images, start)
    block = np.where(seen.level[first] < h, -1, seen.block[first])
    j = np.array([np.searchsorted(images[a:b], i) for a, b, i in zip(start, start[1:], batch[first])])
    drawn = lots(int(np.diff(start).max()), self.n_anchors, self.seed) if self.anchors == 'random' else np.empty((0, 0), np.int64)
    place = places_in(seen.images, seen.start, block, images, start)
    group = split_all(similar, seen.squares, block, place, images, start, unit, j, readings[:, images], self.options, drawn)
    for c in np.flatnonzero(block < 0):
        own = slice(start[c], start[c + 1])
        group[own] = self.split_large(features, images[own], unit[own], unit[own][j[c]], similar, readings)
    new = np.maximum.reduceat(group, start[:-1])
    fresh, off = bank.fresh(h, int(new.sum())).numpy(), group > 0
    if len(fresh): relabel(bank, h, images[off], fresh[(np.repeat(new.cumsum() - new, np.diff(start)) + group)[off] - 1])
    return len(fresh)

@patch
def merge_level(self: ClusterDynamics, features, bank, near, similarity, linked, h, similar, readings, below):
    labels, lists = bank.labels[h].numpy(), bank.index(h)
    image, start, places = candidates_around(labels, near, linked)
    if not len(image): return 0, None
    row = np.repeat(image, np.diff(start))
    found, own = near[row, places], near[image, 0]
    clusters = labels[found]
    key = image, start, places, lists.count[clusters]
    seen = below[1] if below and all(map(np.array_equal, key, below[0])) else around(features, lists, clusters, start, own, readings)
    wanted = merge_all(similar, seen, image, places, similarity, readings[:, own], self.options)
    if h + 1 < bank.n_levels:
        above = bank.labels[h + 1].numpy()
        wanted &= above[found] == above[near[row, 0]]
    return merge_clusters(bank, h, labels[near[row, 0]][wanted], clusters[wanted]), (key, seen)

def merge_clusters(bank, h, a, b):
    "Join pairs of clusters"
    if not len(a): return 0
    names, pairs = np.unique(np.stack([a, b]), return_inverse=True)
    lists = bank.index(h)
    members, start = lists.of(names)
    order = members[start[:-1]].argsort()
    rank = order.argsort()
    root = union(len(names), *rank[pairs.reshape(2, -1)])
    gone = root != np.arange(len(root))
    images, start = lists.of(names[order[gone]])
    relabel(bank, h, images, np.repeat(names[order[root[gone]]], np.diff(start)))
    return int(gone.sum())

def moved_images(bank, images, old):
    if not len(images): return 0
    names, first = np.unique(images, return_index=True)
    now = bank.labels[-1].numpy()
    members, _ = bank.index(-1).of(np.unique(np.concatenate([old[first], now[names]])))
    before = now[members]
    place = np.searchsorted(names, members).clip(max=len(names) - 1)
    before = np.where(names[place] == members, old[first][place], before)
    return round(share_moved(torch.from_numpy(before), torch.from_numpy(now[members]))*len(members))

@patch
def __call__(self: ClusterDynamics, features, label_bank, indices):
    features, indices = checked_inputs(features, label_bank, indices)
    self.check()
    bank, batch = label_bank, np.unique(indices.numpy())
    near, similarity, similar, readings = self.see(features, bank, batch)
    place, linked = follow(similarity, self.nn_mutual_k, self.cut, self.alpha_m, self.sigma)
    if self.neighbour == 'nearest': place[:] = min(1, near.shape[1] - 1)
    p = near[np.arange(len(batch)), place]
    stay = self.stays(features, bank, batch, p, similar, readings)
    p = np.where(stay, batch, p)
    splits, merges, below = [], [], None
    with bank.recording() as journal:
        take_labels(bank, batch[~stay], resolve_pointers(batch, p)[~stay])
        seen = touched(features, bank, batch, self.dense_images if self.anchors == 'farthest' else bank.n_images)
        for h in range(bank.n_levels):
            splits.append(self.split_level(features, bank, batch, h, similar, readings, seen) if self.splits else 0)
            gone, below = self.merge_level(features, bank, near, similarity, linked, h, similar, readings, below) if self.merges else (0, None)
            merges.append(gone)
    images, old = (np.concatenate(x) for x in zip(*journal))
    rejections = int(((p == batch) & ~stay).sum())
    return DynamicsReport(splits, merges, len(batch) - rejections, rejections, moved_images(bank, images, old)/bank.n_images)
