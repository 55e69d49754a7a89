"""What a step costs at full size, on paper: compute, memory per device, traffic. Nothing here is measured on a GPU.

    python benchmarks/scaling.py

The UNets of Stable Diffusion 1.4 and XL, built from their published configurations, make training steps on fake tensors
(shapes without data) through the real MemFilter. FLOPs are those of torch's counter, bytes those of the storages that
are alive. The rest follows Rajbhandari et al., "ZeRO" (SC 2020); see docs/scaling.md. Minutes on one core, no weights.
"""

from __future__ import annotations

import argparse
import weakref
from collections import namedtuple
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from memfilter import MemFilter

# unet/config.json of CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-xl-base-1.0, beside the defaults
SD14 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS, BATCH = {"SD 1.4": SD14, "SDXL": SDXL}, {"SD 1.4": 8, "SDXL": 2}  # samples per device, those of configs/
DTYPES, YES = {True: "fp32, autocast", False: "bf16"}, {False: "no", True: "yes"}
# bytes per parameter of states and of the update's temporaries (fused AdamW has none, ZeRO a copy of the gradients in fp32);
# stage of ZeRO, -1 for DDP; DeepSpeed's buckets
Setup = namedtuple("Setup", "weights gradients optimizer ema update stage buckets")
SETUPS = {"DDP, AdamW": Setup(4, 4, 8, 4, 0, -1, 0), "DDP, 8-bit AdamW": Setup(4, 4, 2, 4, 0, -1, 0)}
SETUPS |= {f"ZeRO-{n}": Setup(2, 2, 12, 4 if n < 3 else 0, 4, n, (0, 1, 2, 1)[n]) for n in range(4)}
SETUPS["ZeRO-2, no EMA"] = SETUPS["ZeRO-2"]._replace(ema=0)


def states(setup: Setup, devices: int) -> float:
    """Bytes per parameter on a device (ZeRO, section 5): stage 1 splits optimizer, 2 also gradients, 3 also weights."""
    sizes = enumerate((setup.optimizer, setup.gradients, setup.weights), start=1)
    return sum(size / (devices if setup.stage >= first else 1) for first, size in sizes) + setup.ema


def traffic(setup: Setup, devices: int, filtered: bool) -> float:
    """Bytes per parameter that a device sends in a step of one micro-batch, by ring algorithms (ZeRO, section 7)."""
    # a reduce-scatter of gradients; all-gathers of their sums (DDP, 0), new weights (1, 2), weights for each pass (3)
    gathers = 1 if setup.stage < 3 else 3 if filtered else 2
    return (devices - 1) / devices * (setup.gradients + gathers * setup.weights)


