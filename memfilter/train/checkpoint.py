"""Where a run can go on from: directories that are whole or not there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Container, Set
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memfilter.config import Config, settings_of
from memfilter.files import is_full

log = logging.getLogger(__name__)

_STATE, _WEIGHTS, _AVERAGE, _EVIDENCE = "state.json", "model.safetensors", "ema.safetensors", "evidence.safetensors"
# what may be another when a run goes on: where things are and how work is split, not what is learnt
FREE = {"data.path", "data.index", "data.shuffle_buffer", "data.cache_gb", "data.workers", "train.samples",
        "train.batch_size", "train.accumulation", "train.gradient_checkpointing", "train.compile",
        "filter.max_empty_steps"}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or a run cannot go on from the one that is there."""


class Checkpoints:
    """``checkpoints/<samples seen>/`` of a run: ``state.json`` with the counters, the average as ``ema.safetensors``, the
    filter's table of keys as ``evidence.safetensors``, and what accelerate saves: trained weights (``model.safetensors``),
    optimizer, fp16's loss scale; under DeepSpeed and FSDP in their formats. Pickled files, accelerate's and DeepSpeed's, are
    read from here only.

    Each is written beside its place and renamed when all ranks are done.

    Args:
        keep: so many of the newest stay.
    """

    def __init__(self, run_dir: Path, keep: int, accelerator: Accelerator, trained: dict[str, torch.nn.Parameter]):
        self._dir, self._keep, self._accelerator = run_dir / "checkpoints", keep, accelerator
        self._deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._trained = trained
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)
        if self._deepspeed:
            engine = accelerator.deepspeed_engine_wrapped.engine
            engine.module_state_dict = partial(_without_frozen, engine.module_state_dict, trained)

    # accelerate would save frozen weights too, and names that only the same number of processes can load
    def _save_weights(self, models: list, weights: list, out: str) -> None:
        if weights and self._accelerator.is_main_process:
            save_file({name: p.detach().contiguous() for name, p in self._trained.items()}, Path(out) / _WEIGHTS)
        weights.clear()

    @torch.no_grad()
    def _load_weights(self, models: list, source: str) -> None:
        if models:
            for name, tensor in load_file(Path(source) / _WEIGHTS).items():
                self._trained[name].copy_(tensor)
        models.clear()

    def save(
        self, samples: int, state: dict, average: list[torch.Tensor] | None, evidence: dict[str, torch.Tensor] | None = None
    ) -> Path:
        """Every rank calls.

        Raises:
            CheckpointError: it cannot be written; those that are there are as they were.
        """
        final, accelerator = self._dir / f"{samples:012d}", self._accelerator
        if _is_whole(final):
            return final
        partial = final.with_name(f".{final.name}.partial")
        try:
            if accelerator.is_main_process:
                self._clear_partials()
                partial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial), **({"exclude_frozen_parameters": True} if self._deepspeed else {}))
            if average is not None and accelerator.is_main_process:
                save_file({str(i): tensor.contiguous() for i, tensor in enumerate(average)}, partial / _AVERAGE)
            if evidence is not None and accelerator.is_main_process:
                save_file({name: tensor.contiguous() for name, tensor in evidence.items()}, partial / _EVIDENCE)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
                ranks = {"kind": _kind(accelerator), "processes": accelerator.num_processes}
                text = json.dumps({"samples": samples, **ranks, **state, "files": sizes}, indent=1)
                (partial / _STATE).write_text(text, encoding="utf-8")
                shutil.rmtree(final, ignore_errors=True)  # one that was passed over
                partial.rename(final)
                for other in {*self._dir.glob("[0-9]*")} - {*self._whole()[: self._keep]}:  # older, or not whole
                    shutil.rmtree(other)
        except (OSError, RuntimeError, SafetensorError) as error:
            free, reason = shutil.disk_usage(self._dir).free if self._dir.is_dir() else 0, " ".join(str(error).split())
            if isinstance(error, RuntimeError) and (full := _full(partial)):
                reason = f"{full} ({reason})"
            self._clear_partials()
            kept = f"the newest whole one is {whole[0]}" if (whole := self._whole()) else "there is no other"
            raise CheckpointError(
                f"{final} cannot be written ({free / 2**20:.0f} MiB free): {reason}; {kept}"
            ) from error
        accelerator.wait_for_everyone()
        return final

    def _clear_partials(self) -> None:
        for partial in self._dir.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def _whole(self) -> list[Path]:
        """Newest first."""
        return sorted((d for d in self._dir.glob("[0-9]*") if _is_whole(d)), reverse=True)

    def newest(self) -> tuple[Path, dict] | None:
        """The newest whole checkpoint and its state."""
        for found in sorted(self._dir.glob("[0-9]*"), reverse=True):
            if _is_whole(found):
                return found, json.loads((found / _STATE).read_text(encoding="utf-8"))
            log.warning("passed over %s: it is not whole", found)
        return None

    def load(self, path: Path, state: dict) -> tuple[list[torch.Tensor] | None, dict[str, torch.Tensor] | None]:
        """Weights, optimizer and loss scale; returns the average and the table of keys that were saved. Every rank calls.

        Raises:
            CheckpointError: it is of another kind of run.
        """
        accelerator, kind = self._accelerator, _kind(self._accelerator)
        if state["kind"] != kind:
            raise CheckpointError(f"{path} is of a run under {state['kind']}, found {kind}: go on as it began")
        if self._deepspeed and state["processes"] != accelerator.num_processes:
            raise CheckpointError(
                f"{path} is of {state['processes']} processes, found {accelerator.num_processes}: DeepSpeed's shards "
                "belong to their number; go on with as many, or without DeepSpeed from the start"
            )
        # a device may have no room for a second optimizer state, nor, where it is paged, for the first
        accelerator.load_state(str(path), **({"load_module_strict": False} if self._deepspeed else {"map_location": "cpu"}))
        accelerator.step = 0  # of micro-batches; checkpoints lie between optimizer steps
        average, evidence = (load_file(path / name) if (path / name).exists() else None for name in (_AVERAGE, _EVIDENCE))
        if average is not None:  # safetensors knows no "cpu:0"
            average = [average[str(i)].to(accelerator.device) for i in range(len(average))]
        return average, evidence


