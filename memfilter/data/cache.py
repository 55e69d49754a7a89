"""Encodings that are made once: a posterior for every view of a picture, embeddings for every caption.

A cache is a directory of

- ``pictures-00000.safetensors``, ...: ``posterior`` [N, 2, C, h, w], mean and standard deviation of the VAE's posterior
  before scaling, and ``time_ids`` [N, 6], SDXL's sizes; rows of pictures that could not be read are 0;
- ``prompts-00000.safetensors``, ...: ``prompt_embeds`` [N, L, D] and, for SDXL, ``pooled_prompt_embeds`` [N, P];
- ``index.parquet``: where each view and its caption stand, or why the sample could not be read;
- ``cache.json``, written last: what all this was made from.

Shards say in their headers what they were made from, and are whole or not there: a job that was killed goes on with the
next one. An encoding does not depend on what else is encoded, so the files are the same whoever wrote which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from memfilter.config import Config, ConfigError
from memfilter.data.experiment import Experiment
from memfilter.data.shards import IMAGE_SUFFIXES, ShardError, Shards

FORMAT = 1
INDEX, COMPLETE = "index.parquet", "cache.json"
PARTS = {"pictures": ("posterior", "time_ids"), "prompts": ("prompt_embeds", "pooled_prompt_embeds")}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("flip", pa.bool_()),
        ("shard", pa.int32()),  # of the picture; null where it could not be read
        ("row", pa.int32()),
        ("caption", pa.string()),
        ("prompt_shard", pa.int32()),  # null for the empty caption
        ("prompt_row", pa.int32()),
        ("bad", pa.string()),  # why the sample could not be read
    ]
)
SUFFIX = ".safetensors"
_OPEN_FILES = 256
# what the use of a tokenizer, and the place it came from, leave in its files
_PASSING = {"padding", "truncation", "max_length", "pad_to_multiple_of", "is_local", "local_files_only", "name_or_path"}


def fingerprint(config: Config, pipeline, shards, experiment: Experiment, resolution: int) -> dict:
    """What encodings depend on; what a cache was made with must be what it is used with.

    Pictures are told by what a manifest or a saved dataset notes of its contents, which is part of ``samples``, else by
    the sizes of their files: a picture whose bytes changed in place is then not noticed.
    """
    parts = {name: getattr(pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")}
    tokenizers = {name: getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")}
    return {
        "format": FORMAT,
        **{name: _digest_of_model(part) for name, part in parts.items() if part is not None},
        **{name: _digest_of_tokenizer(part) for name, part in tokenizers.items() if part is not None},
        "data.resolution": resolution,
        "data.random_crop": config.data.random_crop,
        "data.random_flip": config.data.random_flip,
        "samples": experiment.whole.fingerprint(),
        "pictures": _digest_of_pictures(shards, experiment.whole.keys),
    }


def _digest_of_model(model) -> str:
    """sha256 of configuration and weights."""
    config = model.config.to_diff_dict() if hasattr(model.config, "to_diff_dict") else dict(model.config)
    config = {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_tokenizer(tokenizer) -> str:
    """sha256 of its files."""
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in ("tokenizer.json", "tokenizer_config.json"):
                facts = {name: value for name, value in json.loads(content).items() if name not in _PASSING}
                content = json.dumps(facts, sort_keys=True).encode()
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _digest_of_pictures(shards, keys: Iterable[str]) -> str:
    if not isinstance(shards, Shards):
        return ""  # what a manifest or a saved dataset notes of its contents is in the experiment's fingerprint
    digest = hashlib.sha256()
    for key in keys:
        sizes = sorted((s, member.size) for s, member in shards.members[key].items() if s in IMAGE_SUFFIXES)
        digest.update(f"{key}\0{sizes}\n".encode())
    return digest.hexdigest()


def differences(before: Mapping, now: Mapping) -> list[str]:
    named = {name: None for name in (*before, *now) if before.get(name) != now.get(name)}
    return [f"{name} was {str(before.get(name))[:12]}, found {str(now.get(name))[:12]}" for name in named]


def shard_name(kind: str, shard: int) -> str:
    return f"{kind}-{shard:05d}{SUFFIX}"


class Cache:
    """A complete cache, for `Encoder`. Files stay mapped, and of them only the rows that are asked for are read.

    ``pictures``: view (key, None, flip) -> posterior [2, C, h, w] and time_ids [6]. ``prompts``: caption -> [L, D] and,
    for SDXL, pooled [P]. ``bad``: key -> why the sample could not be read. Tensors are fp32, on the CPU.
    """

    def __init__(self, path: Path):
        pictures, prompts, self.bad = {}, {}, {}
        columns = pq.read_table(path / INDEX, schema=SCHEMA, partitioning=None).to_pydict()
        for key, flip, shard, row, caption, prompt_shard, prompt_row, bad in zip(*columns.values(), strict=True):
            if bad is None:
                pictures[key, None, flip] = shard, row
            else:
                self.bad[key] = bad
            if prompt_shard is not None:
                prompts[caption] = prompt_shard, prompt_row
        self.pictures: Mapping[tuple, tuple[Tensor, ...]] = _Rows(path, "pictures", pictures)
        self.prompts: Mapping[str, tuple[Tensor, ...]] = _Rows(path, "prompts", prompts)

    @classmethod
    def open(cls, path: str | os.PathLike, fingerprint: dict) -> Cache:
        """The cache in a directory.

        Args:
            fingerprint: see the function of that name.

        Raises:
            ConfigError: it is not there or not complete, or was made from something else; a line for every difference.
        """
        path = Path(path)
        if not (path / COMPLETE).is_file():
            state = "is not complete" if path.is_dir() else "does not exist"
            raise ConfigError(f"data.cache: {path} {state}: run memfilter cache with the settings of this run")
        try:
            facts = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
            reasons = [f"was made from something else: {reason}; make another with memfilter cache, or go back to what "
                       "it was made from" for reason in differences(facts["fingerprint"], fingerprint)]  # fmt: skip
            reasons = reasons or [f"is not complete: {name} is missing or cut; run memfilter cache again"
                                  for name, size in facts["files"].items() if _size(path / name) != size]  # fmt: skip
            if not reasons:
                return cls(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reasons = [f"cannot be read ({' '.join(str(error).split())}): remove it and run memfilter cache"]
        raise ConfigError("\n".join(f"data.cache: {path} {reason}" for reason in reasons))

    def shards(self, shards) -> KnownShards:
        """The same samples, of which those that could not be read are not tried again."""
        return KnownShards(shards, self.bad)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


class _Rows(Mapping):
    """Name -> row of every tensor in its shard."""

    def __init__(self, path: Path, kind: str, places: dict[Hashable, tuple[int, int]]):
        self._places, self._parts = places, PARTS[kind]
        self._file = lru_cache(_OPEN_FILES)(lambda shard: safe_open(path / shard_name(kind, shard), framework="pt"))

    def __getitem__(self, name: Hashable) -> tuple[Tensor, ...]:
        shard, row = self._places[name]
        file = self._file(shard)
        return tuple(file.get_slice(part)[row].float() for part in self._parts if part in file.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class KnownShards:
    """Shards of which it is known what cannot be read: it is not tried again.

    Args:
        shards: `Shards`, or what is used like them.
        bad: key -> why.
    """

    shards: Shards
    bad: Mapping[str, str]

    def keys(self) -> list[str]:
        return self.shards.keys()

    def image(self, key: str) -> Image.Image:
        if key in self.bad:
            raise ShardError(self.bad[key])
        return self.shards.image(key)

    def caption(self, key: str) -> str:
        return self.shards.caption(key)
