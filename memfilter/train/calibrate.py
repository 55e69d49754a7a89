"""``memfilter calibrate``: what the model says of clean samples before it is fine-tuned."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from memfilter.calibration import Calibration
from memfilter.config import Config, ConfigError, check
from memfilter.data.encode import Encoder
from memfilter.data.experiment import Experiment
from memfilter.data.sampler import SampleDataset, SampleStream, View, collate
from memfilter.data.sources import open_data
from memfilter.filter import MemFilter
from memfilter.functional import log_gain, noise_factor, squared_error, text_cosine, text_norm
from memfilter.pipelines import ModelError, weights_digest
from memfilter.processes import end_processes, from_main
from memfilter.reference import SIGNALS
from memfilter.train.checks import WEIGHTS, facts_of_calibration, require_suitable, resolution_of, training_scheduler
from memfilter.train.engine import make_accelerator
from memfilter.train.model import load_model
from memfilter.train.objective import Objective

log = logging.getLogger(__name__)


def calibrate(config: Config, out: Path, keys: int = 300, looks: int = 40, progress: bool = True) -> Calibration:
    """Looks at clean samples several times each, with the weights of model.path at rest, and writes what it found.

    Samples are clean that the index does not call duplicates; where there is none, all are taken to be. They are drawn
    from train.seed, in the place of those that cannot be read come the next, and each is looked at under fresh noise at
    timesteps drawn uniformly. Of several processes each takes every n-th sample; the file is the same.

    Args:
        config: of the training run.
        out: the file.
        keys: samples. A third makes the reference; the others bound how small a false flag rate can be asked for.
        looks: at each sample; the guarantee is for so many.

    Raises:
        ConfigError, ModelError, ShardError: something cannot be run, there are fewer clean samples that can be read, or more
            that cannot than are asked for.
    """
    check(config)
    if keys < 6 or looks < 1:
        raise ConfigError(f"calibrate needs at least 6 keys and 1 look, found {keys} and {looks}")
    if config.data.streaming:
        raise ConfigError("data.streaming: samples are looked at several times, which a stream does not allow")
    accelerator = make_accelerator(config)
    from_main(accelerator.state, lambda: _require_place(out))
    shards, experiment = open_data(config)
    pipeline = load_model(config)
    resolution = resolution_of(config, pipeline)
    noise_scheduler = training_scheduler(config, pipeline)
    encoder = Encoder(pipeline, accelerator.device, rows=config.train.batch_size)
    require_suitable(config, pipeline, noise_scheduler, resolution)

    def dataset_of(rows: np.ndarray) -> SampleDataset:
        return SampleDataset(shards, experiment, _InTurn(rows, config.train.seed), View(resolution), len(rows) * looks)

    clean = _clean(experiment, keys, config.train.seed)
    chosen, reasons = from_main(accelerator.state, lambda: _tried(dataset_of(clean), keys))
    if len(chosen) < keys:
        raise ConfigError(f"calibrate needs {keys} clean samples that can be read, found {len(chosen)} among {len(reasons)} "
                          f"that cannot: {reasons[0]}")  # fmt: skip
    if reasons:
        log.warning("left out, since they cannot be read: %d, the first of them: %s", len(reasons), reasons[0])
    # position = look * keys + key: every look has its own noise and timestep
    dataset = dataset_of(clean[chosen])
    digest = weights_digest(pipeline.unet)
    unet = pipeline.unet.to(accelerator.device).eval()
    null_pass = MemFilter(float("inf")).wrap(unet, null=encoder.null, scheduler=noise_scheduler).to(accelerator.device)
    objective = Objective(config, None, encoder, noise_scheduler, None, resolution)
    objective.caption_dropout = 0.0
    factors = noise_factor(noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod).to(accelerator.device)

    size, rank, processes = config.train.batch_size, accelerator.process_index, accelerator.num_processes
    timesteps, signals = torch.zeros(looks * keys, dtype=torch.long), torch.zeros(looks * keys, len(SIGNALS))
    starts = range(rank * size, looks * keys, processes * size)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    with torch.no_grad():
        for start in tqdm(starts, desc="calibrate", unit="batch", disable=not (progress and accelerator.is_main_process)):
            rows = range(start, min(start + size, looks * keys))
            batch = collate([dataset[position] for position in rows])
            if bad := [reason for reason in batch["bad"] if reason is not None]:
                raise ConfigError(f"calibrate meets a sample that cannot be read any more: {bad[0]}")
            inputs = objective.inputs(batch)
            with torch.autocast(accelerator.device.type, low, enabled=low is not None):  # accelerate's does nothing under DeepSpeed
                cond = unet(inputs.noisy_latents, inputs.timesteps, **inputs.conditions).sample
                null = null_pass.null_prediction(inputs.noisy_latents, inputs.timesteps, inputs.conditions)
            error = squared_error(cond, inputs.target)
            found = {
                "norm": text_norm(cond, null, factors[inputs.timesteps], config.filter.unit),
                "loss": error,
                "cosine": text_cosine(cond, null),
                "gain": log_gain(error, squared_error(null, inputs.target)),
            }
            timesteps[start : rows.stop] = inputs.known_timesteps
            signals[start : rows.stop] = torch.stack([found[name].float().cpu() for name in SIGNALS], 1)
    timesteps = torch.stack(gather_object([timesteps])).sum(0)
    signals = torch.stack(gather_object([signals])).sum(0)
    if not signals.isfinite().all():
        raise ModelError(f"model.path: {config.model.path} gives predictions that are not finite for some samples")
    calibration = Calibration(
        timesteps.view(looks, keys).T,
        signals.view(looks, keys, -1).transpose(0, 1),
        {"model": Path(config.model.path).name, WEIGHTS: digest} | facts_of_calibration(config, noise_scheduler, resolution),
    )
    if accelerator.is_main_process:
        calibration.save(out)
    return calibration


def _require_place(out: Path) -> None:
    """Before the samples are looked at, which takes its time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out.parent} cannot be a directory: {error}") from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"out: {out} cannot be written: it is a directory, or its directory takes no files")


