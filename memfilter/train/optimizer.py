"""What moves the weights: optimizer, learning rate as a function of the samples seen, and their average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from memfilter.config import ConfigError, TrainConfig

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or one of bitsandbytes'.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    # one pass over the weights instead of ten; fp16's loss scaling hides its overflows inside of it, where nobody can count, so
    # that there torch chooses: on a GPU all tensors at once
    kind = partial(torch.optim.AdamW, fused=None if config.mixed_precision == "fp16" else True)
    if config.optimizer != "adamw":
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise ConfigError(f"train.optimizer={config.optimizer} needs bitsandbytes ({error}): "
                              "pip install '.[8bit]'") from error  # fmt: skip
        kind = getattr(optim, _BITSANDBYTES[config.optimizer])
    return kind(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def lr_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, step_samples: int
) -> Callable[[int], float]:
    """Samples seen before -> learning rate. A pure function: what no step was made for needs no catching up.

    Args:
        step_samples: samples of one optimizer step, over all processes.
    """
    schedule = get_scheduler(
        config.lr_schedule,
        optimizer,
        step_rules=_rules_in_steps(config.lr_rules, step_samples),
        num_warmup_steps=config.warmup_samples // step_samples,
        num_training_steps=config.samples // step_samples,
        num_cycles=config.lr_cycles,
        power=config.lr_power,
    )
    return lambda samples: config.learning_rate * schedule.lr_lambdas[0](samples // step_samples)


def _rules_in_steps(rules: str | None, step_samples: int) -> str | None:
    """ "1:80000,0.1" counts samples, diffusers' grammar of the same form counts steps."""
    if rules is None:
        return None
    *parts, last = rules.split(",")
    halves = (part.split(":") for part in parts)
    return ",".join([*(f"{factor}:{-(-int(samples) // step_samples)}" for factor, samples in halves), last])


def make_ema(parameters: list[torch.nn.Parameter], config: TrainConfig, step_samples: int) -> EMAModel | None:
    """The average that is exported, in fp32, or None. Its decay is that of ``ema_half_life``, whatever a step's batch is.

    Args:
        step_samples: samples of one optimizer step, over all processes.
    """
    if not config.ema_half_life:
        return None
    decay = ema_decay(config, step_samples)
    # diffusers raises the decay step by step unless the least is given too, which is no function of samples
    ema = EMAModel(parameters, decay=decay, min_decay=decay, use_ema_warmup=False)
    ema.to(dtype=torch.float32)  # low-precision averages lose updates; DeepSpeed trains bf16 weights
    return ema


def ema_decay(config: TrainConfig, samples: int) -> float:
    """What the average keeps of itself over so many samples of the stream, whether they were trained on or passed over."""
    return 0.5 ** (samples / config.ema_half_life)
