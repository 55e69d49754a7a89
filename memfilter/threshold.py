"""Rules that turn norms into verdicts. A rule is called with (norm [B], timesteps [B]) and gives keep, bool [B]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memfilter.functional import UNITS, keep_mask
from memfilter.reference import Reference


@dataclass(frozen=True)
class FixedThreshold:
    """One tau for every timestep: the paper's rule (Section 4.3; it sweeps tau = 2..6 on Stable Diffusion).

    Args:
        tau: positive; ``inf`` keeps everything and only measures.
        unit: of tau and of the norm, ``l2`` (the paper's) or ``rms`` (see `text_norm`).

    Raises:
        ValueError: tau is not a positive number, or the unit is unknown.
    """

    tau: float
    unit: str = "l2"

    def __post_init__(self):
        if isinstance(self.tau, bool) or math.isnan(self.tau) or self.tau <= 0:
            raise ValueError(f"filter.tau must be a positive number, found {self.tau}: give one such as 4.0, "
                             "inf to measure only, or null for no extra pass")  # fmt: skip
        if self.unit not in UNITS:
            raise ValueError(f"filter.unit must be one of {', '.join(UNITS)}, found {self.unit!r}")

    def __call__(self, norm: Tensor, timesteps: Tensor) -> Tensor:
        return keep_mask(norm, self.tau)


class TimestepThreshold:
    """Drops a sample whose norm is improbable among ordinary samples at its timestep: p <= ``false_positive_rate``.

    p is the conformal p-value (1 + number of reference norms >= norm) / (1 + number of them), so that of ordinary samples,
    exchangeable with those of the reference, at most this share is dropped. One look decides: a sample is spared at the
    timesteps where it looks ordinary.

    Args:
        reference: norms of ordinary samples by timestep bin; what is added to it later counts from the next call on.
        false_positive_rate: in (0, 1).

    Raises:
        ValueError: the rate is out of range, or so small that no norm could ever be dropped.
    """

    def __init__(self, reference: Reference, false_positive_rate: float = 0.02):
        if not 0 < false_positive_rate < 1:
            raise ValueError(f"filter.false_positive_rate must lie between 0 and 1, found {false_positive_rate}")
        if false_positive_rate * (reference.size + 1) < 1 - 1e-9:
            raise ValueError(f"filter.false_positive_rate={false_positive_rate} needs a reference of at least "
                             f"{math.ceil(1 / false_positive_rate) - 1} norms a bin, found {reference.size}")  # fmt: skip
        self.reference, self.false_positive_rate = reference, false_positive_rate
        self._known, self._limits = -1, torch.empty(0)

    def __call__(self, norm: Tensor, timesteps: Tensor) -> Tensor:
        if self._known != self.reference.version:
            self._known, self._limits = self.reference.version, self.reference.limits(self.false_positive_rate)
        self._limits = self._limits.to(norm.device, non_blocking=True)
        return norm < self._limits[self.reference.bin(timesteps)]
