"""The method as pure functions of tensors. Equations are those of Wen et al., "Detecting, Explaining, and Mitigating
Memorization in Diffusion Models" (ICLR 2024), unless another source is named."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
REDUCTIONS = ("kept", "kept_global", "batch")
UNITS = ("l2", "rms")


def noise_factor(prediction_type: str, alphas_cumprod: Tensor) -> Tensor:
    """What a difference of two predictions at one x_t is multiplied by to become a difference of noise predictions.

    From x_t = sqrt(abar) x0 + sqrt(1 - abar) eps (Eq. 2) with x_t held fixed:
    ``epsilon``: 1; ``v_prediction`` (v = sqrt(abar) eps - sqrt(1 - abar) x0): sqrt(abar);
    ``sample`` (x0): -sqrt(abar / (1 - abar)).

    Args:
        prediction_type: as diffusers schedulers name it.
        alphas_cumprod: abar_t, any shape.

    Returns:
        Same shape as ``alphas_cumprod``. It is 0 where the prediction says nothing about the noise
        (v and x0 at zero terminal SNR): such timesteps cannot be checked.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return torch.ones_like(alphas_cumprod)
    if prediction_type == "v_prediction":
        return alphas_cumprod.sqrt()
    if prediction_type == "sample":
        return -(alphas_cumprod / (1 - alphas_cumprod)).sqrt()
    raise ValueError(f"unknown prediction type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")


def flow_noise_factor(sigmas: Tensor) -> Tensor:
    """`noise_factor` for rectified flow: x_t = (1 - s) x0 + s eps and v = eps - x0 give d_eps = (1 - s) d_v."""
    return 1 - sigmas


def min_snr_weight(prediction_type: str, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Min-SNR loss weight of Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023).

    With snr = abar / (1 - abar): ``epsilon``: min(snr, gamma) / snr; ``v_prediction``: min(snr, gamma) / (snr + 1);
    ``sample``: min(snr, gamma).

    Args:
        prediction_type: as diffusers schedulers name it.
        alphas_cumprod: abar_t, any shape.
        gamma: 5 in the paper.

    Returns:
        Same shape as ``alphas_cumprod``. Where abar is 0 an epsilon weight is 1, its limit.

    Raises:
        ValueError: unknown prediction type.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "epsilon":
        return torch.where(snr > gamma, gamma / snr, 1.0)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    raise ValueError(f"unknown prediction type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")


def text_norm(cond: Tensor, null: Tensor, factor: Tensor | None = None, unit: str = "l2") -> Tensor:
    """Magnitude of the text-conditional noise prediction, ||eps(x_t, e_p) - eps(x_t, e_null)||_2 (Section 3.3).

    Args:
        cond: prediction for the prompt, [B, ...].
        null: prediction for the empty prompt at the same noisy latents and timesteps, [B, ...].
        factor: [B] of `noise_factor` where the model does not predict the noise itself.
        unit: ``l2``, the paper's, grows with the number of latent elements; ``rms`` divides by its square root,
            so that a threshold carries over to another resolution (4 for SD at 512 px is 4 / 128 in rms).

    Returns:
        [B], in fp32 at least.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}: expected one of {', '.join(UNITS)}")
    precise = torch.promote_types(cond.dtype, torch.float32)
    difference = (cond.to(precise) - null.to(precise)).flatten(1)  # [B, ...] -> [B, N]
    norm = torch.linalg.vector_norm(difference, dim=1)  # [B, N] -> [B]
    if unit == "rms":
        norm = norm / difference.shape[1] ** 0.5
    return norm if factor is None else norm * factor.to(norm).abs()


def text_cosine(cond: Tensor, null: Tensor) -> Tensor:
    """Cosine between the text-conditional prediction, cond - null, and null: [B, ...] twice -> [B], in fp32 at least.

    Memorized samples show a high one at low noise (Asthana and Belagiannis, "Detecting and Mitigating Memorization in
    Diffusion Models through Anisotropy of the Log-Probability", ICLR 2026), where v and noise predictions are all but the
    same; of other prediction types it is taken as it is.
    """
    precise = torch.promote_types(cond.dtype, torch.float32)
    cond, null = cond.to(precise).flatten(1), null.to(precise).flatten(1)
    return torch.nn.functional.cosine_similarity(cond - null, null)


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample: [B, ...] twice -> [B], in fp32 at least."""
    precise = torch.promote_types(pred.dtype, torch.float32)
    return (pred.to(precise) - target.to(precise)).square().flatten(1).mean(1)


def log_gain(cond_error: Tensor, null_error: Tensor) -> Tensor:
    """log(error of the null prediction / error of the conditional one): what the prompt explains of this very noise. [B]

    At one noise level the difference of the two errors is, up to a factor, the integrand of log p(x | prompt) - log p(x)
    (Kong et al., "Interpretable Diffusion via Information Decomposition", ICLR 2024); for a memorized pair the prompt
    tells all of x. A ratio, it is the same in noise, v and x0 space.
    """
    smallest = torch.finfo(cond_error.dtype).tiny
    return null_error.clamp(min=smallest).log() - cond_error.clamp(min=smallest).log()


def keep_mask(norm: Tensor, tau: float) -> Tensor:
    """Which samples stay in the loss: ``norm < tau``, strictly (Section 4.3). [B] -> bool [B].

    A NaN compares false and would be dropped without a word: check for it first, as `MemFilter` does.
    """
    return norm < tau


def masked_loss(
    pred: Tensor, target: Tensor, keep: Tensor, reduction: str = "kept", weight: Tensor | None = None
) -> Tensor:
    """Mean squared error over the samples that are kept.

    Args:
        pred, target: [B, ...].
        keep: bool [B].
        weight: [B], a factor for every sample's error, such as `min_snr_weight`; None for 1.
        reduction: ``kept``: mean over the kept samples, as the official code does on one device; ``kept_global``: their
            sum, which somebody divides by the number kept on all ranks and in all micro-batches of an optimizer step
            (`MemFilter.before_step` does); ``batch``: the sum divided by the batch size, so that a dropped sample
            weighs as much as a kept one.

    Returns:
        A scalar in fp32 at least. With nothing kept it is 0 and still has its graph, so that backward runs on every
        rank and gives gradients of exactly 0.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    precise = torch.promote_types(pred.dtype, torch.float32)
    shape = (-1,) + (1,) * (pred.ndim - 1)
    # a dropped sample may hold anything, even NaN, and NaN * 0 is NaN: select, do not multiply
    difference = torch.where(keep.view(shape), pred.to(precise) - target.to(precise), 0)
    per_sample = difference.square().flatten(1).mean(1)  # [B, ...] -> [B]
    if weight is not None:
        per_sample = per_sample * torch.where(keep, weight.to(per_sample), 0)
    count = {"kept": keep.sum().clamp(min=1), "kept_global": 1, "batch": len(keep)}[reduction]
    return per_sample.sum() / count
