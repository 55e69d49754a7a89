"""The training loop: what happens in an optimizer step, from top to bottom."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from memfilter.config import Config, ConfigError, check, make_filter
from memfilter.data.encode import Encoder
from memfilter.data.experiment import Experiment, index_beside
from memfilter.data.sampler import SampleDataset, SampleStream, View, collate
from memfilter.data.shards import Shards
from memfilter.files import atomic
from memfilter.pipelines import ModelError, add_lora, load_pipeline
from memfilter.preflight import UnsuitableModel, validate
from memfilter.train.export import export_lora, export_pipeline
from memfilter.train.gallery import write_gallery
from memfilter.train.objective import Objective
from memfilter.train.optimizer import lr_schedule, make_ema, make_optimizer
from memfilter.train.tracking import Audit, BadSamples, Tracker, require_wandb
from memfilter.train.validation import Validation

log = logging.getLogger(__name__)


def train(config: Config, progress: bool = True) -> dict:
    """Fine-tunes as configured and exports a pipeline; returns the summary that is also in ``summary.json``.

    Raises:
        ConfigError, ModelError, ShardError: before the first step, when something cannot be run.
        ShardError, NonFiniteNorm, EmptySteps: while it runs.
    """
    return Trainer(config).run(progress)


class Trainer:
    """A run. Making it loads and checks everything and writes nothing; `run` does the rest.

    ``pipeline`` holds the model that is trained, ``objective`` the loss of a batch, ``dataset`` the samples by
    their position in the stream.
    """

    def __init__(self, config: Config):
        check(config)
        self.config, self.run_dir = config, Path(config.run_dir)
        _require_empty(self.run_dir)
        require_wandb(config.log)
        self.accelerator = _accelerator(config)
        shards, experiment = _open_data(config)

        # model
        self.pipeline = pipeline = load_pipeline(
            config.model.path, variant=config.model.variant, revision=config.model.revision
        )
        if config.model.lora_rank is not None:
            alpha = config.model.lora_rank if config.model.lora_alpha is None else config.model.lora_alpha
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.train.mixed_precision, torch.float32)
            add_lora(pipeline.unet, config.model.lora_rank, alpha, config.model.lora_targets, dtype, config.train.seed)
        if config.train.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        if config.train.compile:
            _require_backend(config.train.compile)
            pipeline.unet.compile(backend=config.train.compile)
        resolution = _resolution(config, pipeline)
        encoder = Encoder(pipeline, self.accelerator.device, memory=int(config.data.cache_gb * 2**30))
        noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.mem_filter = make_filter(config.filter)
        _validate(config, pipeline, noise_scheduler, resolution)
        try:
            wrapped = self.mem_filter.wrap(pipeline.unet.train(), null=encoder.null, scheduler=noise_scheduler)
        except ValueError as error:
            raise ModelError(f"model.path: {error}") from error
        self.trained = [p for p in wrapped.parameters() if p.requires_grad]

        # data
        self.dataset = SampleDataset(
            shards,
            experiment,
            SampleStream(experiment.virtual(), config.train.seed),
            View(resolution, config.data.random_crop, config.data.random_flip),
            config.train.samples,
            encoder.remembered if config.data.workers == 0 else frozenset(),
        )

        # optimizer
        optimizer = make_optimizer(self.trained, config.train)
        self.lr_at = lr_schedule(config.train, optimizer)
        self.unet, self.optimizer = self.accelerator.prepare(wrapped, optimizer)
        self.ema = make_ema(self.trained, config.train)
        self.objective = Objective(config, self.unet, encoder, noise_scheduler, self.mem_filter, resolution)
        self.skipped_steps = 0

    def run(self, progress: bool = True) -> dict:
        """Trains, exports, and returns the summary."""
        config, accelerator, mem_filter = self.config, self.accelerator, self.mem_filter
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic(self.run_dir / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        tracker = Tracker(self.run_dir, config.log, asdict(config))
        audit = Audit(self.run_dir / "audit.parquet")
        bad_samples = BadSamples(self.run_dir / "bad_samples.jsonl", config.data.max_bad_share * config.train.samples)
        # guidance doubles the rows of a picture
        together = max(1, config.train.batch_size // 2)
        validation = Validation(
            config.log, self.pipeline, self.unet, self.dataset, self.run_dir / "validation", together
        )
        bar = tqdm(total=config.train.samples, unit="sample", disable=not progress, desc=self.run_dir.name, mininterval=1)
        losses, kept, seen, failed = [], [], 0, True
        started = reported = time.perf_counter()
        try:
            for batch in self.loader():
                before, size = seen, len(batch["position"])
                bad_samples.add(batch)

                # gradients
                with accelerator.accumulate(self.unet):
                    loss = self.objective(batch)
                    accelerator.backward(loss)
                    seen += size
                    weight = size if config.filter.reduction == "batch" else mem_filter.verdict.keep.sum()
                    losses.append(loss.detach() * (1 if config.filter.reduction == "kept_global" else weight))
                    kept.append(torch.as_tensor(weight))
                    audit.add(batch, mem_filter.verdict)

                    # step
                    if accelerator.sync_gradients:
                        self.step(seen)

                # report
                bar.update(size)
                if _crosses(config.log.every, before, seen) or seen == config.train.samples:
                    mean = (torch.stack(losses).sum() / torch.stack(kept).sum().clamp(min=1)).item()
                    metrics = {"loss": mean, "lr": self.lr_at(seen - 1), "skipped_steps": self.skipped_steps}
                    metrics |= mem_filter.metrics(accelerator)
                    metrics["samples_per_second"] = size * len(losses) / (time.perf_counter() - reported)
                    tracker.log(seen, metrics, mem_filter.histograms(accelerator))
                    audit.flush()
                    bar.set_postfix_str(_summary_line(metrics))
                    losses.clear()
                    kept.clear()
                    reported = time.perf_counter()
                if config.log.validation_every and _crosses(config.log.validation_every, before, seen):
                    began = time.perf_counter()
                    with self.averaged():
                        tracker.images(seen, "validation", validation.run(seen))
                    reported += time.perf_counter() - began

            # export
            seconds = time.perf_counter() - started
            audit.close()
            totals = mem_filter.stats.totals() | {"skipped_steps": self.skipped_steps}
            summary = {"samples": seen, "seconds": seconds, **totals, "config": asdict(config)}
            if self.ema:
                self.ema.copy_to(self.trained)
            export = export_pipeline if config.model.lora_rank is None else export_lora
            export(self.pipeline, self.pipeline.unet.eval(), self.run_dir, summary)
            with atomic(self.run_dir / "summary.json") as partial:
                partial.write_text(json.dumps(summary, indent=1))
            if config.log.gallery and mem_filter.active:
                tracker.dropped(seen, write_gallery(self.run_dir, self.dataset, config.log.gallery))
            failed = False
        finally:
            bar.close()
            audit.close()
            tracker.close(failed)
        return summary

    def loader(self) -> DataLoader:
        """Batches in the order of the stream."""
        size = self.config.train.batch_size
        return DataLoader(
            self.dataset,
            batch_sampler=[range(start, start + size) for start in range(0, self.config.train.samples, size)],
            collate_fn=collate,
            num_workers=self.config.data.workers,
        )

    def step(self, seen: int) -> None:
        """One update from the gradients at hand; none where nothing was kept or loss scaling found an overflow."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(seen - 1)
        if self.mem_filter.before_step(self.optimizer):
            self.accelerator.clip_grad_norm_(self.trained, self.config.train.max_grad_norm)
            self.optimizer.step()
            if self.accelerator.optimizer_step_was_skipped:
                self.skipped_steps += 1
            elif self.ema:
                self.ema.step(self.trained)
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self):
        """The weights are the averaged ones, and the denoiser is in eval mode, for as long as this lasts."""
        self.pipeline.unet.eval()
        if self.ema:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.trained)
            self.pipeline.unet.train()


