"""Tiny pipelines of every family, built from configuration: weights are random, layout and code paths are the real ones."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from memfilter.pipelines import model_dir

FAMILIES = ("sd1", "sd2", "sdxl")
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (8, 16),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}


def save_pipeline(out: Path, family: str, prediction_type: str | None = None, unet=None, seed: int = 0, **scheduler) -> Path:
    """Writes a pipeline of 16 px pictures and 4x8x8 latents; SD 2.x predicts v as its 768 px models do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = _pipeline(family, prediction_type, unet or {}, scheduler)
    pipeline.save_pretrained(out, safe_serialization=True)
    return out


def _pipeline(family: str, prediction_type: str | None, unet: dict, scheduler: dict):
    tokenizer = CLIPTokenizer.from_pretrained(model_dir("scenes") / "tokenizer")
    prediction_type = prediction_type or ("v_prediction" if family == "sd2" else "epsilon")
    parts = {
        "vae": AutoencoderKL(**VAE),
        "text_encoder": _text_encoder(CLIPTextModel, tokenizer),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(**SCHEDULER, prediction_type=prediction_type, **scheduler),
    }
    if family != "sdxl":
        parts["unet"] = UNet2DConditionModel(**UNET | unet)
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    added = {
        "cross_attention_dim": 32,  # both text encoders' embeddings side by side
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    parts["unet"] = UNet2DConditionModel(**UNET | added | unet)
    second = _text_encoder(CLIPTextModelWithProjection, tokenizer)
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False, force_zeros_for_empty_prompt=True
    )


def _text_encoder(kind, tokenizer):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
