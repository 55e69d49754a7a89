"""Which pictures are copies of others: byte for byte, by perceptual hash, or by copy-detection embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

HASH_BYTES = 8
NEAR_BITS = 6  # of 64, by which the hashes of near pictures differ at most: docs/results/near_duplicates.md
EXACT, NEAR, CAPTION = "exact duplicate", "near duplicate", "equal caption"


def perceptual_hashes(picture: Image.Image) -> tuple[bytes, bytes]:
    """ImageHash's phash (64 bits) of a picture and of its mirror image."""
    from imagehash import phash

    small = picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # which phash begins with
    return tuple(np.packbits(phash(view).hash).tobytes() for view in (small, ImageOps.mirror(small)))


class Likeness(Protocol):
    """Tells which pictures are near others. Pictures are rows of whatever it was made from."""

    def add(self, rows: np.ndarray) -> None:
        """Remembers pictures, int [n]."""

    def known(self, rows: np.ndarray) -> np.ndarray:
        """For every picture the nearest that is remembered, int [n]; -1 where none is near."""

    def among(self, rows: np.ndarray) -> np.ndarray:
        """Whether picture i is near picture j, bool [n, n]."""


class HashLikeness:
    """Near is whose perceptual hashes differ in few bits.

    Args:
        hashes: uint8 [N, 8].
        max_bits: the most that near pictures' hashes differ by.
        mirrored: hashes of the mirror images, uint8 [N, 8], where a mirrored picture is near too.
    """

    def __init__(self, hashes: np.ndarray, max_bits: int, mirrored: np.ndarray | None = None):
        self._hashes, self._max_bits = hashes, max_bits
        self._views = [hashes] if mirrored is None else [hashes, mirrored]
        self._rows = np.empty(0, int)
        self._index = self._new_index()

    def add(self, rows: np.ndarray) -> None:
        self._index.add(self._hashes[rows])
        self._rows = np.append(self._rows, rows)

    def known(self, rows: np.ndarray) -> np.ndarray:
        nearest = np.full(len(rows), -1)
        if self._index.ntotal:
            for view in self._views:
                bits, place = (found[:, 0] for found in self._index.search(view[rows], 1))
                nearest = np.where((nearest < 0) & (bits <= self._max_bits), self._rows[place], nearest)
        return nearest

    def among(self, rows: np.ndarray) -> np.ndarray:
        index, near = self._new_index(), np.zeros((len(rows), len(rows)), bool)
        index.add(self._hashes[rows])
        for view in self._views:
            limits, _, found = index.range_search(view[rows], self._max_bits + 1)  # which looks for less than that
            near[np.repeat(np.arange(len(rows)), np.diff(limits.astype(int))), found] = True
        return near

    @staticmethod
    def _new_index():
        import faiss

        return faiss.IndexBinaryFlat(8 * HASH_BYTES)


def near_pairs(hashes: np.ndarray, max_bits: int, chunk: int = 4096) -> np.ndarray:
    """Rows whose perceptual hashes differ in at most so many bits: uint8 [N, 8] -> int [n, 2], the smaller first."""
    index, pairs = HashLikeness._new_index(), [np.empty((0, 2), int)]
    index.add(hashes)
    for start in range(0, len(hashes), chunk):
        limits, _, found = index.range_search(hashes[start : start + chunk], max_bits + 1)  # which looks for less than that
        rows = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits.astype(int)))
        pairs.append(np.stack([rows, found], 1)[rows < found])
    return np.concatenate(pairs)


