"""Pipelines out: what a finished run leaves for the stock diffusers pipeline to load."""

from __future__ import annotations

import copy
import shutil
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from memfilter.pipelines import LORA, PIPELINE, is_hub_id

VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "peft")


def with_weights(unet: nn.Module, whole: dict[str, Tensor]) -> nn.Module:
    """The denoiser, in eval mode, with these weights in place of those that are trained. Sharded modules put their shards back
    whenever they are asked for their state: where all weights are trained they go into a new one."""
    if whole.keys() == dict(unet.named_parameters()).keys():
        with torch.device("meta"):
            made = type(unet).from_config(unet.config)
        made.load_state_dict(whole, assign=True)
        return made.eval()
    for name, weight in whole.items():
        owner, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return unet.eval()


def export_pipeline(pipeline, unet, run_dir: Path, summary: dict) -> Path:
    """Writes the pipeline with this denoiser in it, and a model card; the directory appears when it is complete."""
    exported = copy.copy(pipeline)
    exported.register_modules(unet=unet)
    library, kind = exported.config.get("feature_extractor") or (None, None)
    if kind and kind.endswith("ImageProcessorPil"):  # as transformers 5 alone calls it where there is no torchvision
        exported.register_to_config(feature_extractor=(library, kind.removesuffix("Pil")))
    return _complete(
        run_dir / PIPELINE, summary, lambda out: exported.save_pretrained(out, safe_serialization=True)
    )


def export_lora(pipeline, unet, run_dir: Path, summary: dict) -> Path:
    """Writes the LoRA weights of this denoiser as ``load_lora_weights`` reads them, and a model card."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = unet.peft_config["default"].to_dict()
    return _complete(
        run_dir / LORA,
        summary,
        lambda out: type(pipeline).save_lora_weights(
            out, unet_lora_layers=layers, safe_serialization=True, unet_lora_adapter_metadata=metadata
        ),
    )


def _complete(out: Path, summary: dict, save) -> Path:
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    model_card(summary, lora=out.name == LORA).save(partial / "README.md")
    shutil.rmtree(out, ignore_errors=True)  # of a run that ended between this and its summary, and goes on
    partial.rename(out)
    return out


def model_card(summary: dict, lora: bool) -> ModelCard:
    """The card of a run: what it was trained from and on, with which tau, and what was dropped.

    Directories appear by their last name only: a card is made to be published.
    """
    import memfilter

    config = summary["config"]
    base = config["model"]["path"]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base if is_hub_id(base) else None,
        tags=["memfilter", "text-to-image", "diffusers", *(["lora"] if lora else [])],
    )
    shown = {section: dict(part) for section, part in config.items() if isinstance(part, dict)}
    shown["model"]["path"] = _model_name(base)
    for section, name in (("data", "path"), ("data", "index"), ("data", "cache"), ("filter", "calibration")):
        if place := shown.get(section, {}).get(name):
            shown[section][name] = Path(place).resolve().name
    packages = [*VERSIONS, *(["bitsandbytes"] if config.get("train", {}).get("optimizer", "adamw") != "adamw" else [])]
    versions = {"memfilter": memfilter.__version__} | {name: version(name) for name in packages}
    return ModelCard.from_template(
        data,
        template_path=str(files("memfilter") / "train" / "model_card.md.jinja"),
        base=_model_name(base),
        lora=lora,
        summary=summary,
        filter=shown["filter"],
        data_name=shown["data"]["path"],
        settings=yaml.safe_dump(shown, sort_keys=False),
        versions=versions,
    )


def _model_name(path: str) -> str:
    return path if is_hub_id(path) else Path(path).resolve().name
