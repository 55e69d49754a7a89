"""The nearest of all training pictures to each generation (DCR's top-1: Somepalli et al., CVPR 2023)."""

from __future__ import annotations

import numpy as np

from memfilter.eval.copies import Measure
from memfilter.eval.parts import Parts
from memfilter.eval.runs import FinishedRun

BLOCK, BYTES = 4096, 2**28  # pictures, and bytes of their features, that are held at once


def nearest(
    generations: np.ndarray, run: FinishedRun, measure: Measure, parts: Parts, progress: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Compares every generation with every training picture, as `FinishedRun.views` has them, by faiss, a block of them at a time.

    The processes share the blocks, and every one of them calls.

    Args:
        generations: uint8 [N, side, side, 3].

    Returns:
        The highest similarity float32 [N], the row of its training picture in the run's index int [N] (the first of
        equals), and how many training pictures could not be read.

    Raises:
        ValueError: none could be read.
    """
    made, side, total = measure.features(generations), generations.shape[1], len(run.experiment.keys)
    block = min(BLOCK, max(64, BYTES // made[0].nbytes)) // (1 + run.config.data.random_flip)  # twice as many views

    def work(number: int) -> dict[str, np.ndarray]:
        import faiss

        index, rows = faiss.IndexFlatIP(made.shape[1]), [np.empty(0, int)]
        for found, pictures in run.pictures(range(number * block, min((number + 1) * block, total)), side):
            for view in run.views(pictures):
                index.add(measure.features(view))
                rows.append(found)
        rows = np.concatenate(rows)
        if not len(rows):
            return {"similarity": np.full(len(made), -np.inf, np.float32), "row": np.full(len(made), -1), "read": rows}
        similarity, place = (found[:, 0] for found in index.search(made, 1))
        return {"similarity": similarity, "row": rows[place], "read": np.unique(rows)}

    found = parts.run(-(-total // block), work, progress)
    if not (read := sum(len(part["read"]) for part in found)):
        raise ValueError("no training picture of the run can be read")
    similarity, row = (np.stack([part[name] for part in found]) for name in ("similarity", "row"))  # [blocks, N]
    best = similarity.argmax(0)[None]
    return np.take_along_axis(similarity, best, 0)[0], np.take_along_axis(row, best, 0)[0], total - read
