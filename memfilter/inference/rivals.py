"""What the norm is measured against: other methods to tell that a prompt is memorized, on the same generations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from memfilter.eval.generate import Job
from memfilter.functional import squared_error
from memfilter.inference.calls import Call

RIVALS = ("density_l2", "density_copies", "anisotropy", "loss")
TILES = 4  # a side
LOSS_AT = (100, 300, 500, 700)  # of 1000 timesteps


def distances(seen: np.ndarray, distance: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Between all pictures of a prompt, or what is compared of them: [P, S, ...] -> [P, S, S]."""
    count = seen.shape[1]
    found = np.zeros((len(seen), count, count), np.float32)
    for a, b in zip(*np.triu_indices(count, 1), strict=True):
        found[:, a, b] = found[:, b, a] = distance(seen[:, a], seen[:, b])
    return found


def density(between: np.ndarray) -> np.ndarray:
    """How near a prompt's pictures are to each other: [P, S, S] -> [P], less the mean distance of all pairs; NaN for one."""
    first, second = np.triu_indices(between.shape[1], 1)
    return -between[:, first, second].mean(1) if len(first) else np.full(len(between), np.nan)


def tiled_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The largest l2 distance, root of a mean, among corresponding tiles: uint8 [N, H, W, 3] twice -> [N].

    The tiles are `TILES` a side; a distance over the whole would find pictures alike for a background of one colour
    (Carlini et al., 2023, section 4.2).
    """
    difference = (a.astype(np.float32) - b.astype(np.float32)) ** 2 / 255**2
    rows = np.array_split(difference, TILES, axis=1)
    tiles = [tile.mean(axis=(1, 2, 3)) for row in rows for tile in np.array_split(row, TILES, axis=2)]
    return np.sqrt(np.max(tiles, axis=0))


def anisotropy(norm: np.ndarray, cosine: np.ndarray, spread: tuple[float, float]) -> np.ndarray:
    """Norm at high noise plus cosine at low noise (Asthana and Belagiannis, ICLR 2026), each over its standard deviation
    among clean prompts, since the two have no unit in common. [P] twice -> [P]"""
    return norm / spread[0] + cosine / spread[1]


@torch.no_grad()
def decoded(pipeline, latents: torch.Tensor) -> np.ndarray:
    """Pictures of latents, scaled as the denoiser has them: [B, C, h, w] -> uint8 [B, H, W, 3]."""
    vae = pipeline.vae
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    made = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return np.round(pipeline.image_processor.postprocess(made, output_type="np") * 255).astype(np.uint8)


def fresh_generator(job: Job, place: int) -> torch.Generator:
    """Of noise that the job's picture was not made from, another at every place."""
    seed = np.random.SeedSequence([job.number, job.seed, place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


@torch.no_grad()
def own_loss(pipeline, batch: list[Job], pictures: np.ndarray, call: Call) -> np.ndarray:
    """Loss of the conditional prediction for the model's own pictures, mean over `LOSS_AT`. uint8 [B, H, W, 3] -> [B]

    Args:
        call: one of their generation's, for what the denoiser is told of the prompts.

    The noise has nothing to do with what the picture was made from: under that, a deterministic sampler's loss would tell how
    straight its way was.
    """
    vae, scheduler = pipeline.vae, pipeline.scheduler
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    latents = (vae.encode(pixels).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    total = scheduler.config.num_train_timesteps
    losses = []
    for place, at in enumerate(LOSS_AT):
        generators = [fresh_generator(job, place) for job in batch]
        noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=g) for g in generators]).to(latents)
        timestep = torch.tensor(at * total // 1000)
        abar = scheduler.alphas_cumprod[timestep].to(latents)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        pred = pipeline.unet(noisy, timestep.to(latents.device), **call.cond | {"return_dict": False})[0]
        target = {
            "epsilon": noise,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * latents,
            "sample": latents,
        }[scheduler.config.prediction_type]
        losses.append(squared_error(pred, target))
    return torch.stack(losses).mean(0).float().cpu().numpy()
