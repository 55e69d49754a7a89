"""Samples per second of the filtered loop with its caches, against loops without them.

    python benchmarks/throughput.py

Three loops take a step in turn, in one process, on copies of the embedded model and on the same shards:

- ours: the loop of `train_filtered.py`, filter on, as a run makes it (audit and statistics included);
- plain: no filter; every step does what diffusers' text-to-image example does: decode, resize, crop, VAE, text encoder,
  UNet, clipping, AdamW;
- official: the plain step with the filter as the paper's code has it: the empty prompt encoded for the whole batch, a
  second pass, the loss over the kept samples.

Ratios are medians over steps of times taken side by side: in the first epoch, where 62% of the samples are duplicates
that come again, and in the second, where everything was seen before. How much there is to save depends on the pictures:
the shards hold clipart scenes as JPEG of several sizes, and what each part of a step weighs is printed. The bounds are for
the second epoch and the largest pictures, of the size in which they come from the web; last line: ratios, verdict; exit 1
when one falls short. At full size the parts weigh otherwise: the VAE, for one, more than here.
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
SIZES = (256, 512, 1024)  # pixels of the stored pictures
DUPLICATES, REPEATS, DISTINCT = 20, 12, 144  # the quickstart's proportions


def write_data(out: Path, size: int) -> Path:
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
            shards.image(key).resize((size, size)).save(buffer, "jpeg", quality=95)
            tar.write({"__key__": key, "jpg": buffer.getvalue(), "txt": shards.caption(key)})
    shutil.copy(scenes / INDEX, out / "shards" / INDEX)
    return out / "shards"


def shares(trainer, batch_size: int) -> dict[str, float]:
    """Median time of every part of a plain step, as a share of a UNet training step."""
    import torch

    pipeline, dataset, seconds = trainer.pipeline, trainer.dataset, {}
    samples = [dataset[p] for p in range(batch_size)]
    pixels, captions = torch.stack([sample["pixels"] for sample in samples]), [sample["caption"] for sample in samples]
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.sample()
    timesteps, unet = torch.zeros(batch_size, dtype=torch.long), pipeline.unet
    embeds, no_grad = embed(pipeline, captions), torch.no_grad()
    parts = {
        "UNet step": lambda: unet(latents, timesteps, embeds).sample.square().mean().backward(),
        "UNet forward": no_grad(lambda: unet(latents, timesteps, embeds)),
        "VAE": no_grad(lambda: pipeline.vae.encode(pixels)),
        "text encoder": lambda: embed(pipeline, captions),
        "decode and resize": lambda: [dataset[p] for p in range(batch_size)],
    }
    for _ in range(8):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    unet.zero_grad(set_to_none=True)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    return {name: value / medians["UNet step"] for name, value in medians.items() if name != "UNet step"}


def embed(pipeline, captions: list[str]):
    import torch

    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return pipeline.text_encoder(tokens.input_ids).last_hidden_state


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

    for start in range(0, config.samples, config.batch_size):
        rows = [dataset.stream.row(p) for p in range(start, start + config.batch_size)]
        keys = [dataset.experiment.keys[row] for row in rows]
        pixels = torch.stack([to_pixels(dataset.shards.image(key), dataset.view.resolution)[0] for key in keys])
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
        prompt_embeds = embed(pipeline, [dataset.shards.caption(key) for key in keys])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(keys),))
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        keep = np.ones(len(keys), bool)
        if filtered:
            with torch.no_grad():
                null = unet(noisy_latents, timesteps, embed(pipeline, [""] * len(keys))).sample
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

    def run():
        try:
            trainer.run(progress=False)
        finally:
            done.release()  # or a failure would be waited for

    trainer.loader = held
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        go.release()
        done.acquire()
        if not thread.is_alive():
            raise SystemExit("the run has ended early")
        yield


def measure(work: Path, size: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Prints what was found with pictures of one size; the ratios of ours to the others in both epochs."""
    from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, TrainConfig
    from memfilter.train.loop import Trainer

    epoch = (DUPLICATES * REPEATS + DISTINCT) // batch_size
    trainer = Trainer(
        Config(
            run_dir=str(work / "run"),
            data=DataConfig(path=str(write_data(work, size)), caption_dropout=0.0),
            filter=FilterConfig(tau=5.0),
            train=TrainConfig(samples=(2 * epoch + 1) * batch_size, batch_size=batch_size, ema_half_life=0),
            log=LogConfig(every=800, gallery=0),
        )
    )
    weighed = shares(trainer, batch_size)
    print(f"{size} px, beside a UNet step: " + ", ".join(f"{name} {share:.2f}" for name, share in weighed.items()))
    loops = {
        "plain": plain_steps(trainer, filtered=False),
        "official": plain_steps(trainer, filtered=True),
        "ours": our_steps(trainer),
    }
    ratios = {}
    for name in ("first epoch", "second epoch"):
        seconds = {loop: [] for loop in loops}
        for _ in range(epoch):
            for loop, step in loops.items():
                start = time.perf_counter()
                next(step)
                seconds[loop].append(time.perf_counter() - start)
        rates = {loop: batch_size / statistics.median(times) for loop, times in seconds.items()}
        print(f"{size} px, {name}: " + ", ".join(f"{loop} {rate:.1f} samples/s" for loop, rate in rates.items()))
        ratios[name] = {
            loop: statistics.median(a / b for a, b in zip(seconds[loop], seconds["ours"], strict=True))
            for loop in ("plain", "official")
        }
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels of the stored pictures")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    from memfilter.cli import quiet_libraries

    quiet_libraries()
    import torch

    torch.manual_seed(0)
    for size in sorted(args.sizes):
        with tempfile.TemporaryDirectory() as work:
            found = measure(Path(work), size, args.batch_size)
        for name, ratios in found.items():
            good = ratios["plain"] >= PLAIN_BOUND and ratios["official"] >= OFFICIAL_BOUND
            print(f"{size} px, {name}: ours / plain {ratios['plain']:.2f} (bound {PLAIN_BOUND}), ours / official "
                  f"{ratios['official']:.2f} (bound {OFFICIAL_BOUND}), verdict {'holds' if good else 'falls short'}")  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
