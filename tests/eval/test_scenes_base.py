"""The models that come with the package are what their cards say."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from memfilter.data import scenes
from memfilter.eval.agreement import agreement
from memfilter.eval.copies import CAPTIONS, PICTURES, PIXELS, SEED, compute_memorized_above, memorized_above, seed_agreement
from memfilter.eval.generate import generate
from memfilter.pipelines import load_pipeline, model_dir

UNSEEN = 11  # a stream of scenes that neither model was trained on


@pytest.fixture(scope="module")
def wanted():
    return [scene for scene in (scenes.draw(1, UNSEEN, i) for i in range(400)) if scenes.held_out(scene)][:16]


@pytest.fixture(scope="module")
def pictures(wanted):
    return generate(load_pipeline("scenes"), [scene.caption for scene in wanted], range(4), steps=10, progress=False)


def test_stock_pipeline_loads_half_precision_safetensors_of_at_most_fifteen_megabytes():
    directory = model_dir("scenes")
    StableDiffusionPipeline.from_pretrained(directory, use_safetensors=True)
    weights = list(directory.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) <= 15e6
    assert all(t.dtype == torch.float16 for file in weights for t in load_file(file).values() if t.is_floating_point())


def test_autoencoder_keeps_a_scene_recognisable():
    vae = load_pipeline("scenes").vae
    drawn = [scenes.draw(2, UNSEEN, i) for i in range(60)]
    pixels = torch.from_numpy(scenes.pixels(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - pixels) / 2).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 30  # dB


def test_combination_that_was_held_out_shows_object_and_background(wanted, pictures):
    agreed = agreement(pictures.reshape(-1, 32, 32, 3), [scene for scene in wanted for _ in range(4)])
    assert agreed.mean() > 0.7


def test_four_seeds_give_four_different_pictures(pictures):
    together = seed_agreement(pictures)
    assert np.median(together) < 0.6
    assert (together < memorized_above()).all()


def test_limit_that_comes_with_the_package_is_that_of_its_scenes():
    computed = compute_memorized_above(CAPTIONS, PICTURES, SEED, PIXELS, scenes.RESOLUTION)
    assert memorized_above() == pytest.approx(computed, abs=1e-6)


def test_scorer_tells_the_right_caption_from_others():
    drawn = [scenes.draw(3, UNSEEN, i) for i in range(300)]
    pixels = scenes.pixels(drawn)
    assert agreement(pixels, drawn).mean() > 0.85
    assert agreement(pixels, drawn[1:] + drawn[:1]).mean() < 0.02


def test_generation_depends_on_prompt_number_and_seed_alone(wanted):
    pipeline, captions = load_pipeline("scenes"), [scene.caption for scene in wanted[:3]]
    together = generate(pipeline, captions, (0, 1), steps=4, progress=False)
    apart = generate(pipeline, captions, (0, 1), steps=4, batch_size=1, progress=False)
    assert np.abs(together.astype(int) - apart).max() <= 1
    assert (generate(pipeline, captions, (1,), steps=4, progress=False)[:, 0] == together[:, 1]).mean() > 0.99
