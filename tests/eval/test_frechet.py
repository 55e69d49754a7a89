import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from memfilter.eval import frechet
from memfilter.eval.agreement import load_scorer, scorer_features
from memfilter.eval.frechet import distances


def gaussian(count: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """Points [count, D] whose sample mean and covariance are exactly these."""
    points = np.random.default_rng(seed).normal(size=(count, len(mean)))
    points -= points.mean(0)
    points @= np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return points @ np.linalg.cholesky(covariance).T + mean


def between(made: np.ndarray, real: np.ndarray) -> dict:
    """A picture's first two pixels are the number of its features in a table."""
    table = np.concatenate([made, real]).astype(np.float32)
    pictures = np.zeros((len(table), 4, 4, 3), np.uint8)
    pictures[:, 0, 0, 0], pictures[:, 0, 1, 0] = np.divmod(np.arange(len(table)), 256)
    cut = len(made)
    return distances(
        lambda p: table[p[:, 0, :2, 0] @ np.array([256, 1])],
        pictures[:cut],
        (pictures[start : start + 37] for start in range(cut, len(table), 37)),
    )


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, 6))
    factors = rng.normal(size=(2, 6, 6))
    a, b = (factor @ factor.T + 0.5 * np.eye(6) for factor in factors)  # which do not commute
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = between(gaussian(300, means[0], a, 1), gaussian(500, means[1], b, 2))
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert (found["generated"], found["training"]) == (300, 500)


def test_frechet_distance_of_independent_dimensions_by_hand():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    found = between(gaussian(50, np.zeros(3), np.diag(a), 1), gaussian(80, np.array([2.0, 0, 0]), np.diag(b), 2))
    assert found["frechet_distance"] == pytest.approx(4 + 1 + 0 + 4, rel=1e-4)  # 2^2, (1-2)^2, (2-2)^2, (3-1)^2


def test_kernel_distance_is_the_unbiased_estimate_with_the_cubic_kernel():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 5)), rng.normal(0.5, 1, size=(40, 5))

    def kernel(a, b):
        return (a @ b.T / 5 + 1) ** 3

    within = [(kernel(p, p).sum() - np.trace(kernel(p, p))) / (40 * 39) for p in (x, y)]
    found = between(x, y)  # of 40 each: every subset is all of them
    assert found["kid"] == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-4)
    assert found["kid_std"] == pytest.approx(0, abs=1e-5)


def test_kernel_distance_of_features_of_unit_length_is_no_rounding():
    rng = np.random.default_rng(3)
    x, y = (points / np.linalg.norm(points, axis=1, keepdims=True) for points in rng.normal(0.1, 1, size=(2, 40, 3072)))
    x, y = x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)

    def kernel(a, b):
        return (a @ b.T / 3072 + 1) ** 3

    within = [(kernel(p, p).sum() - np.trace(kernel(p, p))) / (40 * 39) for p in (x, y)]
    found = between(x, y)
    assert found["kid"] == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-4)
    assert found["kid_std"] < 1e-12


def test_subsets_are_the_same_each_time_and_leave_other_draws_alone(monkeypatch):
    monkeypatch.setattr(frechet, "SUBSET", 10)
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 5)), rng.normal(0.5, 1, size=(40, 5))
    state = torch.get_rng_state()
    first, second = between(x, y), between(x, y)
    assert first == second and first["kid_std"] > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_single_picture_is_refused():
    with pytest.raises(ValueError, match="needs two pictures on either side, found 1 generated and 9 training"):
        between(np.ones((1, 3)), np.ones((9, 3)))


def test_scorers_features_are_what_its_classifiers_see():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features, scorer = scorer_features(pictures), load_scorer()
    with torch.no_grad():
        logits, _ = scorer(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    weight, bias = scorer.object.weight.detach().numpy(), scorer.object.bias.detach().numpy()
    assert features @ weight.T + bias == pytest.approx(logits.numpy(), abs=1e-3)


def test_neither_torchvision_nor_torch_fidelity_is_imported():
    script = """
import sys
import numpy as np
from memfilter.eval.frechet import distances
x = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 3), dtype=np.uint8)
distances(lambda p: p.reshape(len(p), -1)[:, :2].astype(np.float32), x, [x])
print({"torchvision", "torch_fidelity"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
