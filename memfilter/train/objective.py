"""What is learned from a batch: noisy latents, both passes of the denoiser, and the masked loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memfilter.config import Config
from memfilter.data import sampler
from memfilter.data.captions import caption_change
from memfilter.data.encode import Encoder
from memfilter.filter import MemFilter
from memfilter.functional import min_snr_weight


class Inputs(NamedTuple):
    """Of one forward of B samples."""

    noisy_latents: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    known_timesteps: Tensor  # the same on the host
    captions: list[str]  # empty where dropped
    conditions: dict  # keyword arguments of the denoiser
    target: Tensor  # [B, C, h, w]


class Objective:
    """Batch -> loss. Every draw is a pure function of the seed and the sample's position in the stream.

    Args:
        unet: wrapped by ``mem_filter`` and prepared.
        resolution: of the pictures, in pixels.
        input_dtype: of latents and embeddings, where the denoiser does not cast them itself.
    """

    def __init__(
        self,
        config: Config,
        unet,
        encoder: Encoder,
        noise_scheduler,
        mem_filter: MemFilter,
        resolution: int,
        input_dtype: torch.dtype | None = None,
    ):
        self.seed = config.train.seed
        self.unet, self.encoder, self.mem_filter = unet, encoder, mem_filter
        self.noise_scheduler = noise_scheduler
        self.caption_dropout = config.data.caption_dropout
        self.change_caption = caption_change(config.mitigation, encoder.pipeline.tokenizer)
        self.embedding_noise = config.mitigation.embedding_noise
        self.remember_pictures = not config.data.random_crop
        self.input_dtype = input_dtype or torch.float32
        self.noise_offset = config.train.noise_offset
        side = resolution // encoder.pipeline.vae_scale_factor
        self.latent_shape = (encoder.vae.config.latent_channels, side, side)
        self.weights: Tensor | None = None  # [T]
        if config.train.snr_gamma is not None:
            kind, alphas_cumprod = noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod
            self.weights = min_snr_weight(kind, alphas_cumprod, config.train.snr_gamma).to(encoder.device)

    def __call__(self, batch: dict) -> Tensor:
        """Loss of a batch of `SampleDataset`, a scalar."""
        inputs = self.inputs(batch)

        # both passes, masked loss
        known = None not in batch["duplicate"]
        self.mem_filter.batch(
            keys=batch["key"],
            duplicate=batch["duplicate"] if known else None,
            caption_dropped=[not caption for caption in inputs.captions],
            excluded=[bad is not None for bad in batch["bad"]],
            shared_keys=batch["shared_key"],
            timesteps=inputs.known_timesteps,
        )
        out = self.unet(inputs.noisy_latents, inputs.timesteps, **inputs.conditions)
        weight = None if self.weights is None else self.weights[inputs.timesteps]
        return self.mem_filter.loss(out.sample, inputs.target, weight)

    def inputs(self, batch: dict) -> Inputs:
        """What the denoiser is given for a batch, and what it should predict."""
        positions, seed, repeats = batch["position"], self.seed, batch["repeats"]

        # noisy latents; these copies to the device are asynchronous, or each would wait for all that is queued there
        draw = torch.stack([sampler.posterior_noise(seed, p, self.latent_shape) for p in positions])
        remember = [again and self.remember_pictures for again in repeats]
        latents, time_ids = self.encoder.pictures(batch, draw, remember)
        noise = torch.stack([self.noise(p) for p in positions]).to(latents, non_blocking=True)
        num_train_timesteps = self.noise_scheduler.config.num_train_timesteps
        known_timesteps = torch.tensor([sampler.timestep(seed, p, num_train_timesteps) for p in positions])
        timesteps = known_timesteps.to(latents.device, non_blocking=True)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)

        # prompts
        dropped = [sampler.caption_dropped(seed, p, self.caption_dropout) for p in positions]
        captions = ["" if d else caption for d, caption in zip(dropped, batch["caption"], strict=True)]
        if self.change_caption:
            captions = [self.change_caption(caption, seed, p) for caption, p in zip(captions, positions, strict=True)]
            repeats = [False] * len(captions)  # it will hardly be the same again
        conditions = self.encoder.prompts(captions, repeats, time_ids)
        embeddings = conditions["encoder_hidden_states"]
        if self.embedding_noise:
            noises = [sampler.embedding_noise(seed, p, embeddings.shape[1:]) for p in positions]
            shift = self.embedding_noise * torch.stack(noises).to(embeddings, non_blocking=True)
            named = torch.tensor([bool(caption) for caption in captions]).to(shift.device, non_blocking=True)
            embeddings = embeddings + torch.where(named[:, None, None], shift, 0)  # the empty prompt stays what it is
        conditions["encoder_hidden_states"] = embeddings.to(self.input_dtype)
        target = self.target(latents, noise, timesteps)
        return Inputs(noisy_latents.to(self.input_dtype), timesteps, known_timesteps, captions, conditions, target)

    def noise(self, position: int) -> Tensor:
        """fp32 [C, h, w]"""
        noise = sampler.noise(self.seed, position, self.latent_shape)
        if self.noise_offset:
            noise += self.noise_offset * sampler.noise_offset(self.seed, position, self.latent_shape[0])
        return noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, [B, C, h, w]."""
        kind = self.noise_scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noise if kind == "epsilon" else latents
