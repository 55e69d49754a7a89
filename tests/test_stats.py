import json
import random

import pytest
import torch

from memfilter.stats import FilterStats

GROUP_SUFFIX = {0: None, 1: "_distinct", 2: "_duplicates"}


def draw(seed: int, size: int, num_train_timesteps: int = 1000) -> list[tuple]:
    """Rows of (timestep, norm, keep, checked, group); the unchecked are kept and have norm 0."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        checked = rng.random() < 0.8
        norm = rng.uniform(0, 8) if checked else 0.0
        rows.append((rng.randrange(num_train_timesteps), norm, not checked or norm < 4, checked, rng.randrange(3)))
    return rows


def add(stats: FilterStats, rows: list[tuple]) -> None:
    t, norm, keep, checked, group = zip(*rows, strict=True)
    stats.add(torch.tensor(t), torch.tensor(norm), torch.tensor(keep), torch.tensor(checked), torch.tensor(group))


def recount(rows: list[tuple], bins: int = 10, num_train_timesteps: int = 1000) -> dict[str, float]:
    checked = [row for row in rows if row[3]]
    expected = {"filter/seen": len(rows), "filter/checked": len(checked), "filter/empty_steps": 0}
    expected["filter/dropped"] = sum(not row[2] for row in checked)

    def put(suffix, part):
        if part:
            expected[f"filter/drop_rate{suffix}"] = sum(not row[2] for row in part) / len(part)
            expected[f"filter/norm{suffix}"] = sum(row[1] for row in part) / len(part)

    for b in [None, *range(bins)]:
        where = "" if b is None else f"/bin{b}"
        inside = [row for row in checked if b is None or row[0] // (num_train_timesteps // bins) == b]
        put(where, inside)
        for group in (1, 2):
            put(f"{GROUP_SUFFIX[group]}{where}", [row for row in inside if row[4] == group])
    return expected


@pytest.mark.parametrize("bins, num_train_timesteps", [(10, 1000), (4, 1000), (1, 1000), (5, 50)])
def test_counts_rates_and_means_are_those_of_a_recount(bins, num_train_timesteps):
    stats, rows = FilterStats(bins, num_train_timesteps), []
    for seed in range(6):
        rows += (batch := draw(seed, 16, num_train_timesteps))
        add(stats, batch)
    assert stats.compute() == pytest.approx(recount(rows, bins, num_train_timesteps), rel=1e-6)


def test_bins_start_at_round_timesteps_and_the_last_one_is_closed():
    stats = FilterStats()
    for t in (0, 99, 100, 899, 900, 999):
        add(stats, [(t, float(t), True, True, 0)])
    metrics = stats.compute()
    found = {b: metrics.get(f"filter/norm/bin{b}") for b in range(10)}
    assert found == dict.fromkeys(range(10)) | {0: 49.5, 1: 100, 8: 899, 9: 949.5}


def test_window_starts_anew_and_totals_do_not():
    stats, first, second = FilterStats(), draw(1, 30), draw(2, 20)
    add(stats, first)
    assert stats.compute() == pytest.approx(recount(first), rel=1e-6)
    add(stats, second)
    assert stats.totals() == pytest.approx(recount(first + second), rel=1e-6)
    assert stats.totals() == pytest.approx(recount(first + second), rel=1e-6)  # reading changes nothing
    assert stats.compute() == pytest.approx(recount(second), rel=1e-6)
    assert stats.compute() == recount([])
    assert stats.totals() == pytest.approx(recount(first + second), rel=1e-6)


def test_unchecked_samples_count_as_seen_only():
    stats = FilterStats()
    add(stats, [(5, 0.0, True, False, 2)] * 3 + [(5, 2.0, True, True, 2)])
    metrics = stats.compute()
    assert (metrics["filter/seen"], metrics["filter/checked"], metrics["filter/norm_duplicates"]) == (4, 1, 2.0)


def test_reduction_sums_over_ranks_and_leaves_the_own_totals_alone():
    ranks = [draw(1, 12), draw(2, 8)]
    both = [FilterStats() for _ in ranks]
    for stats, rows in zip(both, ranks, strict=True):
        add(stats, rows)
    other = both[1]._window.clone()
    assert both[0].compute(lambda own: own + other) == pytest.approx(recount(ranks[0] + ranks[1]), rel=1e-6)
    assert both[0].totals() == pytest.approx(recount(ranks[0]), rel=1e-6)


def test_state_goes_through_json_and_continues():
    stats, first, second, third = FilterStats(), draw(1, 30), draw(2, 20), draw(3, 10)
    add(stats, first)
    stats.compute()
    add(stats, second)
    stats.empty_steps = 7
    state = json.loads(json.dumps(stats.state_dict()))

    resumed = FilterStats()
    add(resumed, draw(9, 5))  # gone after loading
    resumed.load_state_dict(state)
    assert resumed.compute()["filter/seen"] == 0
    add(resumed, third)
    expected = recount(first + second + third) | {"filter/empty_steps": 7}
    assert resumed.totals() == pytest.approx(expected, rel=1e-6)
    assert resumed.compute() == pytest.approx(recount(third) | {"filter/empty_steps": 7}, rel=1e-6)