class EmbeddingLikeness:
    """Near is whose embeddings have a high cosine.

    Args:
        embed: gives the embeddings [n, D] of pictures, int [n]; they need not be of unit length.
        min_cosine: the least that near pictures have.
    """

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray], min_cosine: float):
        self._embed, self._min_cosine = embed, min_cosine
        self._rows, self._index = np.empty(0, int), None
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, rows: np.ndarray) -> None:
        import faiss

        units = self._units(rows)
        self._index = self._index or faiss.IndexFlatIP(units.shape[1])
        self._index.add(units)
        self._rows = np.append(self._rows, rows)

    def known(self, rows: np.ndarray) -> np.ndarray:
        if self._index is None or not len(rows):
            return np.full(len(rows), -1)
        cosine, place = (found[:, 0] for found in self._index.search(self._units(rows), 1))
        return np.where(cosine >= self._min_cosine, self._rows[place], -1)

    def among(self, rows: np.ndarray) -> np.ndarray:
        units = self._units(rows)
        return units @ units.T >= self._min_cosine

    def _units(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of unit length, float32 [n, D]; the last ones are kept, since `Distinct` asks three times."""
        if self._last is None or not set(rows) <= set(self._last[0]):
            vectors = np.array(self._embed(rows), np.float32)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            if not np.isfinite(lengths).all() or not lengths.all():
                raise ValueError("an embedding is zero or not finite: leave the picture out or embed it again")
            self._last = rows, vectors / lengths
        order = {row: place for place, row in enumerate(self._last[0])}
        return self._last[1][[order[row] for row in rows]]


class Verdict(NamedTuple):
    """About one picture: why it is refused (None: it is admitted), and which admitted one it is like."""

    row: int
    reason: str | None
    like: int | None


class Distinct:
    """A growing set of pictures none of which is a copy of another. First come, first served.

    Args:
        sha256: of every picture's file.
        likenesses: what counts as near.
        captions: of every picture, where equal captions are refused too.
        chunk: so many pictures are compared at once; of no consequence for what is admitted.
    """

    def __init__(
        self,
        sha256: Sequence[bytes],
        likenesses: Sequence[Likeness] = (),
        captions: Sequence[str] | None = None,
        chunk: int = 1024,
    ):
        self._sha256, self._likenesses, self._captions, self._chunk = sha256, likenesses, captions, chunk
        self._files: dict[bytes, int] = {}
        self._said: dict[str, int] = {}

    def sift(self, rows: np.ndarray, limit: int) -> Iterator[Verdict]:
        """Judges pictures in their order, until ``limit`` more are admitted. To be read to its end."""
        for start in range(0, len(rows), self._chunk):
            if limit <= 0:
                return
            verdicts = list(self._judge(np.asarray(rows[start : start + self._chunk]), limit))
            admitted = np.array([verdict.row for verdict in verdicts if verdict.reason is None], int)
            limit -= len(admitted)
            if len(admitted):
                for likeness in self._likenesses:
                    likeness.add(admitted)
            yield from verdicts

    def _judge(self, rows: np.ndarray, limit: int) -> Iterator[Verdict]:
        like, near = np.full(len(rows), -1), np.zeros((len(rows), len(rows)), bool)
        new = np.array([self._sha256[row] not in self._files for row in rows], bool)
        for likeness in self._likenesses:  # the dearer ones come last and are asked only about what is left
            if len(places := np.flatnonzero(new & (like < 0))):
                like[places] = likeness.known(rows[places])
                near[np.ix_(places, places)] |= likeness.among(rows[places])
        admitted: list[int] = []
        for place, row in enumerate(rows.tolist()):
            if len(admitted) == limit:
                return
            file, caption = self._sha256[row], self._captions[row] if self._captions else None
            neighbours = np.flatnonzero(near[place, admitted])
            if file in self._files:
                yield Verdict(row, EXACT, self._files[file])
            elif like[place] >= 0:
                yield Verdict(row, NEAR, int(like[place]))
            elif len(neighbours):
                yield Verdict(row, NEAR, int(rows[admitted[neighbours[0]]]))
            elif caption is not None and caption in self._said:
                yield Verdict(row, CAPTION, self._said[caption])
            else:
                admitted.append(place)
                self._files[file] = row
                if caption is not None:
                    self._said[caption] = row
                yield Verdict(row, None, None)
