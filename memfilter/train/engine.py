"""Backward, update and whole weights, whatever stands between a loss and its gradients: nothing, DDP, FSDP2, DeepSpeed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from memfilter.config import Config, ConfigError
from memfilter.filter import MemFilter

DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
                 DistributedType.MULTI_NPU)  # fmt: skip
# for the main process's work alone: NCCL's ten minutes are too short for a checkpoint of SDXL on a slow disk, and a rank that
# hangs should not hold a cluster for days
PATIENCE = timedelta(hours=2)
SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator that the launcher asks for.

    Raises:
        ConfigError: the launch, or what it asks for together with the configuration, cannot be right.
    """
    # nothing but gradients needs to travel: the wrapped denoiser's buffers are constants
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    if "LOCAL_RANK" in os.environ:
        connection = {"timeout": PATIENCE}
        if deepspeed and not torch.cuda.is_available():
            connection["backend"] = "gloo"  # or accelerate asks for NCCL
            _use_plain_collectives()
        handlers.append(InitProcessGroupKwargs(**connection))
    try:
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            # as a plugin, or a variable of the environment would have the last word
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.accumulation),
            kwargs_handlers=handlers,
        )
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"accelerate cannot start: {' '.join(str(error).split())}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    found = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not launched == found == accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {launched} processes and accelerate connected {accelerator.num_processes} of them: "
            "each would train by itself; on CPUs use ACCELERATE_USE_CPU=true torchrun --nproc_per_node "
            f"{launched} train_filtered.py ..., see docs/distributed.md"
        )
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError("accelerate forgets DeepSpeed under ACCELERATE_USE_CPU: set DS_ACCELERATOR=cpu instead")
    reasons = list(_refusals(config, accelerator))
    if reasons:
        raise ConfigError("\n".join(reasons))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(config, accelerator.deepspeed_plugin)
    elif accelerator.distributed_type == DistributedType.FSDP:
        leave_inputs(accelerator.state.fsdp_plugin)
    elif accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate takes fp16 on a CPU for fp32, without a word; torch can do it
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def _use_plain_collectives() -> None:
    """DeepSpeed compiles an operator for shared memory at its first start on a CPU, for a minute or more, and a compile
    that is killed leaves a lock for which every later start waits. gloo gives the same results without it."""
    from deepspeed.ops import __compatible_ops__ as operators

    operators["deepspeed_shm_comm"] = False


