"""What is drawn for a sample, as a pure function of (seed, position in the global sample stream)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from memfilter.data.experiment import Experiment
from memfilter.data.shards import Shards

_NOISE, _TIMESTEP, _POSTERIOR, _CAPTION = range(4)


class SampleStream:
    """An endless stream of virtual samples: every epoch is a permutation of all of them.

    Args:
        rows: row of every virtual sample.
    """

    def __init__(self, rows: np.ndarray, seed: int):
        self.rows, self.seed = rows, seed
        self._epoch, self._order = None, rows

    def row(self, position: int) -> int:
        """The row that is shown at this position."""
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return int(self._order[place])


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


@dataclass
class SampleDataset(Dataset):
    """Position in the stream -> key, duplicate (None: unknown), repeats (comes again), caption, and pixels [3, H, W] in
    [-1, 1]."""

    shards: Shards
    experiment: Experiment
    stream: SampleStream
    resolution: int

    def __getitem__(self, position: int) -> dict:
        row = self.stream.row(position)
        key = self.experiment.keys[row]
        return {
            "position": position,
            "key": key,
            "duplicate": None if self.experiment.duplicate is None else bool(self.experiment.duplicate[row]),
            "repeats": bool(self.experiment.repeats[row] > 1),
            "caption": self.shards.caption(key),
            "pixels": to_pixels(self.shards.image(key), self.resolution),
        }


def to_pixels(picture: Image.Image, resolution: int) -> Tensor:
    """Shorter side to ``resolution``, centre crop: RGB -> [3, H, W] in [-1, 1]."""
    scale = resolution / min(picture.size)
    if scale != 1:
        size = [max(resolution, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = ((side - resolution) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def collate(samples: list[dict]) -> dict:
    """Lists, with the pixels stacked to [B, 3, H, W]."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return batch | {"pixels": torch.stack(batch["pixels"])}
