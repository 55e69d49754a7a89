"""Our loop against the official algorithm, redone here from its description: same weights, same batches."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from diffusers import DDPMScheduler

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.data import sampler
from memfilter.data.experiment import INDEX, Experiment
from memfilter.data.shards import Shards
from memfilter.pipelines import load_pipeline
from memfilter.train.loop import train

STEPS, BATCH, LR, SEED, TAU, MAX_GRAD_NORM = 50, 3, 1e-5, 7, 2.5, 1.5
SIZE = 32  # of the scenes, which are encoded as they are
WARM_UP, GAMMA, OFFSET, HALF_LIFE = 10, 1.5, 0.3, 40  # steps, -, -, samples


def official(pipeline, shards_dir, lr=lambda step: LR, weigh=torch.ones_like, offset=0.0):
    """The paper's fine-tune: the empty prompt is encoded for every sample, kept samples are indexed out, and a step
    that keeps nothing changes nothing.

    Args:
        weigh: timesteps -> weights of the squared errors.
        offset: of the noise, times a normal draw for each sample and channel.

    Returns:
        kept (positions), grad_norms (before they are clipped), losses (of kept samples, by step) and averages (of the
        weights, which are what they are after the first step; by name).
    """
    shards, experiment = Shards.open(shards_dir), Experiment.read(shards_dir / INDEX)
    stream = sampler.SampleStream(experiment.virtual(), SEED)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, vae = pipeline.unet.train(), pipeline.vae
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    kept, grad_norms, losses, averages = set(), [], [], {}
    decay = 0.5 ** (BATCH / HALF_LIFE)

    def embed(captions):
        ids = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids)[0]

    for step in range(STEPS):
        positions = range(step * BATCH, (step + 1) * BATCH)
        keys = [experiment.keys[stream.row(p)] for p in positions]
        with torch.no_grad():
            pixels = torch.stack([torch.tensor(np.array(shards.image(key)) / 127.5 - 1) for key in keys])
            posterior = vae.encode(pixels.permute(0, 3, 1, 2).float()).latent_dist
            draws = torch.stack([sampler.posterior_noise(SEED, p, (4, 16, 16)) for p in positions])
            latents = (posterior.mean + posterior.std * draws) * vae.config.scaling_factor
            noise = torch.stack([sampler.noise(SEED, p, (4, 16, 16)) for p in positions])
            noise = noise + offset * torch.stack([sampler.noise_offset(SEED, p, 4).reshape(4, 1, 1) for p in positions])
            timesteps = torch.tensor([sampler.timestep(SEED, p, 1000) for p in positions])
            noisy = scheduler.add_noise(latents, noise, timesteps)
            cond, null = embed([shards.caption(key) for key in keys]), embed([""] * BATCH)
            null_pred = unet(noisy, timesteps, null).sample
        pred = unet(noisy, timesteps, cond).sample
        norms = np.sqrt(((pred.detach() - null_pred).reshape(BATCH, -1).double().numpy() ** 2).sum(1))
        keep = torch.tensor(norms < TAU)
        kept |= {p for p, k in zip(positions, keep, strict=True) if k}
        errors = (pred - noise).pow(2).mean((1, 2, 3)) * weigh(timesteps).to(pred)
        losses.append(errors[keep].tolist())
        if keep.any():
            errors[keep].mean().backward()
            grad_norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM).item())
            optimizer.param_groups[0]["lr"] = lr(step)
            optimizer.step()
            for name, weight in unet.state_dict().items():
                averages[name] = decay * averages.get(name, weight) + (1 - decay) * weight
        optimizer.zero_grad()
    return SimpleNamespace(kept=kept, grad_norms=grad_norms, losses=losses, averages=averages)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save_pipeline(tmp_path_factory.mktemp("model") / "base", "sd1"))


def fine_tune(base, run_dir, shards_dir, **settings):
    """(summary, audit, weights) of ours"""
    settings = {"ema_half_life": 0} | settings
    config = Config(
        run_dir=str(run_dir),
        model=ModelConfig(base),
        data=DataConfig(path=str(shards_dir), resolution=SIZE, caption_dropout=0.0),
        filter=FilterConfig(tau=TAU),
        train=TrainConfig(samples=STEPS * BATCH, batch_size=BATCH, learning_rate=LR, max_grad_norm=MAX_GRAD_NORM, seed=SEED,
                          **settings),
        log=LogConfig(every=10 * BATCH),
    )  # fmt: skip
    summary = train(config, progress=False)
    # a comparison is worth something only if samples were dropped, and in some step all of them
    assert 0.2 < summary["filter/drop_rate"] < 0.9
    assert summary["filter/empty_steps"] > 0
    audit = pq.read_table(run_dir / "audit.parquet").to_pydict()
    return summary, audit, load_pipeline(str(run_dir / "pipeline")).unet.state_dict()


def test_fifty_steps_end_in_the_kept_sets_and_weights_of_the_official_algorithm(tmp_path, scenes_dir, base):
    _, audit, ours = fine_tune(base, tmp_path / "run", scenes_dir)
    pipeline = load_pipeline(base)
    theirs = official(pipeline, scenes_dir)

    assert min(theirs.grad_norms) < MAX_GRAD_NORM < max(theirs.grad_norms)
    assert {p for p, k in zip(audit["position"], audit["keep"], strict=True) if k} == theirs.kept
    assert len(audit["position"]) == STEPS * BATCH
    for name, weight in pipeline.unet.state_dict().items():
        assert ours[name].numpy() == pytest.approx(weight.numpy(), abs=1e-6), name


def test_schedule_loss_weights_noise_offset_and_average_are_those_of_their_formulas(tmp_path, scenes_dir, base):
    _, audit, ours = fine_tune(
        base,
        tmp_path / "run",
        scenes_dir,
        lr_schedule="cosine",
        warmup_samples=WARM_UP * BATCH,
        snr_gamma=GAMMA,
        noise_offset=OFFSET,
        ema_half_life=HALF_LIFE,
    )
    pipeline = load_pipeline(base)
    alphas_cumprod = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)

    def lr(step):
        if step < WARM_UP:
            return LR * step / WARM_UP
        return LR * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP))) / 2

    theirs = official(pipeline, scenes_dir, lr, lambda timesteps: (GAMMA / snr[timesteps]).clamp(max=1), OFFSET)
    assert {p for p, k in zip(audit["position"], audit["keep"], strict=True) if k} == theirs.kept
    for name, average in theirs.averages.items():
        assert ours[name].numpy() == pytest.approx(average.numpy(), abs=1e-6), name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    windows = [sum(theirs.losses[i : i + 10], []) for i in range(0, STEPS, 10)]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(window) for window in windows], rel=1e-4)
