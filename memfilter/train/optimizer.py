"""What moves the weights: optimizer, learning rate as a function of the samples seen, and their average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

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
    made = kind(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    if getattr(made, "is_paged", False):
        made.load_state_dict = partial(_load_paged, made)
    return made


def _load_paged(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """bitsandbytes would put the state on the device as it is, in memory that is not paged."""
    type(optimizer).load_state_dict(optimizer, state, move_to_device=False)
    for parameter, values in optimizer.state.items():
        for name in {"state1", "state2"} & values.keys():
            values[name] = optimizer.get_state_buffer(parameter, values[name].dtype).copy_(values[name])


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


class MasterAverage:
    """The average of the fp32 weights that DeepSpeed's ZeRO-1 and 2 step, as far as a run uses diffusers' EMAModel. The
    low-precision weights that the device computes with stand still where a step is smaller than their rounding, and so would
    their average.

    Every rank averages its own shard, where that is, with no word to others. What gives or takes whole weights every rank
    calls.

    Args:
        parameters: of the model that DeepSpeed has prepared.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.decay = self.min_decay = decay
        self.optimization_step = 0
        self._parameters = parameters
        self._shards = [None if p._hp_mapping is None else _master(p).clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: list[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        decay = self.decay if self.optimization_step > 1 else 0.0  # as EMAModel
        for parameter, shard in zip(parameters, self._shards, strict=True):
            if shard is not None:
                shard.lerp_(_master(parameter), 1 - decay)

    @property
    def shadow_params(self) -> list[Tensor]:
        """Each whole, in fp32 on the host."""
        return [self._whole(*pair).cpu() for pair in zip(self._parameters, self._shards, strict=True)]

    @shadow_params.setter
    def shadow_params(self, whole: list[Tensor]) -> None:
        for parameter, shard, values in zip(self._parameters, self._shards, whole, strict=True):
            if shard is not None:
                shard.copy_(_part(parameter, values.flatten()))

    def store(self, parameters: list[torch.nn.Parameter]) -> None:
        self._stored = [p.detach().cpu().clone() for p in parameters]

    def copy_to(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter, shard in zip(parameters, self._shards, strict=True):
            parameter.data.copy_(self._whole(parameter, shard))

    def restore(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter, stored in zip(parameters, self._stored, strict=True):
            parameter.data.copy_(stored)
        self._stored = None

    @staticmethod
    def _whole(parameter: torch.nn.Parameter, shard: Tensor | None) -> Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if shard is not None:
            _part(parameter, whole).copy_(shard)
        torch.distributed.all_reduce(whole, group=parameter._dp_group)
        return whole.view_as(parameter)


def _master(parameter: torch.nn.Parameter) -> Tensor:
    """This rank's part of the fp32 weight, flat; a checkpoint that is loaded brings another."""
    return parameter._hp_mapping.get_hp_fragment().detach()


def _part(parameter: torch.nn.Parameter, flat: Tensor) -> Tensor:
    """The same part of a whole weight."""
    place = parameter._hp_mapping.lp_fragment_address
    return flat.narrow(0, place.start, place.numel)


def make_ema(parameters: list[torch.nn.Parameter], config: TrainConfig, step_samples: int) -> EMAModel | MasterAverage | None:
    """The average that is exported, in fp32, or None. Its decay is that of ``ema_half_life``, whatever a step's batch is.

    Args:
        step_samples: samples of one optimizer step, over all processes.
    """
    if not config.ema_half_life:
        return None
    decay = ema_decay(config, step_samples)
    if hasattr(parameters[0], "_hp_mapping"):
        return MasterAverage(parameters, decay)
    # diffusers raises the decay step by step unless the least is given too, which is no function of samples
    ema = EMAModel(parameters, decay=decay, min_decay=decay, use_ema_warmup=False)
    ema.to(dtype=torch.float32)  # low-precision averages lose updates
    return ema


def ema_decay(config: TrainConfig, samples: int) -> float:
    """What the average keeps of itself over so many samples of the stream, whether they were trained on or passed over."""
    return 0.5 ** (samples / config.ema_half_life)
