"""The paper's experiment from anybody's pictures: some shown many times, many shown once, none a copy of another."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from PIL import Image

from memfilter import __version__
from memfilter.data.candidates import BROKEN_SHARD, NO_CAPTION, TOO_LARGE, UNREADABLE, candidates, versions
from memfilter.data.duplicates import (
    CAPTION,
    EXACT,
    HASH_BYTES,
    NEAR,
    Distinct,
    EmbeddingLikeness,
    HashLikeness,
    Likeness,
    Verdict,
)  # fmt: skip
from memfilter.data.manifest import MANIFEST, SCHEMA, write_manifest
from memfilter.data.plan import Plan, lines
from memfilter.data.shards import MAX_CAPTION, decode, read_bytes
from memfilter.files import atomic

LOST = "lost.jsonl"
KEY_TAKEN = "key taken"  # by another candidate
LOSSES = (UNREADABLE, TOO_LARGE, NO_CAPTION, KEY_TAKEN, EXACT, NEAR, CAPTION)
Embed = Callable[[list[Image.Image]], np.ndarray]


@dataclass
class Choice:
    """Rows of the usable candidates that were chosen, and what became of the others that were looked at."""

    duplicates: list[int] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)
    refused: list[Verdict] = field(default_factory=list)
    not_found: list[dict] = field(default_factory=list)  # listed, but not among the candidates

    @property
    def chosen(self) -> list[int]:
        return self.duplicates + self.distinct


def prepare_experiment(
    data: Path,
    out: Path,
    plan: Plan,
    processes: int | None = None,
    hashes: Path | None = None,
    embed: Embed | None = None,
) -> dict[str, int]:
    """Chooses, and writes ``manifest.parquet`` and ``lost.jsonl`` (the candidates that are of no use, and why).

    What is chosen is a function of the plan and the pictures: they are taken in the order of a hash of the seed and
    their bytes, so that one candidate more or less changes little.

    Args:
        data: directory of img2dataset's shards or of pictures, or of directories of them.
        out: where the results go, and the hashes of finished shards, from which an interrupted search goes on.
        processes: that read and hash; by default one for each core.
        hashes: another directory for those, to be shared by several experiments.
        embed: copy-detection embeddings [B, D] of B pictures, instead of ``plan.embeddings``.

    Returns:
        The completeness report: candidates, how many were lost to what, chosen, missing.

    Raises:
        FileExistsError: there is a manifest already.
        ShardError: nothing can be read.
        ValueError: the plan makes no sense, or asks for more pictures than there are.
    """
    plan.check()
    if (out / MANIFEST).exists():
        raise FileExistsError(f"{out / MANIFEST} exists: remove it or choose another directory")
    listed, others = plan.listed(), lines(plan.other_captions) if plan.other_captions else None
    found = candidates(data, hashes or out / "hashes", processes)
    usable, lost = _usable(found)
    likenesses = list(_likenesses(data, usable, plan, embed))
    choice = choose(usable, plan, likenesses, listed)

    keys, shards = usable["key"].to_pylist(), usable["shard"].to_pylist()
    lost += [{"key": keys[row], "shard": shards[row], "reason": reason, "of": keys[like]}
             for row, reason, like in choice.refused]  # fmt: skip
    lost += [{"listed": entry, "reason": "not among the candidates"} for entry in choice.not_found]
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / LOST) as partial:
        partial.write_text("".join(json.dumps(facts) + "\n" for facts in lost), encoding="utf-8")
    counts = _count(found, usable, lost, choice, plan)
    print(report(counts))
    _require_enough(counts, plan, out)

    header = {
        "seed": plan.seed,
        "versions": {"memfilter": __version__, "faiss": faiss.__version__, "pyarrow": pa.__version__, **versions()},
        "conditions": asdict(plan) | dict(zip(("duplicates", "repeats"), plan.sizes, strict=True)),
        "counts": counts,
    }
    write_manifest(out / MANIFEST, _rows(usable, choice, plan, others), header)
    return counts


def choose(usable: pa.Table, plan: Plan, likenesses: Sequence[Likeness], listed: list[dict] | None = None) -> Choice:
    """First the duplicates, then the distinct ones, in the order of a hash of seed and bytes.

    Args:
        usable: candidates, see `candidates.SCHEMA`.
        listed: what may become a duplicate, see `Plan.listed`; of every entry one picture does.
    """
    captions = usable["caption"].to_pylist() if plan.unique_captions else None
    distinct, choice = Distinct(usable["sha256"].to_pylist(), likenesses, captions), Choice()
    order, wanted = _order(usable, plan.seed), plan.sizes[0]
    judged: set[int] = set()

    def take(rows: Sequence[int], limit: int, into: list[int]) -> None:
        for verdict in distinct.sift(np.array(rows, int), limit):
            judged.add(verdict.row)
            if verdict.reason is None:
                into.append(verdict.row)
            else:
                choice.refused.append(verdict)

    if listed is None:
        take(order, wanted, choice.duplicates)
    else:
        for entry, rows in _matches(listed, usable, order):
            if len(choice.duplicates) == wanted:
                break
            if not rows:
                choice.not_found.append(entry)
            take([row for row in rows if row not in judged], 1, choice.duplicates)
    take([row for row in order if row not in judged], plan.distinct, choice.distinct)
    return choice


def report(counts: dict[str, int]) -> str:
    """The completeness report as lines of text."""
    width = max(map(len, counts))
    return "\n".join(f"{name.replace('_', ' '):<{width}} {count:>12,}" for name, count in counts.items())


def _usable(found: pa.Table) -> tuple[pa.Table, list[dict]]:
    """The candidates that can be read and have a caption and a key of their own, and what is wrong with the others."""
    keep, lost, taken = [], [], set()
    columns = [found[name].to_pylist() for name in ("key", "shard", "lost", "detail")]
    for row, (key, shard, reason, detail) in enumerate(zip(*columns, strict=True)):
        if reason is None and key in taken:
            reason = KEY_TAKEN
        if reason is None:
            taken.add(key)
            keep.append(row)
        else:
            facts = {"key": key, "shard": shard, "reason": reason, "detail": detail}
            lost.append({name: value for name, value in facts.items() if value})
    return found.take(pa.array(keep, pa.int64())).combine_chunks(), lost


def _likenesses(data: Path, usable: pa.Table, plan: Plan, embed: Embed | None) -> Iterator[Likeness]:
    if plan.max_bits is not None:
        hashes, mirrored = (
            np.frombuffer(b"".join(usable[name].to_pylist()), np.uint8).reshape(-1, HASH_BYTES)
            for name in ("hash", "mirrored")
        )
        yield HashLikeness(hashes, plan.max_bits, mirrored if plan.mirrored else None)
    if embed is not None:
        yield EmbeddingLikeness(_embedder(data, usable, embed), plan.min_cosine)
    elif plan.embeddings is not None:
        yield EmbeddingLikeness(_stored(plan.embeddings, usable["key"].to_pylist()), plan.min_cosine)


def _embedder(data: Path, usable: pa.Table, embed: Embed, batch: int = 64) -> Callable[[np.ndarray], np.ndarray]:
    def of(rows: np.ndarray) -> np.ndarray:
        places = usable.select(["key", "shard", "offset", "size"]).take(rows).to_pylist()
        pictures = (decode(read_bytes(data / p["shard"], p["offset"], p["size"]), p["key"]) for p in places)
        return np.concatenate([embed(list(islice(pictures, batch))) for _ in range(0, len(places), batch)])

    return of


def _stored(path: str, keys: list[str]) -> Callable[[np.ndarray], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names, vectors = file["keys"].tolist(), file["embeddings"]
    except (KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"embeddings {path} is no .npz file with keys and embeddings ({error})") from error
    if vectors.ndim != 2 or vectors.shape[0] != len(names):
        raise ValueError(f"embeddings {path} has {len(names)} keys and embeddings of shape {vectors.shape}: "
                         "expected [keys, dimensions]")  # fmt: skip
    place = {name: at for at, name in enumerate(names)}
    if missing := [key for key in keys if key not in place]:
        raise ValueError(f"embeddings {path} lacks {len(missing):,} candidates, such as {missing[0]!r}")
    return lambda rows: vectors[[place[keys[row]] for row in rows]]


def _order(usable: pa.Table, seed: int) -> list[int]:
    """Rows in the order of a hash of seed and bytes; of equal files, in that of their keys."""
    ranks = [hashlib.blake2b(sha256, key=str(seed).encode()).digest() for sha256 in usable["sha256"].to_pylist()]
    ranks = list(zip(ranks, usable["key"].to_pylist(), strict=True))
    return sorted(range(len(usable)), key=ranks.__getitem__)


def _matches(listed: list[dict], usable: pa.Table, order: list[int]) -> Iterator[tuple[dict, list[int]]]:
    """For every listed entry the candidates that it means, those with its url first."""
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    columns = {name: usable[name].to_pylist() for name in ("key", "url", "caption")}
    for row in order:
        for name, values in columns.items():
            if values[row] is not None:
                places[name, _folded(name, values[row])].append(row)
    for entry in listed:
        found = [places.get((name, _folded(name, entry[name])), []) for name in columns if name in entry]
        yield entry, list(dict.fromkeys(row for rows in found for row in rows))


def _folded(name: str, text: str) -> str:
    """Without the differences in white space that lists and shards have, and of captions in case."""
    text = " ".join(text.split())
    return text.lower() if name == "caption" else text


def _rows(usable: pa.Table, choice: Choice, plan: Plan, others: list[str] | None) -> pa.Table:
    """The manifest's rows: duplicates, then distinct ones, each in the order of their keys."""
    usable = usable.select([name for name in SCHEMA.names if name in usable.column_names])
    duplicates = sorted(usable.take(pa.array(choice.duplicates, pa.int64())).to_pylist(), key=lambda row: row["key"])
    distinct = sorted(usable.take(pa.array(choice.distinct, pa.int64())).to_pylist(), key=lambda row: row["key"])
    repeats = plan.sizes[1]
    if plan.variant == "other_captions":
        pool = sorted({caption[:MAX_CAPTION] for caption in others or usable["caption"].to_pylist()})
        duplicates = [row for number, duplicate in enumerate(duplicates)
                      for row in _recaptioned(duplicate, repeats, pool, (plan.seed, number))]  # fmt: skip
        repeats = 1
    duplicates = [row | {"repeats": repeats, "role": "duplicate"} for row in duplicates]
    return pa.Table.from_pylist(duplicates + [row | {"repeats": 1, "role": "distinct"} for row in distinct], SCHEMA)


