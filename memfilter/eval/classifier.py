"""The filter judged as a classifier of duplicates, from the audit of a run that knows them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

COLUMNS = ("position", "duplicate", "timestep", "text_norm", "keep", "p_value", "evidence", "skipped")
SCORES = ("norm", "evidence", "1 - p")
MAX_FPR = 0.01
BIN = 100  # timesteps
PERIODS = 3
ROC_POINTS = 200


def tpr_at_fpr(fpr: np.ndarray, tpr: np.ndarray, limit: float = MAX_FPR) -> float:
    """The true positive rate at the last threshold whose false positive rate is below the limit, strictly, as in the
    paper's code (others take the nearest). Equal scores are decided alike: a tie that reaches the limit is left out.
    """
    return float(tpr[np.flatnonzero(fpr < limit)[-1]])


def roc(duplicate: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from none flagged to all: bool [N], float [N] -> [T] each."""
    from sklearn.metrics import roc_curve

    # intermediate points are kept: one of them may be the last below 1%
    return roc_curve(duplicate, score, drop_intermediate=False)[:2]


def quality(duplicate: np.ndarray, score: np.ndarray) -> dict | None:
    """AUC and TPR at 1% FPR of a score, and of how many samples; None where one kind is missing."""
    if duplicate.all() or not duplicate.any():
        return None
    from sklearn.metrics import auc

    fpr, tpr = roc(duplicate, score)
    counts = {"duplicates": int(duplicate.sum()), "distinct": int((~duplicate).sum())}
    return {"auc": float(auc(fpr, tpr)), "tpr_at_1pct_fpr": tpr_at_fpr(fpr, tpr)} | counts


def decision_quality(duplicate: np.ndarray, dropped: np.ndarray) -> dict | None:
    """`quality` of what was dropped, with its precision and recall; precision is None where nothing was."""
    if (found := quality(duplicate, dropped.astype(float))) is None:
        return None
    hits, count = int((dropped & duplicate).sum()), int(dropped.sum())
    rates = {"precision": hits / count if count else None, "recall": hits / int(duplicate.sum())}
    return rates | {"false_positive_rate": float(dropped[~duplicate].mean())} | found


def judge(audit: Path, samples: int) -> dict | None:
    """How well a run told duplicates from others: its decisions, and each score by itself.

    Decisions are those about every row of the audit that was not excluded as unreadable; samples that were passed over
    count as dropped. A score is judged on the rows that have it: of the norm, those with a null pass.

    Args:
        audit: audit.parquet of a run.
        samples: of the run, by which it is parted into thirds.

    Returns:
        ``whole``: decisions and each of `SCORES` (None where it cannot be told), and ``roc`` of each, some `ROC_POINTS`
        points of the curve; ``thirds`` and ``timesteps``: the same without roc, with ``from`` and ``to``. None where
        the audit knows no duplicates.
    """
    known = set(pq.read_schema(audit).names)
    table = pq.read_table(audit, columns=[name for name in COLUMNS if name in known], partitioning=None)
    if "skipped" in table.column_names:
        table = table.filter(pc.fill_null(pc.not_equal(table["skipped"], "excluded"), True))
    if not len(table) or table["duplicate"].null_count:
        return None

    def numbers(name: str) -> np.ndarray:
        """NaN where there is none."""
        return table[name].to_numpy().astype(np.float64) if name in table.column_names else np.full(len(table), np.nan)

    duplicate, dropped = table["duplicate"].to_numpy().astype(bool), ~table["keep"].to_numpy().astype(bool)
    if duplicate.all() or not duplicate.any():
        return None
    scores = dict(zip(SCORES, (numbers("text_norm"), numbers("evidence"), 1 - numbers("p_value")), strict=True))
    position, timestep = numbers("position"), numbers("timestep")

    def judged(rows: np.ndarray) -> dict:
        found = {"decisions": decision_quality(duplicate[rows], dropped[rows])}
        for name, score in scores.items():
            there = rows & ~np.isnan(score)
            found[name] = quality(duplicate[there], score[there])
        return found

    whole = judged(np.ones(len(table), bool))
    curves = {
        name: _thinned(*roc(duplicate[~np.isnan(score)], score[~np.isnan(score)]))
        for name, score in {"decisions": dropped.astype(float), **scores}.items()
        if whole[name]
    }
    edges = [round(samples * i / PERIODS) for i in range(PERIODS + 1)]
    thirds = [
        {"from": low, "to": high} | judged((position >= low) & (position < high)) for low, high in pairwise(edges)
    ]
    bins = [
        {"from": low, "to": low + BIN} | judged((timestep >= low) & (timestep < low + BIN))
        for low in range(0, int(timestep.max()) + 1, BIN)
    ]
    return {"whole": whole | {"roc": curves}, "thirds": thirds, "timesteps": bins}


def _thinned(fpr: np.ndarray, tpr: np.ndarray) -> dict:
    """Points of a curve: all, or those that share out its length evenly."""
    length = fpr + tpr  # from 0 to 2, and never falls
    places = np.unique(np.searchsorted(length, np.linspace(0, 2, ROC_POINTS), side="right") - 1)
    places = np.unique([0, *places, len(fpr) - 1]) if len(fpr) > ROC_POINTS else np.arange(len(fpr))
    return {"fpr": fpr[places].round(6).tolist(), "tpr": tpr[places].round(6).tolist()}
