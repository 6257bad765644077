"""Similarity"""
from typing import NamedTuple
import numpy as np
from .members import compiled
from .neighbors import evenly
from .products import neighbourhoods

class Similarity(NamedTuple):
    "What stands for the cosine: c' and what it knows of a bank, or the cosine itself"
    calibrated: bool
    b: np.float32
    r: np.float32
    loud: np.float32
    edge: np.float32
    joining: np.float32

COSINE = Similarity(False, *np.float32([0, 1, 0, 0, 0]))

def calibrated(b, loudest, r):
    r = max(r, 1e-3, (loudest - b)/.9)
    loud = max(loudest - b, 0.)/r
    floor = lambda most: loud/(loud + most*(1 - loud)) if loud else 0.
    return Similarity(True, *np.float32([b, r, loud, floor(.4), floor(.55)]))

@compiled
def _level(similar, cosine, share, spread): # c' for a share of reaches; all float32
    zero, one = np.float32(0), np.float32(1)
    level = min(max(((cosine - similar.b)/(similar.r*share) - similar.loud)/(one - similar.loud), zero), one)
    return level*min(np.sqrt(spread/max(one - cosine, np.float32(1e-4))), one)

@compiled
def similarities(similar, cosines, a, b):
    "The similarity of rows with readings a and b"
    out = cosines.copy()
    if not similar.calibrated: return out
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = _level(similar, cosines[i, j], max(a[0, i]*b[0, j], similar.edge), a[1, i]*b[1, j])
    return out

@compiled
def links(similar, cosines, read, size):
    "The links of clusters"
    out = cosines.copy()
    if not similar.calibrated: return out
    for i in range(len(out)):
        for j in range(len(out)):
            share = max(max(read[0, i]*read[0, j], similar.joining), np.float32(1)/np.sqrt(max(size[i]*size[j], np.float32(1))))
            out[i, j] = _level(similar, cosines[i, j], share, read[1, i]*read[1, j])
    return out

@compiled
def kin(cosines, loudest):
    "Places of the rows of one kind with the first; whether the image is sure of them; whether they end here"
    k = len(cosines)
    votes, score = np.zeros(k), np.zeros(k)
    for p in range(1, min(9, k)): votes[p] = max(cosines[0, p] - loudest, 0.)**2
    for q in range(1, k):
        for p in range(1, min(9, k)):
            if p != q: score[q] += votes[p]*(cosines[p, q] - loudest)
        score[q] /= max(votes.sum() - votes[q], 1e-9)
    best = np.argsort(-score, kind='mergesort')[:16]
    enough = .6*score[best[:3]].mean()
    alike, heard = (score >= enough) & (score > 0), votes[score >= enough].sum()
    places = best[alike[best]]
    return places, heard >= .7*max(votes.sum(), 1e-9) and len(places) > 1, alike.sum() <= 7*(k - 1)/8

class KinLevels(NamedTuple):
    "What neighbourhoods tell of images and their kin"
    own: np.ndarray   # (B,) how far an image stands above the background with its kin
    among: np.ndarray # (B,) and its kin among themselves
    sure: np.ndarray  # (B,) bool, whether it is sure of its kin
    ends: np.ndarray  # (B,) bool, whether its kin end in the neighbourhood

@compiled
def kin_levels(cosines, b, loudest):
    "How far images stand above the background with their kin, and these among themselves"
    own, among = np.zeros(len(cosines)), np.zeros(len(cosines))
    sure, ends = np.zeros(len(cosines), np.bool_), np.zeros(len(cosines), np.bool_)
    for i in range(len(cosines)):
        places, sure[i], ends[i] = kin(cosines[i], loudest)
        for p in places:
            own[i] += (cosines[i, 0, p] - b)/len(places)
            for q in places:
                if p != q: among[i] += (cosines[i, p, q] - b)/(len(places)*(len(places) - 1))
        sure[i] &= own[i] > 0
    return KinLevels(own, among, sure, ends)

def readings_of(levels, b, r): # (2, B)
    "Reach and spread of images"
    own, among, sure, ends = levels
    reach = (own/np.sqrt(np.maximum(r*np.maximum(among, 1e-6), 1e-12))).clip(.2, 2)
    spread = np.sqrt((1 - b - own*(sure & ends)).clip(1e-3, 2))
    return np.stack([np.where(sure & (among > r/2), reach, 1), spread]).astype(np.float32)

def kin_level(levels, b):
    "How far images of one person stand above the background: r"
    known = np.sort(levels.among[levels.sure])
    return float(known[(len(known) - 1)//2]) if len(known) else 1 - b

def background(found, near, columns):
    "Median and 90th percentile of cosines with strangers"
    strangers = ~(near[:, :17, None] == columns).any(1)
    some = strangers.any()
    found = np.sort(found[strangers] if some else found.ravel())
    middle, loud = (float(found[len(found)*tenths//10]) for tenths in (5, 9))
    return middle, loud if some else middle

def calibrate(features, images, k):
    "near, cosines; b, loudest, r; levels"
    columns = evenly(len(features), 256).numpy()
    near, cosines, found = neighbourhoods(features, images, k, columns)
    b, loudest = background(found, near, columns)
    levels = kin_levels(cosines, b, loudest)
    return near, cosines, (b, loudest, kin_level(levels, b)), levels