def _without_frozen(whole: Callable[..., dict], trained: Container[str], *args, exclude_frozen_parameters=False, **more) -> dict:
    """DeepSpeed's ``module_state_dict``, which knows frozen weights by other names than the filtered denoiser saves them by."""
    state = whole(*args, **more)
    return {name: tensor for name, tensor in state.items() if name in trained} if exclude_frozen_parameters else state


def _full(directory: Path) -> OSError | None:
    """Why no more can be written there: torch.save does not say."""
    try:
        (directory / "probe").write_bytes(bytes(2**20))
    except OSError as error:
        return error if is_full(error) else None
    return None


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / _STATE).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _kind(accelerator: Accelerator) -> str:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.deepspeed_plugin.zero_stage}"
    return "FSDP" if accelerator.distributed_type == DistributedType.FSDP else "DDP or one process"


def changes(before: dict, config: Config, free: Set[str] = FREE) -> list[str]:
    """Every setting that would make a run another one, with what it was in ``before``, as JSON has a `Config`.

    Args:
        free: what may be another.
    """
    now = json.loads(json.dumps(asdict(config)))
    return [
        f"{section}.{setting.name} was {before[section][setting.name]}, found {now[section][setting.name]}"
        for section, setting in settings_of(Config)
        if section not in ("log", "checkpoint") and f"{section}.{setting.name}" not in free
        if setting.name in before.get(section, {}) and before[section][setting.name] != now[section][setting.name]
    ]


def require_same(path: Path, state: dict, config: Config, data: str) -> None:
    """Raises CheckpointError with every setting that would make the run another one.

    Args:
        data: fingerprint of the samples, see `Experiment.fingerprint`.
    """
    reasons = changes(state["config"], config)
    if state["data"] != data:
        reasons.append("the samples of data.path and data.index are others")
    if reasons:
        raise CheckpointError("\n".join(f"the run cannot go on from {path}: {reason}" for reason in reasons))
