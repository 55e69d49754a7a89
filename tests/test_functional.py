import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from memfilter.functional import (
    flow_noise_factor,
    keep_mask,
    log_gain,
    masked_loss,
    min_snr_weight,
    noise_factor,
    squared_error,
    text_cosine,
    text_norm,
)

SHAPES = [(1, 4, 8, 8), (3, 4, 64, 64), (5, 16, 6, 10), (7, 3), (2, 4, 3, 8, 8)]


def paper_norm(cond, null) -> np.ndarray:
    """Section 3.3 in float64: [B, ...] -> [B, N] -> root of the sum of squares."""
    difference = np.asarray(cond, np.float64) - np.asarray(null, np.float64)
    return np.sqrt((difference.reshape(len(difference), -1) ** 2).sum(1))


def paper_loss(pred, target, keep, divisor) -> float:
    difference = np.asarray(pred, np.float64) - np.asarray(target, np.float64)
    per_sample = (difference.reshape(len(difference), -1) ** 2).mean(1)
    return sum(loss for loss, kept in zip(per_sample, keep, strict=True) if kept) / divisor


@pytest.mark.parametrize("shape", SHAPES)
def test_text_norm_is_the_root_of_the_sum_of_squares_per_sample(shape):
    cond, null = torch.randn(2, *shape)
    assert text_norm(cond, null).shape == shape[:1]
    np.testing.assert_allclose(text_norm(cond, null), paper_norm(cond, null), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_unit_is_the_root_of_the_mean_of_squares(shape):
    cond, null = torch.randn(2, *shape)
    elements = np.prod(shape[1:])
    np.testing.assert_allclose(text_norm(cond, null, unit="rms"), paper_norm(cond, null) / elements**0.5, rtol=1e-6)


def test_four_in_the_papers_unit_is_a_thirty_second_in_rms_for_stable_diffusion():
    cond = torch.full((1, 4, 64, 64), 4 / 128)
    assert text_norm(cond, torch.zeros_like(cond)).item() == 4.0
    assert text_norm(cond, torch.zeros_like(cond), unit="rms").item() == 4 / 128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_squared_and_summed_in_fp32(dtype):
    # 300^2 overflows fp16, and bf16 cannot count to 16384
    cond, null = (300 + torch.rand(2, 4, 64, 64)).to(dtype), torch.rand(2, 4, 64, 64).to(dtype)
    norm = text_norm(cond, null)
    assert norm.dtype == torch.float32
    np.testing.assert_allclose(norm, paper_norm(cond.double(), null.double()), rtol=1e-6)
    loss = masked_loss(cond, null, torch.tensor([True, True]))
    assert loss.dtype == torch.float32
    expected = paper_loss(cond.double(), null.double(), [True, True], 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_double_precision_stays_double():
    cond, null = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    assert text_norm(cond, null).dtype == torch.float64
    np.testing.assert_allclose(text_norm(cond, null), paper_norm(cond, null), rtol=1e-14)


# squares of 300 overflow fp16, and bf16 cannot count to 16384; numpy in fp64 sees the rounded numbers
PRECISE = {torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-12}


def rounded(dtype) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Three predictions [3, 4, 64, 64] that have much in common, as they are and as [3, N] in float64."""
    common = 300 + torch.rand(3, 4, 64, 64, dtype=torch.float64)
    shares = torch.tensor([-0.5, 0.01, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    noise = 100 * torch.randn(3, *common.shape, dtype=torch.float64)
    made = [part.to(dtype) for part in (common * (1 + shares) + noise[0], common + noise[1], noise[2])]
    return [(part, part.double().numpy().reshape(3, -1)) for part in made]


def assert_precise(found, expected, dtype):
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=PRECISE[dtype], atol=PRECISE[dtype])  # what is near 0 is a difference


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
def test_text_cosine_is_that_between_the_conditional_part_and_the_null_prediction(dtype):
    (cond, a), (null, b), _ = rounded(dtype)
    expected = ((a - b) * b).sum(1) / np.sqrt(((a - b) ** 2).sum(1) * (b**2).sum(1))
    assert expected.min() < -0.5 and expected.max() > 0.5
    assert_precise(text_cosine(cond, null), expected, dtype)
    assert text_cosine(cond, cond).tolist() == [0] * 3  # no conditional part: 0, not NaN


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
def test_squared_error_is_the_mean_of_squares_per_sample(dtype):
    (pred, a), _, (target, b) = rounded(dtype)
    assert_precise(squared_error(pred, target), ((a - b) ** 2).mean(1), dtype)


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
def test_gain_is_the_logarithm_of_the_null_errors_ratio_to_the_conditional_one(dtype):
    (cond, a), (null, b), (target, c) = rounded(dtype)
    expected = np.log(((b - c) ** 2).mean(1) / ((a - c) ** 2).mean(1))
    assert expected.min() < -0.5 and expected.max() > 0.5
    assert_precise(log_gain(squared_error(cond, target), squared_error(null, target)), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gain_at_an_error_of_zero_is_that_of_the_smallest_number(dtype):
    error, zero = torch.tensor([1e-3, 1.0, 40.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    expected = np.log(error.double().numpy()) - np.log(float(torch.finfo(dtype).tiny))
    np.testing.assert_allclose(log_gain(zero, error), expected, rtol=1e-6)
    np.testing.assert_allclose(log_gain(error, zero), -expected, rtol=1e-6)
    assert log_gain(zero, zero).tolist() == [0] * 3


@pytest.mark.parametrize("tau", [0.5, 3.0, 5.0, 13.0, float("inf")])
def test_a_norm_of_exactly_tau_is_dropped(tau):
    # Pythagorean: 3-4-5 and 5-12-13 have exact norms; the others are on the axes
    cond = torch.tensor([[3.0, 4.0], [5.0, 12.0], [0.5, 0.0], [0.0, 3.0], [0.0, 0.0]])
    norm = text_norm(cond, torch.zeros_like(cond))
    assert norm.tolist() == [5.0, 13.0, 0.5, 3.0, 0.0]
    assert keep_mask(norm, tau).tolist() == [n < tau for n in (5.0, 13.0, 0.5, 3.0, 0.0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantile", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("reduction", ["kept", "batch"])
def test_masked_loss_is_the_papers_arithmetic(shape, quantile, reduction):
    cond, null, target = torch.randn(3, *shape)
    norms = paper_norm(cond, null)
    tau = float(np.quantile(norms, quantile)) + (1e-3 if quantile == 1 else 0)
    keep = keep_mask(text_norm(cond.double(), null.double()), tau)
    assert keep.tolist() == [norm < tau for norm in norms]
    divisor = max(1, sum(norms < tau)) if reduction == "kept" else shape[0]
    expected = paper_loss(cond, target, norms < tau, divisor)
    np.testing.assert_allclose(masked_loss(cond, target, keep, reduction), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reduction", ["kept", "batch"])
def test_nothing_kept_gives_zero_loss_and_gradients_of_exactly_zero(reduction):
    net = torch.nn.Linear(6, 6)
    loss = masked_loss(net(torch.randn(4, 6)), torch.randn(4, 6), torch.zeros(4, dtype=torch.bool), reduction)
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("reduction", ["kept", "batch"])
def test_a_broken_prediction_that_is_dropped_reaches_neither_loss_nor_gradients(bad, reduction):
    pred, target = torch.randn(2, 3, 4, 8, 8)
    pred[1, 2, 3, 4] = bad
    pred.requires_grad_()
    loss = masked_loss(pred, target, torch.tensor([True, False, True]), reduction)
    loss.backward()
    clean = pred.detach()[[0, 2]]
    np.testing.assert_allclose(
        loss.item(), paper_loss(clean, target[[0, 2]], [1, 1], 2 if reduction == "kept" else 3), rtol=1e-6
    )
    assert not pred.grad[1].any()
    assert pred.grad[[0, 2]].isfinite().all() and pred.grad[[0, 2]].any()


def test_gradient_is_that_of_the_kept_samples_alone():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 1)).double()
    x, target = torch.randn(6, 4, 8, 8).double(), torch.randn(6, 4, 6, 6).double()
    keep = torch.tensor([True, False, True, True, False, False])
    masked = torch.autograd.grad(masked_loss(net(x), target, keep), net.parameters())
    alone = torch.autograd.grad(torch.nn.functional.mse_loss(net(x[keep]), target[keep]), net.parameters())
    by_batch = torch.autograd.grad(masked_loss(net(x), target, keep, "batch"), net.parameters())
    for m, a, b in zip(masked, alone, by_batch, strict=True):
        torch.testing.assert_close(m, a, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(b, a * 3 / 6, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["kept", "batch"])
def test_weight_is_a_factor_of_every_kept_samples_error_and_not_of_the_divisor(reduction):
    pred, target = torch.randn(2, 5, 4, 6, 6)
    weight, keep = torch.tensor([0.5, 3.0, 0.0, 7.0, 1.0]), torch.tensor([True, True, True, False, True])
    errors = ((pred.double() - target.double()) ** 2).numpy().reshape(5, -1).mean(1)
    expected = (errors * [0.5, 3, 0, 0, 1]).sum() / (4 if reduction == "kept" else 5)
    np.testing.assert_allclose(masked_loss(pred, target, keep, reduction, weight), expected, rtol=1e-6)
    ones = masked_loss(pred, target, keep, reduction, torch.ones(5))
    assert torch.equal(ones, masked_loss(pred, target, keep, reduction))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weight_of_a_dropped_sample_reaches_neither_loss_nor_gradients(bad):
    pred, target = torch.randn(2, 3, 4, 8, 8)
    pred.requires_grad_()
    keep = torch.tensor([True, False, True])
    loss = masked_loss(pred, target, keep, weight=torch.tensor([2.0, bad, 4.0]))
    loss.backward()
    clean = pred.detach()
    alone = 2 * paper_loss(clean[:1], target[:1], [1], 1) + 4 * paper_loss(clean[2:], target[2:], [1], 1)
    np.testing.assert_allclose(loss.item(), alone / 2, rtol=1e-6)
    assert not pred.grad[1].any() and pred.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e6])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weight_is_that_of_diffusers_trainers(prediction_type, gamma):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, torch.arange(1000)).double().numpy()
    clipped = np.minimum(snr, gamma)
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction_type]
    assert gamma == 1e6 or (snr < gamma).any() and (snr > gamma).any()
    np.testing.assert_allclose(min_snr_weight(prediction_type, scheduler.alphas_cumprod, gamma), expected, rtol=1e-4)


@pytest.mark.parametrize("prediction_type, limits", [("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("sample", [0, 5])])
def test_min_snr_weight_has_its_limits_without_signal_and_without_noise(prediction_type, limits):
    abar = torch.tensor([0, 1], dtype=torch.float64)
    assert min_snr_weight(prediction_type, abar, 5.0).tolist() == limits
    near = min_snr_weight(prediction_type, (abar - 1e-9).abs(), 5.0)
    np.testing.assert_allclose(near, limits, atol=1e-7)


def epsilon_model():
    """f(x_t, t, e): a noise prediction that depends on all three, in float64."""
    layers = torch.nn.Linear(4 * 36 + 1 + 5, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4 * 36)
    net = torch.nn.Sequential(*layers).double()

    def predict(x, t, e):
        return net(torch.cat([x.flatten(1), t[:, None] / 1000, e], 1)).view_as(x)

    return predict


@torch.no_grad()
def epsilon_predictions(batch: int = 8):
    x, e, null = torch.randn(batch, 4, 6, 6).double(), torch.randn(batch, 5).double(), torch.zeros(batch, 5).double()
    t = torch.linspace(0, 998, batch).round()
    f = epsilon_model()
    return x, t.long(), f(x, t, e), f(x, t, null)


@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_norm_is_that_of_the_noise_whatever_the_model_predicts(prediction_type, schedule):
    x, t, eps, eps_null = epsilon_predictions()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule)
    abar = scheduler.alphas_cumprod.double()[t]
    a = abar.view(-1, 1, 1, 1)

    def as_predicted(eps):
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return {"epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0, "sample": x0}[prediction_type]

    norm = text_norm(as_predicted(eps), as_predicted(eps_null), noise_factor(prediction_type, abar))
    np.testing.assert_allclose(norm, paper_norm(eps, eps_null), rtol=1e-9)


def test_v_prediction_of_diffusers_is_the_one_that_is_converted():
    scheduler = DDPMScheduler()
    x0, eps, t = torch.randn(5, 4, 6, 6), torch.randn(5, 4, 6, 6), torch.tensor([0, 1, 400, 800, 999])
    noisy, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    a = scheduler.alphas_cumprod[t]
    # another eps at the same x_t means another x0 at the same x_t
    other = eps + torch.randn_like(eps)
    x0_other = (noisy - (1 - a).sqrt().view(-1, 1, 1, 1) * other) / a.sqrt().view(-1, 1, 1, 1)
    v_other = scheduler.get_velocity(x0_other, other, t)
    norm = text_norm(v, v_other, noise_factor("v_prediction", a))
    np.testing.assert_allclose(norm, paper_norm(eps, other), rtol=1e-4)


def test_norm_is_that_of_the_noise_for_rectified_flow():
    x, _, eps, eps_null = epsilon_predictions()
    sigmas = torch.linspace(0, 0.95, len(x)).double()
    s = sigmas.view(-1, 1, 1, 1)

    def velocity(eps):
        return eps - (x - s * eps) / (1 - s)  # v = eps - x0 at fixed x_t = (1 - s) x0 + s eps

    norm = text_norm(velocity(eps), velocity(eps_null), flow_noise_factor(sigmas))
    np.testing.assert_allclose(norm, paper_norm(eps, eps_null), rtol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_factor_is_zero_at_zero_terminal_snr_and_only_there(prediction_type):
    abar = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type).alphas_cumprod
    factor = noise_factor(prediction_type, abar)
    assert (factor == 0).nonzero().flatten().tolist() == [999]
    assert factor.isfinite().all()


def test_factor_is_zero_at_pure_noise_in_rectified_flow():
    assert flow_noise_factor(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 0.75, 0.0]


def test_unknown_names_are_refused_by_name():
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="velocity.*epsilon"):
        noise_factor("velocity", x)
    with pytest.raises(ValueError, match="velocity.*epsilon"):
        min_snr_weight("velocity", x, 5.0)
    with pytest.raises(ValueError, match="max.*l2"):
        text_norm(x, x, unit="max")
    with pytest.raises(ValueError, match="sum.*kept"):
        masked_loss(x, x, torch.tensor([True]), "sum")
