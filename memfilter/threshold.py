"""Rules that turn norms into verdicts. A rule is called with (norm [B], timesteps [B]) and gives keep, bool [B]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from memfilter.functional import UNITS, keep_mask


@dataclass(frozen=True)
class FixedThreshold:
    """One tau for every timestep: the paper's rule (Section 4.2; it sweeps tau = 2..6 on Stable Diffusion).

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
