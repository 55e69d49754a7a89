"""What detection measures, by hand; and the judgement on the ground of clean prompts."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from scipy import stats
from transformers import CLIPConfig

from memfilter.eval.copies import PIXELS
from memfilter.eval.generate import Job, arguments_of, generate_batch, generator_of, unchecked
from memfilter.inference import CleanNorms, Sampling, clean_norms, judge, measure_prompts, rivals, token_significance, watch
from memfilter.inference.calls import first_calls
from memfilter.inference.generating import Mitigation, generate_prompt
from memfilter.inference.detection import Signals
from memfilter.inference.rivals import RIVALS, anisotropy, density, distances, fresh_generator, own_loss, tiled_distance
from memfilter.inference.table import verdict

SAMPLING = Sampling(seeds=3, steps=4, guidance_scale=5.0, size=16)
PROMPTS = ["a red dog", "a cat on the moon", "a house", "<b>two</b> trees"]
FORM = (4, 5.0, 16)


def test_signals_do_not_depend_on_how_prompts_are_batched(pipeline):
    whole = measure_prompts(pipeline, PROMPTS, SAMPLING, rivals=RIVALS, batch_size=12, progress=False)
    for batch_size in (2, 4):  # fewer than the seeds of a prompt, and hardly more
        found = measure_prompts(pipeline, PROMPTS, SAMPLING, rivals=RIVALS, batch_size=batch_size, progress=False)
        np.testing.assert_allclose(found.norms, whole.norms, rtol=1e-4)
        for name in RIVALS:
            np.testing.assert_allclose(found.rival(name, clean=ground(found)), whole.rival(name, clean=ground(whole)), rtol=1e-2,
                                       atol=1e-4, err_msg=name)  # fmt: skip
    assert whole.norms.shape == (4, 3, 4) and list(whole.raw) == list(RIVALS)


def ground(signals) -> CleanNorms:
    """As if the prompts were clean ones."""
    return CleanNorms(signals.norms, signals.timesteps, {}, signals.raw["anisotropy"][..., -1])


def test_norms_are_those_of_watching_the_pictures_of_generate(pipeline):
    found = measure_prompts(pipeline, PROMPTS, SAMPLING, progress=False)
    with watch(pipeline) as seen:
        generate_batch(pipeline, [Job(2, PROMPTS[2], seed) for seed in range(3)], *FORM)
    np.testing.assert_allclose(found.norms[2], seen.norms, rtol=1e-4)
    np.testing.assert_allclose(found.metric(2, 2)[2], seen.norms[:2, :2].mean(), rtol=1e-4)


def test_breaking_off_reads_the_same_norms(pipeline):
    whole = measure_prompts(pipeline, PROMPTS, SAMPLING, progress=False)
    short = measure_prompts(pipeline, PROMPTS, SAMPLING, until=2, progress=False)
    np.testing.assert_allclose(short.norms, whole.norms[..., :2], rtol=1e-5)


def test_broken_off_it_goes_by_the_picture_that_the_last_step_predicts(pipeline):
    jobs = [Job(0, PROMPTS[0], seed) for seed in range(2)]
    call = first_calls(pipeline, 2, **arguments_of(jobs, *FORM))[-1]
    guided = call.null_pred + 5.0 * (call.cond_pred - call.null_pred)
    expected = pipeline.scheduler.step(guided, call.timestep, call.sample).pred_original_sample
    torch.testing.assert_close(call.predicted_x0(pipeline.scheduler, 5.0), expected, rtol=1e-4, atol=1e-4)
    # DDIM's last step gives what it predicts
    whole = measure_prompts(pipeline, PROMPTS, SAMPLING, rivals=RIVALS, progress=False)
    found = measure_prompts(pipeline, PROMPTS, SAMPLING, rivals=RIVALS, until=SAMPLING.steps, progress=False)
    for name in RIVALS:
        np.testing.assert_allclose(found.rival(name, clean=ground(whole)), whole.rival(name, clean=ground(whole)), rtol=1e-2,
                                   atol=1e-3, err_msg=name)  # fmt: skip
    early = measure_prompts(pipeline, PROMPTS, SAMPLING, rivals=("density_l2",), until=1, progress=False)
    assert np.abs(early.rival("density_l2") - whole.rival("density_l2")).max() > 1e-3


def test_fewer_seeds_are_those_of_a_shorter_measurement(sd1):
    whole = measure_prompts(sd1, PROMPTS, SAMPLING, rivals=RIVALS, progress=False)
    shorter = measure_prompts(sd1, PROMPTS, Sampling(2, 4, 5.0, 16), rivals=RIVALS, progress=False)
    for name in RIVALS:
        one, other = whole.rival(name, 2, ground(shorter)), shorter.rival(name, clean=ground(shorter))
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-4, err_msg=name)
    assert np.isnan(whole.rival("density_l2", 1)).all() and not np.isnan(whole.rival("loss", 1)).any()


def test_density_is_the_nearness_of_all_pairs(rng):
    pictures = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    pictures[1] = pictures[1, :1]
    found = density(distances(pictures, tiled_distance))
    pairs = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        x, y = pictures[0, a] / 255, pictures[0, b] / 255
        tiles = [np.sqrt(((x - y)[r : r + 2, c : c + 2] ** 2).mean()) for r in range(0, 8, 2) for c in range(0, 8, 2)]
        pairs.append(max(tiles))
    assert found == pytest.approx([-np.mean(pairs), 0.0], abs=1e-6)
    likeness = density(distances(pictures, lambda a, b: 1 - PIXELS.similarity(a, b)))
    assert likeness[1] == pytest.approx(0, abs=1e-6) and likeness[0] < -0.5
    assert np.isnan(density(distances(pictures[:, :1], tiled_distance))).all()


def test_tiles_see_a_small_difference_that_the_whole_does_not(rng):
    plain = np.full((1, 16, 16, 3), 200, np.uint8)
    small, faint = plain.copy(), plain.copy()
    small[:, :4, :4] = 0
    faint += 20
    assert tiled_distance(plain, small)[0] == pytest.approx(200 / 255)
    assert tiled_distance(plain, faint)[0] == pytest.approx(20 / 255)


def test_anisotropy_weighs_both_by_their_spread_among_clean_prompts(rng):
    norms, cosines = rng.normal(5, 2, (50, 3, 4)), rng.normal(0, 0.1, (50, 3))
    clean = CleanNorms(norms, np.arange(4.0), {}, cosines)
    assert clean.spread() == pytest.approx((norms[..., 0].mean(1).std(), cosines.mean(1).std()))
    assert clean.spread(2) == pytest.approx((norms[:, :2, 0].mean(1).std(), cosines[:, :2].mean(1).std()))
    signals = Signals([""] * 50, np.arange(4.0), norms, {"anisotropy": cosines[..., None]})
    expected = norms[:, 0, 0] / norms[:, 0, 0].std() + cosines[:, 0] / cosines[:, 0].std()
    np.testing.assert_allclose(signals.rival("anisotropy", 1, clean), expected, atol=1e-4)
    assert anisotropy(np.array([3.0]), np.array([0.5]), (2.0, 0.1)) == pytest.approx([6.5])
    with pytest.raises(ValueError, match="asks for whole ones"):
        CleanNorms(norms, np.arange(4.0), {}).spread()


def test_loss_is_that_of_the_training_objective_on_the_own_picture(pipeline):
    batch = [Job(0, PROMPTS[0], 0), Job(1, PROMPTS[1], 0)]
    pictures = generate_batch(pipeline, batch, *FORM)
    call = first_calls(pipeline, 1, **arguments_of(batch, *FORM))[0]
    found = own_loss(pipeline, batch, pictures, call)
    again = own_loss(pipeline, batch[1:], pictures[1:], first_calls(pipeline, 1, **arguments_of(batch[1:], *FORM))[0])
    assert found.shape == (2,) and (found > 0).all()
    np.testing.assert_allclose(again, found[1:], rtol=1e-3)
    other = own_loss(pipeline, batch, pictures[::-1].copy(), call)
    assert not np.allclose(found, other)


def test_loss_is_the_mean_over_its_timesteps_each_at_a_known_noise(pipeline, monkeypatch):
    """Against the objective written out once more; noising and target are the scheduler's."""
    batch = [Job(0, PROMPTS[0], 0), Job(1, PROMPTS[1], 2)]
    pictures = generate_batch(pipeline, batch, *FORM)
    monkeypatch.setattr(rivals, "LOSS_AT", (300, 700))
    call, scheduler, losses = first_calls(pipeline, 1, **arguments_of(batch, *FORM))[0], pipeline.scheduler, []
    found = own_loss(pipeline, batch, pictures, call)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures / 127.5 - 1).permute(0, 3, 1, 2).float()
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        cond = call.cond | {"return_dict": True}
        for place, at in enumerate((300, 700)):
            drawn = [torch.randn(latents.shape[1:], generator=fresh_generator(job, place)) for job in batch]
            noise, when = torch.stack(drawn), torch.tensor([at] * 2)
            target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, when)
            pred = pipeline.unet(scheduler.add_noise(latents, noise, when), at, **cond).sample
            losses.append(((pred - target) ** 2).mean((1, 2, 3)).numpy())
    assert np.abs(losses[0] / losses[1] - 1).min() > 1e-3
    assert found == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-4)


