"""MemFilter: the plug-in. It wraps the denoiser, remembers the verdict of the last forward, and masks the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memfilter.functional import REDUCTIONS, masked_loss, noise_factor, text_norm
from memfilter.stats import FilterStats
from memfilter.threshold import FixedThreshold
from memfilter.unet import FilteredUNet


class NonFiniteNorm(FloatingPointError):
    """The norm of some samples is NaN or infinite: the latents, the embeddings or the weights are broken."""


class EmptySteps(RuntimeError):
    """So many optimizer steps in a row kept nothing that training stands still."""


@dataclass
class Verdict:
    """What one forward found out; every tensor is [B]."""

    timesteps: Tensor
    text_norm: Tensor  # 0 where unchecked
    keep: Tensor
    checked: Tensor
    keys: Sequence[str] | None


class _Readback:
    """What a forward found, on its way to the host. The copy is asked for before the backward is queued and waited for
    after: the device has work all the while, and the host knows before the update."""

    def __init__(self, keep: Tensor, finite: Tensor, keys: Sequence[str] | None):
        self.keys = keys
        facts = torch.stack([keep, finite])  # [2, B]
        self._host = facts.to("cpu", non_blocking=True)
        self._arrived = None
        if facts.device.type != "cpu":
            self._arrived = torch.get_device_module(facts.device).Event()
            self._arrived.record()

    def read(self) -> int:
        """How many samples are kept.

        Raises:
            NonFiniteNorm: some norm is NaN or infinite.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        keep, finite = self._host
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            names = ", ".join(str(self.keys[i]) if self.keys is not None else f"row {i}" for i in bad)
            raise NonFiniteNorm(f"the text norm of {len(bad)} of {len(finite)} samples is not finite ({names}): "
                                "look for NaN in their latents, or lower the learning rate")  # fmt: skip
        return int(keep.sum())