def _accelerator(config: Config) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision, gradient_accumulation_steps=config.train.accumulation
    )
    if accelerator.num_processes > 1:
        raise ConfigError(f"training runs in one process, found {accelerator.num_processes}: --num_processes 1")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate takes fp16 on a CPU for fp32, without a word; torch can do it
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def _require_empty(run_dir: Path) -> None:
    try:
        found = run_dir.exists() and any(run_dir.iterdir())
        parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} cannot be a directory: {error}") from error
    if found:
        raise ConfigError(f"run_dir: {run_dir} is not empty; remove it or choose another")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir: {run_dir} cannot be made in {parent}")


def _require_backend(name: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=None)
    if name not in known:
        raise ConfigError(f"train.compile: there is no backend {name!r}: expected one of {', '.join(known)}")


def _open_data(config: Config) -> tuple[Shards, Experiment]:
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
    return shards, experiment


def _resolution(config: Config, pipeline) -> int:
    resolution = config.data.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if resolution % pipeline.vae_scale_factor:
        raise ConfigError(f"data.resolution: {resolution} is not a multiple of {pipeline.vae_scale_factor}, "
                          "by which the model's VAE reduces a picture")  # fmt: skip
    return resolution


def _validate(config: Config, pipeline, noise_scheduler, resolution: int) -> None:
    if config.filter.tau is None:
        return
    side = resolution // pipeline.vae_scale_factor
    try:
        hints = validate(
            pipeline.unet,
            scheduler=noise_scheduler,
            text_encoders=(pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)),
            latent_shape=(pipeline.vae.config.latent_channels, side, side),
            tau=config.filter.tau,
            unit=config.filter.unit,
        )
    except UnsuitableModel as error:
        raise ModelError("\n".join(f"model.path: {reason}" for reason in str(error).splitlines())) from error
    for hint in hints:
        log.info("%s", hint)


def _crosses(every: int, before: int, after: int) -> bool:
    return after // every > before // every


def _summary_line(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss", "filter/drop_rate_duplicates": "dup dropped", "filter/drop_rate_distinct": "dist dropped"}
    return ", ".join(f"{label} {metrics[name]:.3f}" for name, label in shown.items() if name in metrics)