def test_noise_of_the_loss_is_not_what_the_picture_was_made_from():
    jobs = [Job(number, "", seed) for number in range(3) for seed in range(3)]
    drawn = [torch.randn(2, generator=generator_of(job)) for job in jobs]
    drawn += [torch.randn(2, generator=fresh_generator(job, place)) for job in jobs for place in range(4)]
    assert len({*map(tuple, torch.stack(drawn).tolist())}) == 9 + 36


def clean(count=199, seeds=4, steps=5, seed=0):
    norms = np.random.default_rng(seed).gamma(5, 1, (count, seeds, steps))
    return CleanNorms(norms, np.arange(steps)[::-1] * 100.0, {"steps": steps})


def test_p_values_of_clean_prompts_are_uniform_and_small_ones_rare():
    ground, fresh = clean(), clean(count=4000, seed=1)
    p = ground.p_values(fresh.metric(2, 3), 2, 3)
    by_hand = [(1 + (ground.metric(2, 3) >= m).sum()) / 200 for m in fresh.metric(2, 3)]
    assert p == pytest.approx(by_hand)
    assert stats.kstest(p, "uniform").statistic < 0.1
    for rate in (0.01, 0.05, 0.2):
        threshold = ground.threshold(rate, 2, 3)
        assert ((fresh.metric(2, 3) >= threshold) == (p <= rate + 1e-12)).all()


