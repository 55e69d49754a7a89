"""Copy similarity by named measures, and from where on a picture counts as a copy.

    python -m memfilter.eval.copies --out memfilter/assets/limits.json

computes the limits on clipart scenes that come with the package.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from memfilter.data import scenes

MEASURE = "pixel correlation"  # the name under which figures are reported
SLICE = 64  # pictures that are averaged down at once


class Measure(ABC):
    """How alike pictures are: the dot product of their features.

    Attributes:
        name: under which figures are reported.
        also_above: similarities whose share is reported beside the memorization rate.
    """

    name: str
    also_above: tuple[float, ...] = ()

    def features(self, pictures: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """uint8 [..., H, W, 3] -> float32 [..., D] of unit length; 0 where there is nothing to see."""
        flat = pictures.reshape(-1, *pictures.shape[-3:])
        found = [self._features(flat[start : start + batch_size]) for start in range(0, len(flat), batch_size)]
        return np.concatenate(found).reshape(*pictures.shape[:-3], -1)

    @abstractmethod
    def _features(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> float32 [N, D] of unit length."""

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of two pictures: uint8 [..., H, W, 3] twice -> [...] in [-1, 1]."""
        return self.similarity_seen(self.seen(a), self.seen(b))

    def pairs(self, pictures: np.ndarray) -> np.ndarray:
        """Of every two of N pictures: uint8 [..., N, H, W, 3] -> [..., N (N - 1) / 2]."""
        return self.pairs_seen(self.seen(pictures))

    def seen(self, pictures: np.ndarray) -> np.ndarray:
        """What is compared of pictures, to be kept where they are compared more than once: uint8 [..., H, W, 3] -> [..., *]."""
        return self.features(pictures)

    def similarity_seen(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`similarity` of what `seen` gives."""
        return (a * b).sum(-1)

    def pairs_seen(self, seen: np.ndarray) -> np.ndarray:
        """`pairs` of what `seen` gives."""
        return _pairs(seen)

    def memorized_above(self, side: int) -> float | None:
        """From which similarity on a picture of so many pixels a side is a copy; None where that must be calibrated."""
        return None

    def facts(self) -> dict:
        """What decides its figures, to be written down."""
        return {"measure": self.name}


