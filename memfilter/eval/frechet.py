"""Distances between two sets of pictures by their features: Frechet (Heusel et al., NeurIPS 2017) and kernel (KID,
Binkowski et al., ICLR 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

SUBSET = 1000  # pictures in a subset of KID
MOST_FEATURES = 4096  # the eigenvalues of the Frechet distance take their third power in time


def distances(
    extract: Callable[[np.ndarray], np.ndarray], generated: np.ndarray, training: Iterable[np.ndarray], seed: int = 0
) -> dict:
    """Frechet distance and KID of generated pictures from training pictures.

    Both depend on the features, and the Frechet distance on the number of pictures too: compare figures of the same
    features and counts.

    Args:
        extract: features of pictures, uint8 [N, H, W, 3] -> float32 [N, D].
        generated: uint8 [N, H, W, 3].
        training: batches of the same.
        seed: of the subsets of KID, of `SUBSET` pictures or as many as there are of both.

    Returns:
        ``frechet_distance``, ``kid`` and its standard deviation over subsets ``kid_std``, and the numbers of pictures
        ``generated`` and ``training``.

    Raises:
        ValueError: fewer than two pictures on a side.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    module = nn.Identity()  # both metrics take the features, which are extracted once
    module.num_features = extract(generated[:1]).shape[1]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that KID keeps all features
        # one process has all the pictures: the others would be waited for
        frechet, kernel = (
            kind(feature=module, sync_on_compute=False) for kind in (FrechetInceptionDistance, KernelInceptionDistance)
        )
    counts = {"generated": 0, "training": 0}

    def update(kind: str, pictures: np.ndarray) -> None:
        counts[kind] += len(pictures)
        features = torch.from_numpy(extract(pictures)).double()  # KID subtracts sums that are nearly alike
        for metric in (frechet, kernel):
            metric.update(features, real=kind == "training")

    for start in range(0, len(generated), 64):
        update("generated", generated[start : start + 64])
    for batch in training:
        update("training", batch)
    if min(counts.values()) < 2:
        raise ValueError(f"a distance needs two pictures on either side, found {counts['generated']} generated and "
                         f"{counts['training']} training")  # fmt: skip
    kernel.subset_size = min(SUBSET, *counts.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kid, deviation = kernel.compute()
    return {"frechet_distance": frechet.compute().item(), "kid": kid.item(), "kid_std": deviation.item()} | counts
