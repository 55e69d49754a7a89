"""Running counts and norms, kept on the device and read back only when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = ("unknown", "distinct", "duplicates")
_FIELDS = ("seen", "checked", "dropped", "norm_sum")


class FilterStats:
    """Sums per timestep bin and per group of samples: duplicates, distinct ones, and those of which nothing is known.

    Args:
        bins: number of equal timestep bins.
        num_train_timesteps: where the last bin ends.
    """

    def __init__(self, bins: int = 10, num_train_timesteps: int = 1000):
        self.bins = bins
        self.num_train_timesteps = num_train_timesteps
        self.empty_steps = 0
        self._window = self._zeros()
        self._total = self._zeros()

    def _zeros(self, device="cpu") -> Tensor:
        return torch.zeros(len(_FIELDS), len(GROUPS), self.bins, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, timesteps: Tensor, norm: Tensor, keep: Tensor, checked: Tensor, group: Tensor) -> None:
        """Takes in one micro-batch: all [B]; ``group`` holds indices into `GROUPS`."""
        if self._window.device != norm.device:
            self._window, self._total = self._window.to(norm.device), self._total.to(norm.device)
        bins = (timesteps.long() * self.bins // self.num_train_timesteps).clamp(0, self.bins - 1)
        cell = group * self.bins + bins  # [B]
        for field, values in enumerate((torch.ones_like(checked), checked, checked & ~keep, norm * checked)):
            self._window[field].view(-1).index_add_(0, cell, values.to(self._window.dtype))

    def compute(self, reduce=None) -> dict[str, float]:
        """What happened since the last call, as flat metrics named ``filter/...``, and starts a new window.

        Args:
            reduce: sums a tensor over all ranks; every rank must call. None for one process.
        """
        window = self._window if reduce is None else reduce(self._window)
        self._total += self._window
        self._window = self._zeros(self._window.device)
        return {**_metrics(window.cpu()), "filter/empty_steps": self.empty_steps}

    def totals(self, reduce=None) -> dict[str, float]:
        """The same over the whole run."""
        total = self._total + self._window
        return {**_metrics((total if reduce is None else reduce(total)).cpu()), "filter/empty_steps": self.empty_steps}

    def state_dict(self) -> dict:
        return {"total": (self._total + self._window).tolist(), "empty_steps": self.empty_steps}

    def load_state_dict(self, state: dict) -> None:
        self._total = torch.tensor(state["total"], dtype=torch.float64, device=self._total.device)
        self._window = self._zeros(self._total.device)
        self.empty_steps = state["empty_steps"]


def _metrics(sums: Tensor) -> dict[str, float]:
    """[field, group, bin] -> named figures; what has no sample has no figure."""
    metrics = {}

    def put(suffix: str, part: Tensor) -> None:
        seen, checked, dropped, norm_sum = part.tolist()
        if checked:
            metrics[f"filter/drop_rate{suffix}"] = dropped / checked
            metrics[f"filter/norm{suffix}"] = norm_sum / checked
        if not suffix:
            metrics.update({"filter/seen": int(seen), "filter/checked": int(checked), "filter/dropped": int(dropped)})

    put("", sums.sum((1, 2)))
    for i, group in enumerate(GROUPS[1:], start=1):
        put(f"_{group}", sums[:, i].sum(1))
    for b in range(sums.shape[2]):
        put(f"/bin{b}", sums[:, :, b].sum(1))
        for i, group in enumerate(GROUPS[1:], start=1):
            put(f"_{group}/bin{b}", sums[:, i, b])
    return metrics
