"""Pipelines in: which models can be fine-tuned, and where a run left its own."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path

import torch

SCENES_BASE = "scenes-base"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINE, LORA = "pipeline", "lora"  # in a run's directory


class ModelError(ValueError):
    """What model.path names is not a pipeline that can be fine-tuned."""


def model_dir(path: str) -> Path:
    """The directory that ``model.path`` means."""
    return Path(str(files("memfilter") / "assets" / SCENES_BASE)) if path == "scenes" else Path(path)


def is_hub_id(path: str) -> bool:
    """Whether ``model.path`` is no directory but has the form of a hub id, owner/name."""
    return not model_dir(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def load_pipeline(
    path: str, dtype: torch.dtype = torch.float32, variant: str | None = None, revision: str | None = None
):
    """A Stable Diffusion 1.x, 2.x or XL pipeline with weights in ``dtype``, from safetensors only.

    Args:
        path: "scenes", a directory in the diffusers layout, or a hub id.
        variant, revision: of the weights, as ``from_pretrained`` takes them.

    Raises:
        ModelError: nothing is there, a part is missing, or it is a pipeline of another kind.
    """
    from diffusers import DiffusionPipeline

    hub = is_hub_id(path)
    source = path if hub else str(model_dir(path))
    if not hub and not (Path(source) / "model_index.json").is_file():
        raise ModelError(f"model.path: {source} is not a pipeline directory, it has no model_index.json")
    where = {"revision": revision, "local_files_only": not hub}
    try:
        index = DiffusionPipeline.load_config(source, **where)
        if index["_class_name"] not in PIPELINES:
            raise ModelError(f"model.path: {source} is a {index['_class_name']}: expected one of {', '.join(PIPELINES)}")
        # diffusers makes a tokenizer out of nothing, and of the others it does not say which is missing
        named = [part for part, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
        parts = dict.fromkeys((*_NEEDED, *named))
        missing = [part for part in parts if part not in named or not (hub or (Path(source) / part).is_dir())]
        if missing:
            raise ModelError(f"model.path: {source} has no {' and no '.join(missing)}")
        pipeline = DiffusionPipeline.from_pretrained(
            source, dtype=dtype, use_safetensors=True, variant=variant, **where
        )
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  diffusers, safetensors and the hub each have their own
        raise ModelError(f"model.path: {source} cannot be loaded: {' '.join(str(error).split())}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def add_lora(unet, rank: int, alpha: float, targets: list[str], dtype: torch.dtype, seed: int) -> None:
    """Freezes the denoiser, in ``dtype``, and gives it LoRA matrices in fp32 that are to be trained (Hu et al., "LoRA:
    Low-Rank Adaptation of Large Language Models", ICLR 2022).

    Raises:
        ModelError: it has no layers of these names.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False).to(dtype)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet.add_adapter(lora)
    except ValueError as error:
        raise ModelError(f"model.lora_targets: {' '.join(str(error).split())}") from error
    cast_training_params(unet, torch.float32)


def weights_digest(*models: torch.nn.Module | None) -> str:
    """Tells models by their weights, in whatever precision they are loaded, compiled or not: from the sha256 of names, shapes and
    values in bf16. Adapters that do nothing, or nothing yet, are left out; of others it matters how strong they are set."""
    digest = hashlib.sha256()
    for model in models:
        state = {} if model is None else model.state_dict()
        names = {name.replace(".base_layer", "").replace("_orig_mod.", ""): name for name in state}
        for shown, name in sorted(names.items()):
            if ".lora_" in name:
                strength = _strength(model, name)
                if not strength or not state[name.replace("lora_A", "lora_B")].any():
                    continue
                digest.update(f"{strength}\n".encode() if strength != 1 else b"")
            values = state[name].detach().to("cpu", torch.bfloat16).contiguous().flatten()
            digest.update(f"{shown} {list(state[name].shape)}\n".encode())
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _strength(model: torch.nn.Module, name: str) -> float:
    """By what the update of the adapter that a weight belongs to is multiplied; 0 where it is switched off."""
    layer, _, rest = name.partition(".lora_")
    adapter, layer = rest.split(".")[1], model.get_submodule(layer)
    if layer.disable_adapters or adapter not in layer.active_adapters:
        return 0.0
    return layer.scaling[adapter]


def load_trained(run_dir: Path):
    """The pipeline that a finished run has exported: the whole, or its base with the LoRA weights in it.

    Raises:
        ModelError: there is none.
    """
    if not (run_dir / LORA).is_dir():
        return load_pipeline(str(run_dir / PIPELINE))
    model = json.loads((run_dir / "summary.json").read_text())["config"]["model"]
    pipeline = load_pipeline(model["path"], variant=model["variant"], revision=model["revision"])
    pipeline.load_lora_weights(str(run_dir / LORA))
    return pipeline
