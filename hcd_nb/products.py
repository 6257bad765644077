"""What the device multiplies for an update: neighbourhoods, squares of cosines, and clusters as wholes"""
from typing import NamedTuple
import numpy as np
import torch
from torch.nn.functional import embedding_bag
from .checks import check_norms, feature_rows
from .members import compiled
from .neighbors import cosines_within, knn
# ---- what the device multiplies
def host(*tensors): # the widest type first
    "Arrays in main memory, with one wait for the device"
    if all(x.device.type == 'cpu' for x in tensors): return [x.numpy() for x in tensors]
    flat = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in tensors]).to('cpu', non_blocking=True)
    if flat.is_pinned(): torch.cuda.current_stream(tensors[0].device).synchronize()
    parts = flat.split([x.numel()*x.element_size() for x in tensors])
    return [part.view(x.dtype).view(x.shape).numpy() for part, x in zip(parts, tensors)]

def neighbourhoods(features, images, k, columns=()):
    "nearest rows, cosines among them, cosines with some columns"
    images, columns = (torch.as_tensor(x, dtype=torch.int64, device=features.device) for x in (images, columns))
    rows, wide = features[images], torch.promote_types(features.dtype, torch.float32)
    near = knn(rows, features, min(k, len(features)), own=images, check=False)[1]
    found = rows.to(wide) @ features[columns].to(wide).T
    near, cosines, found = host(near, cosines_within(features, near).float(), found.float())
    try: check_norms(torch.from_numpy(np.sqrt(np.diagonal(cosines, 0, 1, 2)).ravel()), rows=torch.from_numpy(near.ravel()))
    except ValueError: feature_rows(features); raise
    return near, cosines, found

class Squares(NamedTuple):
    "Cosines among the rows of several sets"
    offset: np.ndarray  # (S,) int64, where the square of each set begins
    width: np.ndarray   # (S,) int64, the length of its rows
    cosines: np.ndarray # float32

def squares(rows, sets, start): # sets (T,) int64 rows, one set after the other; start (S+1,)
    size, stacks = np.diff(start), []
    offset, end = np.zeros_like(size), 0
    width = np.ones_like(size)
    for low, high in zip((1, 8, 16, 32, 64, 128, 256), (8, 16, 32, 64, 128, 256, size.max(initial=0))):
        some = np.flatnonzero((size > low) & (size <= high))
        if not len(some): continue
        n = size[some].max()
        place = np.minimum(start[some, None] + np.arange(n), start[some + 1, None] - 1)
        stacks.append(cosines_within(rows, torch.from_numpy(sets[place])).float().flatten())
        offset[some], width[some] = end + n*n*np.arange(len(some)), n
        end += n*n*len(some)
    return Squares(offset, width, host(torch.cat(stacks))[0] if stacks else np.empty(0, np.float32))

@compiled
def square(squares, s, places):
    "Cosines among some rows of a set"
    out = np.empty((len(places), len(places)), np.float32)
    for a in range(len(places)):
        for b in range(len(places)): out[a, b] = squares.cosines[squares.offset[s] + places[a]*squares.width[s] + places[b]]
    return out

def means_of(features, images, start):
    "Mean rows of clusters"
    images, start = (torch.as_tensor(x, device=features.device) for x in (images, start))
    wide = torch.promote_types(features.dtype, torch.float32)
    if hasattr(features, 'fetch') or features.dtype != wide: features, images = features[images].to(wide), torch.arange(len(images), device=images.device)
    return embedding_bag(images, features, start[:-1], mode='mean')

@compiled
def mean_readings(read, start, members):
    out = np.zeros((2, len(start) - 1))
    for c in range(len(start) - 1):
        for i in members[start[c]:start[c + 1]]: out[:, c] += read[:, i]
        out[:, c] /= start[c + 1] - start[c]
    return out.astype(np.float32)

class Around(NamedTuple):
    "Some images, and clusters around each"
    start: np.ndarray    # (R + 1,) int64, where the clusters of each image begin
    squares: Squares     # mean cosines among the clusters of an image, and with the image itself, which is last
    size: np.ndarray     # (T,) float32 images of each cluster
    readings: np.ndarray # (2, T) float32 their mean readings

def around(features, lists, labels, start, images, readings):
    "What the clusters around images are as wholes"
    names, node = np.unique(labels, return_inverse=True)
    members, begin = lists.of(names)
    own = features[torch.as_tensor(images, device=features.device)]
    means = means_of(features, members, begin)
    sets, image = np.insert(node, start[1:], len(names) + np.arange(len(images))), np.arange(len(start))
    sq = squares(torch.cat([means, own.to(means.dtype)]), sets, start + image)
    return Around(start, sq, np.diff(begin)[node].astype(np.float32), mean_readings(readings, begin, members)[:, node])

