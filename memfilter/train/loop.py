"""The training loop: what happens in an optimizer step, from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm

from memfilter.config import Config, ConfigError, check, make_filter
from memfilter.data import sampler
from memfilter.data.cache import Cache, fingerprint
from memfilter.data.encode import Encoder
from memfilter.data.feed import Feed
from memfilter.data.sampler import collate
from memfilter.data.sources import make_dataset, open_data
from memfilter.files import atomic, held, is_full
from memfilter.filter import EmptySteps, NonFiniteNorm
from memfilter.pipelines import ModelError
from memfilter.train.checkpoint import FREE, CheckpointError, Checkpoints, changes, require_same
from memfilter.train.checks import require_calibration, require_place, require_suitable, resolution_of, training_scheduler
from memfilter.train.engine import Engine, make_accelerator
from memfilter.train.export import export_lora, export_pipeline, with_weights
from memfilter.train.gallery import write_gallery
from memfilter.train.interruption import EXIT_CODE, Interrupted, Interruption, leave_to_parent
from memfilter.train.model import load_model
from memfilter.train.objective import Objective
from memfilter.train.optimizer import ema_decay, lr_schedule, make_ema, make_optimizer
from memfilter.train.tracking import Audit, BadSamples, Tracker, require_wandb
from memfilter.train.validation import Validation

log = logging.getLogger(__name__)
HELD = 1000  # forwards at most, whose losses and audits a process holds until they are written


def train(config: Config, progress: bool = True) -> dict:
    """Fine-tunes as configured and exports a pipeline; returns the summary that is also in ``summary.json``.

    Raises:
        ConfigError, ModelError, ShardError, CheckpointError: before the first step, when something cannot be run.
        ShardError, NonFiniteNorm, EmptySteps, CheckpointError: while it runs.
        Interrupted: a signal ended it.
    """
    summary = Path(config.run_dir) / "summary.json"
    if config.checkpoint.resume and summary.is_file():
        finished = json.loads(summary.read_text(encoding="utf-8"))
        if changed := changes(finished["config"], config, free=FREE - {"train.samples"}):
            raise ConfigError("\n".join(f"run_dir: {config.run_dir} is finished, as another run: {line}" for line in changed))
        log.info("%s is finished", config.run_dir)
        return finished
    return Trainer(config).run(progress)


class Trainer:
    """A run. Making it loads and checks everything and writes nothing; `run` does the rest. With several processes every
    one makes it and runs it, and the main one writes.

    ``pipeline`` holds the model that is trained, ``objective`` the loss of a batch, ``dataset`` the samples by
    their position in the stream, ``seen`` how many of them all processes have seen.
    """

    def __init__(self, config: Config):
        check(config)
        self.config, self.run_dir = config, Path(config.run_dir)
        require_place(self.run_dir, config.checkpoint.resume)
        self.accelerator = make_accelerator(config)
        self.main = self.accelerator.is_main_process
        if self.main:
            require_wandb(config.log)
        shards, experiment = open_data(config, self.accelerator.num_processes)
        self.data, left_out = experiment.fingerprint(), experiment.distinct_left_out
        self.left_out = {} if left_out is None else {"data/distinct_left_out": left_out}

        # model
        self.pipeline = pipeline = load_model(config)
        resolution = resolution_of(config, pipeline)
        cache = None
        if config.data.cache:
            cache = Cache.open(config.data.cache, fingerprint(config, pipeline, shards, experiment, resolution))
            shards = cache.shards(shards)
        memory = int(config.data.cache_gb * 2**30)
        encoder = Encoder(pipeline, self.accelerator.device, memory=memory, rows=config.train.batch_size, cache=cache)
        noise_scheduler = training_scheduler(config, pipeline)
        calibration = require_calibration(config, pipeline.unet, noise_scheduler, resolution)
        try:
            self.mem_filter = make_filter(config, calibration, noise_scheduler.config.num_train_timesteps)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        require_suitable(config, pipeline, noise_scheduler, resolution)
        try:
            wrapped = self.mem_filter.wrap(
                pipeline.unet.train(),
                null=encoder.null,
                scheduler=noise_scheduler,
                static_shapes=config.train.compile is not None,
            )
        except ValueError as error:
            raise ModelError(f"model.path: {error}") from error
        names = [name for name, p in pipeline.unet.named_parameters() if p.requires_grad]

        # data
        remembered = encoder.remembered if config.data.workers == 0 else frozenset(cache.pictures if cache else ())
        rank = self.accelerator.process_index, self.accelerator.num_processes
        self.dataset = make_dataset(config, shards, experiment, resolution, remembered, *rank)

        # optimizer
        processes, micro_batches = self.accelerator.num_processes, config.train.accumulation
        self.forward_samples = config.train.batch_size * processes
        self.step_samples = self.forward_samples * micro_batches
        if config.filter.reduction == "kept" and self.step_samples > config.train.batch_size:
            log.info("filter.reduction=kept weighs processes and micro-batches alike, however many samples they keep; "
                     "kept_global weighs samples alike")  # fmt: skip
        optimizer = make_optimizer([p for p in wrapped.parameters() if p.requires_grad], config.train)
        self.lr_at = lr_schedule(config.train, optimizer, self.step_samples)
        self.engine = Engine(self.accelerator, wrapped, optimizer, config.train.max_grad_norm)
        self.trained = dict(zip(names, self.engine.trained, strict=True))
        self.ema = make_ema(self.engine.trained, config.train, self.step_samples)
        self.objective = Objective(
            config, self.engine.model, encoder, noise_scheduler, self.mem_filter, resolution, self.engine.input_dtype
        )

        # where it stands
        self.seen, self.skipped_steps, self._skipped_in_a_row, self.wandb_id = 0, 0, 0, None
        self.seconds, self.cpu_seconds = 0.0, 0.0  # the latter of this process, with all its threads
        self.window = [0.0, 0.0]  # loss and its weight since the last report, of all processes
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []  # the same, of this process, not yet in the window
        self._drawn: list[dict] = []  # batches that the checkpoint's run had drawn and not trained on
        self.checkpoints = Checkpoints(self.run_dir, config.checkpoint.keep, self.accelerator, self.trained)
        if config.checkpoint.resume and (found := self.checkpoints.newest()):
            self._resume(*found)
        self.feed: Feed | None = None
        if not self._passes_over() and (config.train.samples - self.seen) % self.step_samples:
            raise ConfigError(f"train.samples: {config.train.samples - self.seen} samples are left, which must be a multiple "
                              f"of batch_size x accumulation x processes = {self.step_samples}: the last step would "
                              "weigh its samples otherwise than the rest")  # fmt: skip

    def run(self, progress: bool = True) -> dict:
        """Trains, exports, and returns the summary."""
        config = self.config
        self._open_files()
        # guidance doubles the rows of a picture
        validation = Validation(
            config.log,
            self.pipeline,
            self.engine.for_pipeline(),
            self.dataset,
            self.run_dir / "validation" if self.main else None,
            max(1, config.train.batch_size // 2),
        )
        bar = tqdm(
            total=config.train.samples,
            initial=self.seen,
            unit="sample",
            disable=not (progress and self.main),
            desc=self.run_dir.name,
            mininterval=1,
        )
        exit_code = 1
        with self._held, Interruption(self.accelerator.device).heard() as interruption:  # until all files are closed
            try:
                self._train(validation, bar, interruption)
                summary = self._finish()
                exit_code = 0
            except Interrupted:
                exit_code = EXIT_CODE
                raise
            except (OSError, SafetensorError) as error:
                if is_full(error):
                    raise self._of_full_disk(error) from error
                raise
            finally:
                bar.close()
                if self.main:
                    self._close_files(exit_code, None if exit_code else summary)
            if self.main:
                self.audit.discard_parts()
            self.accelerator.wait_for_everyone()
        return summary

    def _train(self, validation: Validation, bar: tqdm, interruption: Interruption) -> None:
        """From the first batch that is left to the last."""
        config, engine = self.config, self.engine
        began = self.reported = time.perf_counter()
        seconds, cpu_seconds = self.seconds - began, self.cpu_seconds - time.process_time()
        self.reported_at = stepped_at = self.seen
        with closing(self.batches()) as batches:
            for batch in batches:
                before = self.seen
                drawn = self.feed.taken() if self.feed else None
                self.bad_samples.add(batch)

                # gradients
                with engine.accumulate():
                    loss = self.objective(batch)
                    engine.backward(loss)
                    self.seen += self.forward_samples
                    self._note(batch, loss)

                # step
                if drawn and drawn.passed_over:
                    self._pass_over(drawn.passed_over)
                if self.accelerator.sync_gradients:
                    self._step(self.seen - stepped_at)
                    if len(self._losses) >= HELD:
                        self._collect()

                # report
                bar.update(self.seen - before)
                if _crosses(config.log.every, before, self.seen) or self.seen == config.train.samples:
                    bar.set_postfix_str(_summary_line(self._report()))
                if config.log.validation_every and _crosses(config.log.validation_every, before, self.seen):
                    with self._untimed(), self.averaged():
                        pictures = validation.run(self.seen)
                        if self.main:
                            self.tracker.images(self.seen, "validation", pictures)

                # checkpoint
                self.seconds, self.cpu_seconds = seconds + time.perf_counter(), cpu_seconds + time.process_time()
                if self.accelerator.sync_gradients:
                    asked, every = interruption.agreed(), config.checkpoint.every
                    if asked or (every and _crosses(every, stepped_at, self.seen)):
                        with self._untimed():
                            saved = self._checkpoint()
                    if asked:
                        raise Interrupted(f"{asked} after {self.seen} samples: go on from {saved} with "
                                          "--checkpoint.resume=true")  # fmt: skip
                    stepped_at = self.seen
        if self.seen < config.train.samples:  # what was left did not fill a step
            if self.feed.out_of_patience:
                advice = {"evidence": "lower filter.false_flag_rate", "sightings": "raise filter.sightings",
                          "oracle": "see which samples the index calls duplicates"}[config.filter.method]  # fmt: skip
                raise EmptySteps(f"everything is flagged: after {self.seen} samples, {len(self.feed.rest)} in a row are of keys "
                                 f"that are left out; look at audit.parquet, and {advice}")  # fmt: skip
            self._pass_over(self.feed.rest)
            self.seen = config.train.samples
            self._report()

    def _of_full_disk(self, error: Exception) -> CheckpointError:
        found = self.checkpoints.newest() if self.main else None
        left = f"; go on from {found[0]} with --checkpoint.resume=true" if found else ""
        return CheckpointError(f"{self.run_dir} cannot be written after {self.seen} samples: {error}{left}")

    def batches(self):
        """Those of `loader`, whose processes end with this, whatever ends it: they are deaf to what else would end them."""
        batches = iter(self.loader())
        try:
            yield from batches
        finally:
            if self.config.data.workers:
                batches._shutdown_workers()

    def loader(self) -> DataLoader:
        """This process's batches in the order of the stream: neighbours go to neighbours, so that a step sees the same
        samples however it is split."""
        if self.config.data.streaming:
            self.dataset.first, split = self.seen, {"batch_size": self.config.train.batch_size}
        else:
            self.feed = self._feed()
            split = {"batch_sampler": self.feed}
        workers = {"num_workers": self.config.data.workers, "worker_init_fn": leave_to_parent}
        return DataLoader(self.dataset, collate_fn=collate, **split, **workers)

    def _passes_over(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Which positions the filter has no use for; None where it takes them all."""
        rule, dataset, evidence = self.config.filter, self.dataset, self.mem_filter.evidence
        if self.config.data.streaming:
            return None
        if rule.method == "oracle":
            if dataset.experiment.duplicate is None:
                raise ConfigError("filter.method=oracle needs an index that tells the duplicates")
            return lambda positions: dataset.experiment.duplicate[[dataset.stream.row(p) for p in positions]]
        if rule.method not in ("evidence", "sightings") or not rule.replace:
            return None

        def flagged(positions: np.ndarray) -> np.ndarray:
            keys = [dataset.shared_key(dataset.stream.row(p)) for p in positions]
            return evidence.passes_over(evidence.slots(keys)).numpy()

        return flagged

    def _feed(self) -> Feed:
        """The samples that are left."""
        return Feed(
            self.seen,
            self.config.train.samples,
            self.forward_samples,
            self.config.train.accumulation,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self._passes_over(),
            self.config.filter.max_empty_steps * self.step_samples,
            self._drawn,
        )

    def _pass_over(self, positions: list[int]) -> None:
        """Counts samples in whose place others were taken."""
        self.seen += len(positions)
        num_train_timesteps = self.objective.noise_scheduler.config.num_train_timesteps
        timesteps = [sampler.timestep(self.config.train.seed, p, num_train_timesteps) for p in positions]
        facts = self.dataset.facts(positions)
        known = None not in facts["duplicate"]
        self.mem_filter.passed_over(torch.tensor(timesteps, dtype=torch.long), facts["duplicate"] if known else None)
        if self.main:
            self.audit.add_passed_over(facts, timesteps)

    @contextmanager
    def averaged(self):
        """The weights are the averaged ones, and the denoiser is in eval mode, for as long as this lasts."""
        self.engine.model.eval()
        if self.ema:
            self.ema.store(self.engine.trained)
            self.ema.copy_to(self.engine.trained)
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.engine.trained)
            self.engine.model.train()

    def _open_files(self) -> None:
        config, run_dir = self.config, self.run_dir
        self._held = ExitStack()
        if self.main:
            run_dir.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(held(run_dir / ".lock"))
            except BlockingIOError as error:
                raise ConfigError(f"run_dir: another process is at work in {run_dir}") from error
            with atomic(run_dir / "config.yaml") as partial:
                partial.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
            self.tracker = Tracker(run_dir, config.log, asdict(config), self.seen, self.wandb_id)
            self.wandb_id = self.tracker.wandb_id
        self.audit = Audit(run_dir, self.seen, self.main)
        allowed = config.data.max_bad_share * config.train.samples
        self.bad_samples = BadSamples(run_dir / "bad_samples.jsonl", allowed, self.seen, self.main)

    def _close_files(self, exit_code: int, summary: dict | None) -> None:
        """What has ended the run is told, and not what follows from it here, such as that the disk is still full."""

        def finish() -> None:
            if summary is not None:
                with atomic(self.run_dir / "summary.json") as partial:
                    partial.write_text(json.dumps(summary, indent=1))

        steps = [self.audit.close, lambda: self.bad_samples.write(self.bad_samples.take()), finish]
        steps.append(lambda: self.tracker.close(exit_code))  # the last: W&B may hang, and the run is finished
        for step in steps:
            with suppress(Exception) if exit_code else nullcontext():
                step()

    def _note(self, batch: dict, loss: torch.Tensor) -> None:
        """Remembers what a forward brought, on the device."""
        keep = self.mem_filter.verdict.keep
        weight = torch.tensor(float(len(keep))) if self.config.filter.reduction == "batch" else keep.sum()
        self._losses.append((loss.detach() * (1 if self.config.filter.reduction == "kept_global" else weight), weight))
        self.audit.add(batch, self.mem_filter.verdict)

    def _step(self, samples: int) -> None:
        """One update from the gradients at hand; none where nothing was kept or loss scaling found an overflow.

        Args:
            samples: of the stream that the step stands for.
        """
        done = self.engine.step(self.mem_filter, self.lr_at(self.seen - 1))
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if done is None else 0
        if done is None:
            self.skipped_steps += 1
            if self._skipped_in_a_row == (allowed := self.config.filter.max_empty_steps):
                raise NonFiniteNorm(f"gradients of {allowed} optimizer steps in a row were NaN or infinite, whatever they were "
                                    "scaled by: use train.mixed_precision=bf16 or no, or look at the data")  # fmt: skip
        elif done and self.ema:
            self.ema.decay = self.ema.min_decay = ema_decay(self.config.train, samples)
            self.ema.step(self.engine.trained)

    def _collect(self) -> None:
        """Brings together what the processes noted since the last time: losses in the window, rows in the files."""
        noted, self._losses = self._losses, []
        finite = self.engine.finite.item()
        window = [torch.stack(values).cpu().double().sum().item() for values in zip(*noted, strict=True)] or [0.0, 0.0]
        found = gather_object([(window, finite, self.audit.take(), self.bad_samples.take())])
        windows, finite, rows, bad = zip(*found, strict=True)
        self.window = [sum(values) for values in zip(self.window, *windows, strict=True)]
        if self.main:
            self.audit.write(rows)
        self.bad_samples.write([facts for found in bad for facts in found])
        # a filter that makes passes names the samples, at the step; without one nobody looks, and after the last step neither
        if not all(finite) or (self.accelerator.sync_gradients and not math.isfinite(self.window[0])):
            left = self.checkpoints.newest() if self.main else None
            raise NonFiniteNorm(f"{'the loss' if all(finite) else 'a gradient'} was NaN or infinite by sample {self.seen}: the "
                                "weights are broken; lower train.learning_rate, or look at train.mixed_precision and the data"
                                + (f"; {left[0]} is from before" if left else ""))  # fmt: skip

    def _report(self) -> dict[str, float]:
        self._collect()
        metrics = {"loss": self.window[0] / max(self.window[1], 1), "lr": self.lr_at(self.seen - 1)}
        metrics |= {"skipped_steps": self.skipped_steps} | self.mem_filter.metrics(self.accelerator)
        metrics["samples_per_second"] = (self.seen - self.reported_at) / (time.perf_counter() - self.reported)
        histograms = self.mem_filter.histograms(self.accelerator)
        if self.main:
            self.tracker.log(self.seen, metrics, histograms)
        self.window, self.reported, self.reported_at = [0.0, 0.0], time.perf_counter(), self.seen
        return metrics

    @contextmanager
    def _untimed(self):
        """What happens here does not count into samples per second."""
        began = time.perf_counter()
        yield
        self.reported += time.perf_counter() - began

    def _checkpoint(self) -> Path:
        self._collect()
        state = {
            "filter": self.mem_filter.state_dict(self.accelerator),
            "window": self.window,
            "skipped_steps": self.skipped_steps,
            "ema_steps": self.ema.optimization_step if self.ema else 0,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "wandb_id": self.wandb_id,
            "data": self.data,
            "drawn": self.feed.state() if self.feed else [],
            "config": asdict(self.config),
        }
        if self.main:
            self.audit.cut(self.seen)
        average = self.ema.shadow_params if self.ema else None
        evidence = self.mem_filter.evidence
        return self.checkpoints.save(self.seen, state, average, evidence and evidence.state_dict())

    def _resume(self, path: Path, state: dict) -> None:
        require_same(path, state, self.config, self.data)
        average, evidence = self.checkpoints.load(path, state)
        if evidence:
            self.mem_filter.evidence.load_state_dict(evidence)
        names = ("samples", "batch_size", "accumulation")
        split = [getattr(self.config.train, name) for name in names] + [self.accelerator.num_processes]
        before = [state["config"]["train"][name] for name in names] + [state["processes"]]
        if split == before:  # else what was drawn ahead is drawn again
            self._drawn = state["drawn"]
        if self.ema:
            self.ema.shadow_params, self.ema.optimization_step = average, state["ema_steps"]
        self.mem_filter.load_state_dict(state["filter"], self.accelerator)
        self.seen, self.window, self.skipped_steps = state["samples"], state["window"], state["skipped_steps"]
        self.seconds, self.cpu_seconds, self.wandb_id = state["seconds"], state["cpu_seconds"], state["wandb_id"]
        log.info("goes on from %s", path)
        if self.config.data.streaming:
            log.warning("data.streaming: the stream begins anew, in another order: the samples to come are not those that "
                        "would have come without the interruption")  # fmt: skip

    def _finish(self) -> dict:
        """Exports, and draws the gallery; returns the summary."""
        config = self.config
        totals = self.mem_filter.stats.totals() | {"skipped_steps": self.skipped_steps} | self.left_out
        times = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        summary = {"samples": self.seen, **times, **totals, "config": asdict(config)}
        weights = self.ema.shadow_params if self.ema else self.engine.full_weights()
        # every rank gathers, one keeps
        whole = {name: weight for name, weight in zip(self.trained, weights, strict=True) if self.main}
        if self.main:
            self.audit.close()
            self.pipeline.register_modules(unet=with_weights(self.pipeline.unet, whole))
            export = export_pipeline if config.model.lora_rank is None else export_lora
            export(self.pipeline, self.pipeline.unet, self.run_dir, summary)
            if config.log.gallery and self.mem_filter.active:
                self.tracker.dropped(self.seen, write_gallery(self.run_dir, self.dataset, config.log.gallery))
        return summary


def _crosses(every: int, before: int, after: int) -> bool:
    return after // every > before // every


def _summary_line(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss", "filter/drop_rate_duplicates": "dup dropped", "filter/drop_rate_distinct": "dist dropped"}
    return ", ".join(f"{label} {metrics[name]:.3f}" for name, label in shown.items() if name in metrics)
