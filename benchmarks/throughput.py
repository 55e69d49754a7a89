"""Samples per second of the filtered loop with its caches, against loops without them.

    python benchmarks/throughput.py

The model is Stable Diffusion 1.x with every width and every side divided by 8 (64 px, random weights), the shards hold
JPEG of 256 px, as img2dataset writes them by default. ``--model scenes`` takes the embedded model, whose VAE and text
encoder weigh less beside its UNet. What each part weighs is printed: at full size the VAE's encoder takes 1.4 times the
FLOPs of a UNet forward, the text encoder 0.02 times.

Three loops take a step in turn, in one process, on copies of the same model and on the same shards:

- ours: the loop of `train_filtered.py`, filter on, as a run makes it (audit and statistics included);
- plain: no filter; every step does what diffusers' text-to-image example does: decode, resize, crop, VAE, text encoder,
  UNet, clipping, AdamW;
- official: the plain step with the filter as the paper's code has it: the empty prompt encoded for the whole batch, a
  second pass, the loss over the kept samples.

Ratios are medians over the steps of one epoch, of times taken side by side. First epoch: the captions and pictures that
repeat are remembered as they come. Later epochs: everything was seen before. The bounds are for later epochs.
Last line: ratios, verdict; exit 1 when one falls short.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

PLAIN_BOUND, OFFICIAL_BOUND = 1.3, 1.5
DUPLICATES, REPEATS, DISTINCT = 20, 20, 240  # the quickstart's proportions
STORED = 256  # pixels


def save_small_sd(out: Path) -> Path:
    """Stable Diffusion 1.x with widths and sides divided by 8."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from memfilter.pipelines import model_dir

    tokenizer = CLIPTokenizer.from_pretrained(model_dir("scenes") / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(40, 80, 160, 160), cross_attention_dim=96, attention_head_dim=8, norm_num_groups=8
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), layers_per_block=2, latent_channels=4, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
        requires_safety_checker=False,
    ).save_pretrained(out)  # fmt: skip
    return out


def write_data(out: Path) -> Path:
    """Clipart scenes, enlarged and stored as JPEG, and the index of what repeats."""
    import io
    import shutil

    import webdataset

    from memfilter.data.experiment import INDEX, prepare_scenes
    from memfilter.data.shards import Shards

    scenes = prepare_scenes(out / "scenes", 0, DUPLICATES, REPEATS, DISTINCT)
    shards = Shards.open(scenes)
    (out / "shards").mkdir()
    with webdataset.TarWriter(str(out / "shards" / "00000.tar")) as tar:
        for key in shards.keys():
            buffer = io.BytesIO()
            shards.image(key).resize((STORED, STORED)).save(buffer, "jpeg", quality=95)
            tar.write({"__key__": key, "jpg": buffer.getvalue(), "txt": shards.caption(key)})
    shutil.copy(scenes / INDEX, out / "shards" / INDEX)
    return out / "shards"


def shares(trainer, batch_size: int) -> dict[str, float]:
    """Median time of every part of a plain step, as a share of a UNet training step."""
    import torch

    pipeline, dataset, seconds = trainer.pipeline, trainer.dataset, {}
    samples = [dataset[p] for p in range(batch_size)]
    pixels = torch.stack([sample["pixels"] for sample in samples])
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.sample()
    embeds = trainer.objective.encoder.prompts([sample["caption"] for sample in samples])["encoder_hidden_states"]
    timesteps = torch.zeros(batch_size, dtype=torch.long)
    unet, captions = pipeline.unet, [sample["caption"] for sample in samples]
    no_grad = torch.no_grad()
    parts = {
        "UNet step": lambda: unet(latents, timesteps, embeds).sample.square().mean().backward(),
        "UNet forward": no_grad(lambda: unet(latents, timesteps, embeds)),
        "VAE": no_grad(lambda: pipeline.vae.encode(pixels)),
        "text encoder": no_grad(lambda: trainer.objective.encoder._encode(captions)),
        "decode and resize": lambda: [dataset[p] for p in range(batch_size)],
    }
    for _ in range(8):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    unet.zero_grad(set_to_none=True)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    return {name: value / medians["UNet step"] for name, value in medians.items()}


