import math

import pytest
import torch
from safetensors.torch import load, save
from simulated import DIRECTION, NAN, ByHand, draw, reference

from memfilter.reference import SIGNALS, Reference


def lattice(count: int, seed: int = 0, missing: float = 0.2, timesteps: int = 1000):
    """Timesteps [n] and signals [n, 4] of few values, so that many tie, some of them not measured."""
    g = torch.Generator().manual_seed(seed)
    signals = torch.randint(6, (count, 4), generator=g).float()
    signals[torch.rand(count, 4, generator=g) < missing] = NAN
    return torch.randint(timesteps, (count,), generator=g), signals


def same_state(a: Reference, b: Reference, *names: str) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name].nan_to_num(-9), b[name].nan_to_num(-9)) for name in names or a)


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("bins, total", [(10, 1000), (7, 1000), (1, 1000), (10, 50)])
def test_p_values_are_those_counted_by_hand_with_ties_and_gaps_and_empty_bins(middle, bins, total):
    made = Reference(12, bins, total)
    oracle = ByHand.like(made)
    for seed, count in enumerate((3, 40, 1, 90)):
        timesteps, signals = lattice(count, seed, timesteps=total // 2 + 1)
        made.add(timesteps, signals)
        oracle.add(timesteps.tolist(), signals.tolist())
    timesteps, signals = lattice(200, seed=9, timesteps=total)
    expected = [oracle.p(t, row, middle) for t, row in zip(timesteps.tolist(), signals.tolist(), strict=True)]
    found = made.p_values(timesteps, signals, middle)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(found.isnan(), signals.isnan()) and bool(signals.isnan().any())
    if bins > 1:  # the upper bins are empty
        nothing = made.p_values(torch.full((4,), total - 1), torch.eye(4))
        assert (nothing == 1).all()
        assert (made.p_values(torch.full((4,), total - 1), torch.eye(4), middle=True) == 0.5).all()


@pytest.mark.parametrize("ties", [False, True])
def test_p_value_of_an_exchangeable_sample_is_at_most_a_with_a_probability_of_at_most_a(ties):
    # every bin is a trial of its own: 19 values, and a twentieth from the same distribution
    bins = 400
    made = Reference(19, bins, bins)
    g = torch.Generator().manual_seed(3)
    drawn = torch.randn(20, bins, 4, generator=g).exp()
    if ties:
        drawn = drawn.round()
    made.add(torch.arange(bins).repeat(19), drawn[:-1].flatten(0, 1))
    p = made.p_values(torch.arange(bins), drawn[-1]).flatten()
    for a in (0.05, 0.1, 0.25, 0.5, 0.9):
        error = 4 * math.sqrt(a * (1 - a) / len(p))
        share = (p <= a + 1e-12).double().mean().item()
        assert share <= a + error
        if not ties:
            assert share >= a - error  # all of these are multiples of 1 / 20
    middle = made.p_values(torch.arange(bins), drawn[-1], middle=True)
    assert abs(middle.mean() - 0.5) < 4 * math.sqrt(1 / 12 / middle.numel())
    assert 0 < middle.min() and middle.max() < 1


@pytest.mark.parametrize("name", SIGNALS)
def test_memorized_is_who_has_a_high_norm_cosine_or_gain_or_a_low_loss(name):
    made = reference(size=99)
    timesteps, signals = draw(1, 1, seed=4)
    row = signals[0].repeat(2, 1)
    row[:, SIGNALS.index(name)] = torch.tensor([1e3, -1e3]) * DIRECTION[name]
    p = made.p_values(timesteps[0].repeat(2), row)
    z = made.scores(timesteps[0].repeat(2), row)
    place = SIGNALS.index(name)
    assert p[:, place].tolist() == pytest.approx([0.01, 1.0]) and z[0, place] > 1.5 and z[1, place] < -1.5
    others = [s for s in range(4) if s != place]
    assert torch.equal(p[0, others], p[1, others])


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.07, 0.1, 0.29, 1 / 3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 3, 9, 19, 49, 99, 100])
def test_limit_is_the_smallest_norm_whose_p_value_is_at_most_the_rate(rate, count):
    g = torch.Generator().manual_seed(count)
    norms = [torch.rand(count, generator=g), torch.randint(1, 4, (count,), generator=g).float()]  # the second ties
    made, place = Reference(100, bins=2), SIGNALS.index("norm")
    for b, norm in enumerate(norms):
        signals = torch.full((count, 4), NAN)
        signals[:, place] = norm
        made.add(torch.full((count,), 500 * b), signals)
    for b, (limit, norm) in enumerate(zip(made.limits(rate), norms, strict=True)):
        if rate * (count + 1) < 1 - 1e-9:
            assert limit == math.inf  # 1 / (count + 1), the smallest that occurs, is too large
            continue
        below = limit.nextafter(torch.tensor(-math.inf))
        p = [(1 + int((norm >= at).sum())) / (count + 1) for at in (limit, below)]
        assert p[0] <= rate + 1e-12 < p[1]
        found = made.p_values(torch.full((2,), 500 * b), torch.stack([limit, below])[:, None].repeat(1, 4))
        assert found[:, place].tolist() == pytest.approx(p)


