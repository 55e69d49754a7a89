"""The adjusted embedding: its gradient, its steps, and that every sample is its own."""

import numpy as np
import pytest
import torch

from memfilter.eval.generate import Job, arguments_of, generator_of
from memfilter.functional import text_norm
from memfilter.inference import Sampling, add_random_tokens, adjust_prompt, watch
from memfilter.inference.calls import factor_at, first_calls
from memfilter.inference.significance import embedding_gradient, frozen
from memfilter.pipelines import load_pipeline

SAMPLING = Sampling(seeds=2, steps=4, guidance_scale=5.0, size=16)
JOBS = [Job(0, "a red dog", 0), Job(0, "a red dog", 1), Job(1, "a cat on the moon", 0)]
FORM = (SAMPLING.steps, SAMPLING.guidance_scale, SAMPLING.size)


def adjust(pipeline, jobs, target, sampling=SAMPLING, **more):
    generator = [generator_of(job) for job in jobs]
    return adjust_prompt(pipeline, [job.prompt for job in jobs], target, sampling, generator, **more)


def first(pipeline, jobs=JOBS):
    return first_calls(pipeline, 1, **arguments_of(jobs, *FORM))[0]


def test_gradient_is_that_of_finite_differences(pipeline):
    pipeline.unet.double()
    try:
        call = first(pipeline.to(torch.float64))
        embeds = call.cond["encoder_hidden_states"]
        norm, gradient = embedding_gradient(pipeline, call)
        factor = abs(factor_at(pipeline.scheduler, call.timestep))
        generator, step = torch.Generator().manual_seed(3), 1e-5
        for _ in range(3):
            direction = torch.randn(embeds.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                above, below = (
                    text_norm(call.cond_again(pipeline.unet, embeds + way * step * direction), call.null_pred) * factor
                    for way in (1, -1)
                )
            expected = (gradient * direction).sum((1, 2))
            torch.testing.assert_close((above - below) / (2 * step), expected, rtol=1e-5, atol=1e-9)
        assert (norm > 0).all() and not pipeline.unet.conv_in.weight.grad
    finally:
        pipeline.to(torch.float32)


def test_every_sample_comes_down_to_the_target_by_itself(pipeline):
    before = adjust(pipeline, JOBS, 1e9, SAMPLING)
    assert before.iterations.tolist() == [0, 0, 0]
    target = float(before.before.sort().values[0]) * 0.99
    together = adjust(pipeline, JOBS, target, SAMPLING, iterations=200)
    assert (together.after <= target).all() and (together.iterations > 0).all()
    torch.testing.assert_close(together.before, before.before)
    for row, job in enumerate(JOBS):
        alone = adjust(pipeline, [job], target, SAMPLING, iterations=200)
        assert alone.iterations[0] == together.iterations[row]
        torch.testing.assert_close(alone.prompt_embeds[0], together.prompt_embeds[row], rtol=1e-3, atol=1e-3)


def test_steps_are_those_of_adam_redone_in_numpy(sd1):
    call = first(sd1)
    embeds = call.cond["encoder_hidden_states"]
    found = adjust(sd1, JOBS, 1e-6, SAMPLING, iterations=3)
    assert found.iterations.tolist() == [3, 3, 3]
    at, m, v = embeds.numpy().astype(np.float64), 0.0, 0.0
    for t in range(1, 4):
        gradient = embedding_gradient(sd1, call, torch.from_numpy(at).float())[1].numpy().astype(np.float64)
        gradient[:, 0] = 0
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        at = at - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(found.prompt_embeds, at, atol=2e-3)
    torch.testing.assert_close(found.prompt_embeds[:, 0], embeds[:, 0], rtol=0, atol=0)  # BOS


def test_embeddings_serve_any_call_and_have_the_norm_that_was_told(pipeline):
    adjusted = adjust(pipeline, JOBS, 0.01, SAMPLING, iterations=2)
    form = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}
    with watch(pipeline) as seen:
        changed = pipeline(**adjusted.arguments(), generator=[generator_of(job) for job in JOBS], **form).images
        plain = pipeline(**arguments_of(JOBS, *FORM)).images
    torch.testing.assert_close(seen.generations[0].norms[:, 0], adjusted.after, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.generations[1].norms[:, 0], adjusted.before, rtol=1e-4, atol=1e-6)
    assert np.abs(changed - plain).max() > 0


