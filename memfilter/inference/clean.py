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


@dataclass
class CleanNorms:
    """What a model answers to clean prompts.

    Args:
        norms: float [prompts, seeds, steps].
        timesteps: [steps].
        about: how they were made (model, scheduler, steps, guidance_scale, size, unit): a prompt that is judged by them must
            be generated alike.
    """

    norms: np.ndarray
    timesteps: np.ndarray
    about: dict

    def metric(self, steps: int | None = None, seeds: int | None = None) -> np.ndarray:
        """Mean norm over the first steps and seeds of each clean prompt, [prompts].

        Raises:
            ValueError: fewer seeds or steps were calibrated.
        """
        made = self.norms.shape[2]
        if steps is not None and steps > made or steps is None and not self.about.get("whole", True):
            raise ValueError(f"the clean prompts' generations were broken off after {made} steps, {steps or 'all'} are asked: "
                             "calibrate anew")  # fmt: skip
        if seeds is not None and seeds > self.norms.shape[1]:
            raise ValueError(f"the clean prompts have {self.norms.shape[1]} seeds each, fewer than {seeds}: a mean over fewer "
                             "is no measure of one over more, calibrate with as many")  # fmt: skip
        return np.nanmean(self.norms[:, :seeds, :steps], axis=(1, 2))

    def threshold(self, false_positive_rate: float, steps: int | None = None, seeds: int | None = None) -> float:
        """The metric from which a prompt counts as memorized: its p-value is then at most ``false_positive_rate``.

        Raises:
            ValueError: it is no rate, or there are too few clean prompts for so small a one.
        """
        if not 0 < false_positive_rate < 1:
            raise ValueError(f"false_positive_rate must lie between 0 and 1, found {false_positive_rate}")
        clean = np.sort(self.metric(steps, seeds))[::-1]
        allowed = math.floor(false_positive_rate * (len(clean) + 1) + 1e-9) - 1  # so many clean prompts may be as high
        if allowed < 0:
            raise ValueError(f"a false positive rate of {false_positive_rate} needs {math.ceil(1 / false_positive_rate) - 1:,} "
                             f"clean prompts at least, there are {len(clean)}")  # fmt: skip
        return float(np.nextafter(clean[allowed], np.inf))

    def p_values(self, metric: np.ndarray, steps: int | None = None, seeds: int | None = None) -> np.ndarray:
        """Conformal p-values, [n] -> [n]: (1 + clean prompts at least as high) / (1 + clean prompts).

        A prompt that is exchangeable with the clean ones has p <= a with a probability of at most a (Vovk et al.,
        "Algorithmic Learning in a Random World", 2005, Proposition 2.4).
        """
        clean = np.sort(self.metric(steps, seeds))
        above = len(clean) - np.searchsorted(clean, np.asarray(metric), side="left")
        return (1 + above) / (1 + len(clean))

    def band(self, quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Quantiles of the norm at every step, over prompts and seeds: [len(quantiles), steps]."""
        return np.nanquantile(self.norms.reshape(-1, self.norms.shape[2]), quantiles, axis=0)

    def require(self, about: dict) -> None:
        """Raises ValueError where a generation is made in another way than the clean ones were."""
        differ = [f"{name} {self.about.get(name)} and {value}" for name, value in about.items() if self.about.get(name) != value]
        if differ:
            raise ValueError(f"the clean prompts were generated otherwise: {'; '.join(differ)}. Calibrate anew")

    def save(self, path: str | os.PathLike) -> None:
        content = {"format": FORMAT, "about": self.about, "timesteps": self.timesteps.tolist(),
                   "norms": np.round(self.norms.astype(float), 6).tolist()}  # fmt: skip
        with atomic(Path(path)) as partial:
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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no norms of clean prompts ({' '.join(str(error).split())})") from error
        return cls(norms, timesteps, content["about"])
