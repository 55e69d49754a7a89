import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from memfilter.data import sampler
from memfilter.data.experiment import INDEX, Experiment, prepare_scenes
from memfilter.data.sampler import SampleDataset, SampleStream, collate, to_pixels
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
        "[s.timestep(7, p, 1000) for p in range(20)], [s.caption_dropped(7, p, 0.5) for p in range(20)]]))"
    )
    other = json.loads(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert other == [
        sampler.noise(7, 12345, (3, 2)).tolist(),
        sampler.posterior_noise(7, 12345, (3, 2)).tolist(),
        [sampler.timestep(7, p, 1000) for p in range(20)],
        [sampler.caption_dropped(7, p, 0.5) for p in range(20)],
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


def array(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("width, height", [(32, 32), (48, 32), (32, 48), (64, 32)])
def test_picture_of_the_right_height_or_width_is_cut_in_the_middle(width, height):
    pixels = array(width, height)
    left, top = (width - 32) // 2, (height - 32) // 2
    expected = pixels[top : top + 32, left : left + 32].transpose(2, 0, 1) / 127.5 - 1
    found = to_pixels(Image.fromarray(pixels), 32)
    assert found.dtype == torch.float32 and found.shape == (3, 32, 32)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("width, height", [(64, 64), (96, 64), (64, 128), (24, 16)])
def test_picture_of_another_size_is_resized_then_cut_in_the_middle(width, height):
    pixels, factor = array(width, height), 32 / min(width, height)
    size = int(width * factor), int(height * factor)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    expected = resized[top : top + 32, left : left + 32].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(to_pixels(Image.fromarray(pixels), 32), expected, atol=1e-6)


def test_pixels_span_minus_one_to_one_and_no_border_is_added_at_any_size():
    assert to_pixels(Image.new("RGB", (8, 8), (0, 255, 51)), 8)[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    for width in range(1, 50):  # 16 / 49 * 49 is below 16
        for height in (1, 7, 16, 31, 49):
            found = to_pixels(Image.new("RGB", (width, height), "white"), 16)
            assert found.shape == (3, 16, 16) and (found == 1).all(), (width, height)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = prepare_scenes(tmp_path_factory.mktemp("d") / "scenes", duplicates=2, repeats=3, distinct=6)
    shards, experiment = Shards.open(out), Experiment.read(out / INDEX)
    return SampleDataset(shards, experiment, SampleStream(experiment.virtual(), seed=1), 16)


def test_an_epoch_of_the_dataset_shows_what_the_index_says(dataset):
    samples = [dataset[position] for position in range(12)]
    repeats = dict(zip(dataset.experiment.keys, dataset.experiment.repeats.tolist(), strict=True))
    assert Counter(sample["key"] for sample in samples) == repeats
    for position, sample in enumerate(samples):
        assert sample["position"] == position
        assert sample["duplicate"] == (repeats[sample["key"]] == 3)
        assert sample["caption"] == dataset.shards.caption(sample["key"])
        assert torch.equal(sample["pixels"], to_pixels(dataset.shards.image(sample["key"]), 16))


def test_worker_processes_change_nothing(dataset):
    batches = [[5, 3, 20], [0, 11, 7], [30, 31, 2], [5, 4, 1]]
    here, there = (
        list(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    assert [batch["position"] for batch in here] == batches
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.pop("pixels"), b.pop("pixels"))
        assert a == b
