"""What is known of every key: the table that holds it, the clock that counts the stream, and what goes by them alone.

`memfilter.evidence` builds on it. A *key* is what encounters are told apart by: the sample, its caption, its content.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memfilter.reference import SIGNALS, Reference

IS_FREE = torch.tensor([name == "loss" for name in SIGNALS])  # needs no null pass


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
    judges_loss = False  # whether `keeps` has a say once the loss of a sample is known, see `memfilter.agc`

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
        """By itself a table drops nobody, and has everybody looked at."""
        keep = torch.zeros(len(slots), dtype=torch.bool)
        return Decisions(keep, ~keep, keep)

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
    often it comes and whatever is thought of it.

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
        return super().decide(slots)._replace(audit=self._due(slots))

    def _due(self, slots: Tensor) -> Tensor:
        return self.clock - self.audited[slots] >= self.window

    def _pays(self, slots: Tensor) -> Tensor:
        """Whether keys are of those whose audits pay for a null pass; bits of the place, mixed (Knuth's multiplier)."""
        return (slots * 2654435761) % 2**32 < self.reference_share * 2**32

    def update(self, step: Step, gone_by: int) -> tuple[Tensor, Tensor]:
        p = self.reference.p_values(step.timesteps, step.signals)[:, SIGNALS.index("norm")]
        evidence = self._weigh(step)
        first = torch.zeros_like(step.audit)
        first[first_places(step.slots)] = True  # a key has one vote, though several of its samples may be in the step
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


def first_places(values: Tensor) -> Tensor:
    """Where every value stands first: [n] -> [unique]"""
    unique, inverse = values.unique(return_inverse=True)
    places = torch.full((len(unique),), len(values))
    return places.scatter_reduce(0, inverse, torch.arange(len(values)), "amin")