def test_weights_ask_for_gradients_as_before(sd1):
    sd1.unet.requires_grad_(True)
    with frozen(sd1.unet):
        assert not any(p.requires_grad for p in sd1.unet.parameters())
    adjust(sd1, JOBS, 0.01, SAMPLING, iterations=1)
    assert all(p.requires_grad and p.grad is None for p in sd1.unet.parameters())


@pytest.mark.parametrize(("target", "iterations"), [(0.0, 10), (float("nan"), 10), (1.0, 0)])
def test_nonsense_is_refused(sd1, target, iterations):
    with pytest.raises(ValueError, match="must be above 0"):
        adjust(sd1, JOBS, target, SAMPLING, iterations=iterations)


def test_norm_that_is_not_finite_is_no_target_met(broken):
    with pytest.raises(ValueError, match="not finite of prompt 'a cat on the moon', seed 1:"):  # of its generator
        adjust(broken, JOBS, 1e9)


def test_embedding_that_moves_out_of_what_is_finite_is_no_target_met(sd1):
    given = first(sd1).cond["encoder_hidden_states"]

    def overflow(module, args, kwargs, output):
        moved = len(args[0]) == len(given) and not torch.equal(kwargs["encoder_hidden_states"], given)
        return (output[0] * float("inf"),) if moved else None

    handle = sd1.unet.register_forward_hook(overflow, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="not finite of prompt 'a red dog', seed 0; "):
            adjust(sd1, JOBS, 1e-6, iterations=1)
    finally:
        handle.remove()


def test_random_tokens_are_drawn_from_the_seed_and_leave_the_words_in_order(sd1):
    jobs = [Job(0, "a red dog on a hill", seed) for seed in range(3)]
    changed = [add_random_tokens(sd1.tokenizer, job, 4) for job in jobs]
    assert changed == [add_random_tokens(sd1.tokenizer, job, 4) for job in jobs]
    assert len({*changed}) == 3
    for text in changed:
        rest = iter(text.split())
        assert all(word in rest for word in "a red dog on a hill".split())
        assert text != "a red dog on a hill"
    assert add_random_tokens(sd1.tokenizer, jobs[0], 0) == "a red dog on a hill"


def test_one_prompt_serves_all_pictures_and_leaves_their_noise_unspent(sd1):
    generator = [generator_of(Job(0, "", seed)) for seed in (0, 1)]
    alone = adjust_prompt(sd1, "a red dog", 0.01, SAMPLING, generator, iterations=2)
    assert torch.equal(generator[1].get_state(), generator_of(Job(0, "", 1)).get_state())
    torch.testing.assert_close(alone.prompt_embeds, adjust(sd1, JOBS[:2], 0.01, iterations=2).prompt_embeds)
    by_default = adjust_prompt(sd1, "a red dog", 0.01, SAMPLING, iterations=2)  # two seeds
    torch.testing.assert_close(by_default.prompt_embeds, alone.prompt_embeds)
    with pytest.raises(ValueError, match="2 prompts and 3 generators"):
        adjust_prompt(sd1, ["a", "b"], 1.0, SAMPLING, [torch.Generator()] * 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_as_whole_precision_does(sd1, dtype):
    low = load_pipeline(sd1.name_or_path, dtype=dtype)
    before = adjust(low, JOBS, 1e9)
    assert (before.iterations == 0).all() and before.prompt_embeds.dtype == dtype
    made = adjust(low, JOBS, float(before.before.min()) * 0.95)
    assert made.prompt_embeds.dtype == dtype and made.prompt_embeds.isfinite().all() and (made.iterations > 0).all()
    assert (made.after < made.before).all()
    torch.testing.assert_close(made.before.float(), adjust(sd1, JOBS, 1e9).before, rtol=0.05, atol=0.01)


def test_where_the_first_step_tells_nothing_the_second_is_met(zero_snr):
    assert SAMPLING.first_readable(zero_snr) == 2
    before = adjust(zero_snr, JOBS, 1e9).before
    made = adjust(zero_snr, JOBS, float(before.min()) * 0.95, iterations=50)
    assert before.isfinite().all() and (made.after < before).all()
    with watch(zero_snr) as seen:
        zero_snr(**arguments_of(JOBS, *FORM))
    torch.testing.assert_close(seen.norms[:, 1], before, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="none of 1 tells anything"):
        adjust(zero_snr, JOBS, 1.0, Sampling(1, 1, 5.0, 16))
