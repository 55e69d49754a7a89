import math

import pytest
import torch

from memfilter.threshold import FixedThreshold


@pytest.mark.parametrize("tau", [0, 0.0, -0.0, -1, -math.inf, math.nan, True, False])
def test_tau_that_is_not_a_positive_number_is_refused(tau):
    with pytest.raises(ValueError, match=f"filter.tau.*found {tau}"):
        FixedThreshold(tau)


@pytest.mark.parametrize("tau", [4, 4.0, 1e-9, math.inf])
def test_positive_tau_is_taken(tau):
    assert FixedThreshold(tau).tau == tau


def test_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="filter.unit.*l2, rms.*'L2'"):
        FixedThreshold(4.0, "L2")


def test_infinite_tau_keeps_every_finite_norm():
    norm = torch.tensor([0.0, 4.0, torch.finfo(torch.float32).max])
    assert FixedThreshold(math.inf)(norm, torch.zeros(3)).all()


def test_threshold_is_strict_at_every_timestep():
    below, at, above = torch.nextafter(torch.tensor(4.0), torch.tensor(0.0)).item(), 4.0, 4.0000005
    for t in (0, 500, 999):
        keep = FixedThreshold(4.0)(torch.tensor([below, at, above]), torch.full((3,), t))
        assert keep.tolist() == [True, False, False]
