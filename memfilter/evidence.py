"""Who is being memorized, by what many encounters with one key say together; and whom it is worth looking at.

A single norm says little: it depends on the timestep, drifts while the model trains, and a hard caption is high every time.
So every signal of an encounter is first placed among those of ordinary samples at its timestep (`Reference`), and then
added up over the encounters of its key, knowing by how much ordinary keys differ among themselves (`Calibration`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from memfilter.calibration import Calibration
from memfilter.reference import SIGNALS, Reference

IS_FREE = torch.tensor([name == "loss" for name in SIGNALS])  # needs no null pass
BELOW = 0.7  # share of the timesteps at which an encounter counts, by default


class Decisions(NamedTuple):
    """What to do with samples at hand; every tensor is bool [n], on the host, from the state before their step."""

    drop: Tensor  # leave out of the loss
    look: Tensor  # make the null pass
    audit: Tensor  # look whatever the verdict says: the reference, and the way back for who was flagged


@dataclass
class Step:
    """What an optimizer step brought, rows of all ranks in the order of the stream. Every tensor has n rows."""

    slots: Tensor  # long; -1 for rows that say nothing, such as samples that could not be read
    timesteps: Tensor
    signals: Tensor  # [n, len(SIGNALS)], NaN where not measured
    audit: Tensor


class KeyTable:
    """What is known of every key, in a table of fixed size, and the clock that counts the samples of the stream.

    A key's place in the table is its hash. Two keys that fall on one place share it: what is found of one is held against
    both. Of n keys in a table of m places, one in about m / n meets another.

    Args:
        table_size: places.
    """

    makes_passes = True  # whether any null pass is ever wanted

    def __init__(self, table_size: int = 2**20):
        if table_size < 1:
            raise ValueError(f"filter.table_size must be at least 1, found {table_size}")
        self.table_size = table_size
        self.clock = 0

    def slots(self, keys: Sequence[str]) -> Tensor:
        """Places of keys, long [n]."""
        digests = (hashlib.blake2b(str(key).encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
        return torch.tensor([int.from_bytes(digest, "little") % self.table_size for digest in digests], dtype=torch.long)

    def decide(self, slots: Tensor) -> Decisions:
        raise NotImplementedError

    def passes_over(self, slots: Tensor) -> Tensor:
        """Which samples need not be read at all this time, bool [n]."""
        return torch.zeros(len(slots), dtype=torch.bool)

    def worth_looking(self, timesteps: Tensor) -> Tensor:
        """Whether a null pass can tell anything at these timesteps, [n] -> bool [n]"""
        return torch.ones(len(timesteps), dtype=torch.bool)

    def update(self, step: Step, gone_by: int) -> tuple[Tensor, Tensor]:
        """Takes in a step; every rank with the same rows.

        Args:
            gone_by: samples of the stream that the step stands for, over all ranks, with those it passed over.

        Returns:
            Of every row the conformal p-value of its norm, and its key's evidence; NaN where there is none.
        """
        self.clock += gone_by
        nothing = torch.full((len(step.slots),), math.nan)
        return nothing, nothing

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` goes on; of the table, the places that were ever used."""
        return {"clock": torch.tensor(self.clock)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.clock = int(state["clock"])


class Sightings(KeyTable):
    """Drops a key once it was trained on ``k`` times: what counting alone would do, to be measured against. No pass is made.

    Args:
        k: at least 1.
    """

    makes_passes = False

    def __init__(self, k: int, table_size: int = 2**20):
        super().__init__(table_size)
        if k < 1:
            raise ValueError(f"filter.sightings must be at least 1, found {k}")
        self.k = k
        self.seen = torch.zeros(table_size, dtype=torch.int32)

    def decide(self, slots: Tensor) -> Decisions:
        drop = self.passes_over(slots)
        return Decisions(drop, torch.zeros_like(drop), torch.zeros_like(drop))

    def passes_over(self, slots: Tensor) -> Tensor:
        return self.seen[slots] >= self.k

    def update(self, step: Step, gone_by: int) -> tuple[Tensor, Tensor]:
        slots = step.slots[step.slots >= 0]
        self.seen.index_add_(0, slots, torch.ones_like(slots, dtype=self.seen.dtype))
        return super().update(step, gone_by)

    def metrics(self) -> dict[str, float]:
        return {"filter/keys_flagged": int((self.seen >= self.k).sum())}

    def state_dict(self) -> dict[str, Tensor]:
        used = self.seen.nonzero().flatten()
        return super().state_dict() | {"used": used, "seen": self.seen[used]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.seen.zero_()
        self.seen[state["used"]] = state["seen"]


class Census(KeyTable):
    """The reference that follows the model, from looks which no verdict chooses.

    Once in ``window`` samples of the stream, the first time that it comes, every key is *audited*: its loss enters the
    reference, and, for a fixed share of the keys, the signals of the null pass. So a key votes once per window however
    often it comes and whatever is thought of it. By itself a census drops nobody and has everybody looked at.

    Args:
        reference: is updated in place.
        window: samples of the stream, over all ranks, between two audits of a key.
        reference_share: of the keys, whose audits pay for a null pass; which, their hash says.
        table_size: see `KeyTable`.
    """

    def __init__(
        self, reference: Reference, *, window: int = 2000, reference_share: float = 0.25, table_size: int = 2**20
    ):
        super().__init__(table_size)
        if window < 1:
            raise ValueError(f"filter.window must be at least 1, found {window}")
        if not 0 < reference_share <= 1:
            raise ValueError(f"filter.reference_share must lie above 0 and at most at 1, found {reference_share}")
        self.reference, self.window, self.reference_share = reference, window, reference_share
        self.audited = torch.full((table_size,), -window, dtype=torch.long)  # clock of the last audit

    def decide(self, slots: Tensor) -> Decisions:
        keep = torch.zeros(len(slots), dtype=torch.bool)
        return Decisions(keep, ~keep, self._due(slots))

    def _due(self, slots: Tensor) -> Tensor:
        return self.clock - self.audited[slots] >= self.window

    def _pays(self, slots: Tensor) -> Tensor:
        """Whether keys are of those whose audits pay for a null pass; bits of the place, mixed (Knuth's multiplier)."""
        return (slots * 2654435761) % 2**32 < self.reference_share * 2**32

    def update(self, step: Step, gone_by: int) -> tuple[Tensor, Tensor]:
        p = self.reference.p_values(step.timesteps, step.signals)[:, SIGNALS.index("norm")]
        evidence = self._weigh(step)
        first = torch.zeros_like(step.audit)
        first[_first_places(step.slots)] = True  # a key has one vote, though several of its samples may be in the step
        votes = step.audit & (step.slots >= 0) & first
        signals = torch.where(self._pays(step.slots)[:, None] | IS_FREE, step.signals, math.nan)
        self.reference.add(step.timesteps[votes], signals[votes])
        self.audited[step.slots[votes]] = self.clock
        super().update(step, gone_by)
        return p, evidence

    def _weigh(self, step: Step) -> Tensor:
        return torch.full((len(step.slots),), math.nan)

    def state_dict(self) -> dict[str, Tensor]:
        used = (self.audited > -self.window).nonzero().flatten()
        reference = {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        return super().state_dict() | {"used": used, "audited": self.audited[used]} | reference

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.audited.fill_(-self.window)
        self.audited[state["used"]] = state["audited"]
        names = (name for name in state if name.startswith("reference."))
        self.reference.load_state_dict({name.removeprefix("reference."): state[name] for name in names})


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
            first[_first_places(slots)] = True
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


def _first_places(values: Tensor) -> Tensor:
    """Where every value stands first: [n] -> [unique]"""
    unique, inverse = values.unique(return_inverse=True)
    places = torch.full((len(unique),), len(values))
    return places.scatter_reduce(0, inverse, torch.arange(len(values)), "amin")
