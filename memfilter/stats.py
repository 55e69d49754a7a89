"""Running counts and norms, kept on the device and read back only when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = ("unknown", "distinct", "duplicates")
_COUNTS = ("seen", "checked", "dropped", "excluded")
_FIELDS = (*_COUNTS, "judged", "passes", "norm_sum")
# norms differ by orders of magnitude between models: four bins to the octave, those at the ends open
_LOWEST, _HIGHEST, _PER_OCTAVE = -8, 12, 4
HISTOGRAM_EDGES = (0.0, *(2 ** (i / _PER_OCTAVE) for i in range(_LOWEST * _PER_OCTAVE, _HIGHEST * _PER_OCTAVE + 1)))


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
        self._norms = torch.zeros(len(GROUPS), self.bins, len(HISTOGRAM_EDGES), dtype=torch.long)
        self._edges = torch.tensor(HISTOGRAM_EDGES)

    @property
    def device(self) -> torch.device:
        """Where it counts now."""
        return self._window.device

    def _zeros(self) -> Tensor:
        return torch.zeros(len(_FIELDS), len(GROUPS), self.bins, dtype=torch.float64)

    @torch.no_grad()
    def add(
        self,
        timesteps: Tensor,
        norm: Tensor,
        keep: Tensor,
        checked: Tensor,
        group: Tensor,
        excluded: Tensor | None = None,
        judged: Tensor | None = None,
        passes: Tensor | None = None,
    ) -> None:
        """Takes in one micro-batch: all [B]; ``group`` holds indices into `GROUPS`.

        Args:
            judged: whether there was a verdict, be it by other encounters; by default where ``checked``.
            passes: how many null passes were made for the sample; by default one where ``checked``.
        """
        if self._window.device != norm.device:
            precise = torch.float32 if norm.device.type == "mps" else torch.float64  # Apple's devices know no more
            self._window, self._norms = self._window.to(norm.device, precise), self._norms.to(norm.device)
            self._edges = self._edges.to(norm.device)
        excluded = torch.zeros_like(checked) if excluded is None else excluded
        bins = (timesteps.long() * self.bins // self.num_train_timesteps).clamp(0, self.bins - 1)
        cell = group * self.bins + bins  # [B]
        judged = checked if judged is None else judged
        passes = checked if passes is None else passes
        fields = (torch.ones_like(checked), checked, judged & ~keep, excluded, judged, passes, norm * checked)
        for field, values in enumerate(fields):
            self._window[field].view(-1).index_add_(0, cell, values.to(self._window.dtype))
        place = torch.bucketize(norm.float(), self._edges, right=True).clamp(max=len(HISTOGRAM_EDGES)) - 1
        self._norms.view(-1).index_add_(0, cell * len(HISTOGRAM_EDGES) + place, checked.long())

    def compute(self, reduce=None) -> dict[str, float]:
        """What happened since the last call, as flat metrics named ``filter/...``, and starts a new window;
        ``filter/empty_steps`` counts from the beginning.

        Args:
            reduce: sums a tensor over all ranks; every rank must call. None for one process.
        """
        window = self._window if reduce is None else reduce(self._window)
        self._total += window.cpu()
        self._window = torch.zeros_like(self._window)
        return {**_metrics(window.cpu()), "filter/empty_steps": self.empty_steps}

    def histograms(self, reduce=None) -> dict[str, list[int]]:
        """How many norms were found between neighbouring `HISTOGRAM_EDGES` since the last call, by name.

        Args:
            reduce: as for `compute`.

        Returns:
            ``filter/norm_histogram``, with ``_duplicates`` and ``_distinct``, and ``filter/norm_histogram/bin3``;
            each as long as `HISTOGRAM_EDGES` (the last entry lies above the last edge); those without any left out.
        """
        norms = (self._norms if reduce is None else reduce(self._norms)).cpu()
        self._norms = torch.zeros_like(self._norms)
        parts = {"": norms.sum((0, 1))}
        parts |= {f"_{group}": norms[i].sum(0) for i, group in enumerate(GROUPS[1:], start=1)}
        parts |= {f"/bin{b}": norms[:, b].sum(0) for b in range(self.bins)}
        return {f"filter/norm_histogram{suffix}": part.tolist() for suffix, part in parts.items() if part.any()}

    def totals(self, reduce=None) -> dict[str, float]:
        """The same over the whole run."""
        window = self._window if reduce is None else reduce(self._window)
        return {**_metrics(self._total + window.cpu()), "filter/empty_steps": self.empty_steps}

    def state_dict(self, reduce=None) -> dict:
        """Numbers and lists of them: what was reported and what was not yet.

        Args:
            reduce: as for `compute`.
        """
        window, norms = (t if reduce is None else reduce(t) for t in (self._window, self._norms))
        return {
            "total": self._total.tolist(),
            "window": window.cpu().tolist(),
            "norms": norms.cpu().tolist(),
            "empty_steps": self.empty_steps,
        }

    def load_state_dict(self, state: dict, with_window: bool = True) -> None:
        """Goes on from there.

        Args:
            with_window: what was not reported yet belongs to one rank, or it would be counted by each.
        """
        self._total = torch.tensor(state["total"], dtype=torch.float64)
        self._window, self._norms = torch.zeros_like(self._window), torch.zeros_like(self._norms)
        if with_window:
            self._window += torch.tensor(state["window"], dtype=torch.float64).to(self._window)
            self._norms += torch.tensor(state["norms"]).to(self._norms)
        self.empty_steps = state["empty_steps"]


def _metrics(sums: Tensor) -> dict[str, float]:
    """[field, group, bin] -> named figures; there is no rate and no norm of what has no checked sample."""
    metrics = {}

    def counts(suffix: str, part: Tensor) -> None:
        for name, count in zip(_COUNTS, part.tolist(), strict=False):
            metrics[f"filter/{name}{suffix}"] = int(count)

    def rates(suffix: str, part: Tensor) -> None:
        _, checked, dropped, _, judged, _, norm_sum = part.tolist()
        if judged:
            metrics[f"filter/drop_rate{suffix}"] = dropped / judged
        if checked:
            metrics[f"filter/norm{suffix}"] = norm_sum / checked

    counts("", sums.sum((1, 2)))
    rates("", sums.sum((1, 2)))
    seen, passes = sums[_FIELDS.index("seen")].sum(), sums[_FIELDS.index("passes")].sum()
    if passes:
        metrics["filter/pass_share"] = (passes / seen).item()  # null passes for each sample of the stream
    for i, group in enumerate(GROUPS[1:], start=1):
        counts(f"_{group}", sums[:, i].sum(1))
        rates(f"_{group}", sums[:, i].sum(1))
    for b in range(sums.shape[2]):
        counts(f"/bin{b}", sums[:, :, b].sum(1))
        rates(f"/bin{b}", sums[:, :, b].sum(1))
        for i, group in enumerate(GROUPS[1:], start=1):
            rates(f"_{group}/bin{b}", sums[:, i, b])
    return metrics