def _recaptioned(duplicate: dict, repeats: int, pool: list[str], seed: tuple[int, int]) -> Iterator[dict]:
    """A row for every copy, each with another caption."""
    places = np.random.default_rng(seed).permutation(len(pool))[: repeats + 1]
    captions = [pool[place] for place in places if pool[place] != duplicate["caption"]][:repeats]
    if len(captions) < repeats:
        raise ValueError(f"variant=other_captions needs {repeats} other captions for each duplicate, found "
                         f"{len(captions)}: ask for fewer repeats or give a longer file of captions")  # fmt: skip
    for number, caption in enumerate(captions):
        yield duplicate | {"key": f"{duplicate['key']}#{number}", "caption": caption}


def _count(found: pa.Table, usable: pa.Table, lost: list[dict], choice: Choice, plan: Plan) -> dict[str, int]:
    """candidates = lost to whatever + not_needed + chosen."""
    reasons = Counter(facts["reason"] for facts in lost)
    wanted, repeats = plan.sizes
    captions = usable["caption"].take(pa.array(choice.chosen, pa.int64())).to_pylist()
    broken = reasons[BROKEN_SHARD]
    losses = {reason.replace(" ", "_"): reasons[reason] for reason in LOSSES}
    total = len(found) - broken
    return {
        "broken_shards": broken,
        "candidates": total,
        **losses,
        "not_needed": total - sum(losses.values()) - len(choice.chosen),
        "chosen": len(choice.chosen),
        "duplicates": len(choice.duplicates),
        "distinct": len(choice.distinct),
        "missing_duplicates": wanted - len(choice.duplicates),
        "missing_distinct": plan.distinct - len(choice.distinct),
        "listed_not_found": len(choice.not_found),
        "sharing_a_caption": sum(n for n in Counter(captions).values() if n > 1),
        "virtual_samples": len(choice.duplicates) * repeats + len(choice.distinct),
    }


def _require_enough(counts: dict[str, int], plan: Plan, out: Path) -> None:
    errors = [
        f"{name}: {counts[name]:,} pictures were found and {wanted:,} asked for: ask for fewer with --{name}, or take "
        f"what there is with --allow_fewer=true; {out / LOST} says why candidates are of no use"
        for name, wanted in (("duplicates", plan.sizes[0]), ("distinct", plan.distinct))
        if counts[name] < wanted and not plan.allow_fewer
    ]
    if not counts["chosen"]:
        errors = [f"nothing is left to choose: {out / LOST} says why"]
    if errors:
        raise ValueError("\n".join(errors))
