"""MemFilter: the plug-in. It wraps the denoiser, remembers the verdict of the last forward, and masks the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memfilter.functional import REDUCTIONS, log_gain, masked_loss, noise_factor, squared_error, text_cosine, text_norm
from memfilter.keys import IS_FREE, Decisions, KeyTable, Step
from memfilter.reference import SIGNALS
from memfilter.stats import FilterStats
from memfilter.threshold import FixedThreshold, TimestepThreshold
from memfilter.unet import FilteredUNet


class NonFiniteNorm(FloatingPointError):
    """The norm, or the loss, of some samples is NaN or infinite: the latents, the embeddings or the weights are broken."""


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
    skipped: list[str | None] | None = None  # why a sample was not checked; None: it was, or nobody chose
    # on the host, once `MemFilter.before_step` has been called; None without evidence
    signals: Tensor | None = None  # [B, len(SIGNALS)], NaN where not measured
    p_value: Tensor | None = None  # of the norm
    evidence: Tensor | None = None  # of the sample's key


class _Readback:
    """What a forward found, on its way to the host. The copy is asked for before the backward is queued and waited for
    after: the device has work all the while, and the host knows before the update."""

    def __init__(self, *facts: Tensor):
        stacked = torch.stack([fact.float() for fact in facts])  # [n, B]
        self._host = stacked.to("cpu", non_blocking=True)
        self._arrived = None
        if stacked.device.type != "cpu":
            self._arrived = torch.get_device_module(stacked.device).Event()
            self._arrived.record()

    def read(self) -> Tensor:
        """On the host, [n, B]."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def _require_finite(what: str, finite: Tensor, keys: Sequence[str] | None) -> None:
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        names = ", ".join(str(keys[i]) if keys is not None else f"row {i}" for i in bad)
        raise NonFiniteNorm(f"the {what} of {len(bad)} of {len(finite)} samples is not finite ({names}): "
                            "look for NaN in their latents, or lower the learning rate")  # fmt: skip


