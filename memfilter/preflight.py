"""What would make the norm meaningless, found before training instead of after."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from memfilter.functional import PREDICTION_TYPES, noise_factor

PAPER_LATENTS = (4, 64, 64)  # Stable Diffusion at 512 px, for which the paper's tau of 2..6 is meant


class UnsuitableModel(ValueError):
    """The norm of this model would be meaningless; the message has one line for every reason."""


def validate(
    unet: nn.Module,
    *,
    scheduler=None,
    text_encoders: Iterable[nn.Module | None] = (),
    latent_shape: tuple[int, ...] | None = None,
    tau: float | None = None,
    unit: str = "l2",
) -> list[str]:
    """Collects every reason why the norm would be meaningless.

    The norm compares two predictions of one network, so nothing but the prompt may differ between the two passes.

    Args:
        unet: the denoiser, before it is wrapped.
        scheduler: the noise scheduler of training.
        text_encoders: those that make the prompts' embeddings; the embedding of the empty prompt is made once.
        latent_shape: (C, h, w) of one sample.
        tau, unit: as `MemFilter` takes them.

    Returns:
        Hints: what works, but perhaps not as meant.

    Raises:
        UnsuitableModel: with all reasons.
    """
    reasons, hints = [], []
    if dropout := [name for name, module in unet.named_modules() if _drops(module)]:
        reasons.append(f"{_some(dropout)} of the denoiser drop activations at random, differently for the empty prompt: "
                       "set their p to 0")  # fmt: skip
    norms = nn.modules.batchnorm._BatchNorm
    if batch_norm := [name for name, m in unet.named_modules() if isinstance(m, norms)]:
        reasons.append(f"{_some(batch_norm)} of the denoiser are BatchNorm: a sample's prediction depends on its batch, "
                       "and the extra pass moves their statistics: use GroupNorm")  # fmt: skip
    config = getattr(unet, "config", None)
    taken, given = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if taken and given and given > taken:
        reasons.append(f"the denoiser has {given} output channels for {taken}: a variance that is learned along would count into "
                       "the norm")  # fmt: skip
    for encoder in text_encoders:
        if encoder is not None and any(p.requires_grad for p in encoder.parameters()):
            reasons.append(f"{type(encoder).__name__} is trained, but the embedding of the empty prompt is made once and "
                           "would be stale: freeze it with requires_grad_(False)")  # fmt: skip
    if scheduler is not None:
        _scheduler(scheduler, reasons, hints)
    if tau is not None and 0 < tau < float("inf") and unit == "l2" and latent_shape not in (None, PAPER_LATENTS):
        shape, paper = ("x".join(map(str, s)) for s in (latent_shape, PAPER_LATENTS))
        hints.append(f"filter.tau={tau:g} in l2 is on the scale of latents of {shape}, not of the paper's {paper}: "
                     "filter.unit=rms carries over between sizes (the paper's 4 is 4 / 128)")  # fmt: skip
    if reasons:
        raise UnsuitableModel("\n".join(reasons))
    return hints


def _scheduler(scheduler, reasons: list[str], hints: list[str]) -> None:
    kind, alphas_cumprod = scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if kind not in PREDICTION_TYPES:
        reasons.append(f"the scheduler's prediction_type is {kind!r}: expected one of {', '.join(PREDICTION_TYPES)}")
    elif alphas_cumprod is None:
        reasons.append(f"{type(scheduler).__name__} has no alphas_cumprod: pass the DDPMScheduler of training")
    else:
        blind = (noise_factor(kind, alphas_cumprod) == 0).nonzero().flatten().tolist()
        if blind:
            hints.append(f"timesteps {_some(map(str, blind))} have no signal (zero terminal SNR): a {kind} says nothing "
                         "about the noise there; they are trained on and counted as unchecked")  # fmt: skip
        if kind == "epsilon" and (alphas_cumprod == 0).any():
            reasons.append("a scheduler with zero terminal SNR cannot train epsilon prediction: use v_prediction")


def _drops(module: nn.Module) -> bool:
    # LoRA and diffusers leave dropout layers with p = 0 behind, which do nothing
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
