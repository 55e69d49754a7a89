"""What must hold before a run begins: its place, and a model whose norm means something."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from memfilter.calibration import Calibration, CalibrationError
from memfilter.config import Config, ConfigError
from memfilter.pipelines import ModelError, model_dir, weights_digest
from memfilter.preflight import UnsuitableModel, validate

log = logging.getLogger(__name__)
WEIGHTS = "weights"  # fact of a calibration: `weights_digest` of the denoiser


def require_place(run_dir: Path, resume: bool) -> None:
    """Raises ConfigError where a run cannot be written, or would meet another that does not go on."""
    try:
        found = run_dir.exists() and any(run_dir.iterdir())
        parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} cannot be a directory: {error}") from error
    if found and not resume:
        raise ConfigError(f"run_dir: {run_dir} is not empty; remove it, choose another, or go on from its last checkpoint "
                          "with checkpoint.resume=true")  # fmt: skip
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir: {run_dir} cannot be made in {parent}")


def require_backend(name: str) -> None:
    """Raises ConfigError unless it is a backend of torch.compile."""
    known = torch.compiler.list_backends(exclude_tags=None)
    if name not in known:
        raise ConfigError(f"train.compile: there is no backend {name!r}: expected one of {', '.join(known)}")


def resolution_of(config: Config, pipeline) -> int:
    """Of the pictures, in pixels; raises ConfigError where the VAE cannot take it."""
    resolution = config.data.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if resolution % pipeline.vae_scale_factor:
        raise ConfigError(f"data.resolution: {resolution} is not a multiple of {pipeline.vae_scale_factor}, "
                          "by which the model's VAE reduces a picture")  # fmt: skip
    return resolution


def require_calibration(config: Config, unet: nn.Module, noise_scheduler, resolution: int) -> Calibration | None:
    """The calibration of a method that needs one.

    Args:
        unet: as it is before training.

    Raises:
        ConfigError: there is none, or it was made with something else.
    """
    rule = config.filter
    if rule.method not in ("timestep", "evidence"):
        return None
    beside = model_dir(config.model.path) / "calibration.json"
    if rule.calibration is None and not beside.is_file():
        raise ConfigError(f"filter.method={rule.method} needs filter.calibration: make one with "
                          f"`memfilter calibrate --model.path={config.model.path} ...`")  # fmt: skip
    try:
        calibration = Calibration.load(rule.calibration or beside)
        facts = facts_of_calibration(config, noise_scheduler, resolution)
        if WEIGHTS in calibration.about:  # not in the one that comes with the package, which stands beside its weights
            facts[WEIGHTS] = weights_digest(unet)
        calibration.require(**facts)
    except CalibrationError as error:
        raise ConfigError(str(error)) from error
    return calibration


def facts_of_calibration(config: Config, noise_scheduler, resolution: int) -> dict[str, str | int]:
    """What a calibration must have in common with a run: on what the signals depend beside the weights."""
    kind = noise_scheduler.config
    return {
        "prediction_type": kind.prediction_type,
        "num_train_timesteps": kind.num_train_timesteps,
        "resolution": resolution,
        "unit": config.filter.unit,
    }


def training_scheduler(config: Config, pipeline) -> DDPMScheduler:
    """The noise schedule that the model was trained with.

    Raises:
        ModelError: it was trained otherwise than by a diffusion of steps, such as by EDM's or a flow's, or on latents that are
            normalised by more than a factor.
    """
    scheduler = pipeline.scheduler
    found = DDPMScheduler.from_config(scheduler.config)
    named = getattr(scheduler, "alphas_cumprod", None)
    same = named is not None and named.shape == found.alphas_cumprod.shape
    if not same or not torch.allclose(named, found.alphas_cumprod, atol=1e-6) or scheduler.config.get("use_flow_sigmas"):
        raise ModelError(f"model.path: {config.model.path} has a {type(scheduler).__name__} that says that it was not "
                         "trained as a diffusion in steps (DDPM), and no other training is supported")  # fmt: skip
    odd = [name for name in ("latents_mean", "latents_std", "shift_factor") if pipeline.vae.config.get(name)]
    if odd:
        raise ModelError(f"model.path: {config.model.path} has a VAE with {' and '.join(odd)}: latents that are normalised "
                         "by more than scaling_factor are not supported")  # fmt: skip
    return found


def require_suitable(config: Config, pipeline, noise_scheduler, resolution: int) -> None:
    """Raises ModelError with every reason why the norm would mean nothing, and logs what else is worth knowing."""
    if not config.filter.makes_passes:
        return
    side = resolution // pipeline.vae_scale_factor
    try:
        hints = validate(
            pipeline.unet,
            scheduler=noise_scheduler,
            text_encoders=(pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)),
            latent_shape=(pipeline.vae.config.latent_channels, side, side),
            tau=config.filter.tau if config.filter.method == "tau" else None,
            unit=config.filter.unit,
        )
    except UnsuitableModel as error:
        raise ModelError("\n".join(f"model.path: {reason}" for reason in str(error).splitlines())) from error
    for hint in hints:
        log.info("%s", hint)
