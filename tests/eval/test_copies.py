import numpy as np
import pytest

from memfilter.data import scenes
from memfilter.eval.copies import copy_similarity, memorized_above, seed_agreement


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


def test_one_in_a_thousand_pairs_of_the_same_caption_exceeds_the_limit_on_other_scenes():
    above = []
    for i in range(150):
        scene = scenes.draw(4, 8, i)
        drawn = scenes.pixels([scenes.vary(scene, 4, 9, i * 20 + j) for j in range(20)])
        first, second = np.triu_indices(20, 1)
        above.append((copy_similarity(drawn[first], drawn[second]) > memorized_above()).mean())
    assert np.mean(above) == pytest.approx(0.001, abs=0.001)


def test_seed_agreement_is_the_mean_over_all_pairs():
    generations = noise(2, 3, 8, 8, 3)
    pairs = [copy_similarity(generations[:, i], generations[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert seed_agreement(generations) == pytest.approx(np.mean(pairs, 0))
