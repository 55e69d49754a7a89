"""The pipeline that is fine-tuned, made ready as configured."""

from __future__ import annotations

import torch

from memfilter.config import Config
from memfilter.pipelines import add_lora, load_pipeline
from memfilter.train.checks import require_backend


def load_model(config: Config):
    """A diffusers pipeline; what of its denoiser is trained wants gradients.

    Raises:
        ConfigError, ModelError: it cannot be loaded, or not be trained as configured.
    """
    model, train = config.model, config.train
    pipeline = load_pipeline(model.path, variant=model.variant, revision=model.revision)
    if model.lora_rank is not None:
        alpha = model.lora_rank if model.lora_alpha is None else model.lora_alpha
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(train.mixed_precision, torch.float32)
        add_lora(pipeline.unet, model.lora_rank, alpha, model.lora_targets, dtype, train.seed)
    if train.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if train.compile:
        require_backend(train.compile)
        pipeline.unet.compile(backend=train.compile)
    return pipeline