class MemFilter:
    """Leaves samples out of the loss that are being memorized: by one tau for the norm of their text-conditional noise
    prediction, or by another rule.

        mem_filter = MemFilter(tau=4.0)
        unet = mem_filter.wrap(unet, null=null_prompt_embeds, scheduler=noise_scheduler)
        out = unet(noisy_latents, timesteps, prompt_embeds)
        loss = mem_filter.loss(out.sample, target)
        loss.backward()
        if mem_filter.before_step(optimizer):
            optimizer.step()

    Args:
        tau: samples whose norm is not below it are dropped (Section 4.3 of the paper; 2..6 there, for Stable Diffusion
            at 512 px). ``inf``: measure only. None, without another rule: no extra pass, nothing checked.
        threshold: another rule for single norms, such as `TimestepThreshold`, instead of tau.
        evidence: a rule that knows every sample's key, such as `Evidence`; `batch` must then name the keys, and every rank
            bring as many samples to a step. tau or threshold beside it judge those of its samples that get a null pass.
        reduction: ``kept``, ``kept_global`` or ``batch``, see `masked_loss`. With ``kept_global`` the gradients of an
            optimizer step are those of the mean over all that was kept in it, however it is split into ranks and
            micro-batches; `before_step` makes them so.
        unit: ``l2`` (the paper's) or ``rms``, see `text_norm`.
        max_empty_steps: so many optimizer steps in a row that keep nothing raise `EmptySteps`.
        judges_all: whether samples without a check count as kept by a verdict, where somebody else leaves some out.
        stats: where counts go; by default ten timestep bins over 1000 timesteps.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        tau: float | None = None,
        *,
        threshold: TimestepThreshold | None = None,
        evidence: KeyTable | None = None,
        reduction: str = "kept",
        unit: str = "l2",
        max_empty_steps: int = 100,
        judges_all: bool = False,
        stats: FilterStats | None = None,
    ):
        if reduction not in REDUCTIONS:
            raise ValueError(f"filter.reduction must be one of {', '.join(REDUCTIONS)}, found {reduction!r}")
        if max_empty_steps < 1:
            raise ValueError(f"filter.max_empty_steps must be at least 1, found {max_empty_steps}")
        if tau is not None and threshold is not None:
            raise ValueError(f"filter.tau={tau} and a threshold exclude each other: give one of them")
        if (tau is not None or threshold is not None) and evidence is not None and not evidence.makes_passes:
            raise ValueError(f"{type(evidence).__name__} makes no null pass: tau or a threshold beside it would judge nothing")
        self.threshold = threshold or FixedThreshold(math.inf if tau is None else tau, unit)
        self.evidence, self.unit, self.judges_all = evidence, unit, judges_all
        self.active = tau is not None or threshold is not None or evidence is not None
        self.reduction = reduction
        self.max_empty_steps = max_empty_steps
        self.stats = stats or FilterStats()
        self.verdict: Verdict | None = None  # of the last training forward
        self._unused = False  # no loss was made from the verdict yet
        self._facts: dict = {}
        self._null: tuple[Tensor, Tensor | None] | None = None  # null prediction and its rows, until the loss
        self._rows: list[Tensor] = []  # of this step's micro-batches, for the evidence
        self._verdicts: list[Verdict] = []  # the same
        self._gone_by = 0  # samples that were passed over since the last step
        self._scheduler = None  # says what is predicted
        self._factors: Tensor | None = None  # [T], None for epsilon prediction
        self._factors_of = "epsilon"  # prediction type
        self._uncounted: tuple[Tensor, ...] | None = None  # what `FilterStats.add` is told once it is known who is kept
        self._unread: tuple[_Readback, ...] = ()  # of the last training forward: its verdict, its errors
        self._kept_in_step: int | None = None  # None: no training forward since the last step
        self._empty_in_a_row = 0
        self._rescaled = None  # DeepSpeed's optimizer, while a factor of `before_step` stands as its loss scale

    def wrap(self, unet: nn.Module, null, scheduler=None, static_shapes: bool = False) -> FilteredUNet:
        """The denoiser with the check inside; do this before ``accelerator.prepare``.

        Args:
            unet: called as ``unet(sample, timestep, encoder_hidden_states, ...)``.
            null: embedding of the empty prompt, [L, D] or [1, L, D], or a mapping (see `FilteredUNet`).
            scheduler: a diffusers noise scheduler; its prediction type and alphabar_t convert the norm to noise
                space. None: the model predicts epsilon.
            static_shapes: see `FilteredUNet`.

        Raises:
            ValueError: the scheduler's prediction type is unknown, or it has no alphabar_t.
        """
        if scheduler is not None:
            if not hasattr(scheduler, "alphas_cumprod"):
                raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod, from which the norm in noise "
                                 "space is made: pass the DDPMScheduler that training uses")  # fmt: skip
            self._scheduler = scheduler
            self._make_factors()
            self.stats.num_train_timesteps = len(scheduler.alphas_cumprod)
        return FilteredUNet(unet, null, self._judge, self._select, static_shapes)

    def _make_factors(self) -> None:
        """By which norms come into noise space."""
        self._factors_of = kind = self._scheduler.config.prediction_type
        factors = noise_factor(kind, self._scheduler.alphas_cumprod)
        self._factors = None if kind == "epsilon" else factors

    def batch(
        self, *, keys=None, duplicate=None, caption_dropped=None, excluded=None, shared_keys=None, timesteps=None
    ) -> None:
        """What is known of the samples of the next training forward; all optional, each of length B.

        Args:
            keys: names, for errors and audits; numbers, perhaps in a tensor, count as their decimals.
            duplicate: whether the sample is known to be duplicated; splits the statistics.
            caption_dropped: whether its caption was replaced by the empty one. Its norm is 0 by definition: it is
                neither checked nor dropped.
            excluded: whether the sample is left out of the loss whatever its norm, such as one that could not be
                read; what stands in its place must be finite. It is not checked and counts apart; with the reduction
                ``batch`` it counts as a sample of the batch, as a dropped one does.
            shared_keys: what evidence is collected under, such as captions or names of groups; by default ``keys``.
            timesteps: those of the forward, on the host, where they are known there: no null pass is then made for samples
                at which it could tell nothing.
        """
        # of a tensor's elements the names would have the device in them, and differ from rank to rank
        keys, shared_keys = (given.tolist() if isinstance(given, Tensor) else given for given in (keys, shared_keys))
        self._facts = {
            "keys": keys,
            "duplicate": duplicate,
            "caption_dropped": caption_dropped,
            "excluded": excluded,
        }
        if self.evidence is not None:
            shared = keys if shared_keys is None else shared_keys
            if shared is None:
                raise ValueError("MemFilter.batch(keys=...): evidence is collected by key, and none are given")
            for name, values in (self._facts | {"shared_keys": shared_keys, "timesteps": timesteps}).items():
                if values is not None and len(values) != len(shared):
                    name = "shared_keys" if name == "keys" else name
                    raise ValueError(f"MemFilter.batch({name}=...) must have one entry for each of the {len(shared)} samples, "
                                     f"found {len(values)}")  # fmt: skip
            self._facts |= self._decide(shared, caption_dropped, excluded, timesteps)

    def _decide(self, shared_keys, caption_dropped, excluded, timesteps) -> dict:
        """What to do with samples, by what is known before their step: `Decisions`, places in the table, and why."""
        slots = self.evidence.slots(shared_keys)
        drop, look, audit = self.evidence.decide(slots)
        if not self.evidence.makes_passes:
            look = torch.zeros_like(look)
        reasons: list[str | None] = [None if looked else "flagged" if dropped else "no evidence"
                                     for looked, dropped in zip(look.tolist(), drop.tolist(), strict=True)]  # fmt: skip
        hopeless = torch.zeros_like(look)
        if timesteps is not None:
            hopeless = ~self.evidence.worth_looking(torch.as_tensor(timesteps))
        nothing = [False] * len(slots)
        for reason, rows in (
            ("high noise", hopeless.tolist()),
            ("caption dropped", nothing if caption_dropped is None else caption_dropped),
            ("excluded", nothing if excluded is None else excluded),
        ):
            rows = torch.as_tensor(rows, dtype=torch.bool, device="cpu")
            reasons = [reason if hit else before for before, hit in zip(reasons, rows.tolist(), strict=True)]
            look &= ~rows
            if reason != "high noise":  # without its caption, or its picture, a sample says nothing of its key
                slots = torch.where(rows, -1, slots)
        return {"slots": slots, "decisions": Decisions(drop, look, audit), "skipped": reasons}

    def passed_over(self, timesteps: Tensor, duplicate: Sequence[bool] | None = None) -> None:
        """Tells of samples of the stream in whose place others were taken, because their keys are flagged. Every rank
        tells of those of all ranks.

        Args:
            timesteps: [n], at which they would have been shown.
            duplicate: as for `batch`.
        """
        self._gone_by += len(timesteps)
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            no = torch.zeros(len(timesteps), dtype=torch.bool)
            group = torch.zeros(len(no), dtype=torch.long) if duplicate is None else torch.tensor(duplicate).long() + 1
            facts = (timesteps, torch.zeros(len(no)), no, no, group)
            self.stats.add(*(fact.to(self.stats.device) for fact in facts), judged=(~no).to(self.stats.device))

    def _select(self, batch_size: int) -> list[int] | None:
        """Rows of the null pass; None for all."""
        if not self.active:
            return []
        if self.evidence is None:
            return None
        if "decisions" not in self._facts:
            raise ValueError("evidence is collected by key: name the samples with MemFilter.batch(keys=...) before the forward")
        rows = self._facts["decisions"].look.nonzero().flatten().tolist()
        several = self.evidence.makes_passes and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # ZeRO-3 and FSDP gather weights in every forward: a rank must not stay away from a pass that others make
        return None if len(rows) == batch_size else rows or [0] * several

    def _judge(
        self, cond: Tensor, null: Tensor | None, timesteps: Tensor, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Verdict on one training forward: (text_norm [B], keep [B]).

        Args:
            null: [n, ...], None where no pass was made.
            rows: of which samples; None: all.
        """
        facts, self._facts = self._facts, {}
        self._settle()
        self._end_rescaling()
        device, count = cond.device, len(cond)
        if (keys := facts.get("keys")) is not None and len(keys) != count:
            raise ValueError(f"MemFilter.batch(keys=...) must have one entry for each of the {count} samples, "
                             f"found {len(keys)}")  # fmt: skip
        decisions = facts.get("decisions")
        if decisions is not None and len(decisions.look) != count:
            raise ValueError(f"MemFilter.batch(keys=...) must have one entry for each of the {count} samples, "
                             f"found {len(decisions.look)}")  # fmt: skip
        looked = torch.full((count,), null is not None, device=device)
        place = None
        if null is not None and rows is not None:
            place = torch.tensor(rows).to(device, non_blocking=True)  # [n]
        if decisions is not None:
            looked = decisions.look.to(device, non_blocking=True)
        checked, excluded = looked.clone(), torch.zeros_like(looked)
        if (given := facts.get("excluded")) is not None:
            excluded = _bools(given, count, device, "excluded")
            checked &= ~excluded
        if (dropped := facts.get("caption_dropped")) is not None:
            checked &= ~_bools(dropped, count, device, "caption_dropped")
        factor = None
        # diffusers' scripts set the prediction type inside the loop
        if self._scheduler is not None and self._scheduler.config.prediction_type != self._factors_of:
            self._make_factors()
        if self._factors is not None:
            self._factors = self._factors.to(device)
            factor = self._factors[timesteps.long()]
            checked &= factor != 0
        norm, finite, cosine = torch.zeros(count, device=device), torch.ones_like(checked), None
        if null is not None:
            paired = cond if place is None else cond[place]
            found = _spread(text_norm(paired, null, factor if place is None or factor is None else factor[place], self.unit),
                            place, count, 0.0)  # fmt: skip
            norm, finite = torch.where(checked, found, 0), torch.isfinite(found) | excluded
            cosine = None if self.evidence is None else _spread(text_cosine(paired, null), place, count)
        judged = checked
        keep = (self.threshold(norm, timesteps) | ~checked) & ~excluded
        if decisions is not None:
            keep &= ~decisions.drop.to(device, non_blocking=True)
        if decisions is not None or self.judges_all:
            judged = ~excluded
        group = torch.zeros(count, dtype=torch.long, device=device)
        if (duplicate := facts.get("duplicate")) is not None:
            group = _bools(duplicate, count, device, "duplicate").long() + 1
        passes = None if null is None or place is None else torch.zeros(count, device=device).index_fill(0, place, 1)
        passes = torch.full((count,), float(null is not None), device=device) if passes is None else passes
        self.verdict, self._unused = Verdict(timesteps, norm, keep, checked, facts.get("keys"), facts.get("skipped")), True
        self._uncounted = (group, excluded, judged, passes, finite)
        if self.evidence is None or not self.evidence.judges_loss:
            self._conclude(keep)
        if self.evidence is not None:
            unknown = torch.full((count,), math.nan, device=device)
            seen = (timesteps, torch.where(checked, norm, math.nan), unknown if cosine is None else cosine)
            self._unread += (_Readback(checked, *seen),)
            self._null = None if null is None else (null, place)
            self._verdicts.append(self.verdict)
            self._rows.append(torch.stack([facts["slots"], decisions.audit.long()]))
        return norm, keep

    def _conclude(self, keep: Tensor) -> None:
        """The verdict stands: it is counted, and on its way to the host."""
        verdict, (*counted, finite), self._uncounted = self.verdict, self._uncounted, None
        verdict.keep = keep
        self.stats.add(verdict.timesteps, verdict.text_norm, keep, verdict.checked, *counted)
        self._unread = (_Readback(keep, finite), *self._unread)

    def _settle(self) -> None:
        """Waits for what the last training forward found."""
        if self._uncounted is not None:  # its loss was never asked for
            self._conclude(self.verdict.keep)
        unread, self._unread = self._unread, ()
        if not unread:
            return
        # they are put back when they are found to be sound
        rows, verdict = (self._rows.pop(), self._verdicts.pop()) if self.evidence is not None else (None, self.verdict)
        keep, finite = unread[0].read().bool()
        _require_finite("text norm", finite, verdict.keys)
        self._null = None
        if self.evidence is not None:
            checked, timesteps, norm, cosine = unread[1].read()
            unknown = torch.full_like(norm, math.nan)
            loss, gain = unknown, unknown
            if len(unread) > 2:
                loss, gain = unread[2].read()
                _require_finite("loss", loss.isfinite(), verdict.keys)  # not every sample has a norm by which it could be told
            found = {"norm": norm, "loss": loss, "cosine": cosine, "gain": gain}
            signals = torch.stack([found[name] for name in SIGNALS], 1)  # [B, S]
            shown = torch.tensor([reason != "excluded" for reason in verdict.skipped])  # else it is a stand-in's loss
            verdict.signals = torch.where(checked.bool()[:, None] | (IS_FREE & shown[:, None]), signals, math.nan)
            columns = [*rows, timesteps, keep, *verdict.signals.T]
            self._rows.append(torch.stack([column.double() for column in columns], 1))  # [B, 4 + S]; a place is exact in fp64
            self._verdicts.append(verdict)
        self._kept_in_step = (self._kept_in_step or 0) + int(keep.sum())

    def loss(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Masked mean squared error of the last forward's samples: [B, ...] -> scalar, graph always intact.

        Args:
            weight: [B], a factor for every sample's error, such as `min_snr_weight` of its timestep.

        Raises:
            ValueError: pred and target differ in shape, or weight is not [B]; they would be spread over each other.
            RuntimeError: since the last loss there was no training forward of this batch size.
        """
        if pred.shape != target.shape:
            raise ValueError(f"MemFilter.loss: pred and target must have one shape, found {[*pred.shape]} and {[*target.shape]}")
        if weight is not None and weight.shape != (len(pred),):
            raise ValueError(f"MemFilter.loss: weight must have one factor for each of the {len(pred)} samples and no other "
                             f"dimension, found {[*weight.shape]}")  # fmt: skip
        if not self._unused or len(self.verdict.keep) != len(pred):
            raise RuntimeError("MemFilter.loss needs the verdict of a training forward of the same batch: call "
                               "the wrapped denoiser first, in train mode and with gradients on")  # fmt: skip
        self._unused = False
        if self.evidence is not None:
            loss, gain = self._errors(pred.detach(), target)
            if self._uncounted is not None:
                self._conclude(self.verdict.keep & self.evidence.keeps(self.verdict.timesteps, loss))
            self._unread += (_Readback(loss, gain),)
        return masked_loss(pred, target, self.verdict.keep, self.reduction, weight)

    def _errors(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gain of every sample, [B]; NaN where there was no null pass."""
        loss, gain = squared_error(pred, target), torch.full((len(pred),), math.nan, device=pred.device)
        if self._null is not None:
            null, place = self._null
            at = slice(None) if place is None else place
            gain = _spread(log_gain(loss[at], squared_error(null, target[at])), place, len(pred))
        return loss, gain

    def before_step(self, optimizer, *others) -> bool:
        """Call between the last backward and the clipping; says whether anything was kept in that step.

        With the reduction ``kept_global`` the gradients, sums so far, are divided by what all ranks kept. It is taken
        that they were averaged over the ranks, as DDP, FSDP2 and DeepSpeed do, and, with accelerate or DeepSpeed, that
        the loss was divided by the number of micro-batches, as their ``backward`` does. ZeRO clips inside its step, where
        it divides by the loss scale first: there the factor goes in, as that step's loss scale.

        Where nothing was kept, gradients are set to None, so that a step changes nothing: with gradients of 0, AdamW's
        momentum and weight decay would still move the weights. Clipping and step are then best left out; they must be with
        fp16's GradScaler, which fails where there is no gradient, and under DeepSpeed.

        Args:
            optimizer: torch's or accelerate's; under DeepSpeed the engine: ``engine.backward(loss)``, then
                ``if mem_filter.before_step(engine): engine.step()``.
            others: whatever else steps by the same losses, not under DeepSpeed.

        Raises:
            RuntimeError: since the last step there was no training forward.
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
        if kept is None:
            raise RuntimeError("MemFilter.before_step was called twice for one step, or without a training forward before it: "
                               "give it all optimizers of a step at once")  # fmt: skip
        if self.evidence is not None:
            kept = self._weigh()
        elif dist.is_available() and dist.is_initialized():  # an update of one rank alone would part the weights
            kept = torch.tensor(kept, device=None if self.verdict is None else self.verdict.keep.device)
            dist.all_reduce(kept)
        if kept:
            self._empty_in_a_row = 0
            if self.reduction == "kept_global":
                ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
                for each in (optimizer, *others):
                    self._rescale(each, engine, ranks * micro_batches / int(kept))
            return True
        if engine is None:
            for each in (optimizer, *others):
                each.zero_grad(set_to_none=True)
        else:
            _discard_gradients(engine)
        self._empty_in_a_row += 1
        self.stats.empty_steps += 1
        if self._empty_in_a_row >= self.max_empty_steps:
            raise EmptySteps(f"{self._empty_in_a_row} optimizer steps in a row kept no sample: {self._why_empty()}")
        return False

    def _why_empty(self) -> str:
        if isinstance(self.threshold, TimestepThreshold):
            return f"lower filter.false_positive_rate={self.threshold.false_positive_rate}, or mend what is excluded"
        if not hasattr(self.threshold, "tau"):
            return "the threshold keeps nothing"
        if self.threshold.tau < math.inf:
            return f"filter.tau={self.threshold.tau} is below the norm of everything; raise it"
        if self.evidence is None:
            return "all of them were excluded"
        return f"all of them were excluded or {'had too small a loss' if self.evidence.judges_loss else 'flagged'}"

    def _weigh(self) -> int:
        """The evidence of this step's samples, of all ranks; says how many were kept. One collective."""
        parts, self._rows = self._rows, []
        verdicts, self._verdicts = self._verdicts, []
        gone_by, self._gone_by = self._gone_by, 0
        device = verdicts[-1].keep.device if verdicts else "cpu"
        rows, mine = _of_all_ranks(parts, device)
        slots, audit, timesteps, keep = rows[:, :4].T
        step = Step(slots.long(), timesteps.long(), rows[:, 4:].float(), audit.bool())
        with torch.inference_mode():  # many operations on a few numbers: what torch does around each of them counts
            p_values, evidence = self.evidence.update(step, gone_by + len(rows))
        for verdict, place in zip(verdicts, mine, strict=True):
            verdict.p_value, verdict.evidence = p_values[place], evidence[place]
        return int(keep.sum())

    def _rescale(self, optimizer, engine, factor: float) -> None:
        """Multiplies the gradients of the step to come."""
        if engine is None or not engine.zero_optimization_stage():
            if engine is not None and (engine.bfloat16_enabled() or engine.fp16_enabled()):
                raise ValueError("filter.reduction=kept_global: ZeRO-0 in low precision has no place for it; use ZeRO-1")
            groups = optimizer.param_groups if engine is None else engine.optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, factor)
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
        known = {} if self.evidence is None else self.evidence.metrics()
        return self.stats.compute(_sum_over(accelerator)) | known

    def histograms(self, accelerator=None) -> dict[str, list[int]]:
        """How the norms since the last call are spread, see `FilterStats.histograms`; every rank calls."""
        return self.stats.histograms(_sum_over(accelerator))

    def state_dict(self, accelerator=None) -> dict:
        """All counts so far, of all ranks, as JSON takes it; with several ranks every rank calls. A rule that knows keys has a
        state of its own, ``evidence.state_dict()``, of tensors."""
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


