"""What is drawn for a sample, as a pure function of (seed, position in the global sample stream)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from memfilter.data.experiment import Experiment
from memfilter.data.shards import MAX_PIXELS, ShardError, Shards

_NOISE, _TIMESTEP, _POSTERIOR, _CAPTION, _OFFSET, _CROP, _FLIP, _ORDER, _WORDS, _EMBEDDING = range(10)


class SampleStream:
    """An endless stream of virtual samples: every epoch is a permutation of all of them.

    Args:
        rows: row of every virtual sample; a row that stands there r times has r copies.
        spread: of r parts of the epoch, about equally long, each has one of the r copies, at a random place; else the
            order is all random, and copies crowd here and there.
    """

    def __init__(self, rows: np.ndarray, seed: int, spread: bool = False):
        self.rows, self.seed, self.spread = rows, seed, spread
        self._epoch, self._order = None, rows

    def row(self, position: int) -> int:
        """The row that is shown at this position."""
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._spread(epoch) if self.spread else self._shuffled(epoch)
        return int(self._order[place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

    def _spread(self, epoch: int) -> np.ndarray:
        rows = np.sort(self.rows)
        _, first, inverse, repeats = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
        copy = np.arange(len(rows)) - first[inverse]  # 0 ... r - 1
        share = _generator(self.seed, epoch, _ORDER).random(len(rows))
        return rows[np.argsort((copy + share) / repeats[inverse], kind="stable")]


def _generator(seed: int, position: int, purpose: int) -> np.random.Generator:
    """Counter-based, so that neighbouring positions are independent and every purpose has draws of its own."""
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, purpose]))


def noise(seed: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, fp32, of the given shape."""
    return torch.from_numpy(_generator(seed, position, _NOISE).standard_normal(shape, np.float32))