def test_steps_that_cannot_be_read_are_no_ground_for_a_verdict():
    ground = clean()
    ground.norms[:, :, 0] = np.nan
    assert ground.first_readable == 2 and clean().first_readable == 1
    assert ground.metric(2) == pytest.approx(ground.norms[..., 1].mean(1))
    assert ground.usual == pytest.approx(np.median(ground.norms[..., 1]))
    with pytest.raises(ValueError, match="the first 1 steps cannot be read"):
        ground.threshold(0.1, 1)


def test_zero_terminal_snr_is_judged_by_later_steps(zero_snr):
    ground = clean_norms(zero_snr, [f"a picture no {i}" for i in range(9)], SAMPLING, progress=False)
    signals = measure_prompts(zero_snr, PROMPTS, SAMPLING, rivals=("anisotropy",), progress=False)
    assert ground.first_readable == SAMPLING.first_readable(zero_snr) == 2 and np.isnan(signals.metric(1)).all()
    threshold, p = judge(signals, ground, 0.2, 2)
    assert np.isfinite(threshold) and (p < 1).any()
    assert np.isfinite(signals.rival("anisotropy", clean=ground)).all()


def test_safety_checker_is_set_aside_where_pictures_are_measured_or_looked_at(sd1):
    plain = measure_prompts(sd1, PROMPTS, SAMPLING, rivals=RIVALS, progress=False)
    checked = copy.copy(sd1)
    checked.safety_checker = Blackening()
    found = measure_prompts(checked, PROMPTS, SAMPLING, rivals=RIVALS, progress=False)
    assert isinstance(checked.safety_checker, Blackening)
    np.testing.assert_allclose(found.norms, plain.norms)
    np.testing.assert_allclose(found.rival("density_l2"), plain.rival("density_l2"))
    pictures = [generate_prompt(one, PROMPTS[0], SAMPLING).pictures for one in (sd1, checked)]
    np.testing.assert_array_equal(*pictures)