class _InTurn(SampleStream):
    """Every row once, then every row again, in the same order."""

    def row(self, position: int) -> int:
        return int(self.rows[position % len(self.rows)])


def _clean(experiment: Experiment, count: int, seed: int) -> np.ndarray:
    """Rows of the samples that are not known to be duplicates, at least so many, in random order."""
    rows = np.arange(len(experiment.keys))
    if experiment.duplicate is None:
        log.warning("there is no index that tells duplicates: all samples are taken to be clean")
    else:
        rows = rows[~experiment.duplicate]
    if len(rows) < count:
        raise ConfigError(f"calibrate needs {count} clean samples, data.path has {len(rows)}: ask for fewer keys")
    return np.random.default_rng(seed).permutation(rows)


def _tried(dataset: SampleDataset, count: int) -> tuple[list[int], list[str]]:
    """The first so many positions that can be read, and why those before them cannot; fewer, where more cannot."""
    chosen, reasons = [], []
    for position in range(len(dataset.stream.rows)):
        reason = dataset[position]["bad"]
        chosen.append(position) if reason is None else reasons.append(reason)
        if len(chosen) == count or len(reasons) > count:
            break
    return chosen, reasons


def table(calibration: Calibration) -> str:
    """Quantiles of the norm by timestep, for people to read."""
    total = int(calibration.about["num_train_timesteps"])
    bins = (calibration.timesteps * 10 // total).flatten()
    norm = calibration.signals[..., SIGNALS.index("norm")].flatten()
    lines = [f"{'timesteps':>12}  {'median norm':>11}  {'90%':>8}  {'98%':>8}"]
    for b in bins.unique().tolist():
        quantiles = norm[bins == b].quantile(torch.tensor([0.5, 0.9, 0.98])).tolist()
        where = f"{b * total // 10}..{(b + 1) * total // 10 - 1}"
        lines.append(f"{where:>12}  {quantiles[0]:11.4g}  {quantiles[1]:8.4g}  {quantiles[2]:8.4g}")
    return "\n".join(lines)


USAGE = "memfilter calibrate [--out=calibration.json] [--keys=300] [--looks=40] [settings of the training run]"
HELP = """Look at clean samples with the model as it is, before it is fine-tuned: the ground for filter.method=evidence.

Takes the settings of the training run; afterwards train with --filter.calibration=calibration.json, or what --out names.
Clean are the samples of data.path that its index does not call duplicates, and all of them where no index tells. --keys says
how many are looked at, --looks how often each; what cannot be read is left out, and others drawn. A third of the keys
becomes the reference; with the n others a false flag rate of 1 / (n + 1) and above can be asked for, and the guarantee is for
as many looks. Prints the norm's quantiles by timestep.
Several processes share the work: `accelerate launch -m memfilter.cli calibrate ...`.
"""


def main(argv: list[str]) -> Path:
    """``memfilter calibrate``: see HELP.

    Raises:
        ConfigError: with every setting that is wrong; and like `calibrate`.
    """
    from memfilter.arguments import parse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out", type=Path, default=Path("calibration.json"))
    parser.add_argument("--keys", type=int, default=300)
    parser.add_argument("--looks", type=int, default=40)
    try:
        own, settings = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    config = parse(settings, HELP, USAGE)
    calibration = calibrate(config, own.out, own.keys, own.looks)
    if os.environ.get("RANK", "0") == "0":
        print(table(calibration))
    end_processes()
    return own.out
