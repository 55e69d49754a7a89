import math

import pytest
import torch
from simulated import NAN, draw, reference

from memfilter.reference import SIGNALS, Reference
from memfilter.threshold import TimestepThreshold

NORM = SIGNALS.index("norm")


def norms(values: torch.Tensor) -> torch.Tensor:
    """Signals of which only the norm was measured: [n] -> [n, 4]"""
    signals = torch.full((len(values), len(SIGNALS)), NAN)
    signals[:, NORM] = values
    return signals


def shares_above(held: list[torch.Tensor], norm: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Conformal p-values, one at a time."""
    return torch.tensor([(1 + int((held[b] >= x).sum())) / (len(held[b]) + 1)
                         for x, b in zip(norm, bins.tolist(), strict=True)], dtype=torch.float64)  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.25, 0.5])
def test_sample_is_dropped_exactly_where_its_p_value_is_at_most_the_rate(rate, ties):
    g = torch.Generator().manual_seed(1)
    counts = (0, 1, 9, 30, 64)  # bins that are empty, too short for the rate, and full
    made = Reference(64, bins=len(counts))
    held = [torch.rand(count, generator=g) * (b + 1) for b, count in enumerate(counts)]
    held = [(10 * norm).round() / 10 if ties else norm for norm in held]
    for b, norm in enumerate(held):
        made.add(torch.full((len(norm),), 200 * b), norms(norm))
    norm, bins = torch.rand(600, generator=g) * 6, torch.randint(len(counts), (600,), generator=g)
    norm = torch.cat([(10 * norm).round() / 10 if ties else norm, *held])  # those of the reference among them
    bins = torch.cat([bins, *(torch.full((len(h),), b) for b, h in enumerate(held))])
    keep = TimestepThreshold(made, rate)(norm, 200 * bins + 199)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, shares_above(held, norm, bins) > rate + 1e-12)
    assert keep.any() and not keep.all()


def test_of_ordinary_samples_at_most_the_rate_is_dropped_at_every_timestep():
    made, (timesteps, signals) = reference(size=64), draw(20_000, 1, 0.0, seed=7)
    keep = TimestepThreshold(made, 0.1)(signals[:, 0, NORM], timesteps.flatten())
    # over the draw of ten bins of 64: 0.1 with a standard deviation of sqrt(0.1 * 0.9 / 64 / 10)
    assert abs((~keep).double().mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 640)


def test_sample_that_is_ordinary_at_one_timestep_is_dropped_at_another():
    made = Reference(9, bins=2)
    made.add(torch.zeros(9), norms(torch.arange(1.0, 10.0)))
    made.add(torch.full((9,), 999), norms(torch.arange(10.0, 19.0)))
    keep = TimestepThreshold(made, 0.1)(torch.full((2,), 9.5), torch.tensor([0, 999]))
    assert keep.tolist() == [False, True]


def test_rule_follows_what_is_added_to_its_reference():
    made = Reference(9, bins=1)
    rule, probe = TimestepThreshold(made, 0.1), torch.tensor([5.0, 50.0])
    assert rule(probe, torch.zeros(2)).tolist() == [True, True]  # nothing is known yet
    made.add(torch.zeros(9), norms(torch.arange(1.0, 10.0)))
    assert rule(probe, torch.zeros(2)).tolist() == [True, False]
    made.add(torch.zeros(9), norms(torch.arange(1.0, 10.0) / 10))
    assert rule(probe, torch.zeros(2)).tolist() == [False, False]
    other = Reference(9, bins=1)
    other.add(torch.zeros(9), norms(torch.arange(100.0, 109.0)))
    made.load_state_dict(other.state_dict())
    assert rule(probe, torch.zeros(2)).tolist() == [True, True]


@pytest.mark.parametrize("bins, total", [(10, 1000), (7, 50), (3, 1000)])
def test_last_timestep_goes_by_the_last_bin_and_the_first_by_the_first(bins, total):
    made = Reference(9, bins, total)
    for b in range(bins):
        inside = next(t for t in range(total) if t * bins // total == b)
        made.add(torch.full((9,), inside), norms(torch.full((9,), float(b))))
    rule = TimestepThreshold(made, 0.1)
    at = torch.tensor([total - 1, 0])
    assert rule(torch.tensor([bins - 1.0, 0.0]), at).tolist() == [True, True]  # all of its bin are as large
    assert rule(torch.tensor([bins - 0.9, 0.1]), at).tolist() == [False, False]
    assert rule(torch.tensor([bins - 1.1, -0.1]), at).tolist() == [True, True]


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=f"filter.false_positive_rate must lie between 0 and 1, found {rate}"):
        TimestepThreshold(Reference(64), rate)


@pytest.mark.parametrize("rate, size, needed", [(0.02, 48, 49), (0.001, 64, 999), (0.3, 2, 3), (0.5, 0, 1)])
def test_rate_at_which_nothing_could_ever_be_dropped_is_refused_with_what_it_needs(rate, size, needed):
    with pytest.raises(ValueError, match=f"false_positive_rate={rate} needs.*at least {needed} norms a bin.*{size}"):
        TimestepThreshold(Reference(size), rate)
    TimestepThreshold(Reference(needed), rate)


@pytest.mark.parametrize("size", [1, 9, 19, 48, 64, 99, 127, 999])
def test_smallest_rate_that_a_reference_allows_is_taken_and_drops_what_is_above_all_of_it(size):
    made = Reference(size, bins=1)
    made.add(torch.zeros(size), norms(torch.arange(1.0, size + 1)))
    largest = torch.tensor(float(size))
    norm = torch.stack([largest, largest.nextafter(torch.tensor(math.inf)), largest + 0.5])
    assert TimestepThreshold(made, 1 / (size + 1))(norm, torch.zeros(3)).tolist() == [True, False, False]