def test_pipeline_that_was_measured_is_saved_with_its_safety_checker(sd1):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = sizes | {"image_size": 8, "patch_size": 8, "projection_dim": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=4))
    checked = copy.copy(sd1)
    checked._internal_dict = copy.copy(sd1.config)
    checked.register_modules(safety_checker=checker)
    before = dict(checked.config)
    assert before["safety_checker"] == ("stable_diffusion", "StableDiffusionSafetyChecker")
    with unchecked(checked):
        assert checked.safety_checker is None
    assert checked.safety_checker is checker and dict(checked.config) == before


def test_facts_of_a_pipeline_are_the_same_after_it_was_used(sd1):
    used, fresh = copy.copy(sd1), copy.copy(sd1)
    used.scheduler, fresh.scheduler = (DPMSolverSinglestepScheduler.from_config(sd1.scheduler.config) for _ in range(2))
    before = SAMPLING.facts(used)
    measure_prompts(used, PROMPTS[:1], SAMPLING, progress=False)
    assert before == SAMPLING.facts(used) == SAMPLING.facts(fresh)


def test_clean_prompts_that_do_not_differ_have_no_spread(sd1):
    ground = clean_norms(sd1, ["a cat"], SAMPLING, progress=False)
    with pytest.raises(ValueError, match="the 1 clean prompts do not differ"):
        ground.spread(2)


@pytest.mark.parametrize("threshold", [3.9023561477661137, 0.012345649, 123456.71])
def test_threshold_that_is_told_is_not_below_the_one_that_is_gone_by(threshold):
    told = verdict([], threshold, 0.01)
    shown = float(re.search("at least ([0-9.]+),", told).group(1))
    assert threshold <= shown <= threshold * (1 + 1e-5)


