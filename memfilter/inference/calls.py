"""The calls that a pipeline makes of its denoiser, seen from outside: whatever the family, the scheduler, the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memfilter.functional import noise_factor, text_norm

Timestep = Tensor | float | int


class UnguidedError(ValueError):
    """A generation without classifier-free guidance has no null prediction."""


class NotFiniteError(ValueError):
    """Norms of a generation are not finite.

    Args:
        pictures: of which; their numbers in the batch.
        names: of all pictures of the batch, for the message; by default their numbers.
    """

    def __init__(self, pictures: Sequence[int], names: Sequence[str] | None = None):
        self.pictures = pictures
        which = "; ".join(names[row] if names else f"picture {row}" for row in pictures[:3]) + ("; ..." if len(pictures) > 3 else "")
        super().__init__(f"the norm is not finite of {which}: the weights are broken, or their precision does not hold what is "
                         "predicted; load the model in float32")  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call under guidance, in two halves.

    Args:
        sample: noisy latents as the denoiser gets them, [B, C, H, W].
        timestep: as it was given.
        cond, null: keyword arguments for the prompt and for the negative one.
        cond_pred, null_pred: [B, C, H, W].
    """

    sample: Tensor
    timestep: Timestep
    cond: dict
    null: dict
    cond_pred: Tensor
    null_pred: Tensor

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping, output) -> Call:
        """From what a hook sees; diffusers puts the negative half first."""
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | dict(kwargs)
        sample, timestep = named.pop("sample"), named.pop("timestep")
        pred = output[0] if isinstance(output, tuple) else output.sample
        size = len(sample)
        timesteps = _half(timestep, 1, size)
        return cls(_half(sample, 1, size), timesteps, _half(named, 1, size), _half(named, 0, size), *pred.chunk(2)[::-1])

    def norm(self, scheduler, cond_pred: Tensor | None = None) -> Tensor:
        """Of the text-conditional noise prediction, [B], perhaps with another prediction for the prompt; NaN where it tells
        nothing of the noise."""
        pred = self.cond_pred if cond_pred is None else cond_pred
        return text_norm(pred, self.null_pred) * readable_factor(scheduler, self.timestep)

    def cond_again(self, unet: nn.Module, prompt_embeds: Tensor | None = None) -> Tensor:
        """The prediction for the prompt, [B, C, H, W], made again, perhaps with other embeddings of it."""
        kwargs = self.cond | {"return_dict": False}
        if prompt_embeds is not None:
            kwargs["encoder_hidden_states"] = prompt_embeds
        return unet(self.sample, self.timestep, **kwargs)[0]


def _half(tree, which: int, size: int):
    """Of every tensor in a tree that has a row for each of ``size`` samples; all else as it is."""
    if isinstance(tree, Tensor):
        return tree.chunk(2)[which] if tree.ndim and len(tree) == size else tree
    if isinstance(tree, Mapping):
        return {key: _half(value, which, size) for key, value in tree.items()}
    return tuple(_half(part, which, size) for part in tree) if isinstance(tree, list | tuple) else tree


def factor_at(scheduler, timestep) -> float:
    """`noise_factor` of a scheduler's model at a timestep, which may lie between two that it was trained on.

    Raises:
        ValueError: the scheduler has no alphas_cumprod or its prediction type is unknown.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return 1.0
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod, from which the norm in noise space is had")
    abar, t = scheduler.alphas_cumprod.double().cpu().numpy(), float(torch.as_tensor(timestep).flatten()[0])
    between = abar[int(t)]
    if t != int(t):  # as samplers that go by sigma do
        steps, sigmas = np.arange(len(abar)), np.sqrt((1 - abar) / np.maximum(abar, np.finfo(abar.dtype).tiny))
        between = 1 / (1 + np.interp(t, steps, sigmas) ** 2)
    return float(noise_factor(kind, torch.tensor(between)))


def readable_factor(scheduler, timestep) -> float:
    """`factor_at` without its sign, by which the l2 norm of a difference becomes one in noise space; NaN where that is not to
    be had, at zero terminal SNR."""
    return abs(factor_at(scheduler, timestep)) or math.nan


def first_readable(scheduler, steps: int) -> int:
    """How many of so many steps have to be made until a norm can be read: 1, or 2 where the first is at zero terminal SNR.

    Raises:
        ValueError: none can be read.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    for number, timestep in enumerate(scheduler.timesteps, 1):
        if not math.isnan(readable_factor(scheduler, timestep)):
            return number
    raise ValueError(f"steps: none of {steps} tells anything of the noise, at zero terminal SNR: ask for more")


def require_finite(norms: Tensor) -> None:
    """Of norms that can be read, [B] or [B, S]: one that is not finite is neither above a threshold nor below it.

    Raises:
        NotFiniteError: for those pictures.
    """
    if bad := (~norms.isfinite()).reshape(len(norms), -1).any(1).nonzero().flatten().tolist():
        raise NotFiniteError(bad)


@contextmanager
def hooked(pipeline, see: Callable[[Timestep, Call | None], None]) -> Iterator[None]:
    """Shows every call of the pipeline's denoiser to ``see``: its timestep, and None where it was made without guidance."""

    def hook(module, args, kwargs, output):
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        see(timestep, Call.of(args, kwargs, output) if pipeline.do_classifier_free_guidance else None)

    handle = pipeline.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Enough(Exception):
    """The calls that were wanted have been made."""


def first_calls(pipeline, steps: int, **arguments) -> list[Call]:
    """The first ``steps`` calls of a generation, which is not carried further.

    Args:
        arguments: of the pipeline, ``prompt`` among them.

    Raises:
        UnguidedError: guidance is off.
    """
    calls: list[Call] = []

    def see(timestep: Timestep, call: Call | None) -> None:
        if call is None:
            raise UnguidedError("guidance_scale must be above 1: without guidance nothing is predicted for no prompt")
        calls.append(call)
        if len(calls) == steps:
            raise _Enough

    with hooked(pipeline, see), torch.no_grad(), suppress(_Enough):
        try:
            pipeline(**arguments)
        finally:
            pipeline.maybe_free_model_hooks()
    return calls
