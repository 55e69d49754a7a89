"""Keys whose signals are drawn from a random effects model; and what a `Reference` says of them, counted by hand."""

import math
import statistics
from collections import deque

import torch

from memfilter.calibration import Calibration
from memfilter.reference import SIGNALS, Reference

DIRECTION = {"norm": 1, "loss": -1, "cosine": 1, "gain": 1}  # in which memorization moves a signal
NAN = math.nan


def as_signals(z: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Normal scores, [..., 4], in the guise of signals: each on a scale of its own that depends on the timestep."""
    t = timesteps / 1000
    columns = dict(zip(SIGNALS, z.unbind(-1), strict=True))
    made = {
        "norm": (2 + 3 * t) * (0.4 * columns["norm"]).exp(),
        "loss": (1.1 - t) * (-0.3 * columns["loss"]).exp(),
        "cosine": (0.1 * columns["cosine"] - t).tanh(),
        "gain": 0.05 * (1 - t) * columns["gain"],
    }
    return torch.stack([made[name] for name in SIGNALS], -1).float()


def draw(keys: int, looks: int, rho=0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps [keys, looks] and signals [keys, looks, 4] of ordinary keys; of a signal's variance the share ``rho``,
    one for all or one for each, lies between them."""
    g = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(1000, (keys, looks), generator=g)
    key, look = torch.randn(keys, 1, 4, generator=g), torch.randn(keys, looks, 4, generator=g)
    rho = torch.as_tensor(rho)
    return timesteps, as_signals(rho.sqrt() * key + (1 - rho).sqrt() * look, timesteps)


def calibration(keys: int = 90, looks: int = 20, rho=0.5, seed: int = 0) -> Calibration:
    about = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "resolution": 64, "unit": "l2"}
    return Calibration(*draw(keys, looks, rho, seed), about)


def reference(size: int = 16, seed: int = 0, **settings) -> Reference:
    """Full of ordinary samples in every bin."""
    made = Reference(size, **settings)
    count = 40 * size * made.bins
    timesteps, signals = draw(count, 1, 0.0, seed)
    made.add(timesteps.flatten(), signals.flatten(0, 1))
    return made


class ByHand:
    """What a `Reference` holds, in plain Python."""

    def __init__(self, size: int, bins: int, num_train_timesteps: int, recent: int):
        self.bins, self.total = bins, num_train_timesteps
        self.held = [[deque(maxlen=size) for _ in range(bins)] for _ in SIGNALS]
        self.recent = [deque(maxlen=recent) for _ in SIGNALS]

    @classmethod
    def like(cls, reference: Reference) -> "ByHand":
        """Of the same sizes, with what the reference holds now."""
        made = cls(reference.size, reference.bins, reference.num_train_timesteps, reference.recent.shape[1])
        for s, direction in enumerate(DIRECTION.values()):
            made.recent[s].extend(z for z in reference.recent[s].tolist() if not math.isnan(z))
            for b, held in enumerate(made.held[s]):
                held.extend(direction * value for value in reference.values[s, b].tolist() if not math.isnan(value))
        return made

    def add(self, timesteps: list[int], signals: list[list[float]]) -> None:
        scores = [self.normal(t, row) for t, row in zip(timesteps, signals, strict=True)]  # by what was held before
        for t, row, new in zip(timesteps, signals, scores, strict=True):
            for s, value in enumerate(row):
                if not math.isnan(value):
                    self.held[s][t * self.bins // self.total].append(value)
                    self.recent[s].append(new[s])

    def p(self, t: int, row: list[float], middle: bool = False) -> list[float]:
        found = []
        for s, (value, direction) in enumerate(zip(row, DIRECTION.values(), strict=True)):
            held = self.held[s][t * self.bins // self.total]
            above, equal = sum(direction * (h - value) > 0 for h in held), sum(h == value for h in held)
            rank = above + (equal + 1) / 2 if middle else above + equal + 1
            found.append(NAN if math.isnan(value) else rank / (len(held) + 1))
        return found

    def normal(self, t: int, row: list[float]) -> list[float]:
        return [NAN if math.isnan(p) else -statistics.NormalDist().inv_cdf(p) for p in self.p(t, row, middle=True)]

    def scores(self, t: int, row: list[float]) -> list[float]:
        found = []
        for z, recent in zip(self.normal(t, row), self.recent, strict=True):
            mean = statistics.fmean(recent) if recent else 0
            spread = max(statistics.stdev(recent), 0.25) if len(recent) > 1 else 1
            found.append((z - mean) / spread)
        return found