class Live(TorchDispatchMode):
    """Bytes of the storages made inside, all but ``known``: ``now``, and ``peak``, the most so far."""

    def __init__(self, known):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self._known:
                self._count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._count, storage._cdata, -storage.nbytes())
        return out

    def _count(self, key: int, size: int) -> None:
        self._known ^= {key}
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def gpu_layers(autocast: bool):
    """Layers cast and save what they do on a GPU: flash attention and, with ``autocast``, the dtypes of CUDA's lists.

    A fake tensor alone takes the attention of its own device, and none of CUDA's casts. As there, a weight's cast is
    kept until autocast is left (call what this yields), unless its cache is off, as in MemFilter's null pass.
    """
    caches = [{}]  # none when autocast was left

    def cast(dtype, value):
        if not isinstance(value, torch.Tensor) or value.dtype == dtype:
            return value
        if not (caches and value.is_leaf and value.requires_grad and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        if id(value) not in caches[0]:
            caches[0][id(value)] = value.to(dtype)
        return caches[0][id(value)]

    def call(function, dtype, *args, **kwargs):
        args, kwargs = tree_map(partial(cast, dtype), (args, kwargs))
        return function(*args, **kwargs)

    flash = torch.ops.aten._scaled_dot_product_flash_attention
    layers = {"scaled_dot_product_attention": partial(call, lambda q, k, v, **_: flash(q, k, v)[0], torch.bfloat16)}
    if autocast:
        layers |= {name: partial(call, getattr(F, name), torch.bfloat16) for name in ("linear", "conv2d")}
        layers |= {name: partial(call, getattr(F, name), torch.float32) for name in ("group_norm", "layer_norm")}
    with mock.patch.multiple(F, **layers):
        yield caches.clear


@cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return UNet2DConditionModel(**MODELS[name]).num_parameters()


@cache
def step(name: str, batch: int, autocast: bool, checkpointing: bool, filtered: bool, flops: bool = False):
    """FLOPs of a training step, or its bytes beside states and inputs: (null pass at most, held for backward, at most).

    Gradients count as states, as after a first micro-batch. Without autocast all is bf16, as under DeepSpeed.
    """
    config, peaks, counter = MODELS[name], [], FlopCounterMode(display=False)
    with FakeTensorMode(), gpu_layers(autocast) as leave_autocast:
        torch.set_default_dtype(torch.float32 if autocast else torch.bfloat16)
        unet = UNet2DConditionModel(**config).train()
        sample, target = torch.empty(2, batch, 4, config["sample_size"], config["sample_size"])
        prompts = {"encoder_hidden_states": torch.empty(batch, 77, config["cross_attention_dim"])}
        if name == "SDXL":
            prompts["added_cond_kwargs"] = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
        torch.set_default_dtype(torch.float32)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for weight in unet.parameters():
            weight.grad = torch.empty_like(weight)
        mem_filter = MemFilter(tau=float("inf") if filtered else None)
        wrapped = mem_filter.wrap(unet, null=tree_map(lambda rows: rows[:1], prompts))
        known = [sample, timesteps := torch.zeros(batch, dtype=torch.long), *tree_leaves(prompts), *wrapped.buffers()]
        live = Live([*known, *unet.parameters(), *(weight.grad for weight in unet.parameters())])
        unet.register_forward_hook(lambda *_: peaks.append(live.peak))
        with counter if flops else live:
            loss = mem_filter.loss(wrapped(sample, timesteps, **prompts).sample, target)
            leave_autocast()
            held = live.now
            loss.backward()
    return counter.get_total_flops() if flops else (peaks[0] if filtered else 0, held, live.peak)


@cache
def encoders(name: str) -> tuple[int, int]:
    """(bytes of VAE and text encoders, bytes beside them while the VAE encodes one picture, at most), in fp32."""
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    giant = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **kinds)
        models = [vae, CLIPTextModel(CLIPTextConfig(**large))]
        models += [CLIPTextModelWithProjection(CLIPTextConfig(**giant, projection_dim=1280))] * (name == "SDXL")
        picture = torch.empty(1, 3, *[8 * MODELS[name]["sample_size"]] * 2)
    with torch.no_grad(), gpu_layers(autocast=False), Live([picture, *vae.parameters()]) as live:
        vae.encode(picture)
    return 4 * sum(model.num_parameters() for model in models), live.peak


def memory(name: str, setup: Setup, devices: int, checkpointing: bool, filtered: bool, args) -> float:
    """Bytes on a device at most: states, encoders, and beside them the most of encoding, passes and update."""
    (frozen, picture), weights, batch = encoders(name), parameters(name), BATCH[name]
    top = step(name, batch, setup.stage < 0, checkpointing, filtered)[2] + setup.buckets * args.bucket * setup.gradients
    if setup.stage == 3 and devices > 1:
        top += min(weights, args.gathered) * setup.weights  # those of other devices that are there at a time
    update = weights * setup.update / (devices if setup.stage > 0 else 1)
    return weights * states(setup, devices) + frozen + max(batch * picture, top, update)


