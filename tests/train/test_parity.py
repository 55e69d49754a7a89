"""Our loop against the official algorithm, redone here from its description: same weights, same batches."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.data import sampler
from memfilter.data.experiment import INDEX, Experiment
from memfilter.data.shards import Shards
from memfilter.pipelines import load_pipeline
from memfilter.train.loop import train

STEPS, BATCH, LR, SEED, TAU = 50, 3, 1e-5, 7, 3.0


def official(pipeline, shards_dir, tau):
    """The paper's fine-tune: the empty prompt is encoded for every sample, kept samples are indexed out, and a step
    that keeps nothing changes nothing. Returns the kept positions."""
    shards, experiment = Shards.open(shards_dir), Experiment.read(shards_dir / INDEX)
    stream = sampler.SampleStream(experiment.virtual(), SEED)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, vae = pipeline.unet.train(), pipeline.vae
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    kept = set()

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
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    return kept


def test_fifty_steps_end_in_the_kept_sets_and_weights_of_the_official_algorithm(tmp_path, scenes_dir):
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig("scenes"),
        data=DataConfig(path=str(scenes_dir), caption_dropout=0.0),
        filter=FilterConfig(tau=TAU),
        train=TrainConfig(samples=STEPS * BATCH, batch_size=BATCH, learning_rate=LR, ema_half_life=0, seed=SEED),
        log=LogConfig(every=50),
    )
    summary = train(config, progress=False)
    audit = pq.read_table(tmp_path / "run" / "audit.parquet").to_pydict()
    ours = load_pipeline(str(tmp_path / "run" / "pipeline")).unet.state_dict()

    pipeline = load_pipeline("scenes")
    kept = official(pipeline, scenes_dir, TAU)

    # the comparison is worth something only if samples were dropped, and in some step all of them
    assert 0.2 < summary["filter/drop_rate"] < 0.9
    assert summary["filter/empty_steps"] > 0
    assert {p for p, k in zip(audit["position"], audit["keep"], strict=True) if k} == kept
    assert len(audit["position"]) == STEPS * BATCH
    for name, theirs in pipeline.unet.state_dict().items():
        assert ours[name].numpy() == pytest.approx(theirs.numpy(), abs=1e-6), name
