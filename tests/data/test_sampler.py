import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from memfilter.data import sampler
from memfilter.data.experiment import INDEX, Experiment, prepare_scenes
from memfilter.data.sampler import SampleDataset, SampleStream, View, collate, to_pixels
from memfilter.data.shards import Shards

REPEATS = [5, 1, 1, 3, 1, 7]
ROWS = np.repeat(np.arange(len(REPEATS)), REPEATS)


def test_every_epoch_shows_each_sample_exactly_its_repeats_times():
    stream = SampleStream(ROWS, seed=0)
    for epoch in range(4):
        rows = [stream.row(epoch * 18 + place) for place in range(18)]
        assert Counter(rows) == Counter(dict(enumerate(REPEATS)))


def test_row_depends_on_nothing_but_seed_and_position():
    stream = SampleStream(ROWS, seed=5)
    in_order = [stream.row(position) for position in range(100)]
    positions = random.Random(0).sample(range(100), 100)
    assert [stream.row(position) for position in positions] == [in_order[p] for p in positions]
    assert [SampleStream(ROWS, seed=5).row(position) for position in range(100)] == in_order


def test_order_differs_by_seed_and_by_epoch():
    rows = np.arange(50)
    orders = [
        tuple(SampleStream(rows, seed).row(epoch * 50 + place) for place in range(50))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({*orders, tuple(rows)}) == 10


def test_order_is_a_fair_shuffle():
    # row 0 stands anywhere: its mean place over 400 epochs is 9.5 within four standard errors of 5.77 / 20
    stream = SampleStream(np.arange(20), seed=0)
    places = [place for epoch in range(400) for place in range(20) if stream.row(epoch * 20 + place) == 0]
    assert len(places) == 400 and abs(np.mean(places) - 9.5) < 1.2


DRAWS = {
    "noise": lambda seed, position: sampler.noise(seed, position, (4, 4, 4)).flatten().tolist(),
    "posterior": lambda seed, position: sampler.posterior_noise(seed, position, (4, 4, 4)).flatten().tolist(),
    "timestep": lambda seed, position: [sampler.timestep(seed, position + i, 1000) for i in range(8)],
    "caption": lambda seed, position: [sampler.caption_dropped(seed, position + i, 0.5) for i in range(64)],
    "offset": lambda seed, position: sampler.noise_offset(seed, position, 4).flatten().tolist(),
    "crop": sampler.crop_place,
    "flip": lambda seed, position: [sampler.flipped(seed, position + i) for i in range(64)],
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draw_is_a_pure_function_of_seed_and_position(draw):
    first = draw(3, 100)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    draw(3, 99), draw(4, 100)
    assert draw(3, 100) == first
    assert draw(4, 100) != first and draw(3, 1000) != first


def test_draws_draw_nothing_from_the_global_random_states():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for draw in DRAWS.values():
        draw(0, 0)
    SampleStream(ROWS, seed=0).row(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_draws_are_the_same_in_another_process():
    script = (
        "import json; from memfilter.data import sampler as s;"
        "print(json.dumps([s.noise(7, 12345, (3, 2)).tolist(), s.posterior_noise(7, 12345, (3, 2)).tolist(),"
        "[s.timestep(7, p, 1000) for p in range(20)], [s.caption_dropped(7, p, 0.5) for p in range(20)],"
        "s.noise_offset(7, 12345, 4).tolist(), s.crop_place(7, 12345), [s.flipped(7, p) for p in range(20)]]))"
    )
    other = json.loads(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert other == [
        sampler.noise(7, 12345, (3, 2)).tolist(),
        sampler.posterior_noise(7, 12345, (3, 2)).tolist(),
        [sampler.timestep(7, p, 1000) for p in range(20)],
        [sampler.caption_dropped(7, p, 0.5) for p in range(20)],
        sampler.noise_offset(7, 12345, 4).tolist(),
        list(sampler.crop_place(7, 12345)),
        [sampler.flipped(7, p) for p in range(20)],
    ]


@pytest.mark.parametrize("draw", [sampler.noise, sampler.posterior_noise])
def test_noise_is_standard_normal_and_independent_between_positions_and_seeds(draw):
    x = torch.stack([draw(0, position, (4, 8, 8)).flatten() for position in range(200)]).double()  # [200, 256]
    assert draw(0, 0, (4, 8, 8)).dtype == torch.float32
    assert abs(x.mean()) < 0.02 and abs(x.var() - 1) < 0.03
    assert abs((x**3).mean()) < 0.07 and abs((x**4).mean() - 3) < 0.15
    other = torch.stack([draw(1, position, (4, 8, 8)).flatten() for position in range(200)]).double()
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x, other)):
        assert abs((a * b).mean()) < 0.02  # five standard errors of 1 / sqrt(51200)


def test_purposes_have_draws_of_their_own():
    shape = (4, 32, 32)
    a, b = sampler.noise(0, 5, shape).flatten(), sampler.posterior_noise(0, 5, shape).flatten()
    assert abs((a * b).mean()) < 0.08
    assert not set(a.tolist()) & set(b.tolist()[:100])
    assert not set(a.tolist() + b.tolist()) & set(sampler.noise_offset(0, 5, 100).flatten().tolist())
    coins = [
        (sampler.caption_dropped(0, p, 0.5), sampler.flipped(0, p), *np.less(sampler.crop_place(0, p), 0.5))
        for p in range(2000)
    ]
    assert abs(np.corrcoef(np.array(coins).T)[np.triu_indices(4, 1)]).max() < 0.11  # five times 1 / sqrt(2000)


@pytest.mark.parametrize("num_train_timesteps", [1000, 50, 1])
def test_timesteps_are_uniform_over_all_of_them(num_train_timesteps):
    t = np.array([sampler.timestep(0, position, num_train_timesteps) for position in range(4000)])
    assert t.min() >= 0 and t.max() < num_train_timesteps
    tenths = np.histogram((t + 0.5) / num_train_timesteps, bins=10, range=(0, 1))[0]
    if num_train_timesteps > 1:
        assert abs(tenths - 400).max() < 5 * 19  # standard deviation of a count: sqrt(4000 * 0.1 * 0.9)
        assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) < 0.08


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_their_share(share):
    count = sum(sampler.caption_dropped(0, position, share) for position in range(4000))
    assert abs(count - 4000 * share) <= 5 * (4000 * share * (1 - share)) ** 0.5


def test_noise_offset_is_one_standard_normal_number_for_every_channel():
    x = torch.stack([sampler.noise_offset(0, position, 4) for position in range(2000)])
    assert x.dtype == torch.float32 and x.shape == (2000, 4, 1, 1)
    assert abs(x.mean()) < 5 / 8000**0.5 and abs(x.var() - 1) < 5 * (2 / 8000) ** 0.5


def test_crop_places_are_uniform_and_every_second_picture_is_flipped():
    places = np.array([sampler.crop_place(0, position) for position in range(4000)])
    assert places.min() >= 0 and places.max() < 1
    for shares in places.T:
        assert abs(np.histogram(shares, bins=10, range=(0, 1))[0] - 400).max() < 5 * 19
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.08
    assert abs(sum(sampler.flipped(0, position) for position in range(4000)) - 2000) < 5 * 32


def array(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("width, height", [(32, 32), (48, 32), (32, 48), (64, 32)])
def test_picture_of_the_right_height_or_width_is_cut_in_the_middle(width, height):
    pixels = array(width, height)
    left, top = (width - 32) // 2, (height - 32) // 2
    expected = pixels[top : top + 32, left : left + 32].transpose(2, 0, 1) / 127.5 - 1
    found, corner = to_pixels(Image.fromarray(pixels), 32)
    assert found.dtype == torch.float32 and found.shape == (3, 32, 32) and corner == (top, left)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("width, height", [(64, 64), (96, 64), (64, 128), (24, 16)])
def test_picture_of_another_size_is_resized_then_cut_in_the_middle(width, height):
    pixels, factor = array(width, height), 32 / min(width, height)
    size = int(width * factor), int(height * factor)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    expected = resized[top : top + 32, left : left + 32].transpose(2, 0, 1) / 127.5 - 1
    found, corner = to_pixels(Image.fromarray(pixels), 32)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert corner == (top, left)


def test_pixels_span_minus_one_to_one_and_no_border_is_added_at_any_size():
    assert to_pixels(Image.new("RGB", (8, 8), (0, 255, 51)), 8)[0][:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    for width in range(1, 50):  # 16 / 49 * 49 is below 16
        for height in (1, 7, 16, 31, 49):
            found, _ = to_pixels(Image.new("RGB", (width, height), "white"), 16)
            assert found.shape == (3, 16, 16) and (found == 1).all(), (width, height)


@pytest.mark.parametrize("width, height", [(12, 8), (8, 13), (8, 8), (9, 8)])
def test_crop_reaches_every_place_from_end_to_end_equally_often(width, height):
    pixels = array(width, height)
    # where every window of the picture lies, by its bytes
    places = {pixels[top : top + 8, left : left + 8].tobytes(): (top, left)
              for top in range(height - 7) for left in range(width - 7)}  # fmt: skip
    found = Counter()
    for position in range(1000):
        crop, corner = to_pixels(Image.fromarray(pixels), 8, sampler.crop_place(0, position))
        shown = ((crop + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
        assert places[shown.tobytes()] == corner
        found[corner] += 1
    assert found.keys() == set(places.values())
    share = 1 / len(places)
    assert all(abs(count - 1000 * share) <= 5 * (1000 * share * (1 - share)) ** 0.5 for count in found.values())


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 1000])
def test_shares_at_the_ends_of_their_range_are_the_outermost_places(room):
    picture = Image.new("RGB", (4 + room, 4))
    assert to_pixels(picture, 4, (0.0, 0.0))[1] == (0, 0)
    assert to_pixels(picture, 4, (np.nextafter(1, 0), np.nextafter(1, 0)))[1] == (0, room)


@pytest.mark.parametrize("place", [None, (0.0, 0.0), (0.6, 0.6)])
@pytest.mark.parametrize("width, height", [(32, 32), (41, 32), (32, 37), (96, 64)])
def test_flip_is_the_same_crop_of_the_mirror_image(width, height, place):
    pixels = array(width, height)
    flipped, corner = to_pixels(Image.fromarray(pixels), 32, place, flip=True)
    mirror, mirror_corner = to_pixels(ImageOps.mirror(Image.fromarray(pixels)), 32, place)
    assert corner == mirror_corner
    torch.testing.assert_close(flipped, mirror, rtol=0, atol=1.01 / 127.5)  # resizing rounds
    if (width, height) == (32, 32):
        np.testing.assert_allclose(flipped, pixels[:, ::-1].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = prepare_scenes(tmp_path_factory.mktemp("d") / "scenes", duplicates=2, repeats=3, distinct=6)
    shards, experiment = Shards.open(out), Experiment.read(out / INDEX)
    return SampleDataset(shards, experiment, SampleStream(experiment.virtual(), seed=1), View(16))


def test_an_epoch_of_the_dataset_shows_what_the_index_says(dataset):
    samples = [dataset[position] for position in range(12)]
    repeats = dict(zip(dataset.experiment.keys, dataset.experiment.repeats.tolist(), strict=True))
    assert Counter(sample["key"] for sample in samples) == repeats
    for position, sample in enumerate(samples):
        assert sample["position"] == position
        assert sample["duplicate"] == (repeats[sample["key"]] == 3)
        assert sample["caption"] == dataset.shards.caption(sample["key"])
        assert torch.equal(sample["pixels"], to_pixels(dataset.shards.image(sample["key"]), 16)[0])
        assert sample["original_size"] == (32, 32) and sample["crop_top_left"] == (0, 0) and sample["bad"] is None


def test_samples_that_come_again_are_known(dataset):
    twice = [dataset[position]["key"] for position in range(12) if dataset[position]["repeats"]]
    assert Counter(twice).keys() == {dataset.experiment.keys[i] for i in (0, 1)} and len(twice) == 6
    for budget, repeats in ((11, False), (12, False), (13, True)):
        longer = replace(dataset, budget=budget)
        assert all(longer[p]["repeats"] == (repeats or longer[p]["key"] in twice) for p in range(12))


def wide(tmp_path, **view) -> SampleDataset:
    """Four pictures of 30 x 20 px, every one of them once, and a caption for each."""
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"p{seed}.png")
        (tmp_path / f"p{seed}.txt").write_text(f"caption {seed}")
    shards = Shards.open(tmp_path)
    experiment = Experiment.of_shards(shards)
    return SampleDataset(shards, experiment, SampleStream(experiment.virtual(), seed=1), View(20, **view))


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("random_flip", [False, True])
def test_view_is_what_pillow_makes_of_the_draws_of_its_position(tmp_path, random_crop, random_flip):
    dataset, shown = wide(tmp_path, random_crop=random_crop, random_flip=random_flip), {}
    for position in range(40):
        sample = dataset[position]
        picture = dataset.shards.image(sample["key"])
        if random_flip and sampler.flipped(1, position):
            picture = ImageOps.mirror(picture)
        left = int(sampler.crop_place(1, position)[1] * 11) if random_crop else 5
        expected = np.asarray(picture.crop((left, 0, left + 20, 20))).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(sample["pixels"], expected, atol=1e-6)
        assert sample["crop_top_left"] == (0, left) and sample["original_size"] == (20, 30)
        assert torch.equal(shown.setdefault(sample["view"], sample["pixels"]), sample["pixels"])
    assert len(shown) == (40 if random_crop else 8 if random_flip else 4)
    if not random_crop:
        assert len({pixels.numpy().tobytes() for pixels in shown.values()}) == len(shown)


def test_sample_that_cannot_be_read_is_bad_and_the_others_are_not(tmp_path):
    dataset = wide(tmp_path, random_crop=True, random_flip=True)
    (tmp_path / "p2.png").write_bytes(b"no picture")
    samples = [dataset[position] for position in range(8)]
    for position, sample in enumerate(samples):
        assert sample["position"] == position and sample["duplicate"] is None
        if sample["key"] == "p2":
            assert "'p2' in " in sample["bad"] and "p2.png" in sample["bad"]
            assert sample["pixels"].shape == (3, 20, 20) and not sample["pixels"].any() and sample["caption"] == ""
            assert sample["original_size"] == (20, 20) and sample["crop_top_left"] == (0, 0)
        else:
            assert sample["bad"] is None and sample["caption"] == f"caption {sample['key'][1]}"
    assert sum(sample["bad"] is not None for sample in samples) == 2
    assert all(sample.keys() == samples[0].keys() for sample in samples)


def test_bad_sample_takes_no_other_samples_view_and_is_not_worth_remembering(tmp_path):
    dataset = replace(wide(tmp_path), budget=100)
    (tmp_path / "p2.png").unlink()
    samples = [dataset[position] for position in range(16)]
    bad = [sample for sample in samples if sample["bad"]]
    assert len(bad) == 4 and not any(sample["repeats"] for sample in bad)
    assert len({sample["view"] for sample in samples}) == 3 + 4
    assert all(sample["repeats"] for sample in samples if not sample["bad"])


def test_picture_that_is_too_large_makes_a_bad_sample(tmp_path):
    dataset = wide(tmp_path)
    Image.new("1", (8001, 8000)).save(tmp_path / "p0.png")
    assert {sample["key"] for sample in map(dataset.__getitem__, range(4)) if sample["bad"]} == {"p0"}


def test_missing_caption_is_no_reason_to_be_bad_but_one_that_vanished_is(tmp_path):
    dataset = wide(tmp_path)
    (tmp_path / "p0.txt").unlink()
    bad = {sample["key"]: sample["bad"] for sample in map(dataset.__getitem__, range(4)) if sample["bad"]}
    assert bad.keys() == {"p0"} and "p0.txt" in bad["p0"]
    again = replace(dataset, shards=Shards.open(tmp_path))
    samples = {sample["key"]: sample for sample in map(again.__getitem__, range(4))}
    assert samples["p0"]["caption"] == "" and samples["p0"]["bad"] is None


def test_picture_whose_view_is_remembered_is_not_decoded(tmp_path):
    dataset = wide(tmp_path, random_flip=True)
    first = [dataset[position] for position in range(4)]
    dataset.remembered = {first[0]["view"], first[2]["view"]}
    for seed in range(4):
        (tmp_path / f"p{seed}.png").write_bytes(b"broken meanwhile")
    for position in range(4):
        sample = dataset[position]
        if position in (0, 2):
            assert sample["pixels"] is sample["original_size"] is sample["crop_top_left"] is sample["bad"] is None
            assert sample["caption"] == first[position]["caption"] and sample["view"] == first[position]["view"]
        else:
            assert sample["bad"]


def test_batches_are_lists():
    samples = [{"key": "a", "pixels": torch.zeros(3, 2, 2), "bad": None}, {"key": "b", "pixels": None, "bad": "why"}]
    batch = collate(samples)
    assert batch["key"] == ["a", "b"] and batch["bad"] == [None, "why"]
    assert isinstance(batch["pixels"], list) and batch["pixels"][0] is samples[0]["pixels"]


def test_worker_processes_change_nothing(dataset):
    dataset = replace(dataset, view=View(16, random_crop=True, random_flip=True))
    batches = [[5, 3, 20], [0, 11, 7], [30, 31, 2], [5, 4, 1]]
    here, there = (
        list(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    assert [batch["position"] for batch in here] == batches
    for a, b in zip(here, there, strict=True):
        assert all(map(torch.equal, a.pop("pixels"), b.pop("pixels")))
        assert a == b


LARGE = np.repeat(np.arange(1030), [200] * 10 + [20] * 20 + [1] * 1000)  # 3400 virtual samples


def order_of(stream: SampleStream, epoch: int = 0) -> np.ndarray:
    size = len(stream.rows)
    return np.array([stream.row(epoch * size + place) for place in range(size)])


@pytest.mark.parametrize("rows", [ROWS, LARGE, ROWS[::-1], np.array([7])], ids=["small", "large", "unsorted", "one"])
def test_spread_epoch_shows_each_sample_exactly_its_repeats_times(rows):
    stream = SampleStream(rows, seed=3, spread=True)
    for epoch in range(3):
        assert sorted(order_of(stream, epoch)) == sorted(rows)


def test_spread_order_depends_on_nothing_but_seed_and_position():
    in_order = [SampleStream(ROWS, 5, spread=True).row(position) for position in range(100)]
    stream = SampleStream(ROWS, 5, spread=True)
    positions = random.Random(0).sample(range(100), 100)
    np.random.seed(9)
    assert [stream.row(position) for position in positions] == [in_order[p] for p in positions]
    script = ("import numpy as np; from memfilter.data.sampler import SampleStream as S;"
              f"s = S(np.repeat(np.arange(6), {REPEATS}), 5, spread=True);"
              "print([s.row(p) for p in range(100)])")  # fmt: skip
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert json.loads(other) == in_order


def test_spread_order_differs_by_seed_by_epoch_and_from_the_shuffled_one():
    orders = {tuple(order_of(SampleStream(LARGE, seed, spread=True), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(order_of(SampleStream(LARGE, 0))) not in orders


def test_spread_order_does_not_depend_on_the_order_of_the_rows():
    shuffled = np.random.default_rng(0).permutation(LARGE)
    assert (order_of(SampleStream(shuffled, 4, spread=True)) == order_of(SampleStream(LARGE, 4, spread=True))).all()


def test_copies_are_spread_evenly_where_shuffling_crowds_them():
    def gaps(rows: np.ndarray, row: int) -> np.ndarray:
        return np.diff(np.flatnonzero(rows == row))

    spread, shuffled = order_of(SampleStream(LARGE, 0, spread=True)), order_of(SampleStream(LARGE, 0))
    for row, repeats in ((0, 200), (9, 200), (10, 20), (29, 20)):
        length = len(LARGE) / repeats
        # two copies lie in neighbouring parts of the epoch: never more than two parts apart, but for the scatter of
        # where in the order a moment comes to lie (three standard deviations of at most sqrt(3400) / 2)
        assert gaps(spread, row).max() < 2 * length + 90 and gaps(spread, row).std() < 0.6 * length
        assert gaps(shuffled, row).std() > 0.6 * length
        # every tenth of the epoch has its share
        shares = np.histogram(np.flatnonzero(spread == row), bins=10, range=(0, len(LARGE)))[0]
        assert abs(shares - repeats / 10).max() <= max(3, repeats / 40)


def test_places_within_a_part_are_uniform_and_independent():
    # ten samples with two copies each: the first copy lies in the first half, anywhere
    rows = np.repeat(np.arange(10), 2)
    first = np.array([[order_of(SampleStream(rows, seed, spread=True)).tolist().index(row) for row in range(10)]
                      for seed in range(400)])  # fmt: skip
    assert first.max() == 9 and first.min() == 0
    assert (abs(np.array([np.bincount(column, minlength=10) for column in first.T]) - 40) < 5 * 6).all()
    assert abs(np.corrcoef(first.T)[np.triu_indices(10, 1)] + 1 / 9).max() < 5 / 20  # a permutation's own -1/9


def test_sample_shown_once_may_come_anywhere():
    rows = np.concatenate([np.repeat(np.arange(3), 30), np.arange(3, 13)])
    places = [np.flatnonzero(order_of(SampleStream(rows, seed, spread=True)) == 7)[0] for seed in range(300)]
    assert min(places) < 5 and max(places) > 94 and abs(np.mean(places) - 49.5) < 5 * 100 / 12**0.5 / 300**0.5


def test_shuffled_order_is_what_it_always_was():
    # bit for bit: what a run of an earlier version saw, a resumed one must see
    assert [SampleStream(ROWS, 5).row(p) for p in range(36)] == np.concatenate(
        [np.random.default_rng((5, epoch)).permutation(ROWS) for epoch in range(2)]
    ).tolist()


def test_spreading_160_000_samples_takes_no_time():
    rows = np.repeat(np.arange(120_200), [200] * 200 + [1] * 120_000)
    start = time.perf_counter()
    SampleStream(rows, 0, spread=True).row(0)
    assert time.perf_counter() - start < 2
