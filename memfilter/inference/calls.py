"""The calls that a pipeline makes of its denoiser, seen from outside: whatever the family, the scheduler, the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memfilter.functional import noise_factor, text_norm

Timestep = Tensor | float | int
# a smaller factor tells nothing of the noise: at zero terminal SNR Euler, DPM++ and UniPC put 2**-24 for an abar of 0, which
# makes 2.4e-4 and a norm of next to nothing, whatever the prompt; Stable Diffusion's own schedule ends at 0.07
READABLE = 1e-3
_AGAIN: ContextVar[bool] = ContextVar("again", default=False)  # whether the denoiser is called by `Call.cond_again`


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

    def predicted_x0(self, scheduler, guidance_scale: float) -> Tensor:
        """The clean latents that the guided prediction speaks of, [B, C, H, W] (the paper's Eq. 3)."""
        guided = self.null_pred + guidance_scale * (self.cond_pred - self.null_pred)
        kind = scheduler.config.prediction_type
        if kind == "sample":
            return guided
        abar = abar_at(scheduler, self.timestep)
        signal, noise = abar**0.5, (1 - abar) ** 0.5
        if kind == "v_prediction":
            return signal * self.sample - noise * guided
        return (self.sample - noise * guided) / signal

    def cond_again(self, unet: nn.Module, prompt_embeds: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
        """The prediction for the prompt, [B, C, H, W], made again, perhaps with other embeddings of it, SDXL's pooled one too."""
        kwargs = self.cond | {"return_dict": False}
        if prompt_embeds is not None:
            kwargs["encoder_hidden_states"] = prompt_embeds
        if pooled is not None:
            kwargs["added_cond_kwargs"] = kwargs["added_cond_kwargs"] | {"text_embeds": pooled}
        reset = _AGAIN.set(True)
        try:
            return unet(self.sample, self.timestep, **kwargs)[0]
        finally:
            _AGAIN.reset(reset)


def _half(tree, which: int, size: int):
    """Of every tensor in a tree that has a row for each of ``size`` samples; all else as it is."""
    if isinstance(tree, Tensor):
        return tree.chunk(2)[which] if tree.ndim and len(tree) == size else tree
    if isinstance(tree, Mapping):
        return {key: _half(value, which, size) for key, value in tree.items()}
    return tuple(_half(part, which, size) for part in tree) if isinstance(tree, list | tuple) else tree


def factor_at(scheduler, timestep) -> float:
    """`noise_factor` of a scheduler's model at a timestep.

    Raises:
        ValueError: the prediction type is unknown, the scheduler is EDM's, or as `abar_at` where that is needed.
    """
    if scheduler.config.get("sigma_data") is not None:
        raise ValueError(f"{type(scheduler).__name__} is for models of EDM's preconditioning, which predict neither noise nor v: "
                         "what their norms say is not known here")  # fmt: skip
    kind = scheduler.config.prediction_type
    return 1.0 if kind == "epsilon" else float(noise_factor(kind, torch.tensor(abar_at(scheduler, timestep))))


def abar_at(scheduler, timestep) -> float:
    """alphabar at a timestep, which may lie between two that the model was trained on.

    Raises:
        ValueError: the scheduler has no alphas_cumprod, or its timesteps are logarithms of sigma.
    """
    if scheduler.config.get("timestep_type") == "continuous":
        raise ValueError(f"{type(scheduler).__name__} with timestep_type=continuous does not say at which timestep of the model's "
                         "it is: use timestep_type=discrete")  # fmt: skip
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod, which say how much noise there is at a timestep")
    abar, t = scheduler.alphas_cumprod.double().cpu().numpy(), float(torch.as_tensor(timestep).flatten()[0])
    between = abar[int(t)]
    if t != int(t):  # as samplers that go by sigma do
        steps, sigmas = np.arange(len(abar)), np.sqrt((1 - abar) / np.maximum(abar, np.finfo(abar.dtype).tiny))
        between = 1 / (1 + np.interp(t, steps, sigmas) ** 2)
    return float(between)


def readable_factor(scheduler, timestep) -> float:
    """`factor_at` without its sign, by which the l2 norm of a difference becomes one in noise space; NaN where that is not to
    be had, at zero terminal SNR."""
    factor = abs(factor_at(scheduler, timestep))
    return factor if factor >= READABLE else math.nan


def first_readable(scheduler, steps: int) -> int:
    """How many of so many steps have to be made until a norm can be read: 1, or more where the first is at zero terminal SNR.

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
    """Shows every call that the pipeline makes of its denoiser to ``see``: its timestep, and None where it was made without
    guidance. Those of `Call.cond_again` are no part of a generation, and have one half only."""

    def hook(module, args, kwargs, output):
        if _AGAIN.get():
            return
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
