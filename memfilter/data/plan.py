"""What an experiment is to consist of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memfilter.data.duplicates import NEAR_BITS

Variant = Literal["same_caption", "other_captions", "weighted"]


@dataclass(frozen=True)
class Plan:
    """What an experiment is to consist of.

    Args:
        seed: of which candidates are taken, and of captions.
        duplicates: pictures that are shown often; by default 200 (Wen et al.), for ``weighted`` 5% of all.
        repeats: how often each of them is shown; by default 200, for ``weighted`` 5 (Somepalli et al., DCR).
        distinct: pictures that are shown once.
        keys: file of keys, one a line: only these may become duplicates. Without such a file any candidate may.
        captions: the same by captions, one a line, whatever their case and white space; of several pictures with a caption
            one is taken.
        prompts: the same by a list of memorized prompts, .jsonl: objects with caption and perhaps url.
        variant: DCR's: a duplicate keeps its caption (same_caption); every copy gets another one (other_captions); or a
            twentieth of all is shown 5 times (weighted).
        other_captions: file of the other captions, one a line; by default they are those of all candidates.
        max_bits: of 64, by which the perceptual hashes of near duplicates differ; null looks for none.
        mirrored: whether mirrored pictures are near duplicates too.
        embeddings: .npz with ``keys`` [N] and ``embeddings`` [N, D] of a copy detection model; null uses none.
        min_cosine: of near duplicates' embeddings.
        unique_captions: whether no two pictures may have the same caption.
        allow_fewer: whether it goes on with fewer pictures than asked for.
    """

    seed: int = 0
    duplicates: int | None = None
    repeats: int | None = None
    distinct: int = 120_000
    keys: str | None = None
    captions: str | None = None
    prompts: str | None = None
    variant: Variant = "same_caption"
    other_captions: str | None = None
    max_bits: int | None = NEAR_BITS
    mirrored: bool = True
    embeddings: str | None = None
    min_cosine: float = 0.75
    unique_captions: bool = False
    allow_fewer: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Duplicates, and how often each is shown."""
        duplicates, repeats = (round(self.distinct / 19), 5) if self.variant == "weighted" else (200, 200)
        return (
            duplicates if self.duplicates is None else self.duplicates,
            repeats if self.repeats is None else self.repeats,
        )

    def check(self) -> None:
        """Raises ValueError with every setting that makes no sense."""
        errors = []
        for name, least, most in (("seed", 0, 2**63 - 1), ("duplicates", 0, None), ("repeats", 1, 2**31 - 1),
                                  ("distinct", 0, None), ("max_bits", 0, 31)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < least or most is not None and value > most):
                errors.append(f"{name} must be at least {least}{f' and at most {most}' if most else ''}, found {value}")
        if not 0 < self.min_cosine <= 1:
            errors.append(f"min_cosine must be above 0 and at most 1, found {self.min_cosine}")
        lists = [name for name in ("keys", "captions", "prompts") if getattr(self, name) is not None]
        if len(lists) > 1:
            errors.append(f"{' and '.join(lists)} all say what may become a duplicate: give one of them")
        if self.other_captions is not None and self.variant != "other_captions":
            errors.append(f"other_captions has no effect on variant={self.variant}")
        if self.sizes[0] == self.distinct == 0:
            errors.append("duplicates and distinct are both 0: ask for some pictures")
        if errors:
            raise ValueError("\n".join(errors))

    def listed(self) -> list[dict[str, str]] | None:
        """What may become a duplicate, in the order of its file: objects with key, or caption and perhaps url; None
        where everything may.

        Raises:
            ValueError: the file lists nothing, or lines of it are no such objects.
        """
        if self.prompts is not None:
            return _objects(self.prompts)
        if self.captions is not None:
            return [{"caption": line} for line in lines(self.captions)]
        return None if self.keys is None else [{"key": line} for line in lines(self.keys)]


def lines(path: str | Path) -> list[str]:
    """The lines of a file that are not blank, without what surrounds them, each once.

    Raises:
        ValueError: there are none.
    """
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    found = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not found:
        raise ValueError(f"{path} lists nothing: write one entry a line")
    return found


def _objects(path: str) -> list[dict[str, str]]:
    found, errors = [], []
    for line in lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("caption"), str):
            found.append({name: entry[name] for name in ("caption", "url") if isinstance(entry.get(name), str)})
        else:
            errors.append(f"{path}: {line[:60]!r} is no JSON object with a caption")
    if errors:
        raise ValueError("\n".join([*errors[:5], *([f"and {len(errors) - 5} more"] if errors[5:] else [])]))
    return found
