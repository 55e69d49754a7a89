"""Copy similarity, and from where on a picture counts as a copy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from memfilter.data import scenes

MEASURE = "pixel correlation"  # the name under which figures are reported


def copy_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of two pictures over all pixels: uint8 [..., H, W, 3] twice -> [...] in [-1, 1].

    Every channel's mean is removed first, or the colour of the background, which the caption names, would count as
    likeness. A flat picture correlates with nothing: 0.
    """
    a, b = (x.astype(np.float32) for x in (a, b))
    a, b = (x - x.mean((-3, -2), keepdims=True) for x in (a, b))
    a, b = (x.reshape(*x.shape[:-3], -1) for x in (a, b))
    scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


@lru_cache
def memorized_above(captions: int = 300, pictures: int = 20, seed: int = 20261122) -> float:
    """The 99.9% quantile of copy similarity between different pictures of the same caption.

    A generation that is closer than this to the training picture of its caption counts as memorized.

    Args:
        captions, pictures: so many captions with so many pictures each; all pairs of one caption are compared.
        seed: of the scenes, which no model was trained on.
    """
    similarities = []
    for i in range(captions):
        scene = scenes.draw(seed, scenes.SAME_CAPTION, i)
        drawn = scenes.pixels([scenes.vary(scene, seed, scenes.VARIATIONS, i * pictures + j) for j in range(pictures)])
        first, second = np.triu_indices(pictures, 1)
        similarities.append(copy_similarity(drawn[first], drawn[second]))
    return float(np.quantile(np.concatenate(similarities), 0.999))


def seed_agreement(generations: np.ndarray) -> np.ndarray:
    """Mean similarity over all pairs of one prompt's generations: uint8 [P, S, H, W, 3] -> [P]."""
    first, second = np.triu_indices(generations.shape[1], 1)
    return copy_similarity(generations[:, first], generations[:, second]).mean(1)