def leave_inputs(plugin) -> None:
    """Lets FSDP cast weights alone. It would round SDXL's sizes as well, and give back other outputs than the denoiser's,
    without what the filter has put there; `Objective` and `Engine.for_pipeline` cast what there is to cast, as for DeepSpeed.
    Gradients are added up over the ranks in fp32, as DDP does."""
    if (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = replace(
            policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32
        )


def _refusals(config: Config, accelerator: Accelerator) -> Iterator[str]:
    """Why launcher and configuration do not go together."""
    kind, train = accelerator.distributed_type, config.train
    lora = config.model.lora_rank is not None
    if kind not in (*DATA_PARALLEL, *SHARDED):
        yield f"the launcher asks for {kind.value}: expected DDP, DeepSpeed or FSDP"
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            yield "the launcher asks for FSDP 1: set fsdp_version: 2"
        if accelerator.device.type == "cpu":
            yield "accelerate does not shard by FSDP on CPUs, and does not say so: use DDP or DeepSpeed"
        if train.optimizer != "adamw":
            yield f"train.optimizer={train.optimizer}: bitsandbytes cannot step FSDP's sharded weights; use adamw"
        if train.ema_half_life:
            yield "train.ema_half_life: an average of weights that FSDP shards would be in pieces; set it to 0, or use DDP"
        if lora:
            yield "model.lora_rank: FSDP cannot shard frozen and trained weights of different types; use DDP"
        if train.mixed_precision == "fp16":
            yield "train.mixed_precision=fp16: FSDP clips before it unscales; use bf16"
    if kind != DistributedType.DEEPSPEED:
        return
    plugin = accelerator.deepspeed_plugin
    stage, settings = plugin.zero_stage, plugin.deepspeed_config
    for section in ("optimizer", "scheduler"):
        if section in settings:
            yield f"the DeepSpeed configuration has a section {section!r}: remove it, settings of train.* decide"
    if stage == 0 and train.mixed_precision != "no":
        yield f"train.mixed_precision={train.mixed_precision} under ZeRO-0: use ZeRO-1, or DDP, which is the same as ZeRO-0"
    sums = settings.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and train.mixed_precision == "bf16" and sums == "fp32":
        yield ("the DeepSpeed configuration has data_types.grad_accum_dtype=fp32: ZeRO-1 then steps by an optimizer that has no "
               "place for the filter's factor; use ZeRO-2")  # fmt: skip
    if stage == 3:
        if train.ema_half_life:
            yield ("train.ema_half_life: an average of weights that ZeRO-3 shards would be whole on every device; "
                   "set it to 0, or use ZeRO-2")  # fmt: skip
        if lora:
            yield "model.lora_rank: LoRA weights are too few to shard; use DDP or ZeRO-2"
    if train.optimizer.startswith("paged"):
        yield f"train.optimizer={train.optimizer}: ZeRO moves its shards of the state itself; use zero2_offload"
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        yield "train.mixed_precision=fp16: DeepSpeed has no fp16 on CPUs; use bf16 or no"
    if train.compile:
        yield "train.compile: not with DeepSpeed, whose hooks are in the forward; use DDP"


def _configure_deepspeed(config: Config, plugin) -> None:
    from transformers.integrations import unset_hf_deepspeed_config

    # transformers would split what it loads under ZeRO-3, accelerate's switch for that notwithstanding; the frozen
    # encoders and VAE are whole on every device
    unset_hf_deepspeed_config()
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.train.batch_size
    settings["gradient_accumulation_steps"] = config.train.accumulation
    settings["gradient_clipping"] = config.train.max_grad_norm
    settings.setdefault("zero_allow_untested_optimizer", True)
    # offloaded states are stepped by torch's AdamW unless the file asks for DeepSpeed's, which it compiles
    settings.setdefault("zero_force_ds_cpu_optimizer", False)


class Engine:
    """The prepared model and its optimizer.

    Args:
        wrapped: the filtered denoiser.
    """

    def __init__(self, accelerator: Accelerator, wrapped: nn.Module, optimizer, max_grad_norm: float):
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        exact = [p.detach().cpu().clone() for p in wrapped.parameters() if p.requires_grad] if self.deepspeed and low else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # of older torch it is the only name
            self.model, self.optimizer = accelerator.prepare(wrapped, optimizer)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if exact:
            # ZeRO makes the fp32 weights that it steps of those that it has cast, which would round what was loaded
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

            for parameter, value in zip(self.trained, exact, strict=True):
                if hasattr(parameter, "ds_tensor"):  # ZeRO-3's parts are equally long, and the last may go beyond the weight
                    part = parameter.ds_tensor.numel()
                    padded = nn.functional.pad(value.flatten(), (0, part * accelerator.num_processes - value.numel()))
                    safe_set_local_fp32_param(parameter, padded.narrow(0, part * accelerator.process_index, part))
                else:
                    safe_set_full_fp32_param(parameter, value)
        # DeepSpeed and FSDP cast the weights and leave the inputs
        self.casts_weights = accelerator.distributed_type in SHARDED
        self.input_dtype = low if self.casts_weights else None
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)  # whether all gradients so far were

    def accumulate(self):
        """The context of a micro-batch."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        if not self.deepspeed:
            return self.accelerator.backward(loss)
        # accelerate's would step as well, and whether to step is not known yet
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(loss)

    def step(self, mem_filter: MemFilter, learning_rate: float) -> bool | None:
        """One update from the gradients at hand. False: nothing was kept; None: loss scaling found an overflow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        kept = mem_filter.before_step(self.model if self.deepspeed else self.optimizer)
        done = kept
        if kept and self.deepspeed:
            self.model.step()  # clips
            done, norm = True if self.model.was_step_applied() else None, self.model.get_global_grad_norm()
        elif kept:
            norm = self.accelerator.clip_grad_norm_(self.trained, self.max_grad_norm)
            self.optimizer.step()
            done = None if self.accelerator.optimizer_step_was_skipped else True
        if done and norm is not None:
            norm = getattr(norm, "full_tensor", lambda: norm)()  # FSDP2's
            self.finite &= torch.as_tensor(norm).isfinite().to(self.finite.device, non_blocking=True)
        if not self.deepspeed:
            self.optimizer.zero_grad(set_to_none=True)
        return done

    def for_pipeline(self) -> nn.Module:
        """The denoiser as a pipeline calls it, with the weights and in the precision of training."""
        # accelerate's own imports DeepSpeed for it, seconds of every start where that is installed
        whole = self.deepspeed or isinstance(self.model, nn.parallel.DistributedDataParallel)
        inside = self.model.module if whole else self.model
        return CastingDenoiser(self.model, inside, self.input_dtype) if self.casts_weights else inside

    def full_weights(self) -> Iterator[Tensor]:
        """The trained weights in fp32 on the host, each whole; with several ranks every rank calls. What is whole on the device is
        so one by one: there is no room for a second model."""
        for parameter in self.trained:
            whole = None
            if self.deepspeed:
                from deepspeed.utils import safe_get_full_fp32_param

                whole = safe_get_full_fp32_param(parameter)
            elif hasattr(parameter, "full_tensor"):  # FSDP2
                whole = parameter.full_tensor()
            yield (parameter if whole is None else whole).detach().cpu().float()


class CastingDenoiser(nn.Module):
    """A denoiser whose weights are in low precision, for a pipeline that knows nothing of it.

    Args:
        model: what is called.
        inside: the denoiser itself, for its attributes.
        dtype: of the weights; None for that of what it is called with.
    """

    def __init__(self, model: nn.Module, inside: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.model, self._inside, self._dtype = model, (inside,), dtype  # in a tuple: not a second module

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_inside"][0], name)

    def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
        dtype = self._dtype or sample.dtype
        out = self.model(sample.to(dtype), timestep, encoder_hidden_states.to(dtype), **kwargs)
        return (out[0].to(sample.dtype), *out[1:])  # pipelines ask for tuples
