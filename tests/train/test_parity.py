"""Our loop against the official algorithm, redone here from its description: same weights, same batches."""

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


def official(pipeline, shards_dir, tau):
    """The paper's fine-tune: the empty prompt is encoded for every sample, kept samples are indexed out, and a step
    that keeps nothing changes nothing. Returns the kept positions and the norms of the gradients."""
    shards, experiment = Shards.open(shards_dir), Experiment.read(shards_dir / INDEX)
    stream = sampler.SampleStream(experiment.virtual(), SEED)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, vae = pipeline.unet.train(), pipeline.vae
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    kept, grad_norms = set(), []

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
            timesteps = torch.tensor([sampler.timestep(SEED, p, 1000) for p in positions])
            noisy = scheduler.add_noise(latents, noise, timesteps)
            cond, null = embed([shards.caption(key) for key in keys]), embed([""] * BATCH)
            null_pred = unet(noisy, timesteps, null).sample
        pred = unet(noisy, timesteps, cond).sample
        norms = np.sqrt(((pred.detach() - null_pred).reshape(BATCH, -1).double().numpy() ** 2).sum(1))
        keep = torch.tensor(norms < tau)
        kept |= {p for p, k in zip(positions, keep, strict=True) if k}
        if keep.any():
            torch.nn.functional.mse_loss(pred[keep], noise[keep]).backward()
            grad_norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM).item())
            optimizer.step()
        optimizer.zero_grad()
    return kept, grad_norms


def test_fifty_steps_end_in_the_kept_sets_and_weights_of_the_official_algorithm(tmp_path, scenes_dir):
    base = tiny.save_pipeline(tmp_path / "base", "sd1")
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(str(base)),
        data=DataConfig(path=str(scenes_dir), resolution=SIZE, caption_dropout=0.0),
        filter=FilterConfig(tau=TAU),
        train=TrainConfig(samples=STEPS * BATCH, batch_size=BATCH, learning_rate=LR, max_grad_norm=MAX_GRAD_NORM,
                          ema_half_life=0, seed=SEED),
        log=LogConfig(every=50),
    )  # fmt: skip
    summary = train(config, progress=False)
    audit = pq.read_table(tmp_path / "run" / "audit.parquet").to_pydict()
    ours = load_pipeline(str(tmp_path / "run" / "pipeline")).unet.state_dict()

    pipeline = load_pipeline(str(base))
    kept, grad_norms = official(pipeline, scenes_dir, TAU)

    # the comparison is worth something only if samples were dropped, in some step all of them, and some steps were clipped
    assert 0.2 < summary["filter/drop_rate"] < 0.9
    assert summary["filter/empty_steps"] > 0
    assert min(grad_norms) < MAX_GRAD_NORM < max(grad_norms)
    assert {p for p, k in zip(audit["position"], audit["keep"], strict=True) if k} == kept
    assert len(audit["position"]) == STEPS * BATCH
    for name, theirs in pipeline.unet.state_dict().items():
        assert ours[name].numpy() == pytest.approx(theirs.numpy(), abs=1e-6), name
