"""Everything a YAML file or a command line may say. ``jsonargparse`` reads these types and their docstrings."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Literal

LRSchedule = Literal[
    "constant", "constant_with_warmup", "piecewise_constant", "linear", "cosine", "cosine_with_restarts", "polynomial"
]  # fmt: skip


@dataclass
class ModelConfig:
    """What is fine-tuned.

    Args:
        path: directory in the diffusers layout or hub id of a Stable Diffusion 1.x, 2.x or XL pipeline; "scenes" is the
            tiny base model that comes with the package.
        variant: of the weights, such as fp16.
        revision: of a hub id.
        lora_rank: null fine-tunes the whole denoiser, a number trains LoRA matrices of this rank.
        lora_alpha: scale of the LoRA update times the rank; by default the rank.
        lora_targets: layers of the denoiser that get LoRA matrices.
    """

    path: str = "scenes"
    variant: str | None = None
    revision: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class DataConfig:
    """What it is fine-tuned on.

    Args:
        path: img2dataset-style tar shards (.png/.jpg/.webp, .txt, .json): their directory, or one tar file; or a flat
            folder of pictures with .txt files of the same names; or what `save_to_disk` of Hugging Face datasets has
            written; with streaming, what is said there. By default what `memfilter prepare scenes runs/scenes` makes.
        streaming: reads from the front instead of at random: webdataset (path is a directory of tar shards, one of
            them, a pattern such as shards/{00000..00012}.tar, or either as an http(s) address) or datasets (path is a
            folder or Parquet files as Hugging Face datasets loads them, a hub id, or what save_to_disk has written).
            A run that goes on from a checkpoint then begins the stream anew. null reads at random.
        shuffle_buffer: of streaming; so many samples are held in each process that reads, to be drawn from.
        index: Parquet file, or a manifest of `memfilter prepare experiment`; by default index.parquet beside the data where
            there is one, else every sample counts once. One row for every sample to be trained on: key, role (distinct,
            duplicate, or null in all rows where nothing is known), repeats (at least 1); a sample it does not list is not
            shown.
        order: of an epoch; shuffled, or spread (the copies of a sample come about equally far apart).
        resolution: pixels; the shorter side becomes this, then a square is cropped. By default what the denoiser was
            made for.
        random_crop: the square lies at random; else in the centre.
        random_flip: mirrors every second picture, at random.
        caption_dropout: share of samples that are shown with the empty caption (classifier-free guidance). It works
            against the filter: the null prediction then learns the duplicates too.
        max_bad_share: more unreadable samples than this share of train.samples end the run.
        cache: directory that `memfilter cache` has made with the same model and data; null encodes while it trains.
        cache_gb: memory on the device for encodings of pictures and captions that come again.
        workers: processes that read and decode ahead; 0 reads in the main process, and only what is not in the cache.
    """

    path: str = "runs/scenes"
    streaming: Literal["webdataset", "datasets"] | None = None
    shuffle_buffer: int = 1000
    index: str | None = None
    order: Literal["shuffled", "spread"] = "shuffled"
    resolution: int | None = None
    random_crop: bool = False
    random_flip: bool = False
    caption_dropout: float = 0.0
    max_bad_share: float = 0.01
    cache: str | None = None
    cache_gb: float = 1.0
    workers: int = 0


@dataclass
class FilterConfig:
    """Which samples are left out of the loss.

    Args:
        method: evidence (what all encounters with a sample say together; needs a calibration) is the one to use; tau (one
            norm against one threshold) is the paper's; timestep (one norm against those of ordinary samples at its
            timestep; needs a calibration); agc (loss against a running mean of the loss at its timestep; no extra pass),
            sightings (a sample that was trained on so often) and oracle (the known duplicates) are there to be measured
            against.
        tau: of method=tau; samples whose text norm is not below it are dropped; inf measures only; null makes no extra
            pass. With other methods it has no effect.
        unit: of the norm; l2 (the paper's, grows with the latent's size) or rms (divided by the root of its size).
        reduction: kept (mean over the kept samples of a micro-batch), kept_global (over those of the whole optimizer
            step) or batch (sum over kept samples / batch size).
        max_empty_steps: so many optimizer steps in a row that keep nothing, or whose gradients overflow in fp16, end the run.
        calibration: file that `memfilter calibrate` has made with the same model; by default calibration.json in the
            model's directory.
        false_positive_rate: of method=timestep; share of ordinary samples that are dropped.
        false_flag_rate: of method=evidence; probability that a clean sample is ever flagged in as many looks as the
            calibration took, with weights at rest.
        key: what shares evidence; the sample (by its key), all samples of one caption, or those of one group (content; the
            column group of the index, see `memfilter prepare groups`).
        signals: what counts as evidence; norm (the paper's), loss (free), cosine of the text-conditional prediction and the
            null one, gain (log of the null prediction's error over the conditional one's).
        half_life: looks after which one counts half in the evidence.
        gate: the null pass is made for samples whose evidence is at least this; -inf makes it for all.
        below: share of the timesteps, from the lowest noise on, at which a look counts.
        replace: whether a flagged sample is passed over and the next of the stream taken in its place; else it is masked.
        window: samples of the stream after which every sample is looked at once more, whatever the verdict, for the
            reference and for the way back; by default a tenth of train.samples.
        reference_share: of the samples, which pay for the reference with a null pass once in a window; all do where the
            null pass is made for all.
        reference_size: values of the reference for each signal and bin of timesteps.
        table_size: places in the table of samples, of 73 bytes each; samples whose hashes meet share evidence.
        sightings: of method=sightings; a sample is dropped once it was trained on so often.
        loss_ratio: of method=agc; a sample is kept whose loss, times this, reaches the mean (Liu et al., ECCV 2024).
        loss_decay: of method=agc; share of the running mean that is left after one more loss.
    """

    method: Literal["tau", "timestep", "evidence", "agc", "sightings", "oracle"] = "tau"
    tau: float | None = 4.0
    unit: Literal["l2", "rms"] = "l2"
    reduction: Literal["kept", "kept_global", "batch"] = "kept"
    max_empty_steps: int = 100
    calibration: str | None = None
    false_positive_rate: float = 0.02
    false_flag_rate: float = 0.02
    key: Literal["sample", "caption", "content"] = "sample"
    signals: list[Literal["norm", "loss", "cosine", "gain"]] = field(
        default_factory=lambda: ["norm", "loss", "cosine", "gain"]
    )
    half_life: float = 15.0
    gate: float = 0.5
    below: float = 0.7
    replace: bool = True
    window: int | None = None
    reference_share: float = 0.25
    reference_size: int = 64
    table_size: int = 2**20
    sightings: int = 30
    loss_ratio: float = 1.25
    loss_decay: float = 0.8

    @property
    def makes_passes(self) -> bool:
        """Whether there is any null pass."""
        if self.method == "evidence":
            return any(name != "loss" for name in self.signals)
        return self.method == "timestep" or self.method == "tau" and self.tau is not None


@dataclass
class MitigationConfig:
    """What others do against memorization while training; combines with any filter.

    Args:
        random_tokens: so many random tokens are put into every caption, at random places, anew each time it is shown (random
            token addition; Somepalli et al., NeurIPS 2023, and Wen et al., ICLR 2024, section 4.4).
        repeated_words: so many words of the caption are put into it once more, at random places (caption word repetition;
            Somepalli et al.).
        random_caption: share of samples that are shown with as many random tokens as their caption has words (Somepalli et
            al.).
        embedding_noise: standard deviation of the normal noise on the embedding of every caption (Somepalli et al.).
        deduplicate: shows one sample of each group of near duplicates, once in an epoch (the column group of the index, see
            `memfilter prepare groups`).
    """

    random_tokens: int = 0
    repeated_words: int = 0
    random_caption: float = 0.0
    embedding_noise: float = 0.0
    deduplicate: bool = False


@dataclass
class TrainConfig:
    """How it is fine-tuned. Time is counted in samples seen.

    Args:
        samples: budget, whatever the data's size; a multiple of batch_size x accumulation x processes (without the last for
            rules that pass samples over). 0 leaves the model as it is, to be held against those that are trained.
        batch_size: samples per forward of one process.
        accumulation: forwards per optimizer step.
        optimizer: adamw, or bitsandbytes' with state in 8 bits; paged: whose state leaves a full GPU for the CPU.
        learning_rate: at its highest.
        lr_schedule: a schedule of diffusers.
        warmup_samples: the learning rate rises linearly over so many samples.
        lr_cycles: of cosine_with_restarts.
        lr_power: of polynomial.
        lr_rules: of piecewise_constant, factors and the samples up to which they hold: "1:80000,0.1:120000,0.01".
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        adam_eps: AdamW's epsilon.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        snr_gamma: min-SNR loss weighting (5 in its paper); null weighs all timesteps alike.
        noise_offset: the noise of every channel is shifted by this times a normal draw; 0 for none.
        ema_half_life: samples after which a weight counts half in the average that is exported; 0 exports the last
            weights.
        mixed_precision: of the denoiser's forward; fp16 scales the loss.
        gradient_checkpointing: less memory for one more forward.
        compile: backend of torch.compile for the denoiser, such as inductor; null does not compile.
        seed: of the order, crops, noise, timesteps, VAE posterior and caption dropout.
    """

    samples: int = 16_000
    batch_size: int = 8
    accumulation: int = 1
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    learning_rate: float = 1e-5
    lr_schedule: LRSchedule = "constant"
    warmup_samples: int = 0
    lr_cycles: int = 1
    lr_power: float = 1.0
    lr_rules: str | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    ema_half_life: float = 5_000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: str | None = None
    seed: int = 0


@dataclass
class CheckpointConfig:
    """How a run is kept safe from interruptions. SIGTERM and SIGUSR1 make one more checkpoint and end the run.

    Args:
        every: samples between two checkpoints, rounded up to whole optimizer steps; 0 for none but on a signal.
        keep: so many of the newest are kept.
        resume: goes on from the newest whole checkpoint in run_dir, and begins anew where there is none.
    """

    every: int = 0
    keep: int = 2
    resume: bool = False


@dataclass
class LogConfig:
    """What is written down while it runs.

    Args:
        every: samples between two lines of metrics.jsonl.
        wandb: whether Weights & Biases is used, and how. Nothing but this key decides: no environment variable does.
        project: Weights & Biases project.
        tensorboard: whether event files are written to tensorboard/.
        validation_every: samples between two sheets of pictures from the model as it is; 0 for none.
        validation_prompts: so many known duplicates and as many distinct samples are shown.
        validation_steps: of the sampler.
        validation_guidance_scale: of classifier-free guidance.
        gallery: so many of the samples that were dropped most often are shown in dropped.html; 0 for none.
    """

    every: int = 800
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "memfilter"
    tensorboard: bool = False
    validation_every: int = 0
    validation_prompts: int = 4
    validation_steps: int = 20
    validation_guidance_scale: float = 7.5
    gallery: int = 50


@dataclass
class Config:
    """A run.

    Args:
        run_dir: where metrics.jsonl, audit.parquet, summary.json and pipeline/ or lora/ go; must not hold a run already,
            unless checkpoint.resume is true. Several machines need one that all of them see. "{digest}" in it stands for
            a name of all settings that the result depends on, so that every point of a sweep has a directory of its own;
            "{seed}" in it, in data.path, data.index and data.cache for train.seed.
    """

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    mitigation: MitigationConfig = field(default_factory=MitigationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def filled_in(config: Config) -> Config:
    """A copy, with "{seed}" and "{digest}" in its paths replaced by what they stand for."""
    config = copy.deepcopy(config)
    for name in ("path", "index", "cache"):
        if place := getattr(config.data, name):
            setattr(config.data, name, place.replace("{seed}", str(config.train.seed)))
    config.run_dir = config.run_dir.replace("{seed}", str(config.train.seed)).replace("{digest}", digest(config))
    return config


def digest(config: Config) -> str:
    """Sixteen hexadecimal digits that name all settings that the weights depend on."""
    settings = asdict(config)
    for section in ("run_dir", "log", "checkpoint"):
        del settings[section]
    del settings["data"]["cache_gb"]  # workers stay: who reads ahead passes other samples over; so may a cache in halves
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class ConfigError(ValueError):
    """Settings that cannot be run; the message has one line for each."""


# section.name: what must hold
_POSITIVE = ("train.batch_size", "train.accumulation", "train.learning_rate", "train.adam_eps",
             "train.max_grad_norm", "train.snr_gamma", "train.lr_cycles", "train.lr_power", "model.lora_rank",
             "model.lora_alpha", "data.shuffle_buffer", "data.resolution", "checkpoint.keep", "log.every",
             "log.validation_prompts", "log.validation_steps", "filter.half_life", "filter.below", "filter.window",
             "filter.reference_share", "filter.reference_size", "filter.table_size", "filter.sightings",
             "filter.false_positive_rate", "filter.false_flag_rate", "filter.loss_ratio")  # fmt: skip
_NOT_NEGATIVE = ("mitigation.random_tokens", "mitigation.repeated_words", "mitigation.random_caption",
                 "mitigation.embedding_noise",
                 "train.samples", "train.warmup_samples", "train.weight_decay", "train.ema_half_life",
                 "train.noise_offset", "train.seed",
                 "data.cache_gb", "data.workers", "checkpoint.every", "log.validation_every",
                 "log.validation_guidance_scale", "log.gallery")  # fmt: skip
_SHARES = ("filter.loss_decay", "train.adam_beta1", "train.adam_beta2", "data.caption_dropout", "data.max_bad_share",
           "filter.false_positive_rate", "filter.false_flag_rate")  # fmt: skip


def check(config: Config) -> None:
    """Raises ConfigError with every setting that is out of range."""
    config, errors = copy.deepcopy(config), []
    for section, setting in settings_of(Config):
        part = getattr(config, section)
        if getattr(part, setting.name) is None and "None" not in setting.type:
            errors.append(f"{section}.{setting.name} must have a value, found null")
            setattr(part, setting.name, getattr(type(part)(), setting.name))

    def require(names: tuple[str, ...], holds: Callable[[float], bool], wording: str) -> None:
        for name in names:
            section, _, key = name.partition(".")
            value = getattr(getattr(config, section), key)
            if value is not None and not (-math.inf < value < math.inf and holds(value)):
                errors.append(f"{name} must be {wording}, found {value}")

    require(_POSITIVE, lambda value: value > 0, "above 0")
    require(_NOT_NEGATIVE, lambda value: value >= 0, "at least 0")
    require(_SHARES, lambda value: 0 <= value < 1, "at least 0 and below 1")
    require(("train.seed",), lambda value: value < 2**63, "below 2**63")
    errors += _about_time(config.train)
    errors += _about_streaming(config)
    if config.data.cache and config.data.random_crop:
        errors.append("data.random_crop=true and data.cache exclude each other: a crop that is random cannot be cached")
    if config.model.lora_rank is not None and not config.model.lora_targets:
        errors.append("model.lora_targets must name at least one layer")
    if config.model.lora_rank is None:
        errors += [f"model.{name} has no effect without model.lora_rank: the whole denoiser is trained"
                   for name in ("lora_alpha", "lora_targets") if getattr(config.model, name) != getattr(ModelConfig(), name)]
    if not re.fullmatch(r"[\w.-]+", config.log.project):
        errors.append(f"log.project must consist of letters, digits, '_', '-' and '.', found {config.log.project!r}")
    errors += _about_filter(config)
    if errors:
        raise ConfigError("\n".join(errors))


def _about_time(train: TrainConfig) -> Iterator[str]:
    """What is wrong with budget and schedule."""
    step = train.batch_size * train.accumulation
    if step > 0 and train.samples % step:
        yield (f"train.samples must be a multiple of batch_size x accumulation = {step}, found {train.samples}: "
               f"the last step would weigh its samples otherwise than the rest")  # fmt: skip
    if train.warmup_samples and train.lr_schedule in ("constant", "piecewise_constant"):
        yield (f"train.warmup_samples={train.warmup_samples} has no effect on the {train.lr_schedule} schedule: "
               "use train.lr_schedule=constant_with_warmup")  # fmt: skip
    elif 0 < train.samples <= train.warmup_samples:
        yield (f"train.warmup_samples={train.warmup_samples} must be below train.samples={train.samples}: the learning rate would "
               "never be what is asked")  # fmt: skip
    if train.lr_schedule == "polynomial" and 0 < train.learning_rate <= 1e-7:
        yield f"train.learning_rate must be above 1e-07, where the polynomial schedule ends, found {train.learning_rate}"
    if (train.lr_schedule == "piecewise_constant") != (train.lr_rules is not None):
        yield "train.lr_rules and train.lr_schedule=piecewise_constant need each other"
    number = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
    if train.lr_rules is not None and not re.fullmatch(rf"({number}:\d+,)*{number}", train.lr_rules):
        yield f'train.lr_rules must look like "1:80000,0.1:120000,0.01", found {train.lr_rules!r}'


def _about_filter(config: Config) -> Iterator[str]:
    """What is wrong with the rule; not with its calibration, which is read later."""
    from memfilter.filter import MemFilter

    rule = config.filter
    try:
        tau = rule.tau if rule.method == "tau" else None
        MemFilter(tau, reduction=rule.reduction, unit=rule.unit, max_empty_steps=rule.max_empty_steps)
    except ValueError as error:
        yield str(error)
    for name, share in (("filter.below", rule.below), ("filter.reference_share", rule.reference_share),
                        ("mitigation.random_caption", config.mitigation.random_caption)):  # fmt: skip
        if share > 1:
            yield f"{name} must be at most 1, found {share}"
    if not rule.signals:
        yield "filter.signals must name at least one signal"
    if math.isnan(rule.gate):
        yield "filter.gate must be a number, found nan"
    if rule.key == "content" and config.data.streaming:
        yield f"data.streaming={config.data.streaming} and filter.key=content exclude each other: groups are looked up by key"
    if config.mitigation.deduplicate and config.data.streaming:
        yield (f"data.streaming={config.data.streaming} and mitigation.deduplicate exclude each other: groups are looked up by "
               "key")  # fmt: skip
    if rule.method == "oracle" and config.data.streaming:
        yield f"data.streaming={config.data.streaming} and filter.method=oracle exclude each other: roles are looked up by key"


def _about_streaming(config: Config) -> Iterator[str]:
    """What needs random access to the samples."""
    data = config.data
    needs = {
        "data.index": (data.index, "roles and repeats are looked up by key"),
        "data.cache": (data.cache, "it holds what is known before the run"),
        "data.order=spread": (data.order == "spread", "the samples of an epoch are not known"),
        "log.validation_every": (config.log.validation_every, "its pictures are looked up by key"),
    }
    for name, (asked, reason) in needs.items():
        if data.streaming and asked:
            yield f"data.streaming={data.streaming} and {name} exclude each other: {reason}"


def settings_of(root: type) -> Iterator[tuple[str, Field]]:
    """(section, field) of every setting inside a section."""
    for section in fields(root):
        if section.default_factory is not MISSING:
            for setting in fields(section.default_factory):
                yield section.name, setting


def make_filter(run: Config, calibration=None, num_train_timesteps: int = 1000):
    """The MemFilter that the configuration of a run describes.

    Args:
        calibration: a `Calibration`, for the methods that need one.
        num_train_timesteps: T of the noise scheduler.

    Raises:
        ValueError: the calibration does not do for what is asked of it.
    """
    from memfilter.agc import LossRule
    from memfilter.evidence import Evidence, Weighing
    from memfilter.filter import MemFilter
    from memfilter.keys import Census, Sightings
    from memfilter.threshold import TimestepThreshold

    config = run.filter
    settings = {"reduction": config.reduction, "unit": config.unit, "max_empty_steps": config.max_empty_steps}
    if config.method == "tau":
        return MemFilter(config.tau, **settings)
    if config.method == "oracle":
        return MemFilter(None, judges_all=True, **settings)
    if config.method == "sightings":
        return MemFilter(None, evidence=Sightings(config.sightings, config.table_size), **settings)
    if config.method == "agc":
        return MemFilter(None, evidence=LossRule(config.loss_ratio, config.loss_decay, num_train_timesteps), **settings)
    all_pay = config.method == "timestep" or config.gate == -math.inf
    table = {
        "table_size": config.table_size,
        "window": config.window or max(1, run.train.samples // 10),
        "reference_share": 1.0 if all_pay else config.reference_share,
    }
    if config.method == "timestep":
        census = Census(calibration.reference(config.reference_size), **table)
        threshold = TimestepThreshold(census.reference, config.false_positive_rate)
        return MemFilter(None, threshold=threshold, evidence=census, **settings)
    strengths = {name: value for name, value in Weighing().strengths.items() if name in config.signals}
    evidence = Evidence.of(
        calibration,
        config.false_flag_rate,
        reference_size=config.reference_size,
        weighing=Weighing(strengths, config.half_life),
        gate=config.gate,
        below=config.below,
        replace=config.replace,
        **table,
    )
    return MemFilter(None, evidence=evidence, **settings)
