import json
import random

import numpy as np
import pytest
import torch

from memfilter.stats import HISTOGRAM_EDGES, FilterStats

GROUP_SUFFIX = {0: None, 1: "_distinct", 2: "_duplicates"}


def draw(seed: int, size: int, num_train_timesteps: int = 1000) -> list[tuple]:
    """Rows of (timestep, norm, keep, checked, group, excluded); norm 0 if unchecked, which excluded rows are."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        checked = rng.random() < 0.8
        excluded = not checked and rng.random() < 0.5
        norm = rng.uniform(0, 8) if checked else 0.0
        keep = norm < 4 and not excluded
        rows.append((rng.randrange(num_train_timesteps), norm, keep, checked, rng.randrange(3), excluded))
    return rows


def add(stats: FilterStats, rows: list[tuple]) -> None:
    stats.add(*map(torch.tensor, zip(*rows, strict=True)))


def recount(rows: list[tuple], bins: int = 10, num_train_timesteps: int = 1000) -> dict[str, float]:
    expected = {"filter/empty_steps": 0}

    def count(suffix, part):
        expected[f"filter/seen{suffix}"] = len(part)
        expected[f"filter/checked{suffix}"] = sum(row[3] for row in part)
        expected[f"filter/dropped{suffix}"] = sum(row[3] and not row[2] for row in part)
        expected[f"filter/excluded{suffix}"] = sum(row[5] for row in part)

    def put(suffix, part):
        part = [row for row in part if row[3]]
        if part:
            expected[f"filter/drop_rate{suffix}"] = sum(not row[2] for row in part) / len(part)
            expected[f"filter/norm{suffix}"] = sum(row[1] for row in part) / len(part)

    for b in [None, *range(bins)]:
        where = "" if b is None else f"/bin{b}"
        inside = [row for row in rows if b is None or row[0] // (num_train_timesteps // bins) == b]
        count(where, inside)
        put(where, inside)
        for group in (1, 2):
            members = [row for row in inside if row[4] == group]
            put(f"{GROUP_SUFFIX[group]}{where}", members)
            if b is None:
                count(GROUP_SUFFIX[group], members)
    if expected["filter/checked"]:
        expected["filter/pass_share"] = expected["filter/checked"] / len(rows)
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
        add(stats, [(t, float(t), True, True, 0, False)])
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


def test_unchecked_samples_count_as_seen_only_and_excluded_ones_apart():
    stats = FilterStats()
    unchecked, excluded = (5, 0.0, True, False, 2, False), (5, 0.0, False, False, 2, True)
    add(stats, [unchecked] * 3 + [excluded] * 2 + [(5, 2.0, True, True, 2, False)])
    metrics = stats.compute()
    names = ("seen", "checked", "dropped", "excluded", "norm_duplicates", "drop_rate")
    assert [metrics[f"filter/{name}"] for name in names] == [6, 1, 0, 2, 2.0, 0.0]


def two_ranks(*parts: list[tuple]):
    """Statistics of two ranks, and what sums a tensor of the first with that of the second."""
    both = FilterStats(), FilterStats()
    for stats, rows in zip(both, parts, strict=True):
        add(stats, rows)
    window, norms = both[1]._window.clone(), both[1]._norms.clone()
    return *both, lambda own: own + (norms if own.shape == norms.shape else window)


def test_reduction_sums_over_ranks_and_totals_hold_what_was_reported_of_all():
    ranks = [draw(1, 12), draw(2, 8)]
    first, _, reduce = two_ranks(*ranks)
    whole = recount(ranks[0] + ranks[1])
    assert first.totals(reduce) == pytest.approx(whole, rel=1e-6)
    assert first.compute(reduce) == pytest.approx(whole, rel=1e-6)
    assert first.totals() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("reported", [True, False])
def test_state_of_two_ranks_goes_on_in_two_and_in_one(reported):
    ranks, coming = [spread(1, 12), spread(2, 8)], spread(3, 10)
    first, _, reduce = two_ranks(*ranks)
    if reported:
        first.compute(reduce)
        first.histograms(reduce)
        reduce = None  # nothing has come since, at no rank
    state = json.loads(json.dumps(first.state_dict(reduce)))
    resumed = FilterStats(), FilterStats()
    for rank, stats in enumerate(resumed):
        stats.load_state_dict(state, with_window=rank == 0)
    add(resumed[1], coming)
    window, norms = resumed[1]._window.clone(), resumed[1]._norms.clone()
    alone = [] if reported else ranks[0] + ranks[1]
    whole = recount(ranks[0] + ranks[1] + coming)
    found = resumed[0].histograms(lambda own: own + norms)
    assert found["filter/norm_histogram"] == recounted_histogram(alone + coming)
    assert resumed[0].compute(lambda own: own + window) == pytest.approx(recount(alone + coming), rel=1e-6)
    assert resumed[0].totals() == pytest.approx(whole, rel=1e-6)


def recounted_histogram(rows: list[tuple], bin: int | None = None, group: int | None = None) -> list[int]:
    norms = [row[1] for row in rows if row[3] and (bin is None or row[0] // 100 == bin) and group in (None, row[4])]
    return np.histogram(np.float32(norms), [*HISTOGRAM_EDGES, np.inf])[0].tolist()


def spread(seed: int, size: int) -> list[tuple]:
    """As `draw`, with norms over more than all the bins."""
    rows = draw(seed, size)
    return [(t, norm and 2 ** (norm * 4 - 12), *rest) for t, norm, *rest in rows]


def test_histograms_are_those_of_numpy_for_every_bin_and_group():
    stats, rows = FilterStats(), spread(3, 2000)
    for start in range(0, 2000, 100):
        add(stats, rows[start : start + 100])
    parts = {"": (None, None), "_distinct": (None, 1), "_duplicates": (None, 2)}
    parts |= {f"/bin{b}": (b, None) for b in range(10)}
    found = stats.histograms()
    assert found == {f"filter/norm_histogram{name}": recounted_histogram(rows, *part) for name, part in parts.items()}
    metrics = stats.compute()
    assert sum(found["filter/norm_histogram"]) == metrics["filter/checked"] < metrics["filter/seen"]
    assert sum(found["filter/norm_histogram/bin4"]) == metrics["filter/checked/bin4"]
    assert min(found["filter/norm_histogram"][i] for i in (0, -1)) > 0


def test_histogram_bins_hold_their_lower_edge_and_are_open_at_both_ends():
    assert HISTOGRAM_EDGES[:2] == (0, 2**-8) and HISTOGRAM_EDGES[-1] == 2**12
    assert HISTOGRAM_EDGES[33] == 1 and HISTOGRAM_EDGES[37] == 2  # four to the octave
    last = len(HISTOGRAM_EDGES) - 1
    below = np.nextafter(np.float32(2**-8), np.float32(0)).item()
    for norm, place in ((0.0, 0), (1e-30, 0), (below, 0), (2**-8, 1), (1.0, 33), (1.1, 33), (2.0, 37), (3.0, 39),
                        (4095.0, last - 1), (4096.0, last), (1e30, last)):  # fmt: skip
        stats = FilterStats()
        add(stats, [(0, norm, True, True, 0, False)])
        assert stats.histograms()["filter/norm_histogram"].index(1) == place, norm


def test_unchecked_samples_are_in_no_histogram():
    stats = FilterStats()
    add(stats, [(5, 0.0, True, False, 1, False), (5, 0.0, False, False, 2, True)])
    assert stats.histograms() == {}


def test_window_of_histograms_starts_anew_on_its_own():
    stats, first, second = FilterStats(), spread(1, 30), spread(2, 20)
    add(stats, first)
    stats.compute()  # leaves the norms alone
    assert stats.histograms()["filter/norm_histogram"] == recounted_histogram(first)
    add(stats, second)
    assert stats.histograms()["filter/norm_histogram"] == recounted_histogram(second)
    assert stats.histograms() == {}
    assert stats.compute()["filter/seen"] == 20


def test_reduction_sums_histograms_over_ranks():
    ranks = [spread(1, 12), spread(2, 8)]
    both = [FilterStats() for _ in ranks]
    for stats, rows in zip(both, ranks, strict=True):
        add(stats, rows)
    other = both[1]._norms.clone()
    found = both[0].histograms(lambda own: own + other)
    assert found["filter/norm_histogram"] == recounted_histogram(ranks[0] + ranks[1])
    assert both[1].histograms()["filter/norm_histogram"] == recounted_histogram(ranks[1])


def halfway() -> tuple[FilterStats, list[tuple], list[tuple]]:
    """Statistics, the rows of theirs that were reported, and those that were not yet."""
    stats, reported, waiting = FilterStats(), spread(1, 30), spread(2, 20)
    add(stats, reported)
    stats.compute()
    stats.histograms()
    add(stats, waiting)
    stats.empty_steps = 7
    return stats, reported, waiting


def reloaded(stats: FilterStats, **settings) -> FilterStats:
    fresh = FilterStats()
    add(fresh, spread(9, 5))  # gone after loading
    fresh.load_state_dict(json.loads(json.dumps(stats.state_dict())), **settings)
    return fresh


def test_state_goes_through_json_and_continues():
    stats, reported, waiting = halfway()
    resumed, coming = reloaded(stats), spread(3, 10)
    add(resumed, coming)
    expected = recount(reported + waiting + coming) | {"filter/empty_steps": 7}
    assert resumed.totals() == pytest.approx(expected, rel=1e-6)
    assert resumed.histograms()["filter/norm_histogram"] == recounted_histogram(waiting + coming)
    assert resumed.compute() == pytest.approx(recount(waiting + coming) | {"filter/empty_steps": 7}, rel=1e-6)
    assert resumed.totals() == pytest.approx(expected, rel=1e-6)


def test_nothing_tells_statistics_that_were_reloaded_from_those_that_were_not():
    stats = halfway()[0]
    resumed = reloaded(stats)
    assert resumed.state_dict() == stats.state_dict()
    for seed in (3, 4):  # in the window that was open, and in the next
        for each in (stats, resumed):
            add(each, spread(seed, 10))
        assert resumed.totals() == stats.totals()
        assert resumed.histograms() == stats.histograms() != {}
        assert resumed.compute() == stats.compute()


def test_state_without_its_window_leaves_the_totals_only():
    stats, reported, _ = halfway()
    resumed, coming = reloaded(stats, with_window=False), spread(3, 10)
    assert resumed.totals() == pytest.approx(recount(reported) | {"filter/empty_steps": 7}, rel=1e-6)
    assert resumed.histograms() == {}
    assert resumed.compute() == recount([]) | {"filter/empty_steps": 7}
    add(resumed, coming)
    assert resumed.histograms()["filter/norm_histogram"] == recounted_histogram(coming)
    assert resumed.compute() == pytest.approx(recount(coming) | {"filter/empty_steps": 7}, rel=1e-6)
    assert resumed.totals() == pytest.approx(recount(reported + coming) | {"filter/empty_steps": 7}, rel=1e-6)
