"""What a model says of clean keys, before it is fine-tuned: the file that `memfilter calibrate` makes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memfilter.reference import SIGNALS, Reference

FORMAT = "memfilter calibration 1"


class CalibrationError(ValueError):
    """A calibration cannot be read, or is of another model."""


@dataclass
class Calibration:
    """Signals of clean keys that were each looked at several times, with weights at rest.

    Args:
        timesteps: [keys, looks].
        signals: [keys, looks, len(SIGNALS)].
        about: what they were measured with: prediction_type, resolution, unit, num_train_timesteps, and a name of the model.
    """

    timesteps: Tensor
    signals: Tensor
    about: dict[str, str | int]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Raises CalibrationError where there is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["signals"] != list(SIGNALS):
                raise ValueError(f"expected {FORMAT!r} of {', '.join(SIGNALS)}")
            values = torch.tensor(content["values"], dtype=torch.float32)
            timesteps, end = torch.tensor(content["timesteps"]), content["about"]["num_train_timesteps"]
            if timesteps.is_floating_point() or not isinstance(end, int) or not ((timesteps >= 0) & (timesteps < end)).all():
                raise ValueError(f"its timesteps are no whole numbers below num_train_timesteps={end}")
            if values.shape != (*timesteps.shape, len(SIGNALS)) or timesteps.ndim != 2 or not values.isfinite().all():
                raise ValueError(f"{tuple(values.shape)} values for {tuple(timesteps.shape)} timesteps")
            return cls(timesteps, values, dict(content["about"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CalibrationError(f"filter.calibration: {path} is no calibration ({error}): make one with "
                                   "`memfilter calibrate`") from error  # fmt: skip

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        rounded = [[[float(f"{v:.5g}") for v in look] for look in key] for key in self.signals.tolist()]
        content = {"format": FORMAT, "about": self.about, "signals": SIGNALS, "timesteps": self.timesteps.tolist()}
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(content | {"values": rounded}), encoding="utf-8")
        os.replace(partial, path)

    def require(self, **about: str | int) -> None:
        """Raises CalibrationError with everything in which the calibration is of something else."""
        reasons = [f"{name} {self.about.get(name)!r}, the run has {wanted!r}" for name, wanted in about.items()
                   if self.about.get(name) != wanted]  # fmt: skip
        if reasons:
            raise CalibrationError(f"filter.calibration was made with {'; '.join(reasons)}: make another one")

    @property
    def _for_reference(self) -> int:
        return max(1, len(self.timesteps) // 3)

    def reference(self, size: int = 64) -> Reference:
        """Of the first third of the keys."""
        reference = Reference(size, num_train_timesteps=int(self.about["num_train_timesteps"]))
        part = slice(0, self._for_reference)
        # look by look: no bin shall be filled by the last keys alone, and what is recent come from many keys; twice, for the
        # first are scored when there is nothing yet to be scored by
        for _ in range(2):
            reference.add(self.timesteps[part].T.flatten(), self.signals[part].transpose(0, 1).flatten(0, 1))
        return reference

    def rho(self, below: float = 1.0) -> Tensor:
        """Which share of a signal's variance, as a normal score within its timestep bin, lies between keys, [len(SIGNALS)]:
        analysis of variance over the first third of the keys, whose looks at one key are taken as independent otherwise.

        Args:
            below: share of all timesteps that counts.

        Raises:
            ValueError: there are fewer than six keys.
        """
        if self._for_reference < 2:
            raise ValueError(f"filter.calibration needs at least 6 keys, found {len(self.timesteps)}")
        part, reference = slice(0, self._for_reference), self.reference(500)
        timesteps, signals = self.timesteps[part], self.signals[part]
        z = reference.scores(timesteps.flatten(), signals.flatten(0, 1)).view(signals.shape)  # [K, T, S]
        counts = (timesteps < below * reference.num_train_timesteps)[..., None]
        n = counts.sum(1).clamp(min=2).float()  # [K, 1]
        mean = torch.where(counts, z, 0).sum(1) / n
        within = (torch.where(counts, (z - mean[:, None]).square(), 0).sum(1) / (n - 1)).mean(0)
        between = (mean.var(0) - within / n.mean()).clamp(min=0)
        return (between / (between + within)).clamp(0.01, 0.99).float()

    def largest_evidence(self, evidence, looks: int | None = None) -> Tensor:
        """The largest evidence that each key outside the reference reaches in so many looks, [keys].

        Raises:
            ValueError: the calibration has fewer looks.
        """
        looks = self.timesteps.shape[1] if looks is None else looks
        if not 1 <= looks <= self.timesteps.shape[1]:
            raise ValueError(f"filter.calibration holds {self.timesteps.shape[1]} looks at every key, found {looks} asked for")
        part = slice(self._for_reference, None)
        return evidence.largest(self.timesteps[part, :looks], self.signals[part, :looks])
