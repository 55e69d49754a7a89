import json
from collections import deque

import numpy as np
import pytest
from torch.utils.data import DataLoader

from memfilter.data.feed import Feed

# processes, micro-batches, samples of one micro-batch on one rank: eight samples to a step
SPLITS = [(1, 1, 8), (2, 1, 4), (1, 2, 4), (4, 1, 2), (1, 8, 1), (2, 2, 2)]


def named(split) -> str:
    return "x".join(map(str, split))


def some(share: float, seed: int = 0, length: int = 4000):
    """Passes over a share of the positions, always the same ones."""
    skipped = np.random.default_rng(seed).random(length) < share
    return lambda positions: skipped[positions]


def run(feeds: list[Feed]) -> tuple[list[int], list[int], list[bool]]:
    """Positions that are trained on and passed over, in their order, and which micro-batches end a step, as every rank
    tells them; a rank's batches must be its slice of them."""
    told = []
    for rank, feed in enumerate(feeds):
        positions, passed_over, ends = [], [], []
        for mine in feed:
            drawn = feed.taken()
            size = len(drawn.positions) // len(feeds)
            assert mine == drawn.positions[rank * size : (rank + 1) * size]
            positions += drawn.positions
            passed_over += drawn.passed_over
            ends.append(drawn.ends_step)
        assert feed.pending == deque()
        told.append((positions, passed_over, ends, feed.rest))
    assert all(one == told[0] for one in told)
    return told[0][:3]


def feeds(split, first: int = 0, end: int = 800, passes_over=None, **settings) -> list[Feed]:
    processes, micro_batches, size = split
    return [Feed(first, end, size * processes, micro_batches, rank, processes, passes_over, **settings)
            for rank in range(processes)]  # fmt: skip


