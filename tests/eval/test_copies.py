import numpy as np
import pytest

from memfilter.data import scenes
from memfilter.eval import copies
from memfilter.eval.copies import PIXELS, PixelCorrelation, copy_similarity, distinct_above, memorized_above, seed_agreement


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_similarity_is_the_correlation_of_pixels_after_every_channels_mean_is_removed():
    a, b = noise(5, 8, 8, 3), noise(5, 8, 8, 3, seed=1)
    for i, found in enumerate(copy_similarity(a, b)):
        x, y = ((p[i].astype(float) - p[i].reshape(-1, 3).mean(0)).ravel() for p in (a, b))
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)


def test_copy_scores_one_and_a_flat_picture_or_another_tint_does_not_count():
    picture = noise(8, 8, 3) // 2
    assert copy_similarity(picture, picture) == pytest.approx(1)
    assert copy_similarity(picture, picture + np.uint8([90, 0, 40])) == pytest.approx(1)
    assert copy_similarity(picture, np.full_like(picture, 7)) == 0


def test_limit_is_the_quantile_of_all_pairs_of_pictures_of_one_caption():
    pairs = []
    for i in range(4):
        scene = scenes.draw(8, scenes.SAME_CAPTION, i)
        varied = [scenes.vary(scene, 8, scenes.VARIATIONS, 9 * i + j) for j in range(9)]
        assert {one.caption for one in varied} == {scene.caption}
        drawn = [np.asarray(scenes.render(one, 24), float) for one in varied]
        centred = [(picture - picture.mean((0, 1))).ravel() for picture in drawn]
        pairs += [np.corrcoef(centred[a], centred[b])[0, 1] for a in range(9) for b in range(a)]
    limit = np.quantile(pairs, 0.999)
    assert len(pairs) == 4 * 36 and min(max(pairs) - limit, limit - np.quantile(pairs, 0.99)) > 1e-3
    assert memorized_above(4, 9, seed=8, resolution=24) == pytest.approx(limit, abs=1e-6)


def test_usual_limit_is_not_computed_and_any_other_is(monkeypatch):
    monkeypatch.setattr(copies, "compute_memorized_above", lambda *asked: asked)
    limit, usual = memorized_above.__wrapped__, (300, 20, 20261122, PIXELS, 32)
    assert limit() == limit(*usual) == pytest.approx(0.868303, abs=1e-6)
    for other in ({"captions": 60}, {"pictures": 4}, {"seed": 1}, {"measure": PixelCorrelation()}, {"resolution": 33}):
        names = ("captions", "pictures", "seed", "measure", "resolution")
        assert limit(**other) == tuple((dict(zip(names, usual, strict=True)) | other).values())


def test_seed_agreement_is_the_mean_over_all_pairs():
    generations = noise(2, 3, 8, 8, 3)
    pairs = [copy_similarity(generations[:, i], generations[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert seed_agreement(generations) == pytest.approx(np.mean(pairs, 0))


@pytest.mark.parametrize("side", [8, 32])
def test_dot_product_of_features_is_the_similarity(side):
    a, b = noise(2, 3, side, side, 3), noise(2, 3, side, side, 3, seed=1)
    a[0, 0] = 7
    found = (PIXELS.features(a) * PIXELS.features(b)).sum(-1)
    assert found == pytest.approx(copy_similarity(a, b), abs=1e-6)
    assert np.array_equal(PIXELS.similarity(a, b), copy_similarity(a, b))
    lengths = np.linalg.norm(PIXELS.features(a), axis=-1)
    assert lengths[0, 0] == 0 and lengths.ravel()[1:] == pytest.approx(1)


def test_large_pictures_are_averaged_down_before_they_are_compared():
    a = noise(2, 128, 128, 3)
    b = a // 2 + noise(2, 128, 128, 3, seed=1) // 2
    small = [x.reshape(2, 64, 2, 64, 2, 3).mean((2, 4)) for x in (a, b)]
    assert PIXELS.similarity(a, b) == pytest.approx(copy_similarity(*small), abs=1e-5)
    assert PIXELS.features(a).shape == (2, 64 * 64 * 3)
    assert PIXELS.features(noise(1, 64, 128, 3)).shape == (1, 32 * 64 * 3)
    assert PIXELS.pairs(a) == pytest.approx(copy_similarity(small[0][:1], small[0][1:]), abs=1e-5)


def test_pictures_that_are_averaged_down_in_slices_are_the_same(monkeypatch):
    pictures = noise(2, 5, 96, 96, 3)
    whole = PIXELS.seen(pictures)
    monkeypatch.setattr(copies, "SLICE", 3)
    assert np.array_equal(PIXELS.seen(pictures), whole) and whole.shape == (2, 5, 64, 64, 3)
    assert np.array_equal(PIXELS.similarity_seen(whole[:, 0], whole[:, 1]), PIXELS.similarity(pictures[:, 0], pictures[:, 1]))


def test_limit_of_distinct_pictures_is_the_quantile_of_all_their_pairs():
    pictures = noise(30, 8, 8, 3)
    pairs = [copy_similarity(pictures[i], pictures[j]) for i in range(30) for j in range(i)]
    assert distinct_above(PIXELS.features(pictures)) == pytest.approx(np.quantile(pairs, 0.999), abs=1e-6)