def posterior_noise(seed: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draw for the VAE's posterior, fp32."""
    return torch.from_numpy(_generator(seed, position, _POSTERIOR).standard_normal(shape, np.float32))


def timestep(seed: int, position: int, num_train_timesteps: int) -> int:
    """Uniform in [0, num_train_timesteps)."""
    return int(_generator(seed, position, _TIMESTEP).integers(num_train_timesteps))


def caption_dropped(seed: int, position: int, share: float) -> bool:
    """Whether the caption is replaced by the empty one, with probability ``share``."""
    return bool(_generator(seed, position, _CAPTION).random() < share)


def word_draws(seed: int, position: int) -> np.random.Generator:
    """From which changes of the caption are drawn."""
    return _generator(seed, position, _WORDS)


def embedding_noise(seed: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draw for the caption's embedding, fp32."""
    return torch.from_numpy(_generator(seed, position, _EMBEDDING).standard_normal(shape, np.float32))


def noise_offset(seed: int, position: int, channels: int) -> Tensor:
    """Standard normal shift of every channel, fp32 [C, 1, 1] (Guttenberg, "Diffusion with Offset Noise", 2023)."""
    return torch.from_numpy(_generator(seed, position, _OFFSET).standard_normal((channels, 1, 1), np.float32))


def crop_place(seed: int, position: int) -> tuple[float, float]:
    """Where a random crop lies, as shares of the free height and width, uniform in [0, 1)."""
    top, left = _generator(seed, position, _CROP).random(2)
    return float(top), float(left)


def flipped(seed: int, position: int) -> bool:
    """Whether the picture is mirrored, with probability 1/2."""
    return bool(_generator(seed, position, _FLIP).random() < 0.5)


@dataclass(frozen=True)
class View:
    """How a picture is shown: at which resolution, and which part of it.

    Args:
        resolution: pixels; the shorter side becomes this, then a square is cropped.
        random_crop: whether the square lies at random; else in the centre.
        random_flip: whether every second picture, at random, is mirrored.
    """

    resolution: int
    random_crop: bool = False
    random_flip: bool = False


@dataclass
class SampleDataset(Dataset):
    """Position in the stream -> what is known of the sample there, as a dict:

    position; key; shared_key (under which evidence is collected); duplicate (None: unknown);
    repeats (whether it comes again); caption; view (a name for the pixels:
    same view, same pixels); pixels [3, H, W] in [-1, 1], None where ``remembered`` has the view; original_size (height,
    width) and crop_top_left, as SDXL is conditioned on them; bad (why the sample could not be read, else None: its
    pixels are then 0 and its caption empty).

    Args:
        budget: positions that will be asked for; beyond the first epoch every sample comes again.
        remembered: views whose pixels nobody needs any more. A worker process does not see it grow, and decodes.
        shared_by: what shares evidence: sample, caption or content, the experiment's groups.
    """

    shards: Shards
    experiment: Experiment
    stream: SampleStream
    view: View
    budget: int = 0
    remembered: Container[tuple] = frozenset()
    shared_by: str = "sample"

    def shared_key(self, row: int) -> str:
        """Of a row of the experiment."""
        if self.shared_by == "content":
            return str(self.experiment.groups[row])
        key = self.experiment.keys[row]
        if self.shared_by == "sample":
            return key
        try:
            return self.shards.caption(key)
        except ShardError:  # the sample is left out in any case
            return key

    def facts(self, positions: list[int]) -> dict[str, list]:
        """position, key and duplicate of samples that need not be read."""
        rows = [self.stream.row(position) for position in positions]
        known = self.experiment.duplicate
        duplicate = [None if known is None else bool(known[row]) for row in rows]
        return {"position": list(positions), "key": [self.experiment.keys[row] for row in rows], "duplicate": duplicate}

    def __getitem__(self, position: int) -> dict:
        row = self.stream.row(position)
        key, view = self.experiment.keys[row], self.view
        place = crop_place(self.stream.seed, position) if view.random_crop else None
        flip = view.random_flip and flipped(self.stream.seed, position)
        sample = {
            "position": position,
            "key": key,
            "shared_key": self.shared_key(row),
            "duplicate": None if self.experiment.duplicate is None else bool(self.experiment.duplicate[row]),
            "repeats": bool(self.experiment.repeats[row] > 1) or self.budget > len(self.stream.rows),
            "view": (self.experiment.picture(row), place, flip),
        }
        try:
            return sample | {"caption": self.shards.caption(key), "bad": None} | self._picture(sample["view"])
        except ShardError as error:
            return sample | unreadable(position, view.resolution, str(error))

    def _picture(self, name: tuple) -> dict:
        key, place, flip = name
        if name in self.remembered:
            return dict(NOT_NEEDED)
        return shown(self.shards.image(key), key, self.view.resolution, place, flip)


NOT_NEEDED = {"pixels": None, "original_size": None, "crop_top_left": None}  # of a picture whose encoding is remembered


def shown(picture: Image.Image, key: str, resolution: int, place: tuple[float, float] | None, flip: bool) -> dict:
    """pixels, original_size and crop_top_left of a sample; arguments as for `to_pixels`.

    Raises:
        ShardError: the picture is so long and narrow that, reduced, it has more than `MAX_PIXELS`.
    """
    if resolution**2 * max(picture.size) > MAX_PIXELS * min(picture.size):
        raise ShardError(f"sample {key!r}: {picture.width} x {picture.height} pixels, reduced to a shorter side of "
                         f"{resolution}, are more than {MAX_PIXELS:,}")  # fmt: skip
    pixels, corner = to_pixels(picture, resolution, place, flip)
    return {"pixels": pixels, "original_size": (picture.height, picture.width), "crop_top_left": corner}


def unreadable(position: int, resolution: int, reason: str) -> dict:
    """What stands for a sample that could not be read."""
    blank, size = torch.zeros(3, resolution, resolution), (resolution, resolution)
    facts = {"caption": "", "pixels": blank, "original_size": size, "crop_top_left": (0, 0), "bad": reason}
    return facts | {"view": ("bad", position), "repeats": False}


def to_pixels(
    picture: Image.Image, resolution: int, place: tuple[float, float] | None = None, flip: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Shorter side to ``resolution``, square crop, perhaps mirrored.

    Args:
        place: of the crop, as shares in [0, 1) of the free height and width; None for the centre.

    Returns:
        Pixels [3, H, W] in [-1, 1] and the crop's (top, left) in the resized picture; of a mirrored picture, in its
        mirror image.
    """
    scale = resolution / min(picture.size)
    if scale != 1:
        size = [max(resolution, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    free = (picture.height - resolution, picture.width - resolution)
    if place is None:
        top, left = (room // 2 for room in free)
    else:
        top, left = (int(share * (room + 1)) for share, room in zip(place, free, strict=True))
    picture = picture.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)


def collate(samples: list[dict]) -> dict:
    """Lists, one entry for every sample."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}
