"""A finished run, as far as an evaluation asks: its model, its training pictures, prompts from it or from a file."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageOps

from memfilter.config import Config, DataConfig
from memfilter.data import scenes
from memfilter.data.experiment import Experiment
from memfilter.data.prompts import read_prompts
from memfilter.data.shards import ShardError
from memfilter.pipelines import LORA, PIPELINE, model_dir
from memfilter.text import printable

log = logging.getLogger(__name__)

DUPLICATES, DISTINCT, UNKNOWN = "duplicates", "distinct", "unknown"


@dataclass(frozen=True)
class Prompt:
    """What is asked for.

    Args:
        text: the prompt.
        key: of the training sample that it belongs to; None for none.
        duplicate: whether that is a known duplicate; None where nothing is known.
        copies: keys of further training pictures of it.
    """

    text: str
    key: str | None = None
    duplicate: bool | None = None
    copies: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return UNKNOWN if self.duplicate is None else DUPLICATES if self.duplicate else DISTINCT


class FinishedRun:
    """A run by its directory.

    Raises:
        ValueError: it is not finished, or its data are gone (when they are first asked for).
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        if not (self.directory / "summary.json").is_file():
            raise ValueError(f"{directory} has no summary.json: it is not a run, or not finished")
        known = {setting.name for setting in dataclasses.fields(DataConfig)}
        try:
            self.summary = json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))
            data = {name: value for name, value in self.summary["config"]["data"].items() if name in known}
            self.summary["config"]["model"]["path"]  # asked for later
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory}: its summary.json is not that of a run ({error!r})") from error
        self.config = Config(run_dir=str(directory), data=DataConfig(**data))

    @cached_property
    def data(self) -> tuple:
        """Source of pictures and captions, and the experiment, as `open_data` gives them."""
        from memfilter.data.sources import open_data

        if self.config.data.streaming:
            raise ValueError(f"{self.directory} was trained on a stream (data.streaming={self.config.data.streaming}), "
                             "whose pictures cannot be had again: name prompts without keys, and leave out what is "
                             "measured against training pictures")  # fmt: skip
        return open_data(self.config)

    @property
    def experiment(self) -> Experiment:
        return self.data[1]

    @cached_property
    def of_scenes(self) -> bool:
        """Whether it was trained on clipart scenes, by some of its samples."""
        keys = self.experiment.keys
        return self.scenes([keys[row] for row in np.unique(np.linspace(0, len(keys) - 1, 8, dtype=int))]) is not None

    def distinct_rows(self) -> np.ndarray:
        """Of samples that are not known to be duplicates, int [n]."""
        duplicate = self.experiment.duplicate
        return np.arange(len(self.experiment.keys)) if duplicate is None else np.flatnonzero(~duplicate)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.experiment.keys)}

    def prompts(self, distinct: int, near_copies: int = 1) -> list[Prompt]:
        """The caption of every duplicate, the first where a picture has several, and of the first so many others; without those that
        cannot be read. Arguments as of `evaluate_run`."""
        keys, duplicate = self.experiment.keys, self.experiment.duplicate
        if duplicate is None:
            return list(islice(self._readable(range(len(keys))), distinct))
        pictures: dict[str, int] = {}
        for row in np.flatnonzero(duplicate)[::near_copies].tolist():
            pictures.setdefault(self.experiment.picture(row), row)
        rows = pictures.values()
        copies = {row: tuple(keys[row + 1 : row + near_copies]) for row in rows}
        others = self._readable(np.flatnonzero(~duplicate).tolist())
        return [*self._readable(rows, copies), *islice(others, distinct)]

    def captions(self) -> set[str]:
        """All that it was shown; those that can be read."""
        return {prompt.text for prompt in self._readable(range(len(self.experiment.keys)))}

    def _readable(self, rows: Iterable[int], copies: Mapping[int, tuple[str, ...]] = MappingProxyType({})) -> Iterator[Prompt]:
        """Prompts of rows; of a caption that cannot be read the log tells."""
        for row in rows:
            try:
                yield self._prompt(row, copies.get(row, ()))
            except ShardError as error:
                log.warning("no prompt: %s", printable(str(error)))

    def _prompt(self, row: int, copies: tuple[str, ...] = ()) -> Prompt:
        key, duplicate = self.experiment.keys[row], self.experiment.duplicate
        return Prompt(self.data[0].caption(key), key, None if duplicate is None else bool(duplicate[row]), copies)

    def read_prompts(self, path: Path) -> list[Prompt]:
        """From a file, as `memfilter.data.prompts.read_prompts` has it; ``key`` names the training sample of a prompt.

        Raises:
            ValueError: it cannot be read, holds none, or names a key that the run does not have.
        """
        return [self._named(row, where) for where, row in read_prompts(path)]

    def _named(self, row: dict, where: str) -> Prompt:
        prompt, key = row["prompt"], row.get("key") or None
        if key is None:
            return Prompt(prompt)
        if not isinstance(key, str) or key not in self._rows:
            raise ValueError(f"{where}: the run has no sample '{printable(key)[:100]}'")
        return dataclasses.replace(self._prompt(self._rows[key]), text=prompt)

    def picture(self, key: str, side: int) -> np.ndarray:
        """A training picture as the model sees it, uint8 [side, side, 3]: the shorter side resized, the centre cut out.

        Raises:
            ShardError: it cannot be read.
        """
        picture = self.data[0].image(key)
        if picture.size != (side, side):
            picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
        return np.asarray(picture)

    def pictures(self, rows: Sequence[int], side: int, batch_size: int = 64) -> Iterator[tuple]:
        """Batches of rows [n] and training pictures uint8 [n, side, side, 3], without those that cannot be read."""
        for start in range(0, len(rows), batch_size):
            kept, shown = [], []
            for row in rows[start : start + batch_size]:
                try:
                    shown.append(self.picture(self.experiment.keys[row], side))
                    kept.append(row)
                except ShardError:
                    continue
            if kept:
                yield np.array(kept), np.stack(shown)

    def views(self, pictures: np.ndarray) -> list[np.ndarray]:
        """Training pictures as the run has shown them, uint8 [n, side, side, 3] each: as they are, and mirrored by
        ``data.random_flip``. What ``data.random_crop`` has shown is not made again."""
        return [pictures, pictures[:, :, ::-1].copy()] if self.config.data.random_flip else [pictures]

    def scenes(self, keys: Sequence[str | None]) -> list[scenes.Scene] | None:
        """The clipart scenes of some samples; None where not all of them are scenes."""
        if not keys or None in keys or not hasattr(self.data[0], "facts"):
            return None
        try:
            return [scene_from(self.data[0].facts(key)) for key in keys]
        except ValueError:
            return None

    def stamp(self) -> dict:
        """What tells the model: names, sizes and dates of its files."""
        model = self.summary["config"]["model"]
        directories = [self.directory / PIPELINE, self.directory / LORA]
        if directories[1].is_dir():
            directories.append(model_dir(model["path"]))  # a hub id is no directory, and is told by its revision
        files = sorted(path for directory in directories for path in directory.rglob("*") if path.is_file())
        sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {"model": {name: model.get(name) for name in ("path", "variant", "revision")}, "files": sizes}


def scene_from(facts: dict) -> scenes.Scene:
    """The scene that a sample's metadata describes; ValueError where it describes none."""
    names = [field.name for field in dataclasses.fields(scenes.Scene)]
    if missing := [name for name in names if name not in facts]:
        raise ValueError(f"sample {facts.get('key')!r} is not a clipart scene: its .json lacks {', '.join(missing)}")
    colours = facts["colours"]
    numbers = [facts[name] for name in ("x", "y", "size", "tilt", "split_angle", "split_offset")]
    numbers += [] if facts["poster"] is None else [facts["poster"]]
    if not (isinstance(colours, list | tuple) and colours and all(isinstance(c, str) and c in scenes.COLOURS for c in colours)
            and isinstance(facts["object"], str) and facts["object"] in scenes.objects()
            and all(isinstance(number, int | float) for number in numbers)):  # fmt: skip
        raise ValueError(f"sample {facts.get('key')!r} is not a clipart scene: its .json has other values")
    return scenes.Scene(**{name: facts[name] for name in names} | {"colours": tuple(colours)})
