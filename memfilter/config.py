"""Everything a YAML file or a command line may say. ``jsonargparse`` reads these types and their docstrings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """What is fine-tuned.

    Args:
        path: directory in the diffusers layout, or "scenes" for the tiny base model that comes with the package.
    """

    path: str = "scenes"


@dataclass
class DataConfig:
    """What it is fine-tuned on.

    Args:
        path: directory of img2dataset-style tar shards (.png/.jpg/.webp, .txt, .json), or one tar file.
        index: Parquet file with key, role (distinct or duplicate) and repeats; by default index.parquet beside the
            shards where there is one, else every sample counts once.
        resolution: pixels; shorter side, then centre crop. By default what the denoiser was made for.
        caption_dropout: share of samples that are shown with the empty caption (classifier-free guidance).
        workers: processes that read and decode ahead; 0 reads in the main process.
    """

    path: str = "runs/scenes"
    index: str | None = None
    resolution: int | None = None
    caption_dropout: float = 0.1
    workers: int = 0


@dataclass
class FilterConfig:
    """Which samples are left out of the loss.

    Args:
        tau: samples whose text norm is not below it are dropped; inf measures only; null makes no extra pass.
        unit: of tau; l2 (the paper's, grows with the latent's size) or rms (divided by the root of its size).
        reduction: kept (mean over kept samples) or batch (sum over kept samples / batch size).
        max_empty_steps: so many optimizer steps in a row that keep nothing end the run.
    """

    tau: float | None = 4.0
    unit: Literal["l2", "rms"] = "l2"
    reduction: Literal["kept", "batch"] = "kept"
    max_empty_steps: int = 100


@dataclass
class TrainConfig:
    """How it is fine-tuned. Time is counted in samples seen.

    Args:
        samples: budget.
        batch_size: samples per forward.
        accumulation: forwards per optimizer step.
        learning_rate: of AdamW, at its highest.
        lr_schedule: a schedule of diffusers.
        warmup_samples: the learning rate rises linearly over so many samples.
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        adam_eps: AdamW's epsilon.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        ema_half_life: samples after which a weight counts half in the average that is exported; 0 exports the last
            weights.
        mixed_precision: of the denoiser's forward.
        gradient_checkpointing: less memory for one more forward.
        seed: of the order, noise, timesteps, VAE posterior and caption dropout.
    """

    samples: int = 16_000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-5
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_samples: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_half_life: float = 5_000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass
class LogConfig:
    """What is written down while it runs.

    Args:
        every: samples between two lines of metrics.jsonl.
        wandb: whether Weights & Biases is used, and how.
        project: Weights & Biases project.
    """

    every: int = 800
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "memfilter"


@dataclass
class Config:
    """A run.

    Args:
        run_dir: where metrics.jsonl, audit.parquet, summary.json and pipeline/ go; must not hold a run already.
    """

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


class ConfigError(ValueError):
    """Settings that cannot be run; the message has one line for each."""


def check(config: Config) -> None:
    """Raises ConfigError with every setting that is out of range."""
    train, errors = config.train, []
    for name in ("samples", "batch_size", "accumulation", "learning_rate", "adam_eps", "max_grad_norm"):
        if not getattr(train, name) > 0:
            errors.append(f"train.{name} must be above 0, found {getattr(train, name)}")
    for name in ("warmup_samples", "weight_decay", "ema_half_life", "seed"):
        if not getattr(train, name) >= 0:
            errors.append(f"train.{name} must be at least 0, found {getattr(train, name)}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(train, name) < 1:
            errors.append(f"train.{name} must be at least 0 and below 1, found {getattr(train, name)}")
    if not 0 <= config.data.caption_dropout < 1:
        errors.append(f"data.caption_dropout must be at least 0 and below 1, found {config.data.caption_dropout}")
    if config.data.workers < 0:
        errors.append(f"data.workers must be at least 0, found {config.data.workers}")
    step = train.batch_size * train.accumulation
    if step > 0 and train.samples % step:
        errors.append(f"train.samples must be a multiple of batch_size x accumulation = {step}, found {train.samples}: "
                      f"the last step would weigh its samples otherwise than the rest")  # fmt: skip
    if train.warmup_samples and train.lr_schedule == "constant":
        errors.append(f"train.warmup_samples={train.warmup_samples} has no effect on the constant schedule: "
                      "use train.lr_schedule=constant_with_warmup")  # fmt: skip
    if config.log.every < 1:
        errors.append(f"log.every must be at least 1, found {config.log.every}")
    if config.data.resolution is not None and config.data.resolution < 1:
        errors.append(f"data.resolution must be at least 1, found {config.data.resolution}")
    try:
        make_filter(config.filter)
    except ValueError as error:
        errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def make_filter(config: FilterConfig):
    """The MemFilter that the configuration describes."""
    from memfilter.filter import MemFilter

    return MemFilter(
        config.tau, reduction=config.reduction, unit=config.unit, max_empty_steps=config.max_empty_steps
    )