def print_table(title: str, columns: str, rows: list) -> None:
    print(f"\n### {title}\n")
    for row in (columns.split("; "), ["---"] * len(rows[0]), *rows):
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def print_steps() -> None:
    rows = []
    for name, yes in product(MODELS, YES):
        plain, more = (step(name, 1, False, yes, on, flops=True) / 1e12 for on in (False, True))
        rows.append([name, parameters(name) / 1e6, YES[yes], more - plain, plain, more, f"{more / plain - 1:.3f}"])
    print_table("TFLOP of a sample", "; million parameters; checkpointing; forward; step; step, filter; f", rows)
    rows = []
    for name, autocast, yes in product(MODELS, DTYPES, YES):
        (_, one, _), (_, held, plain) = (step(name, n, autocast, yes, False) for n in (1, BATCH[name]))
        null, _, filtered = step(name, BATCH[name], autocast, yes, True)
        each = (held - one) / (BATCH[name] - 1)
        sizes = (each, one - each, plain, null, filtered, BATCH[name] * encoders(name)[1], encoders(name)[0])
        cells = [*(size / 2**30 for size in sizes), (filtered - plain) / 2**20]
        rows.append([f"{name}, batch {BATCH[name]}", DTYPES[autocast], YES[yes], *cells])
    columns = "; weights; checkpointing; held a sample; held once; most; null pass; most, filter; VAE; frozen; + MiB"
    print_table("Activations and encoders of a device, GiB", columns, rows)


def print_devices(args) -> None:
    cases = list(product(("", ", filter"), args.devices))
    rows = [[label, *(float(states(setup, n)) for n in args.devices)] for label, setup in SETUPS.items()]
    print_table("States on each of N devices, bytes per parameter", "; ".join(map(str, ["", *args.devices])), rows)
    columns = "; ".join(["", "setup", "checkpointing", *(f"{n}{filtered}" for filtered, n in cases)])
    rows = [[f"{name}, batch {BATCH[name]}", label, YES[yes],
             *(memory(name, SETUPS[label], n, yes, bool(on), args) / 2**30 for on, n in cases)]
            for name, label, yes in product(MODELS, SETUPS, YES)]  # fmt: skip
    print_table("Memory of each of N devices, GiB", columns, rows)
    rows = [[name, label, *(traffic(SETUPS[label], n, bool(on)) * parameters(name) / 1e9 for on, n in cases)]
            for name, label in product(MODELS, SETUPS) if not label.endswith(("8-bit AdamW", "EMA"))]  # fmt: skip
    print_table("Sent by each of N devices in a step, GB", columns.replace("checkpointing; ", ""), rows)


def seconds(name: str, setup: Setup, devices: int, filtered: bool, rate: float, link: float) -> tuple[float, float]:
    """Of a step with checkpointing: passes send while they compute, or after; all but gathers goes in the backward."""
    plain, more = (BATCH[name] * step(name, 1, False, True, on, flops=True) / rate for on in (False, True))
    sent, gathered = (parameters(name) * traffic(setup, devices, on) / link for on in (False, True))
    forward, gather = more - plain, gathered - sent
    passes = [(forward, gather)] * (2 if filtered else 1) + [(plain - forward, sent - gather)]
    return sum(map(max, passes)), sum(map(sum, passes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--gathered", type=float, default=1e9, help="DeepSpeed's stage3_max_live_parameters")
    parser.add_argument("--bucket", type=float, default=5e8, help="DeepSpeed's reduce_bucket_size")
    parser.add_argument("--workers", type=int, default=8, help="devices of the example of times")
    parser.add_argument("--tflops", type=float, default=312, help="of a device on paper; an A100 in bf16")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of it that is reached")
    parser.add_argument("--links", nargs="+", default=["NVLink=300", "100 Gb/s Ethernet=12.5"], help="GB/s of a device")
    args = parser.parse_args()
    print_steps()
    print_devices(args)
    rows = []
    for name, label, link in product(MODELS, ("DDP, AdamW", "ZeRO-2", "ZeRO-3"), args.links):
        speeds = args.tflops * 1e12 * args.mfu, float(link.split("=")[1]) * 1e9
        plain, filtered = (seconds(name, SETUPS[label], args.workers, on, *speeds) for on in (False, True))
        cells = [*(f"{time:.3f}" for time in plain + filtered), filtered[0] / plain[0], filtered[1] / plain[1]]
        rows.append([f"{name}, batch {BATCH[name]}", label, link, *cells])
    columns = "; setup; link, GB/s; overlapped; in turn; overlapped, filter; in turn, filter; ratio; ratio, in turn"
    print_table(f"Seconds of a step with checkpointing on {args.workers} devices", columns, rows)


if __name__ == "__main__":
    main()