def _spread(values: Tensor, place: Tensor | None, count: int, blank: float = math.nan) -> Tensor:
    """Values of some rows, [n], where they belong among all: [B], ``blank`` elsewhere."""
    if place is None:
        return values
    return torch.full((count,), blank, dtype=values.dtype, device=values.device).index_copy(0, place, values)


def _of_all_ranks(parts: list[Tensor], device) -> tuple[Tensor, list[Tensor]]:
    """Rows of a step's micro-batches on all ranks in the order of the stream, which goes micro-batch by micro-batch and, in
    each, rank by rank: [sum of B, F] on the host, and where the rows of each micro-batch of this rank are.

    Args:
        parts: [B, F] each, as many and as long on every rank.
    """
    rows = torch.cat(parts)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows, list(torch.arange(len(rows)).split([len(part) for part in parts]))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    local = rows.to(device)
    gathered = [torch.empty_like(local) for _ in range(ranks)]
    dist.all_gather(gathered, local)
    by_rank = [one.cpu().split([len(part) for part in parts]) for one in gathered]
    ordered, mine, start = [], [], 0
    for micro_batch in range(len(parts)):
        for r in range(ranks):
            ordered.append(by_rank[r][micro_batch])
            if r == rank:
                mine.append(torch.arange(start, start + len(ordered[-1])))
            start += len(ordered[-1])
    return torch.cat(ordered), mine


def _sum_over(accelerator):
    if accelerator is None or accelerator.num_processes == 1:
        return None
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), reduction="sum")  # before a forward it is on the host