def test_limit_of_an_empty_bin_is_infinite_and_other_signals_have_no_part_in_it():
    made = Reference(8, bins=2)
    assert made.limits(0.5).tolist() == [math.inf] * 2
    signals = torch.ones(8, 4)
    signals[:, SIGNALS.index("norm")] = NAN
    made.add(torch.zeros(8), signals)
    assert made.limits(0.5).tolist() == [math.inf] * 2


def test_newest_values_take_the_place_of_the_oldest():
    made = Reference(3, bins=2)
    for value in range(1, 6):
        made.add(torch.tensor([0]), torch.full((1, 4), float(value)))
    made.add(torch.tensor([700]), torch.full((1, 4), 9.0))
    for s, name in enumerate(SIGNALS):
        assert sorted((made.values[s, 0] * DIRECTION[name]).tolist()) == [3, 4, 5]
    assert made.counts().tolist() == [[3, 1]] * 4
    assert made.added.tolist() == [[5, 1]] * 4


@pytest.mark.parametrize("cut", [[150], [1] * 150, [7, 1, 0, 100, 42]])
def test_rows_added_together_or_one_by_one_leave_the_same_values_in_the_same_places(cut):
    timesteps, signals = lattice(150)
    together, apart = Reference(4, bins=3), Reference(4, bins=3)  # so that a call brings more than there is room for
    together.add(timesteps, signals)
    for some, rows in zip(timesteps.split(cut), signals.split(cut), strict=True):
        apart.add(some, rows)
    assert same_state(together, apart, "values", "added")
    assert together.added.sum() == (~signals.isnan()).sum()


def test_of_more_rows_than_there_is_room_for_the_last_are_held():
    made = Reference(5, bins=1)
    made.add(torch.zeros(23), torch.arange(23.0)[:, None].repeat(1, 4))
    assert sorted(made.values[0, 0].tolist()) == [18, 19, 20, 21, 22]
    assert (made.counts() == 5).all()
    made.add(torch.zeros(2), torch.tensor([100.0, 101.0])[:, None].repeat(1, 4))
    assert sorted(made.values[0, 0].tolist()) == [20, 21, 22, 100, 101]


def test_what_was_not_measured_is_not_held():
    made = Reference(5, bins=1)
    made.add(torch.zeros(3), torch.tensor([[1, NAN, NAN, NAN], [NAN, 2, NAN, NAN], [3, 4, 5, NAN]]))
    assert made.counts().T.tolist() == [[2, 2, 1, 0]]
    assert (made.recent[SIGNALS.index("gain")].isnan()).all()


@pytest.mark.parametrize("bins, total", [(10, 1000), (7, 50), (3, 1000)])
def test_every_timestep_has_a_bin_and_the_last_one_has_the_last(bins, total):
    made = Reference(4, bins, total)
    found = made.bin(torch.arange(total)).tolist()
    assert found == [t * bins // total for t in range(total)]
    assert found[0] == 0 and found[-1] == bins - 1
    assert made.bin(torch.tensor([total, total + 5])).tolist() == [bins - 1] * 2


def test_scores_are_those_counted_by_hand():
    made, calls = Reference(12, bins=3, recent=9), [lattice(n, n) for n in (1, 1, 2, 30, 1, 4)]
    oracle = ByHand.like(made)
    probe = lattice(40, seed=8)
    for call in calls:
        made.add(*call)
        oracle.add(call[0].tolist(), call[1].tolist())
        expected = [oracle.scores(t, row) for t, row in zip(probe[0].tolist(), probe[1].tolist(), strict=True)]
        torch.testing.assert_close(made.scores(*probe), torch.tensor(expected), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_before_anything_is_known_scores_are_zero():
    assert (Reference(4).scores(torch.tensor([0, 999]), torch.randn(2, 4)) == 0).all()


def test_scores_of_a_model_that_moved_everywhere_are_soon_those_of_ordinary_samples_again():
    made = reference(size=64)
    (timesteps, signals), (ordinary, later) = draw(48, 1, 0.0, seed=5), draw(500, 1, 0.0, seed=6)
    signals, later = signals.flatten(0, 1), later.flatten(0, 1)
    signals[:, SIGNALS.index("loss")] *= 0.75  # by about one standard deviation
    later[:, SIGNALS.index("loss")] *= 0.75
    moved = made.scores(ordinary.flatten(), later)[:, SIGNALS.index("loss")]
    assert moved.mean() > 0.7
    made.add(timesteps.flatten(), signals)
    after = made.scores(ordinary.flatten(), later)[:, SIGNALS.index("loss")]
    assert abs(after.mean()) < 4 / math.sqrt(48) and 0.6 < after.std() < 1.5


def test_state_goes_through_a_file_and_on_as_if_nothing_had_been():
    made, calls = Reference(6, bins=3), [lattice(20, n) for n in range(6)]
    for call in calls[:3]:
        made.add(*call)
    content = save(made.state_dict())
    for call in calls[3:]:
        made.add(*call)
    other = Reference(6, bins=3)
    other.add(*lattice(30, 99))
    version = other.version
    state = load(content)
    other.load_state_dict(state)
    assert other.version != version
    for call in calls[3:]:
        other.add(*call)
    assert same_state(made, other)
    assert all(torch.equal(value.nan_to_num(-9), load(content)[name].nan_to_num(-9)) for name, value in state.items())


def test_adding_is_told_by_the_version():
    made, versions = Reference(4), set()
    for call in range(3):
        versions.add(made.version)
        made.add(*lattice(2, call))
    assert len(versions | {made.version}) == 4
