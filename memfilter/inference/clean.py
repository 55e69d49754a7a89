"""Norms of prompts that are known not to be memorized: the ground on which a generation is judged."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memfilter.files import atomic

FORMAT = "memfilter clean norms 1"


def rounded(value: float, digits: int = 7) -> float:
    """To significant digits, by default as many as fp32 holds: small norms keep as many as large ones."""
    return float(f"{value:.{digits}g}")


def mean_norm(norms: np.ndarray, steps: int | None = None, seeds: int | None = None) -> np.ndarray:
    """Over the first steps and seeds, without what could not be read: [P, seeds, S] -> [P]; NaN where nothing could."""
    chosen = norms[:, :seeds, :steps]
    there = np.isfinite(chosen).sum((1, 2))
    return np.where(there, np.nansum(chosen, (1, 2)) / np.maximum(there, 1), np.nan)


def allowed_above(false_positive_rate: float, clean: int) -> int:
    """How many of so many clean prompts may have as high a metric as one that is called memorized.

    Raises:
        ValueError: it is no rate, or there are too few clean prompts for so small a one.
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must lie between 0 and 1, found {false_positive_rate}")
    allowed = math.floor(false_positive_rate * (clean + 1) + 1e-9) - 1
    if allowed < 0:
        raise ValueError(f"a false positive rate of {false_positive_rate} needs {math.ceil(1 / false_positive_rate) - 1:,} "
                         f"clean prompts at least, there are {clean}")  # fmt: skip
    return allowed