def plain_steps(trainer, filtered: bool):
    """A plain loop over the trainer's samples with a model of its own; makes a step for every ``next``."""
    import copy

    import numpy as np
    import torch
    from diffusers import DDPMScheduler

    from memfilter.data.sampler import to_pixels

    pipeline, config = trainer.pipeline, trainer.config.train
    unet = copy.deepcopy(pipeline.unet).train()
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate)
    dataset, tau = trainer.dataset, trainer.config.filter.tau

    def embed(captions: list[str]):
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return pipeline.text_encoder(tokens.input_ids).last_hidden_state

    for start in range(0, config.samples, config.batch_size):
        rows = [dataset.stream.row(p) for p in range(start, start + config.batch_size)]
        keys = [dataset.experiment.keys[row] for row in rows]
        pixels = torch.stack([to_pixels(dataset.shards.image(key), dataset.view.resolution)[0] for key in keys])
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            prompt_embeds = embed([dataset.shards.caption(key) for key in keys])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(keys),))
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        keep = np.ones(len(keys), bool)
        if filtered:
            with torch.no_grad():
                null = unet(noisy_latents, timesteps, embed([""] * len(keys))).sample
        pred = unet(noisy_latents, timesteps, prompt_embeds).sample
        if filtered:
            keep = ((pred.detach() - null).flatten(1).norm(dim=1) < tau).numpy()
        if keep.any():
            torch.nn.functional.mse_loss(pred[keep], noise[keep]).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield


def our_steps(trainer):
    """The trainer's own run in a thread, held at every batch: makes a step for every ``next``."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    batches = trainer.loader

    def held():
        source = iter(batches())
        while True:
            go.acquire()  # reading and decoding belong to the step
            yield next(source)
            done.release()

    trainer.loader = held
    threading.Thread(target=trainer.run, kwargs={"progress": False}, daemon=True).start()
    while True:
        go.release()
        done.acquire()
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["small-sd", "scenes"], default="small-sd")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()

    from memfilter.cli import quiet_libraries

    quiet_libraries()
    import torch

    from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
    from memfilter.train.loop import Trainer

    torch.manual_seed(0)
    epoch = (DUPLICATES * REPEATS + DISTINCT) // args.batch_size
    with tempfile.TemporaryDirectory() as work:
        model = "scenes" if args.model == "scenes" else str(save_small_sd(Path(work) / "model"))
        trainer = Trainer(
            Config(
                run_dir=f"{work}/run",
                model=ModelConfig(path=model),
                data=DataConfig(path=str(write_data(Path(work))), caption_dropout=0.0),
                filter=FilterConfig(tau=1000.0),
                train=TrainConfig(samples=10 * epoch * args.batch_size, batch_size=args.batch_size, ema_half_life=0),
                log=LogConfig(every=epoch * args.batch_size, gallery=0),
            )
        )
        weighed = shares(trainer, args.batch_size)
        print("beside a UNet step: " + ", ".join(f"{name} {share:.2f}" for name, share in weighed.items()))
        loops = {
            "plain": plain_steps(trainer, filtered=False),
            "official": plain_steps(trainer, filtered=True),
            "ours": our_steps(trainer),
        }
        good = True
        for name, steps in (("warm-up", 3), ("first epoch", epoch - 3), ("later epochs", epoch)):
            seconds = {loop: [] for loop in loops}
            for _ in range(steps):
                for loop, step in loops.items():
                    start = time.perf_counter()
                    next(step)
                    seconds[loop].append(time.perf_counter() - start)
            if name == "warm-up":
                continue
            rates = {loop: args.batch_size / statistics.median(times) for loop, times in seconds.items()}
            ratios = {
                loop: statistics.median(a / b for a, b in zip(seconds[loop], seconds["ours"], strict=True))
                for loop in ("plain", "official")
            }
            print(f"{name}: " + ", ".join(f"{loop} {rate:.1f} samples/s" for loop, rate in rates.items()))
            good = ratios["plain"] >= PLAIN_BOUND and ratios["official"] >= OFFICIAL_BOUND
            print(f"{name}: ours / plain {ratios['plain']:.2f} (bound {PLAIN_BOUND}), "
                  f"ours / official {ratios['official']:.2f} (bound {OFFICIAL_BOUND})"
                  + (f", verdict {'holds' if good else 'falls short'}" if name == "later epochs" else ""))  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
