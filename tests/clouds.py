"""Pictures whose perceptual hashes are as good as random, and shards of whatever a test wants in them."""

import io
import tarfile

import numpy as np
from PIL import Image


def cloud(number: int, side: int = 64) -> Image.Image:
    coarse = np.random.default_rng((7, number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image | int, form: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    (cloud(picture) if isinstance(picture, int) else picture).save(buffer, form, **options)
    return buffer.getvalue()


def sample(key: str, picture: Image.Image | int, caption: str | None = None, form: str = "png", **options) -> list:
    """Members of a shard; the caption is by default a number's."""
    members = [(f"{key}.{'jpg' if form == 'jpeg' else form}", encoded(picture, form, **options))]
    caption = f"cloud {picture}" if caption is None else caption
    return members + [(f"{key}.txt", caption.encode())]


def write_tar(path, members: list[tuple[str, bytes]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_clouds(path, numbers, per_shard: int = 10):
    """Shards of clouds whose keys are their numbers."""
    numbers = list(numbers)
    for shard, start in enumerate(range(0, len(numbers), per_shard)):
        chosen = numbers[start : start + per_shard]
        write_tar(path / f"{shard:05d}.tar", [m for number in chosen for m in sample(f"{number:05d}", number)])
    return path