class Blackening(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        return np.zeros_like(images), [True] * len(images)


def test_too_few_clean_prompts_for_a_rate_are_an_error():
    assert clean(count=99).threshold(0.01) > 0
    with pytest.raises(ValueError, match="needs 99 clean prompts at least, there are 98"):
        clean(count=98).threshold(0.01)


def test_means_over_other_seeds_are_not_compared():
    with pytest.raises(ValueError, match="4 seeds each, fewer than 5"):
        clean().metric(seeds=5)


def test_file_holds_all_of_it_and_other_files_are_refused(tmp_path):
    ground = clean()
    ground.norms[:, :, 0] = np.nan  # zero terminal SNR
    ground.save(tmp_path / "clean.json")
    again = CleanNorms.load(tmp_path / "clean.json")
    np.testing.assert_allclose(again.norms, ground.norms, atol=1e-6)
    measured = CleanNorms(ground.norms.astype(np.float32), ground.timesteps, ground.about)
    assert (measured.threshold(0.01), measured.usual) == (again.threshold(0.01), again.usual)
    assert again.about == ground.about and not np.isnan(again.metric()).any()
    small = CleanNorms(ground.norms * 1e-7, ground.timesteps, ground.about)
    np.testing.assert_allclose(small.norms, ground.norms * 1e-7, rtol=1e-6)
    again.require({"steps": 5})
    with pytest.raises(ValueError, match="steps 5 and 50"):
        again.require({"steps": 50})
    valid = json.loads((tmp_path / "clean.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    norms = json.loads(json.dumps(valid["norms"]))
    norms[1][2][3] = None  # though others of its step can be read
    changes = ({"norms": []}, {"about": 3}, {"cosines": [1]}, {"norms": [[[None] * 5]]}, {"norms": norms})
    broken = [valid | change for change in changes]
    broken.append({name: value for name, value in valid.items() if name != "about"})
    for content in ("", "[]", "{}", *map(json.dumps, broken)):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="no norms of clean prompts"):
            CleanNorms.load(tmp_path / "other.json")


def test_prompts_are_judged_by_what_clean_ones_answer(sd1):
    ground = clean_norms(sd1, [f"a picture no {i}" for i in range(19)], SAMPLING, progress=False)
    signals = measure_prompts(sd1, PROMPTS, SAMPLING, progress=False)
    threshold, p = judge(signals, ground, 0.1, 1)
    assert threshold == ground.threshold(0.1, 1, 3)
    assert p == pytest.approx([(1 + (ground.metric(1, 3) >= m).sum()) / 20 for m in signals.metric(1)])
    assert ground.band().shape == (3, 4)
    np.testing.assert_allclose(ground.band((0.5,))[0], np.median(ground.norms.reshape(-1, 4), axis=0))


def test_without_guidance_nothing_can_be_measured():
    with pytest.raises(ValueError, match="guidance_scale must be above 1"):
        Sampling(guidance_scale=1.0)


@pytest.mark.parametrize(
    "work",
    [
        lambda pipeline: measure_prompts(pipeline, PROMPTS, SAMPLING, batch_size=3, progress=False),
        lambda pipeline: measure_prompts(pipeline, PROMPTS, SAMPLING, batch_size=3, until=1, progress=False),
        lambda pipeline: generate_prompt(pipeline, PROMPTS[0], SAMPLING),
        lambda pipeline: generate_prompt(pipeline, PROMPTS[0], SAMPLING, Mitigation("prompt", 1e9, 1.0)),
        lambda pipeline: token_significance(pipeline, PROMPTS[0], SAMPLING),
    ],
)
def test_norm_that_is_not_finite_is_an_error_that_names_prompt_and_seed(broken, work):
    with pytest.raises(ValueError, match="not finite of prompt 'a red dog', seed 2:"):
        work(broken)


def test_norms_that_are_not_finite_are_no_ground_and_have_no_p_value():
    ground = clean()
    with pytest.raises(ValueError, match="the metric of prompt 1 is nan"):
        ground.p_values(np.array([1.0, np.nan]))
    for value in (np.nan, np.inf):
        norms = ground.norms.copy()
        norms[2, 3, 1] = value
        with pytest.raises(ValueError, match="clean prompt 2, seed 3: a norm is not finite"):
            CleanNorms(norms, ground.timesteps, {})
    with pytest.raises(ValueError, match="none of the clean prompts' norms can be read"):
        CleanNorms(np.full_like(ground.norms, np.nan), ground.timesteps, {})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(DDIMScheduler, {"timestep_spacing": "trailing"}), (DPMSolverMultistepScheduler, {"use_karras_sigmas": True})],
)
def test_clean_norms_under_other_settings_of_the_scheduler_are_refused(sd1, kind, changes):
    made, other = (copy.copy(sd1) for _ in range(2))
    made.register_modules(scheduler=kind.from_config(sd1.scheduler.config))
    other.register_modules(scheduler=kind.from_config(sd1.scheduler.config, **changes))
    facts = SAMPLING.facts(made)
    assert json.loads(json.dumps(facts)) == facts and not any("._" in name for name in facts)
    ground = CleanNorms(clean().norms, clean().timesteps, facts)
    ground.require(SAMPLING.facts(made))
    (name, value), = changes.items()
    with pytest.raises(ValueError, match=f"otherwise: scheduler.{name} {made.scheduler.config[name]} and {value}. Calibrate"):
        ground.require(SAMPLING.facts(other))
