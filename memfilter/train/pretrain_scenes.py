"""Make the embedded base model: a tiny Stable Diffusion, from scratch, on clipart scenes alone.

    python -m memfilter.train.pretrain_scenes --work_dir runs/pretrain --out memfilter/assets/scenes-base

Pictures, autoencoder, latents, tokenizer, then denoiser and text encoder together; what is finished, and the last
checkpoint of the denoiser, is found again in ``work_dir`` when the command is repeated with the same arguments. Combinations
of ``scenes.held_out`` are never shown. Everything is drawn from ``SEED``; bf16 autocast where it pays.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from memfilter.data import scenes
from memfilter.files import atomic

SEED = 20261122
PICTURES = 100_000
# Two levels: 32 px -> latents of 4 x 16 x 16. With a third level (16 x 8 x 8) reconstructions of equal training time
# lost the objects (22 against 27 dB); groups of many channels keep flat colours, which group norm would wash out.
VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    block_out_channels=[32, 64],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    mid_block_add_attention=False,
    sample_size=scenes.RESOLUTION,
)
TEXT = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
    projection_dim=128,
)
UNET = dict(
    sample_size=scenes.RESOLUTION // 2,
    in_channels=4,
    out_channels=4,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[64, 96, 128],
    layers_per_block=1,
    attention_head_dim=4,  # the number of heads, as diffusers reads it for this class
    norm_num_groups=16,
    cross_attention_dim=TEXT["hidden_size"],
)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    steps_offset=1,
)

log = logging.getLogger("memfilter.pretrain")


def training_scenes(count: int = PICTURES) -> list[scenes.Scene]:
    """The first ``count`` scenes of the stream whose combination is not held out."""
    found, index = [], 0
    while len(found) < count:
        scene = scenes.draw(SEED, scenes.BASE, index)
        index += 1
        if not scenes.held_out(scene):
            found.append(scene)
    return found


def make_pictures(work: Path) -> tuple[np.ndarray, list[str]]:
    """uint8 [N, 32, 32, 3] and captions."""
    drawn = training_scenes()
    path = work / "pictures.npy"
    if not path.exists():
        chunks = [drawn[i : i + 1000] for i in range(0, len(drawn), 1000)]
        with ProcessPoolExecutor() as pool:
            parts = list(tqdm(pool.map(scenes.pixels, chunks), total=len(chunks), desc="pictures"))
        with atomic(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r"), [scene.caption for scene in drawn]


def train_autoencoder(work: Path, pictures: np.ndarray, steps: int, batch_size: int = 16):
    from diffusers import AutoencoderKL

    out = work / "vae"
    if out.exists():
        vae = AutoencoderKL.from_pretrained(out)
        vae.register_to_config(_name_or_path="")  # a path of this machine has no place in the exported model
        return vae
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    rng = np.random.default_rng(SEED)
    for step in tqdm(range(steps), desc="autoencoder", mininterval=5):
        pixels = as_input(pictures[np.sort(rng.integers(len(pictures), size=batch_size))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        # a little KL keeps the latents compact; the weight is small enough for flat colours and edges to survive
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        loss = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean() + 2e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            log.info("autoencoder step %d loss %.4f kl %.3f", step, loss.item(), kl.item())
    sample = torch.cat([vae.encode(as_input(pictures[i : i + 250])).latent_dist.mean.detach() for i in range(0, 2000, 250)])
    vae.register_to_config(scaling_factor=float(1 / sample.std()))
    vae.save_pretrained(work / ".vae.partial")
    (work / ".vae.partial").rename(out)
    return vae


@torch.no_grad()
def make_latents(work: Path, vae, pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of every picture's posterior, scaled: fp16 [N, 4, 16, 16] each."""
    path = work / "latents.safetensors"
    if not path.exists():
        means, stds = [], []
        for i in tqdm(range(0, len(pictures), 500), desc="latents"):
            posterior = vae.encode(as_input(pictures[i : i + 500])).latent_dist
            means.append((posterior.mean * vae.config.scaling_factor).half())
            stds.append((posterior.std * vae.config.scaling_factor).half())
        with atomic(path) as partial:
            save_file({"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}, partial)
    return load_file(path)


def make_tokenizer(work: Path, captions: list[str]):
    """A CLIP tokenizer with a byte-pair vocabulary learnt from the captions; digits stay apart."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    # CLIP's own splitting, so that the vocabulary learnt here is the one its tokenizer will apply
    reference = CLIPTokenizer()._tokenizer
    trained = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789,.-'!?"))
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(captions[:20_000], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT["max_position_embeddings"])
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


def train_denoiser(work: Path, latents, tokenizer, captions, steps: int, batch_size: int = 64, lr: float = 1.5e-3):
    """UNet and text encoder together; returns them with the weights of an exponential moving average."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.training_utils import EMAModel, compute_snr
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT,
    )
    both = torch.nn.ModuleDict({"text_encoder": CLIPTextModel(config), "unet": UNet2DConditionModel(**UNET)})
    both["unet"].set_attn_processor(AttnProcessor())  # on the CPU, bf16 flash attention is slow in the backward pass
    optimizer = torch.optim.AdamW(both.parameters(), lr=lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, steps))
    ema = EMAModel(both.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    scheduler = DDPMScheduler(**SCHEDULER)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    state, first = work / "denoiser.safetensors", 0
    if state.exists():
        first = restore(state, both, optimizer, ema)
        for _ in range(first):
            schedule.step()
    started, losses = time.time(), []
    for step in tqdm(range(first, steps), desc="denoiser", initial=first, total=steps, mininterval=10):
        generator = torch.Generator().manual_seed(SEED + step)
        rows = torch.randint(len(tokens), (batch_size,), generator=generator)
        clean = latents["mean"][rows].float()
        clean = clean + latents["std"][rows].float() * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty, tokens[rows])
        with torch.autocast("cpu", torch.bfloat16):
            prompt_embeds = both["text_encoder"](ids).last_hidden_state
            predicted = both["unet"](scheduler.add_noise(clean, noise, timesteps), timesteps, prompt_embeds).sample
        # min-SNR weighting (Hang et al., 2023, Eq. 6, gamma 5): less weight on fine detail, which is learnt last anyway
        snr = compute_snr(scheduler, timesteps)
        loss = ((predicted.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(both.parameters())
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(state, both, optimizer, ema, step + 1)
            log.info("denoiser step %d loss %.4f, %.2f s/step", step + 1, np.mean(losses[-250:]), (time.time() - started) / (step + 1 - first))
    ema.copy_to(both.parameters())
    return both["unet"].eval(), both["text_encoder"].eval()


def lr_factor(step: int, steps: int) -> float:
    """Warm-up over 200 steps, constant to the half, then a cosine to zero."""
    if step < 200:
        return (step + 1) / 200
    late = max(0.0, (step / steps - 0.5) * 2)
    return 0.5 * (1 + float(np.cos(np.pi * late)))


def save(path: Path, model, optimizer, ema, step: int) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, (parameter, shadow) in enumerate(zip(model.parameters(), ema.shadow_params, strict=True)):
        tensors[f"ema.{i}"] = shadow
        tensors |= {f"optimizer.{i}.{k}": v for k, v in optimizer.state[parameter].items()}
    tensors["step"] = torch.tensor(step)
    with atomic(path) as partial:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial)


def restore(path: Path, model, optimizer, ema) -> int:
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for i, parameter in enumerate(model.parameters()):
        ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
        optimizer.state[parameter] = {k: tensors[f"optimizer.{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
    step = int(tensors["step"])
    ema.optimization_step = step
    return step


def as_input(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def main(argv: list[str] | None = None) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="intermediate results; repeat the command to go on")
    parser.add_argument("--out", type=Path, required=True, help="where the pipeline directory goes")
    parser.add_argument("--vae_steps", type=int, default=3200)
    parser.add_argument("--steps", type=int, default=7000, help="denoiser steps of 64 pictures")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    pictures, captions = make_pictures(args.work_dir)
    vae = train_autoencoder(args.work_dir, pictures, args.vae_steps)
    latents = make_latents(args.work_dir, vae.eval(), pictures)
    tokenizer = make_tokenizer(args.work_dir, captions)
    unet, text_encoder = train_denoiser(args.work_dir, latents, tokenizer, captions, args.steps)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.out, safe_serialization=True)


if __name__ == "__main__":
    main()