@pytest.mark.parametrize("split", SPLITS, ids=named)
@pytest.mark.parametrize("first, end", [(0, 80), (24, 80), (13, 61)])
def test_without_passing_over_all_positions_come_in_turn_however_a_step_is_split(split, first, end):
    made = feeds(split, first, end)
    positions, passed_over, ends = run(made)
    assert positions == list(range(first, end)) and passed_over == []
    assert ends == ([False] * (split[1] - 1) + [True]) * ((end - first) // 8)
    assert made[0].rest == [] and not made[0].out_of_patience


def test_batches_of_a_rank_are_neighbouring_slices():
    first, second = feeds((2, 2, 2), 0, 16)
    assert list(first) == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert list(second) == [[2, 3], [6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_step_sees_the_same_samples_however_it_is_split(share):
    told = {}
    for split in SPLITS:
        made = feeds(split, 5, 805, some(share))
        positions, passed_over, ends = run(made)
        told[split] = positions, passed_over, made[0].rest, sum(ends)
    assert all(one == told[SPLITS[0]] for one in told.values())
    positions, passed_over, rest, steps = told[SPLITS[0]]
    # the oracle: whoever is not passed over comes, in turn, until eight are not to be had any more
    skipped = some(share)(np.arange(4000))
    wanted = [p for p in range(5, 805) if not skipped[p]]
    assert positions == wanted[: len(positions)] and steps * 8 == len(positions)
    assert len(wanted) - len(positions) < 8
    assert passed_over == [p for p in range(5, positions[-1] + 1) if skipped[p]]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("end", [8, 83, 160])
def test_every_position_is_accounted_for_once(share, end):
    made = feeds((1, 2, 4), 0, end, some(share, seed=end))
    positions, passed_over, _ = run(made)
    accounted = positions + passed_over + made[0].rest
    assert len(set(accounted)) == len(accounted) and set(accounted) <= set(range(end))
    # what is missing would have been part of a step that did not fill up
    missing = sorted(set(range(end)) - set(accounted))
    assert len(missing) < 8 and all(p > max(positions, default=-1) for p in missing)
    skipped = some(share, seed=end)(np.arange(end))
    assert all(skipped[passed_over]) and all(skipped[made[0].rest]) and not any(skipped[positions])


def test_passed_over_positions_are_told_with_the_last_micro_batch_of_the_step_they_made_room_in():
    feed = Feed(0, 100, 2, 2, passes_over=lambda positions: positions % 3 == 0)
    drawn = [feed.taken() for _ in zip(feed, range(4), strict=False)]
    assert [one.positions for one in drawn] == [[1, 2], [4, 5], [7, 8], [10, 11]]
    # a step is filled up: 0 and 3 are passed over for the first one, 6 and 9 for the second
    assert [one.passed_over for one in drawn] == [[], [0, 3], [], [6, 9]]
    assert [one.ends_step for one in drawn] == [False, True, False, True]


def test_it_is_asked_when_a_step_is_drawn_and_once_for_every_position():
    asked, flagged = [], set()

    def passes_over(positions):
        asked.extend(positions.tolist())
        return np.isin(positions, list(flagged))

    feed = Feed(0, 40, 4, passes_over=passes_over)
    batches = iter(feed)
    assert next(batches) == [0, 1, 2, 3] and asked == [0, 1, 2, 3]
    flagged.update([1, 5, 6])  # too late for 1
    assert next(batches) == [4, 7, 8, 9]
    flagged.clear()
    assert [p for batch in batches for p in batch] == list(range(10, 38))
    assert sorted(asked) == list(range(38))  # the two that are left fill no step


@pytest.mark.parametrize("split", [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (1, 4, 2)], ids=named)
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 5, 8])
def test_run_that_is_resumed_with_batches_read_ahead_goes_on_exactly(split, share, ahead):
    passes_over = some(share) if share else None
    made = feeds(split, 0, 400, passes_over)
    expected = run(made)
    for steps in (1, 2, 7):
        begun, resumed = [], []
        trained = steps * split[1]
        for rank, feed in enumerate(feeds(split, 0, 400, passes_over)):
            batches = iter(feed)
            for _ in range(trained + ahead):
                next(batches)
            begun = [feed.taken() for _ in range(trained)]
            seen = sum(len(one.positions) + len(one.passed_over) for one in begun)
            state = json.loads(json.dumps(feed.state()))
            again = Feed(seen, 400, split[0] * split[2], split[1], rank, split[0], passes_over, pending=state)
            resumed.append(again)
        positions, passed_over, ends = run(resumed)
        assert [p for one in begun for p in one.positions] + positions == expected[0]
        assert [p for one in begun for p in one.passed_over] + passed_over == expected[1]
        assert [one.ends_step for one in begun] + ends == expected[2]
        assert resumed[0].rest == made[0].rest


def test_what_was_drawn_before_a_checkpoint_stays_drawn_whoever_was_flagged_since():
    feed = Feed(0, 100, 4, passes_over=lambda positions: positions == 2)
    batches = iter(feed)
    for _ in range(3):
        next(batches)
    feed.taken()
    later = Feed(5, 100, 4, passes_over=lambda positions: positions > 0, pending=feed.state())
    assert list(later)[:2] == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert later.rest == list(range(13, 97))


def test_what_was_drawn_before_two_checkpoints_ago_stays_drawn_too():
    first = Feed(0, 100, 4, 2)
    batches = iter(first)
    for _ in range(8):
        next(batches)
    second = Feed(0, 100, 4, 2, pending=first.state())
    batches = iter(second)
    for _ in range(2):  # nothing is read ahead now
        next(batches)
        second.taken()
    assert second.state() == first.state()[2:]
    third = Feed(8, 100, 4, 2, passes_over=lambda positions: positions > 0, pending=second.state())
    assert [p for batch in third for p in batch] == list(range(8, 32))


@pytest.mark.parametrize("patience", [None, 50])
def test_run_whose_last_batch_was_read_ahead_ends_where_it_would_have_ended(patience):
    feed = Feed(0, 90, 4, 2, passes_over=lambda positions: positions >= 20, patience=patience)
    positions = [p for batch in feed for p in batch]  # all read ahead
    assert positions == list(range(16)) and feed.rest == list(range(20, 20 + len(feed.rest)))
    for _ in range(2):
        feed.taken()
    # meanwhile everybody was readmitted
    again = Feed(8, 90, 4, 2, patience=patience, pending=json.loads(json.dumps(feed.state())))
    assert [p for batch in again for p in batch] == list(range(8, 16))
    assert again.rest == feed.rest and again.out_of_patience == feed.out_of_patience == (patience == 50)


@pytest.mark.parametrize("patience", [0, 5, 23])
def test_patience_ends_when_more_than_so_many_are_passed_over_for_one_step(patience):
    feed = Feed(0, 10_000, 4, passes_over=lambda positions: positions >= 40, patience=patience)
    positions, passed_over, _ = run([feed])
    assert positions == list(range(40)) and passed_over == []
    assert feed.out_of_patience and patience < len(feed.rest) <= patience + 4
    assert feed.rest == list(range(40, 40 + len(feed.rest)))


def test_patience_is_for_each_step_anew_and_a_step_that_fills_up_is_trained_on():
    feed = Feed(0, 60, 4, passes_over=lambda positions: positions % 3 > 0, patience=8)  # 8 for each step of 4
    positions, passed_over, _ = run([feed])
    assert positions == list(range(0, 60, 3))[: len(positions)] and len(positions) == 20
    assert not feed.out_of_patience and {*positions, *passed_over, *feed.rest} == set(range(58))


def test_without_patience_everything_may_be_passed_over_to_the_end():
    feed = Feed(0, 1000, 4, passes_over=lambda positions: positions >= 0)
    assert run([feed])[0] == []
    assert not feed.out_of_patience and len(feed.rest) > 1000 - 4


@pytest.mark.parametrize("end", [0, 3, 7])
def test_budget_too_small_for_a_step_gives_none(end):
    feed = Feed(0, end, 4, 2)
    assert list(feed) == [] and feed.pending == deque() and feed.rest == []


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_takes_it_as_its_batch_sampler(workers):
    feed = Feed(3, 83, 4, 2, passes_over=some(0.3))
    expected = run([Feed(3, 83, 4, 2, passes_over=some(0.3))])
    positions, passed_over, ends = [], [], []
    for batch in DataLoader(range(100), batch_sampler=feed, num_workers=workers):
        drawn = feed.taken()
        assert batch.tolist() == drawn.positions
        positions += drawn.positions
        passed_over += drawn.passed_over
        ends.append(drawn.ends_step)
    assert (positions, passed_over, ends) == expected and ends[-1]