class PixelCorrelation(Measure):
    """`copy_similarity`, of pictures that are averaged down to ``side`` pixels where they are larger."""

    name = MEASURE

    def __init__(self, side: int = 64):
        self.side = side

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        pixels = _centred(self.seen(pictures))
        scale = np.linalg.norm(pixels, axis=-1, keepdims=True)
        return np.divide(pixels, scale, out=np.zeros_like(pixels), where=scale > 0)

    # pictures, averaged down: to the last bit what evaluations have always compared, which features, divided first, are not
    def seen(self, pictures: np.ndarray) -> np.ndarray:
        height, width = pictures.shape[-3:-1]
        if (longest := max(height, width)) <= self.side:
            return pictures
        size = [max(1, round(length * self.side / longest)) for length in (height, width)]
        flat = np.ascontiguousarray(pictures).reshape(-1, height, width, 3)
        found = np.empty((len(flat), *size, 3), np.float32)
        for start in range(0, len(flat), SLICE):  # in fp32 all of them would be four times what they are
            pixels = torch.from_numpy(flat[start : start + SLICE]).permute(0, 3, 1, 2).float()
            found[start : start + SLICE] = F.interpolate(pixels, size, mode="area").permute(0, 2, 3, 1).numpy()
        return found.reshape(*pictures.shape[:-3], *size, 3)

    def similarity_seen(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return copy_similarity(a, b)

    def pairs_seen(self, seen: np.ndarray) -> np.ndarray:
        first, second = np.triu_indices(seen.shape[-4], 1)
        # one prompt's at a time: there are many more pairs than pictures
        found = [copy_similarity(own[first], own[second]) for own in seen.reshape(-1, *seen.shape[-4:])]
        return np.stack(found).reshape(*seen.shape[:-4], -1)

    def facts(self) -> dict:
        return {"measure": self.name, "side": self.side}


PIXELS = PixelCorrelation()


def copy_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of two pictures over all pixels: uint8 [..., H, W, 3] twice -> [...] in [-1, 1].

    Every channel's mean is removed first, or the colour of the background, which the caption names, would count as
    likeness. A flat picture correlates with nothing: 0.
    """
    a, b = _centred(a), _centred(b)
    scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def _centred(pictures: np.ndarray) -> np.ndarray:
    """[..., H, W, 3] -> float32 [..., 3 H W], every channel with mean 0."""
    pixels = pictures.astype(np.float32)
    pixels = pixels - pixels.mean((-3, -2), keepdims=True)
    return pixels.reshape(*pixels.shape[:-3], -1)


CAPTIONS, PICTURES, SEED = 300, 20, 20261122  # of the limits on clipart scenes
SHIPPED = (32, 64)  # pixels at which these come with the package


@lru_cache
def memorized_above(
    captions: int = CAPTIONS,
    pictures: int = PICTURES,
    seed: int = SEED,
    measure: Measure = PIXELS,
    resolution: int = scenes.RESOLUTION,
) -> float:
    """The 99.9% quantile of copy similarity between different pictures of the same caption, on clipart scenes.

    A generation that is closer than this to the training picture of its caption counts as memorized. What is usual comes with
    the package, anything else is computed.

    Args:
        captions, pictures: so many captions with so many pictures each; all pairs of one caption are compared.
        seed: of the scenes, which no model was trained on.
        resolution: of the pictures, in pixels.
    """
    if (captions, pictures, seed) == (CAPTIONS, PICTURES, SEED) and measure is PIXELS and resolution in SHIPPED:
        shipped = json.loads((files("memfilter") / "assets" / "limits.json").read_text(encoding="utf-8"))
        return shipped["memorized_above"][str(resolution)]
    return compute_memorized_above(captions, pictures, seed, measure, resolution)


def compute_memorized_above(captions: int, pictures: int, seed: int, measure: Measure, resolution: int) -> float:
    """`memorized_above`, from the pictures."""
    similarities = []
    for i in range(captions):
        scene = scenes.draw(seed, scenes.SAME_CAPTION, i)
        drawn = [scenes.vary(scene, seed, scenes.VARIATIONS, i * pictures + j) for j in range(pictures)]
        similarities.append(measure.pairs(scenes.pixels(drawn, resolution)))
    return float(np.quantile(np.concatenate(similarities), 0.999))


def distinct_above(features: np.ndarray) -> float:
    """The 99.9% quantile of copy similarity between pictures of different captions, of unit features [N, D]."""
    return float(np.quantile(_pairs(features), 0.999))


def seed_agreement(seen: np.ndarray, measure: Measure = PIXELS) -> np.ndarray:
    """Mean similarity over all pairs of one prompt's generations, of what the measure has `seen` of them: [P, S, *] -> [P]."""
    return measure.pairs_seen(seen).mean(-1)


def _pairs(features: np.ndarray) -> np.ndarray:
    """Dot products of every two of N features: [..., N, D] -> [..., N (N - 1) / 2]."""
    return (features @ features.swapaxes(-1, -2))[..., *np.triu_indices(features.shape[-2], 1)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the file")
    out = parser.parse_args(argv).out
    limits = {str(side): compute_memorized_above(CAPTIONS, PICTURES, SEED, PIXELS, side) for side in SHIPPED}
    settings = {"captions": CAPTIONS, "pictures": PICTURES, "seed": SEED} | PIXELS.facts()
    origin = {"made_by": "python -m memfilter.eval.copies"} | settings
    out.write_text(json.dumps(origin | {"memorized_above": limits}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
