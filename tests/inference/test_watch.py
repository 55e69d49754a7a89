"""Watching changes nothing and reads what a call of the denoiser by hand gives."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from memfilter.inference import MemorizationDetected, Sampling, adjust_prompt, token_significance, watch
from memfilter.inference.calls import NotFiniteError, UnguidedError, factor_at, first_calls, first_readable, readable_factor

SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler, LMSDiscreteScheduler,
              HeunDiscreteScheduler)  # fmt: skip


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def generated(pipeline, prompts=("a cat", "a red dog on a hill"), each=2, steps=4, **more):
    settings = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}
    return pipeline(
        list(prompts), num_images_per_prompt=each, generator=generators(len(prompts) * each), **settings | more
    ).images


def with_scheduler(pipeline, kind, **changes):
    other = copy.copy(pipeline)
    other.register_modules(scheduler=kind.from_config(pipeline.scheduler.config, **changes))
    return other


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pictures_are_bit_for_bit_the_same(pipeline, kind):
    pipeline = with_scheduler(pipeline, kind)
    plain = generated(pipeline)
    with watch(pipeline, cosine=True) as seen:
        watched = generated(pipeline)
    np.testing.assert_array_equal(watched, plain)
    assert seen.norms.shape == seen.cosines.shape == (4, len(seen.timesteps))
    assert len(seen.timesteps) == pipeline.num_timesteps
    assert (seen.norms > 0).all() and (seen.cosines.abs() <= 1).all()
    assert not pipeline.unet._forward_hooks


def test_norms_are_those_of_the_paper_redone_in_numpy(pipeline):
    calls = []
    handle = pipeline.unet.register_forward_hook(lambda m, args, kwargs, out: calls.append((args, out[0])), with_kwargs=True)
    with watch(pipeline) as seen:
        generated(pipeline)
    handle.remove()
    abar = pipeline.scheduler.alphas_cumprod.numpy()
    for step, ((_, t), pred) in enumerate(calls):
        null, cond = np.split(pred.numpy().astype(np.float64), 2)
        factor = abar[int(t)] ** 0.5 if pipeline.scheduler.config.prediction_type == "v_prediction" else 1
        expected = factor * np.sqrt(((cond - null) ** 2).sum((1, 2, 3)))
        np.testing.assert_allclose(seen.norms[:, step], expected, rtol=1e-5)
        assert seen.timesteps[step] == t


def test_metric_is_the_mean_over_first_steps_and_pictures_of_a_prompt(sd1):
    with watch(sd1) as seen:
        generated(sd1, each=3, steps=5)
    norms = seen.norms.numpy()  # [6, 5]
    np.testing.assert_allclose(seen.metric(2, 3), norms.reshape(2, 3, 5)[..., :2].mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(seen.metric(), norms.mean(1), rtol=1e-6)


def test_unit_rms_carries_over_to_other_sizes(sd1):
    with watch(sd1) as l2:
        generated(sd1)
    with watch(sd1, unit="rms") as rms:
        generated(sd1)
    torch.testing.assert_close(l2.norms, rms.norms * (4 * 8 * 8) ** 0.5)


def test_every_generation_has_its_own_norms(sd1):
    with watch(sd1) as seen:
        generated(sd1, steps=1)
        generated(sd1, steps=1)
        with pytest.raises(KeyboardInterrupt):
            generated(sd1, callback_on_step_end=stopping)
        generated(sd1, prompts=("a cat",), each=1, steps=3)
    assert [g.norms.shape for g in seen.generations] == [(4, 1), (4, 1), (4, 1), (1, 3)]
    torch.testing.assert_close(seen.generations[0].norms, seen.generations[1].norms, rtol=0, atol=0)


def stopping(*_):
    raise KeyboardInterrupt


def test_what_the_package_asks_of_the_denoiser_meanwhile_is_no_generation(pipeline):
    """Of explaining and adjusting only the generations that are broken off for them are seen."""
    with watch(pipeline) as plain:
        generated(pipeline, prompts=("a cat",), steps=4)
    with watch(pipeline) as seen:
        token_significance(pipeline, "a cat", Sampling(2, 4, 5.0, 16), steps=(0,))
        adjusted = adjust_prompt(pipeline, "a cat", 1e-3, Sampling(2, 4, 5.0, 16), generators(2))
        pipeline(**adjusted.arguments(), generator=generators(2), num_inference_steps=4, guidance_scale=5.0, height=16, width=16)
    assert [g.norms.shape for g in seen.generations] == [(2, 1), (2, 1), (2, 4)]
    torch.testing.assert_close(seen.generations[1].norms, plain.norms[:, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.norms[:, 0], adjusted.after, rtol=1e-4, atol=1e-5)


def test_memorized_prompt_ends_the_generation_with_its_number(sd1):
    with watch(sd1) as seen:
        generated(sd1)
    metric = seen.metric(2, 2)
    threshold = float(metric.mean())  # between the two prompts
    with watch(sd1, threshold=threshold, after=2, images_per_prompt=2) as seen, pytest.raises(MemorizationDetected) as told:
        generated(sd1)
    assert told.value.prompts == [int(metric.argmax())] and told.value.steps == 2
    torch.testing.assert_close(told.value.metric, metric)
    assert seen.norms.shape == (4, 2) and f"{metric.max():.4g}" in str(told.value)
    assert not sd1.unet._forward_hooks


def test_what_is_offloaded_goes_back_when_a_generation_is_ended(sd1, monkeypatch):
    freed = []
    monkeypatch.setattr(type(sd1), "maybe_free_model_hooks", lambda self: freed.append(self))
    with pytest.raises(MemorizationDetected), watch(sd1, threshold=0.0):
        sd1("a cat", num_inference_steps=2, output_type="np", height=16, width=16)
    assert freed == [sd1]


def test_models_of_edm_are_refused(sd1):
    with pytest.raises(ValueError, match="EDMEulerScheduler is for models of EDM's preconditioning"):
        first_readable(EDMEulerScheduler(), 4)


def test_callback_leaves_the_generation_alone_and_is_called_once(sd1):
    plain, told = generated(sd1), []
    with watch(sd1, threshold=0.0, images_per_prompt=2, on_memorized=told.append):
        watched = generated(sd1)
    np.testing.assert_array_equal(watched, plain)
    assert [found.prompts for found in told] == [[0, 1]]


def test_threshold_that_nothing_reaches_tells_nothing(sd1):
    with watch(sd1, threshold=1e9):
        generated(sd1)


def test_generation_without_guidance_is_an_error(pipeline):
    with watch(pipeline), pytest.raises(UnguidedError, match="guidance_scale above 1"):
        generated(pipeline, guidance_scale=1.0)


@pytest.mark.parametrize("before", [{}, {"callback_on_step_end": stopping}])
def test_generation_without_guidance_is_an_error_after_one_with_it_too(sd1, before):
    with watch(sd1, threshold=1e9):
        with suppress(KeyboardInterrupt):
            generated(sd1, **before)
        with pytest.raises(UnguidedError):
            generated(sd1, guidance_scale=1.0)


def test_negative_prompt_takes_the_place_of_the_empty_one(pipeline):
    form = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}

    def predicted(prompt):  # for the same latents
        return first_calls(pipeline, 1, prompt=prompt, generator=generators(1), **form)[0]

    call, negative = predicted("a cat"), predicted("a red dog on a hill")
    distance = (call.cond_pred - negative.cond_pred).square().sum((1, 2, 3)).sqrt()
    expected = distance * abs(factor_at(pipeline.scheduler, call.timestep))
    with watch(pipeline) as seen:
        pipeline("a cat", negative_prompt="a red dog on a hill", generator=generators(1), **form)
    torch.testing.assert_close(seen.norms[:, 0], expected, rtol=1e-3, atol=1e-6)
    assert abs(float(call.norm(pipeline.scheduler) / expected) - 1) > 0.01  # of the empty prompt


def test_norm_that_is_not_finite_ends_the_comparison_with_its_picture(broken):
    for threshold in (0.0, 1e9):
        with watch(broken, threshold=threshold, images_per_prompt=2), pytest.raises(ValueError, match="of picture 3:"):
            generated(broken)
    with watch(broken) as seen:
        generated(broken)
    with pytest.raises(NotFiniteError, match="not finite of picture 3:") as error:
        seen.norms  # noqa: B018
    assert error.value.pictures == [3]


def test_guidance_that_is_switched_off_on_the_way_ends_the_norms(sd1):
    def off(pipe, step, timestep, values):
        if step == 1:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    more = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plain = generated(sd1, **more)
    with watch(sd1) as seen:
        np.testing.assert_array_equal(generated(sd1, **more), plain)
    assert seen.norms.shape == (4, 2)


def test_nothing_was_seen(sd1):
    with watch(sd1) as seen:
        pass
    with pytest.raises(ValueError, match="nothing was generated"):
        seen.norms  # noqa: B018


def test_factor_at_timesteps_between_those_of_the_training(pipeline):
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(7)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        expected = 1.0 if scheduler.config.prediction_type == "epsilon" else float((1 / (1 + sigma**2)) ** 0.5)
        assert factor_at(scheduler, timestep) == pytest.approx(expected, rel=1e-4)


def test_norm_tells_nothing_at_zero_terminal_snr_and_is_compared_one_step_later(zero_snr):
    with watch(zero_snr) as seen:
        generated(zero_snr)
    assert seen.norms[:, 0].isnan().all() and not seen.norms[:, 1:].isnan().any()
    assert not seen.metric().isnan().any()
    told = []
    with watch(zero_snr, threshold=0.0, after=1, images_per_prompt=2, on_memorized=told.append):
        generated(zero_snr)
    assert [found.steps for found in told] == [2]


@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler,
     UniPCMultistepScheduler],
)  # fmt: skip
def test_zero_terminal_snr_is_told_whatever_the_scheduler_puts_in_its_place(zero_snr, kind):
    scheduler = kind.from_config(zero_snr.scheduler.config)
    assert first_readable(scheduler, 10) == 2
    scheduler.set_timesteps(10)
    first, second = (readable_factor(scheduler, timestep) for timestep in scheduler.timesteps[:2])
    assert np.isnan(first) and second > 0.01


def test_timesteps_that_are_logarithms_of_sigma_are_refused(zero_snr, sd1):
    with pytest.raises(ValueError, match="EulerDiscreteScheduler with timestep_type=continuous"):
        first_readable(with_scheduler(zero_snr, EulerDiscreteScheduler, timestep_type="continuous").scheduler, 4)
    # where the noise is predicted, no factor is asked for
    assert first_readable(with_scheduler(sd1, EulerDiscreteScheduler, timestep_type="continuous").scheduler, 4) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"after": 0}, "at least 1, found 0"), ({"after": 9}, "after is 9, the generation has 4 steps"),
     ({"images_per_prompt": 3}, "images_per_prompt is 3, the generation has 4 pictures")],
)  # fmt: skip
def test_comparison_that_cannot_be_made_is_refused_before_the_generation(sd1, settings, message):
    with pytest.raises(ValueError, match=message), watch(sd1, threshold=0.0, **settings) as seen:
        generated(sd1)
    assert settings.get("after") == 0 or not seen.generations
