"""What ordinary samples look like at each timestep: the ground on which a p-value stands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGNALS = ("norm", "loss", "cosine", "gain")
# in which direction a signal speaks of memorization
_SIGN = torch.tensor([1.0, -1.0, 1.0, 1.0])


class Reference:
    """The last ``size`` values of every signal in every timestep bin, of samples that no verdict has chosen.

    All of it is on the host, and a pure function of what was added in which order: ranks that add the same rows hold the
    same reference.

    A model that trains moves away from it. What moves all bins alike is soon seen, since the bins can be taken together:
    `scores` are relative to the mean and deviation of the ``recent`` last ones. What moves one bin is seen as its values are
    replaced, and p-values go by these alone.

    Args:
        size: values held for each signal and bin. More make finer p-values, fewer follow sooner.
        bins: equal timestep bins.
        num_train_timesteps: where the last bin ends.
        recent: values, of all bins together, that tell how far the model has moved.
    """

    def __init__(self, size: int = 64, bins: int = 10, num_train_timesteps: int = 1000, recent: int = 48):
        self.size, self.bins, self.num_train_timesteps = size, bins, num_train_timesteps
        self.values = torch.full((len(SIGNALS), bins, size), math.nan)  # signed: larger is more memorized
        self.added = torch.zeros(len(SIGNALS), bins, dtype=torch.long)  # so many ever
        self.recent = torch.full((len(SIGNALS), recent), math.nan)  # normal scores among the values held then
        self.version = 0  # another one when something was added

    def bin(self, timesteps: Tensor) -> Tensor:
        """[n] -> [n]"""
        return (timesteps.long() * self.bins // self.num_train_timesteps).clamp(0, self.bins - 1)

    def add(self, timesteps: Tensor, signals: Tensor) -> None:
        """Takes in rows in their order, the newest in place of the oldest.

        Args:
            timesteps: [n].
            signals: [n, len(SIGNALS)]; NaN where one was not measured.
        """
        if not len(timesteps):
            return
        scores = self._normal_scores(timesteps, signals).T  # [S, n]
        signed, measured = (signals.float() * _SIGN).T, ~signals.T.isnan()
        for moved, score, known in zip(self.recent, scores, measured, strict=True):
            moved.copy_(torch.cat([moved, score[known]])[-len(moved) :])
        # cell by cell, in order: the next places of the ring
        cells = (torch.arange(len(SIGNALS))[:, None] * self.bins + self.bin(timesteps))[measured]
        order = cells.argsort(stable=True)
        cells, values = cells[order], signed[measured][order]
        new = cells.bincount(minlength=self.added.numel())
        rank = torch.arange(len(cells)) - (new.cumsum(0) - new)[cells]
        last = rank >= new[cells] - self.size  # or one place would be written twice
        places = (self.added.view(-1)[cells] + rank) % self.size
        self.values.view(-1, self.size)[cells[last], places[last]] = values[last]
        self.added += new.view_as(self.added)
        self.version += 1

    def counts(self) -> Tensor:
        """How many values are held, [len(SIGNALS), bins]."""
        return self.added.clamp(max=self.size)

    def p_values(self, timesteps: Tensor, signals: Tensor, middle: bool = False) -> Tensor:
        """Conformal p-values, [n] and [n, len(SIGNALS)] -> float64 [n, len(SIGNALS)]; NaN where nothing was measured.

        p = (1 + number of reference values at least as extreme) / (1 + number of reference values): for a sample that is
        exchangeable with the reference, P(p <= a) <= a for every a (Vovk et al., "Algorithmic Learning in a Random World",
        2005, Proposition 2.4).

        Args:
            middle: ties, the sample's own place among them, count half, so that the mean is 1/2 and neither 0 nor 1 occurs.
        """
        bins, signed = self.bin(timesteps), signals.float() * _SIGN
        held = self.values[:, bins].transpose(0, 1)  # [S, n, size] -> [n, S, size]
        above, equal = (held > signed[..., None]).sum(2), (held == signed[..., None]).sum(2)
        count = self.counts()[:, bins].T
        p = (above + (equal + 1) * (0.5 if middle else 1.0)).double() / (count + 1)
        return p.masked_fill(signed.isnan(), math.nan)

    def _normal_scores(self, timesteps: Tensor, signals: Tensor) -> Tensor:
        return -torch.special.ndtri(self.p_values(timesteps, signals, middle=True)).float()

    def scores(self, timesteps: Tensor, signals: Tensor) -> Tensor:
        """How far signals speak of memorization, as standard normal scores among recent ordinary samples: [n] and
        [n, len(SIGNALS)] -> [n, len(SIGNALS)]; NaN where nothing was measured."""
        known = ~self.recent.isnan()
        count = known.sum(1).clamp(min=1)
        mean = self.recent.nan_to_num(0).sum(1) / count
        spread = (torch.where(known, self.recent - mean[:, None], 0).square().sum(1) / (count - 1).clamp(min=1)).sqrt()
        spread = torch.where(count > 1, spread, 1).clamp(min=0.25)
        return (self._normal_scores(timesteps, signals) - mean) / spread

    def limits(self, rate: float) -> Tensor:
        """The smallest norm in each bin whose p-value is at most ``rate``, [bins]; inf where there is none."""
        limits = torch.full((self.bins,), math.inf)
        for b, count in enumerate(self.counts()[SIGNALS.index("norm")].tolist()):
            allowed = math.floor(rate * (count + 1) + 1e-9) - 1  # so many reference values may be as large
            if allowed >= 0:
                held = self.values[SIGNALS.index("norm"), b, :count].sort(descending=True).values
                limits[b] = held[allowed].nextafter(torch.tensor(math.inf))  # with the next smaller one there would be more
        return limits

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values, "added": self.added, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.values, self.added, self.recent = (state[name].clone() for name in ("values", "added", "recent"))
        self.version += 1
