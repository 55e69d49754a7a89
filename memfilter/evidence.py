"""Who is being memorized, by what many encounters with one key say together; and whom it is worth looking at.

A single norm says little: it depends on the timestep, drifts while the model trains, and a hard caption is high every time.
So every signal of an encounter is first placed among those of ordinary samples at its timestep (`Reference`), and then
added up over the encounters of its key, knowing by how much ordinary keys differ among themselves (`Calibration`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memfilter.calibration import Calibration
from memfilter.keys import IS_FREE, Census, Decisions, Step, first_places
from memfilter.reference import SIGNALS, Reference

BELOW = 0.7  # share of the timesteps at which an encounter counts, by default


@dataclass(frozen=True)
class Weighing:
    """How encounters are added up.

    A signal z of one encounter is taken for b + e: b tells the key, with variance rho among ordinary keys, e the encounter,
    with 1 - rho. The mean of n encounters then has the variance v = rho + (1 - rho) / n, and if memorization shifts it by
    ``strength``, the most powerful test between the two (Neyman and Pearson; signals taken as independent) goes by
    sum(strength * mean / v), which divided by its own deviation, sqrt(sum(strength^2 / v)), is the evidence: standard
    normal among ordinary keys if the model held, so that one bar serves whatever was measured how often. The bar itself does
    not trust the model (`flag_at` of `Evidence`).

    Args:
        strengths: signal -> expected shift; signals that are not named are switched off.
        half_life: encounters after which one counts half.
        first: so many encounters tell what is usual for the key.
    """

    strengths: dict[str, float] = field(default_factory=lambda: {"norm": 0.25, "loss": 0.75, "cosine": 0.1, "gain": 1.0})
    half_life: float = 15.0
    first: int = 8

    def __post_init__(self):
        if unknown := set(self.strengths) - set(SIGNALS):
            raise ValueError(f"filter.signals: unknown {', '.join(sorted(unknown))}: expected some of {', '.join(SIGNALS)}")
        if not self.strengths or not all(strength > 0 for strength in self.strengths.values()):
            raise ValueError("filter.signals must name at least one signal, each with a positive strength")
        if not 0 < self.half_life < math.inf:
            raise ValueError(f"filter.half_life must be positive, found {self.half_life}")

    @property
    def decay(self) -> float:
        return 0.5 ** (1 / self.half_life)

    def vector(self) -> Tensor:
        """Strengths in the order of `SIGNALS`, 0 where switched off."""
        return torch.tensor([self.strengths.get(name, 0.0) for name in SIGNALS])

    def evidence(self, sums: Tensor, counts: Tensor, rho: Tensor) -> Tensor:
        """0 for keys without encounters.

        Args:
            sums: of z over the first encounters and, discounted, over the later ones, [n, 2, S].
            counts: how many they were, [n, 2, S].
            rho: [S].

        Returns:
            [n]
        """
        decay, (first, later) = self.decay, counts.float().unbind(1)
        noise = (1 - rho) / first.clamp(min=1)
        shrink = torch.where(first > 0, rho / (rho + noise), 0)
        usual = shrink * sums[:, 0] / first.clamp(min=1)
        weight = (1 - decay**later) / (1 - decay)  # of the later encounters together
        squares = (1 - decay ** (2 * later)) / (1 - decay**2)
        variance = rho * (1 - shrink) + (1 - rho) * squares / weight.clamp(min=1).square()
        strength = torch.where(later > 0, self.vector(), 0)
        pull = (strength * (sums[:, 1] / weight.clamp(min=1) - usual) / variance).sum(1)
        return pull / (strength.square() / variance).sum(1).sqrt().clamp(min=1e-12)


class Evidence(Census):
    """Evidence per key, and who is left out because of it.

    A key whose evidence reaches ``flag_at`` is *flagged*: left out at every timestep, and passed over before any pass where
    the loop can do that. It is still audited once in a window, and re-admitted when its evidence falls below
    ``readmit_below``; nothing restarts then, it goes on with the evidence it has.

    Args:
        rho: share of every signal's variance that lies between ordinary keys, [len(SIGNALS)].
        flag_at: evidence from which on a key is flagged; `of` sets it.
        readmit_below: by default half of ``flag_at``.
        weighing: how encounters are added up.
        gate: the null pass is made for keys whose evidence is at least this; -inf: for everybody.
        below: only encounters at timesteps below this share of all count: at high noise nothing can be told.
        replace: whether the loop may pass a flagged key over and take the next sample of the stream in its place.
        census: see `Census`.
    """

    def __init__(
        self,
        reference: Reference,
        rho: Tensor,
        flag_at: float,
        *,
        readmit_below: float | None = None,
        weighing: Weighing | None = None,
        gate: float = 0.5,
        below: float = BELOW,
        replace: bool = True,
        **census,
    ):
        super().__init__(reference, **census)
        self.rho, self.flag_at = rho.float(), flag_at
        self.readmit_below = flag_at / 2 if readmit_below is None else readmit_below
        self.weighing = weighing or Weighing()
        self.gate, self.below, self.replace = gate, below, replace
        self.makes_passes = any(name != "loss" for name in self.weighing.strengths)
        # the first encounters, and those after them
        self.sums = torch.zeros(self.table_size, 2, len(SIGNALS))
        self.counts = torch.zeros(self.table_size, 2, len(SIGNALS), dtype=torch.int32)
        self.flagged = torch.zeros(self.table_size, dtype=torch.bool)
        self.flags, self.readmissions = 0, 0

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        false_flag_rate: float = 0.02,
        *,
        looks: int | None = None,
        reference_size: int = 64,
        **settings,
    ) -> Evidence:
        """Evidence whose bar is calibrated.

        Of the calibration's keys the first third makes the reference. The others are led through the very procedure (which
        encounters pay for a null pass, forgetting and all), and the bar is the conformal quantile of the largest evidence
        that each of them ever reached in ``looks`` encounters.

        The guarantee: with frozen weights, a clean key that is exchangeable with the calibration's is ever flagged in its
        first ``looks`` encounters with a probability of at most ``false_flag_rate`` (over the draw of the calibration too).
        Re-admission restarts nothing: it is the same path that goes on. While the model trains, the reference follows it,
        and the guarantee is as good as ordinary samples stay alike up to that.

        Args:
            looks: by default as many as the calibration has.
            reference_size: of `Reference`.
            settings: of `Evidence`.

        Raises:
            ValueError: the calibration has too few keys for the rate, or too few looks.
        """
        if not 0 < false_flag_rate < 1:
            raise ValueError(f"filter.false_flag_rate must lie between 0 and 1, found {false_flag_rate}")
        rho = calibration.rho(settings.get("below", BELOW))
        evidence = cls(calibration.reference(reference_size), rho, math.inf, **settings)
        largest = calibration.largest_evidence(evidence, looks)
        rank = math.ceil((1 - false_flag_rate) * (len(largest) + 1) - 1e-9)
        if rank > len(largest):
            needed = math.ceil(1 / false_flag_rate) - 1
            raise ValueError(f"filter.false_flag_rate={false_flag_rate} needs at least {needed} clean keys beside those of the "
                             f"reference, the calibration has {len(largest)}: calibrate with more, or raise the rate")  # fmt: skip
        quantile = largest.sort().values[rank - 1]
        if not quantile > 0:
            raise ValueError(f"filter.calibration: at filter.false_flag_rate={false_flag_rate} any evidence at all would flag, since "
                             "most keys have none yet after so few looks: calibrate with more, such as 40")  # fmt: skip
        # strictly above: one that only ties with it is not flagged
        evidence.flag_at = quantile.nextafter(torch.tensor(math.inf)).item()
        if settings.get("readmit_below") is None:
            evidence.readmit_below = evidence.flag_at / 2
        return evidence

    def largest(self, timesteps: Tensor, signals: Tensor) -> Tensor:
        """The largest evidence that each of some new keys ever reaches: the rule itself is applied to them, with a table of
        their own in which nobody is flagged, and a reference that stays as it is.

        Args:
            timesteps: [keys, looks].
            signals: [keys, looks, len(SIGNALS)].

        Returns:
            [keys]
        """
        settings = {"weighing": self.weighing, "gate": self.gate, "below": self.below, "table_size": len(timesteps)}
        fresh, keys = Evidence(self.reference, self.rho, math.inf, **settings), torch.arange(len(timesteps))
        unaudited, largest = torch.zeros(len(keys), dtype=torch.bool), torch.full((len(keys),), -math.inf)
        for look in range(timesteps.shape[1]):
            found = fresh._weigh(Step(keys, timesteps[:, look], signals[:, look], unaudited))
            largest = torch.maximum(largest, found)
        return largest

    def evidence(self, slots: Tensor) -> Tensor:
        """Of keys, as far as it goes: [n] -> [n]"""
        return self.weighing.evidence(self.sums[slots], self.counts[slots], self.rho)

    def decide(self, slots: Tensor) -> Decisions:
        flagged, audit = self.flagged[slots], self._due(slots)
        look = (audit & (self._pays(slots) | flagged)) | (~flagged & (self.evidence(slots) >= self.gate))
        return Decisions(flagged, look | (self.gate == -math.inf), audit)

    def passes_over(self, slots: Tensor) -> Tensor:
        return self.flagged[slots] & ~self._due(slots) if self.replace else torch.zeros(len(slots), dtype=torch.bool)

    def worth_looking(self, timesteps: Tensor) -> Tensor:
        return timesteps < self.below * self.reference.num_train_timesteps

    def _weigh(self, step: Step) -> Tensor:
        z = self.reference.scores(step.timesteps, step.signals)  # [n, S]
        known = step.slots.clamp(min=0)
        # an audit's null pass is for the reference: that it was made has nothing to do with the key, which would otherwise
        # go another way than the calibration's keys went
        earned = self.flagged[known] | (self.evidence(known) >= self.gate)
        z = torch.where(earned[:, None] | IS_FREE, z, math.nan)
        counts = (step.slots >= 0) & self.worth_looking(step.timesteps)
        left = counts.nonzero().flatten()
        while len(left):  # a key that comes several times in a step is taken in so many rounds
            slots = step.slots[left]
            first = torch.zeros(len(left), dtype=torch.bool)
            first[first_places(slots)] = True
            self._accumulate(slots[first], z[left[first]])
            left = left[~first]
        evidence = torch.where(step.slots >= 0, self.evidence(known), math.nan)
        self._flag(known[counts])
        return evidence

    def _accumulate(self, slots: Tensor, z: Tensor) -> None:
        measured = ~z.isnan()
        early = measured & (self.counts[slots, 0] < self.weighing.first)
        parts = torch.stack([early, measured & ~early], 1)  # [n, 2, S]
        forget = torch.tensor([1.0, self.weighing.decay])[:, None]
        self.sums[slots] = self.sums[slots] * torch.where(parts, forget, 1.0) + torch.where(parts, z.nan_to_num(0)[:, None], 0)
        self.counts[slots] += parts.to(self.counts.dtype)

    def _flag(self, slots: Tensor) -> None:
        slots = slots.unique()
        evidence, before = self.evidence(slots), self.flagged[slots]
        after = torch.where(before, evidence >= self.readmit_below, evidence >= self.flag_at)
        self.flagged[slots] = after
        self.flags += int((after & ~before).sum())
        self.readmissions += int((before & ~after).sum())

    def metrics(self) -> dict[str, float]:
        """Keys that are flagged now, how often one was flagged so far, and how often re-admitted."""
        return {
            "filter/keys_flagged": int(self.flagged.sum()),
            "filter/flags": self.flags,
            "filter/readmissions": self.readmissions,
        }

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        used = state["used"]
        table = {name: getattr(self, name)[used] for name in ("sums", "counts", "flagged")}
        return state | table | {"totals": torch.tensor([self.flags, self.readmissions])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name in ("sums", "counts", "flagged"):
            table = getattr(self, name)
            table.zero_()
            table[state["used"]] = state[name]
        self.flags, self.readmissions = state["totals"].tolist()