@dataclass
class CleanNorms:
    """What a model answers to clean prompts.

    All is rounded to what a file of it holds, so that thresholds are the same before and after.

    Args:
        norms: float [prompts, seeds, steps]; NaN where a step tells nothing of the noise.
        timesteps: [steps].
        about: how they were made (weights, prompts, scheduler, steps, guidance_scale, size): a prompt that is judged by them
            must be generated alike.
        cosines: of the last step, [prompts, seeds], for the rival ``anisotropy``; None where generations were broken off.

    Raises:
        ValueError: none of the steps can be read, or a norm or cosine is not finite though others of its step are.
    """

    norms: np.ndarray
    timesteps: np.ndarray
    about: dict
    cosines: np.ndarray | None = None

    def __post_init__(self):
        self.norms = _all_rounded(self.norms)
        readable = ~np.isnan(self.norms).all((0, 1))  # [steps]
        if not readable.any():
            raise ValueError("none of the clean prompts' norms can be read")
        _require_finite("norm", self.norms[..., readable])
        if self.cosines is not None:
            self.cosines = _all_rounded(self.cosines)
            _require_finite("cosine", self.cosines)

    @property
    def first_readable(self) -> int:
        """Steps until the first whose norm can be read."""
        return int(np.isfinite(self.norms).all((0, 1)).argmax()) + 1

    def metric(self, steps: int | None = None, seeds: int | None = None) -> np.ndarray:
        """Mean norm over the first steps and seeds of each clean prompt, [prompts].

        Raises:
            ValueError: fewer seeds or steps were calibrated, or none of these steps can be read.
        """
        made = self.norms.shape[2]
        if steps is not None and steps > made or steps is None and not self.about.get("whole", True):
            raise ValueError(f"the clean prompts' generations were broken off after {made} steps, {steps or 'all'} are asked: "
                             "calibrate anew")  # fmt: skip
        if seeds is not None and seeds > self.norms.shape[1]:
            raise ValueError(f"the clean prompts have {self.norms.shape[1]} seeds each, fewer than {seeds}: a mean over fewer "
                             "is no measure of one over more, calibrate with as many")  # fmt: skip
        found = mean_norm(self.norms, steps, seeds)
        if np.isnan(found).any():
            raise ValueError(f"the norm of the first {steps} steps cannot be read, at zero terminal SNR: ask for more")
        return found

    def threshold(self, false_positive_rate: float, steps: int | None = None, seeds: int | None = None) -> float:
        """The metric from which a prompt counts as memorized: its p-value is then at most ``false_positive_rate``.

        Raises:
            ValueError: as `metric` and `allowed_above`.
        """
        clean = np.sort(self.metric(steps, seeds))[::-1]
        return float(np.nextafter(clean[allowed_above(false_positive_rate, len(clean))], np.inf))

    def p_values(self, metric: np.ndarray, steps: int | None = None, seeds: int | None = None) -> np.ndarray:
        """Conformal p-values, [n] -> [n]: (1 + clean prompts at least as high) / (1 + clean prompts).

        A prompt that is exchangeable with the clean ones has p <= a with a probability of at most a (Vovk et al.,
        "Algorithmic Learning in a Random World", 2005, Proposition 2.4).

        Raises:
            ValueError: as `metric`, or one of those that are judged is not finite.
        """
        clean, metric = np.sort(self.metric(steps, seeds)), np.asarray(metric)
        if (bad := np.flatnonzero(~np.isfinite(metric))).size:
            raise ValueError(f"the metric of prompt {bad[0]} is {metric.flat[bad[0]]}: it has no p-value")
        above = len(clean) - np.searchsorted(clean, metric, side="left")
        return (1 + above) / (1 + len(clean))

    def band(self, quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Quantiles of the norm at every step, over prompts and seeds: [len(quantiles), steps]; NaN where it cannot be read."""
        found = np.full((len(quantiles), self.norms.shape[2]), np.nan)
        readable = self.norms[..., self.first_readable - 1 :]
        found[:, self.first_readable - 1 :] = np.nanquantile(readable.reshape(-1, readable.shape[-1]), quantiles, axis=0)
        return found

    @property
    def usual(self) -> float:
        """Median norm of the first step that can be read."""
        return float(self.band((0.5,))[0, self.first_readable - 1])

    def spread(self, seeds: int | None = None) -> tuple[float, float]:
        """Standard deviation over clean prompts of the first norm and of the last cosine, means over the first seeds; over all
        where fewer were calibrated.

        Raises:
            ValueError: there are no cosines, or no spread.
        """
        if self.cosines is None:
            raise ValueError("the clean prompts' generations were broken off, anisotropy asks for whole ones: calibrate anew")
        first = self.norms[..., self.first_readable - 1]
        found = float(first[:, :seeds].mean(1).std()), float(self.cosines[:, :seeds].mean(1).std())
        if not all(found):
            raise ValueError(f"the {len(self.norms)} clean prompts do not differ, anisotropy asks for a spread among them: name more")
        return found

    def require(self, about: dict) -> None:
        """Raises ValueError where a generation is made in another way than the clean ones were."""
        differ = [f"{name} {self.about.get(name)} and {value}" for name, value in about.items() if self.about.get(name) != value]
        if differ:
            raise ValueError(f"the clean prompts were generated otherwise: {'; '.join(differ)}. Calibrate anew")

    def save(self, path: str | os.PathLike) -> None:
        content = {"format": FORMAT, "about": self.about, "timesteps": self.timesteps.tolist(), "norms": _listed(self.norms)}
        if self.cosines is not None:
            content["cosines"] = _listed(self.cosines)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> CleanNorms:
        """Raises ValueError where there is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"it is no file of format {FORMAT!r}")
            norms, timesteps = (np.array(content[name], dtype=float) for name in ("norms", "timesteps"))
            if norms.ndim != 3 or not norms.size or norms.shape[2:] != timesteps.shape:
                raise ValueError(f"norms {list(norms.shape)} and timesteps {list(timesteps.shape)} do not fit")
            cosines = None if content.get("cosines") is None else np.array(content["cosines"], dtype=float)
            if cosines is not None and cosines.shape != norms.shape[:2]:
                raise ValueError(f"norms {list(norms.shape)} and cosines {list(cosines.shape)} do not fit")
            about = content["about"]
            if not isinstance(about, dict):
                raise ValueError("about is no object")
            return cls(norms, timesteps, about, cosines)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: no norms of clean prompts ({' '.join(str(error).split())})") from error


def _all_rounded(values: np.ndarray) -> np.ndarray:
    return np.vectorize(rounded, otypes=[float])(np.asarray(values, dtype=float))


def _require_finite(what: str, values: np.ndarray) -> None:
    """[prompts, seeds, ...]"""
    if len(bad := np.argwhere(~np.isfinite(values))):
        raise ValueError(f"clean prompt {bad[0][0]}, seed {bad[0][1]}: a {what} is not finite")


def _listed(values: np.ndarray) -> list:
    """For JSON, which has no NaN."""
    return np.where(np.isnan(values), None, values.astype(object)).tolist()
