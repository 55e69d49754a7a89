"""The training loop: what happens in an optimizer step, from top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from memfilter.config import Config, ConfigError, TrainConfig, check, make_filter
from memfilter.data import sampler
from memfilter.data.encode import Encoder
from memfilter.data.experiment import Experiment, index_beside
from memfilter.data.shards import Shards
from memfilter.pipelines import export_pipeline, load_pipeline
from memfilter.train.tracking import Audit, Tracker


def train(config: Config, progress: bool = True) -> dict:
    """Fine-tunes as configured and exports a pipeline; returns the summary that is also in ``summary.json``.

    Raises:
        ConfigError, ModelError, ShardError: before the first step, when something cannot be run.
        NonFiniteNorm, EmptySteps: from the filter, while it runs.
    """
    check(config)
    run_dir = Path(config.run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"run_dir: {run_dir} is not empty; remove it or choose another")
    seed = config.train.seed
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision, gradient_accumulation_steps=config.train.accumulation
    )
    if accelerator.num_processes > 1:
        raise ConfigError(f"training runs in one process, found {accelerator.num_processes}: --num_processes 1")

    # model
    pipeline = load_pipeline(config.model.path)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    encoder = Encoder(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, accelerator.device)
    if config.train.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    mem_filter = make_filter(config.filter)
    unet = mem_filter.wrap(pipeline.unet.train(), null=encoder.prompts([""])[0], scheduler=noise_scheduler)
    ema = _ema(unet, config.train)

    # data
    resolution = config.data.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    dataset = _dataset(config, resolution)
    starts = range(0, config.train.samples, config.train.batch_size)
    loader = DataLoader(
        dataset,
        batch_sampler=[range(start, start + config.train.batch_size) for start in starts],
        collate_fn=sampler.collate,
        num_workers=config.data.workers,
    )

    # optimizer
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        eps=config.train.adam_eps,
        weight_decay=config.train.weight_decay,
    )
    lr_at = _lr_schedule(config.train, optimizer)
    unet, optimizer = accelerator.prepare(unet, optimizer)

    run_dir.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run_dir, config.log, asdict(config))
    audit = Audit(run_dir / "audit.parquet")
    bar = tqdm(total=config.train.samples, unit="sample", disable=not progress, desc=run_dir.name, mininterval=1)
    losses, seen, started, failed = [], 0, time.perf_counter(), True
    try:
        for batch in loader:
            with accelerator.accumulate(unet):
                # noisy latents
                positions = batch["position"]
                draw = _posterior_noise(seed, positions, pipeline, resolution)
                latents = encoder.latents(batch["key"], batch["pixels"], draw, batch["repeats"])
                noise = torch.stack([sampler.noise(seed, p, latents.shape[1:]) for p in positions]).to(latents)
                timesteps = torch.tensor(
                    [sampler.timestep(seed, p, noise_scheduler.config.num_train_timesteps) for p in positions],
                    device=latents.device,
                )
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                target = _target(noise_scheduler, latents, noise, timesteps)

                # prompts
                dropped = [sampler.caption_dropped(seed, p, config.data.caption_dropout) for p in positions]
                captions = ["" if d else caption for d, caption in zip(dropped, batch["caption"], strict=True)]
                prompt_embeds = encoder.prompts(captions, batch["repeats"])

                # both passes, masked loss, gradients
                mem_filter.batch(
                    keys=batch["key"],
                    duplicate=None if dataset.experiment.duplicate is None else batch["duplicate"],
                    caption_dropped=dropped,
                )
                out = unet(noisy_latents, timesteps, prompt_embeds)
                loss = mem_filter.loss(out.sample, target)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if mem_filter.active:
                    audit.add(batch, mem_filter.verdict)

                # step
                seen += len(positions)
                if accelerator.sync_gradients:
                    for group in optimizer.param_groups:
                        group["lr"] = lr_at(seen - 1)
                    if mem_filter.before_step(optimizer):
                        accelerator.clip_grad_norm_(unet.parameters(), config.train.max_grad_norm)
                        optimizer.step()
                        if ema:
                            ema.step(accelerator.unwrap_model(unet).parameters())
                    optimizer.zero_grad(set_to_none=True)

            # report
            bar.update(len(positions))
            if seen // config.log.every > (seen - len(positions)) // config.log.every or seen == config.train.samples:
                metrics = {"loss": torch.stack(losses).mean().item(), "lr": lr_at(seen - 1)}
                metrics |= mem_filter.metrics(accelerator)
                metrics["samples_per_second"] = seen / (time.perf_counter() - started)
                tracker.log(seen, metrics)
                audit.flush()
                bar.set_postfix_str(_summary_line(metrics))
                losses.clear()

        # export
        seconds = time.perf_counter() - started
        audit.close()
        trained = accelerator.unwrap_model(unet).unet
        if ema:
            ema.copy_to(trained.parameters())
        export_pipeline(pipeline, trained.eval(), run_dir / "pipeline")
        totals = mem_filter.stats.totals() if mem_filter.active else {}
        summary = {"samples": seen, "seconds": seconds, **totals, "config": asdict(config)}
        partial = run_dir / ".summary.json.partial"
        partial.write_text(json.dumps(summary, indent=1))
        os.replace(partial, run_dir / "summary.json")
        failed = False
    finally:
        bar.close()
        tracker.close(failed)
    return summary


def _dataset(config: Config, resolution: int) -> sampler.SampleDataset:
    shards = Shards.open(config.data.path)
    index = Path(config.data.index) if config.data.index else index_beside(config.data.path)
    if config.data.index and not index.is_file():
        raise ConfigError(f"data.index: {index} does not exist")
    try:
        experiment = Experiment.read(index) if index.is_file() else Experiment.of_shards(shards)
        experiment.require(shards)
    except ValueError as error:
        raise ConfigError(f"data.index: {error}") from error
    if not len(experiment.keys):
        raise ConfigError(f"data.path: {config.data.path} has no sample to train on")
    stream = sampler.SampleStream(experiment.virtual(), config.train.seed)
    return sampler.SampleDataset(shards, experiment, stream, resolution)


def _posterior_noise(seed: int, positions: list[int], pipeline, resolution: int) -> torch.Tensor:
    side = resolution // pipeline.vae_scale_factor
    shape = (pipeline.vae.config.latent_channels, side, side)
    return torch.stack([sampler.posterior_noise(seed, p, shape) for p in positions])


def _target(scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise if kind == "epsilon" else latents


def _lr_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Samples seen before -> learning rate. A pure function: what no step was made for needs no catching up."""
    step_samples = config.batch_size * config.accumulation
    schedule = get_scheduler(
        config.lr_schedule,
        optimizer,
        num_warmup_steps=config.warmup_samples // step_samples,
        num_training_steps=config.samples // step_samples,
    )
    return lambda samples: config.learning_rate * schedule.lr_lambdas[0](samples // step_samples)


def _ema(unet, config: TrainConfig) -> EMAModel | None:
    # diffusers' shadow takes the dtype of the parameters, which are fp32 here: low-precision averages lose updates
    if not config.ema_half_life:
        return None
    decay = 0.5 ** (config.batch_size * config.accumulation / config.ema_half_life)
    return EMAModel(unet.parameters(), decay=decay, use_ema_warmup=False)


def _summary_line(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss", "filter/drop_rate_duplicates": "dup dropped", "filter/drop_rate_distinct": "dist dropped"}
    return ", ".join(f"{label} {metrics[name]:.3f}" for name, label in shown.items() if name in metrics)