class MemFilter:
    """Leaves samples out of the loss whose text-conditional noise prediction is abnormally large.

        mem_filter = MemFilter(tau=4.0)
        unet = mem_filter.wrap(unet, null=null_prompt_embeds, scheduler=noise_scheduler)
        out = unet(noisy_latents, timesteps, prompt_embeds)
        loss = mem_filter.loss(out.sample, target)
        loss.backward()
        mem_filter.before_step(optimizer)
        optimizer.step()

    Args:
        tau: samples whose norm is not below it are dropped (Section 4.2 of the paper; 2..6 there, for Stable Diffusion
            at 512 px). ``inf``: measure only. None: no extra pass, nothing checked.
        reduction: ``kept``, ``kept_global`` or ``batch``, see `masked_loss`. With ``kept_global`` the gradients of an
            optimizer step are those of the mean over all that was kept in it, however it is split into ranks and
            micro-batches; `before_step` makes them so.
        unit: ``l2`` (the paper's) or ``rms``, see `text_norm`.
        max_empty_steps: so many optimizer steps in a row that keep nothing raise `EmptySteps`.
        stats: where counts go; by default ten timestep bins over 1000 timesteps.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        tau: float | None,
        *,
        reduction: str = "kept",
        unit: str = "l2",
        max_empty_steps: int = 100,
        stats: FilterStats | None = None,
    ):
        if reduction not in REDUCTIONS:
            raise ValueError(f"filter.reduction must be one of {', '.join(REDUCTIONS)}, found {reduction!r}")
        if max_empty_steps < 1:
            raise ValueError(f"filter.max_empty_steps must be at least 1, found {max_empty_steps}")
        self.threshold = FixedThreshold(math.inf if tau is None else tau, unit)
        self.active = tau is not None
        self.reduction = reduction
        self.max_empty_steps = max_empty_steps
        self.stats = stats or FilterStats()
        self.verdict: Verdict | None = None  # of the last training forward
        self._unused = False  # no loss was made from the verdict yet
        self._facts: dict = {}
        self._factors: Tensor | None = None  # [T], None for epsilon prediction
        self._unread: _Readback | None = None  # of the last training forward
        self._kept_in_step: int | None = None  # None: no training forward since the last step
        self._empty_in_a_row = 0
        self._rescaled = None  # DeepSpeed's optimizer, while a factor of `before_step` stands as its loss scale

    def wrap(self, unet: nn.Module, null, scheduler=None) -> FilteredUNet:
        """The denoiser with the check inside; do this before ``accelerator.prepare``.

        Args:
            unet: called as ``unet(sample, timestep, encoder_hidden_states, ...)``.
            null: embedding of the empty prompt, [L, D] or [1, L, D], or a mapping (see `FilteredUNet`).
            scheduler: a diffusers noise scheduler; its prediction type and alphabar_t convert the norm to noise
                space. None: the model predicts epsilon.

        Raises:
            ValueError: the scheduler's prediction type is unknown, or it has no alphabar_t.
        """
        if scheduler is not None:
            if not hasattr(scheduler, "alphas_cumprod"):
                raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod, from which the norm in noise "
                                 "space is made: pass the DDPMScheduler that training uses")  # fmt: skip
            factors = noise_factor(scheduler.config.prediction_type, scheduler.alphas_cumprod)
            self._factors = None if scheduler.config.prediction_type == "epsilon" else factors
            self.stats.num_train_timesteps = len(factors)
        return FilteredUNet(unet, null, self._judge, self.active)

    def batch(self, *, keys=None, duplicate=None, caption_dropped=None, excluded=None) -> None:
        """What is known of the samples of the next training forward; all optional, each of length B.

        Args:
            keys: names, for errors and audits.
            duplicate: whether the sample is known to be duplicated; splits the statistics.
            caption_dropped: whether its caption was replaced by the empty one. Its norm is 0 by definition: it is
                neither checked nor dropped.
            excluded: whether the sample is left out of the loss whatever its norm, such as one that could not be
                read; what stands in its place must be finite. It is not checked and counts apart; with the reduction
                ``batch`` it counts as a sample of the batch, as a dropped one does.
        """
        self._facts = {
            "keys": keys,
            "duplicate": duplicate,
            "caption_dropped": caption_dropped,
            "excluded": excluded,
        }

    def _judge(self, cond: Tensor, null: Tensor | None, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Verdict on one training forward: (text_norm [B], keep [B]); ``null`` is None where no pass was made for it."""
        facts, self._facts = self._facts, {}
        self._settle()
        self._end_rescaling()
        device, count = cond.device, len(cond)
        if (keys := facts.get("keys")) is not None and len(keys) != count:
            raise ValueError(f"MemFilter.batch(keys=...) must have one entry for each of the {count} samples, "
                             f"found {len(keys)}")  # fmt: skip
        checked = torch.full((count,), null is not None, device=device)
        excluded = torch.zeros_like(checked)
        if (given := facts.get("excluded")) is not None:
            excluded = _bools(given, count, device, "excluded")
            checked &= ~excluded
        if (dropped := facts.get("caption_dropped")) is not None:
            checked &= ~_bools(dropped, count, device, "caption_dropped")
        factor = None
        if self._factors is not None:
            self._factors = self._factors.to(device)
            factor = self._factors[timesteps.long()]
            checked &= factor != 0
        norm, finite = torch.zeros(count, device=device), torch.ones_like(checked)
        if null is not None:
            found = text_norm(cond, null, factor, self.threshold.unit)
            norm, finite = torch.where(checked, found, 0), torch.isfinite(found) | excluded
        keep = (self.threshold(norm, timesteps) | ~checked) & ~excluded
        group = torch.zeros(count, dtype=torch.long, device=device)
        if (duplicate := facts.get("duplicate")) is not None:
            group = _bools(duplicate, count, device, "duplicate").long() + 1
        self.stats.add(timesteps, norm, keep, checked, group, excluded)
        self.verdict, self._unused = Verdict(timesteps, norm, keep, checked, facts.get("keys")), True
        self._unread = _Readback(keep, finite, self.verdict.keys)
        return norm, keep

    def _settle(self) -> None:
        unread, self._unread = self._unread, None
        if unread is not None:
            self._kept_in_step = (self._kept_in_step or 0) + unread.read()

    def loss(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Masked mean squared error of the last forward's samples: [B, ...] -> scalar, graph always intact.

        Args:
            weight: [B], a factor for every sample's error, such as `min_snr_weight` of its timestep.

        Raises:
            RuntimeError: since the last loss there was no training forward of this batch size.
        """
        if not self._unused or len(self.verdict.keep) != len(pred):
            raise RuntimeError("MemFilter.loss needs the verdict of a training forward of the same batch: call "
                               "the wrapped denoiser first, in train mode and with gradients on")  # fmt: skip
        self._unused = False
        return masked_loss(pred, target, self.verdict.keep, self.reduction, weight)

    def before_step(self, optimizer) -> bool:
        """Call between the last backward and the clipping; says whether anything was kept in that step.

        With the reduction ``kept_global`` the gradients, sums so far, are divided by what all ranks kept. It is taken
        that they were averaged over the ranks, as DDP, FSDP2 and DeepSpeed do, and, with accelerate or DeepSpeed, that
        the loss was divided by the number of micro-batches, as their ``backward`` does. ZeRO clips inside its step, where
        it divides by the loss scale first: there the factor goes in, as that step's loss scale.

        Where nothing was kept, gradients are set to None, so that the step changes nothing: with gradients of 0,
        AdamW's momentum and weight decay would still move the weights. DeepSpeed's step must then not be called.

        Args:
            optimizer: torch's or accelerate's; under DeepSpeed the engine: ``engine.backward(loss)``, then
                ``if mem_filter.before_step(engine): engine.step()``.

        Raises:
            NonFiniteNorm: the norm of some sample of this step is NaN or infinite; the weights are still good.
            EmptySteps: this is the ``max_empty_steps``-th such step in a row.
            TypeError: an optimizer of accelerate under DeepSpeed, whose ``accelerator.backward`` has stepped already.
        """
        self._settle()
        engine = optimizer if hasattr(optimizer, "is_gradient_accumulation_boundary") else None
        if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
            raise TypeError("under DeepSpeed accelerator.backward steps as well, before MemFilter can say whether to: call "
                            "backward and step of the engine, which is the prepared model, and pass it to before_step")  # fmt: skip
        micro_batches = _micro_batches(optimizer, engine)
        if micro_batches is None:  # more of them come before the step
            return True
        kept, self._kept_in_step = self._kept_in_step, None
        if kept is None and not self.active:  # nothing was asked of the filter
            return True
        kept = kept or 0
        if dist.is_available() and dist.is_initialized():  # an update of one rank alone would part the weights
            kept = torch.tensor(kept, device=None if self.verdict is None else self.verdict.keep.device)
            dist.all_reduce(kept)
        if kept:
            self._empty_in_a_row = 0
            if self.reduction == "kept_global":
                ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
                self._rescale(optimizer, engine, ranks * micro_batches / int(kept))
            return True
        if engine is None:
            optimizer.zero_grad(set_to_none=True)
        else:
            _discard_gradients(engine)
        self._empty_in_a_row += 1
        self.stats.empty_steps += 1
        if self._empty_in_a_row >= self.max_empty_steps:
            reason = "all of them were excluded"
            if self.threshold.tau < math.inf:
                reason = f"filter.tau={self.threshold.tau} is below the norm of everything; raise it"
            raise EmptySteps(f"{self._empty_in_a_row} optimizer steps in a row kept no sample: {reason}")
        return False

    def _rescale(self, optimizer, engine, factor: float) -> None:
        """Multiplies the gradients of the step to come."""
        if engine is None or not engine.zero_optimization_stage():
            if engine is not None and (engine.bfloat16_enabled() or engine.fp16_enabled()):
                raise ValueError("filter.reduction=kept_global: ZeRO-0 in low precision has no place for it; use ZeRO-1")
            for group in optimizer.param_groups if engine is None else engine.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            return
        # norm, clipping and fp16's overflow check of ZeRO's step all go by its loss scale; its method for setting one
        # writes a line to the log each time
        self._rescaled = engine.optimizer
        scale = self._rescaled.loss_scale / factor
        self._rescaled.custom_loss_scaler, self._rescaled.external_loss_scale = True, scale

    def _end_rescaling(self) -> None:
        """Losses to come are scaled as ever."""
        rescaled, self._rescaled = self._rescaled, None
        if rescaled is not None:
            rescaled.custom_loss_scaler, rescaled.external_loss_scale = False, None

    def metrics(self, accelerator=None) -> dict[str, float]:
        """Counts, rates and norms since the last call, named ``filter/...``; with several ranks every rank calls."""
        return self.stats.compute(_sum_over(accelerator))

    def histograms(self, accelerator=None) -> dict[str, list[int]]:
        """How the norms since the last call are spread, see `FilterStats.histograms`; every rank calls."""
        return self.stats.histograms(_sum_over(accelerator))

    def state_dict(self, accelerator=None) -> dict:
        """All counts so far, of all ranks, as JSON takes it; with several ranks every rank calls."""
        return {"stats": self.stats.state_dict(_sum_over(accelerator)), "empty_in_a_row": self._empty_in_a_row}

    def load_state_dict(self, state: dict, accelerator=None) -> None:
        """Goes on from a `state_dict`, which may come from another number of ranks."""
        first = accelerator is None or accelerator.is_main_process
        self.stats.load_state_dict(state["stats"], with_window=first)
        self._empty_in_a_row = state["empty_in_a_row"]


def _discard_gradients(engine) -> None:
    """What DeepSpeed's step does beside the update."""
    zero = engine.optimizer
    zero.zero_grad(set_to_none=True)
    engine.micro_steps += 1
    if engine.zero_optimization_stage() in (1, 2):
        # it would take the next backward for one more micro-batch of this step, and with offloaded states add to it what
        # the step before left in its buffer
        zero._wait_for_offload_copies()
        zero.micro_step_id = -1
        zero._offload_accumulated_param_ids = set()


def _micro_batches(optimizer, engine) -> int | None:
    """By how many micro-batches the losses of this step were divided; None where the step is not due."""
    if engine is not None:
        return engine.gradient_accumulation_steps() if engine.is_gradient_accumulation_boundary() else None
    state = getattr(optimizer, "gradient_state", None)  # accelerate's
    if state is None:
        return 1
    return state.num_steps if state.sync_gradients else None


def _bools(values, count: int, device, name: str) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.bool).to(device, non_blocking=True)  # or the host would wait
    if tensor.shape != (count,):
        raise ValueError(f"MemFilter.batch({name}=...) must have one entry for each of the {count} samples, "
                         f"found shape {tuple(tensor.shape)}")  # fmt: skip
    return tensor


def _sum_over(accelerator):
    return None if accelerator is None else lambda tensor: accelerator.reduce(tensor, reduction="sum")
