"""Scores of words: by hand, on a denoiser whose gradient is known, and where tokens stand."""

import numpy as np
import pytest
import tiny
import torch

from memfilter.eval.generate import Job, arguments_of
from memfilter.inference import Sampling, token_significance
from memfilter.inference.calls import first_calls
from memfilter.inference.significance import embedding_gradient, words_gradient, words_of
from memfilter.pipelines import load_pipeline

SAMPLING = Sampling(seeds=2, steps=4, guidance_scale=5.0, size=16)
PROMPT = "a Red dog, on  the moon"


@pytest.mark.parametrize("of", ["words", "encoded"])
def test_scores_are_gradients_averaged_over_seeds_and_steps(pipeline, of):
    words = token_significance(pipeline, PROMPT, SAMPLING, steps=(0, 2), of=of)
    assert [word.text for word in words] == PROMPT.split()
    jobs = [Job(0, PROMPT, seed) for seed in range(2)]
    calls = first_calls(pipeline, 3, **arguments_of(jobs, 4, 5.0, 16))
    gradient = {"words": lambda call: words_gradient(pipeline, call, PROMPT), "encoded": lambda call: embedding_gradient(pipeline, call)}
    scores = np.mean([np.sqrt((gradient[of](calls[step])[1].numpy() ** 2).sum(-1)).mean(0) for step in (0, 2)], axis=0)
    encoded = pipeline.tokenizer(PROMPT)["input_ids"]
    tokens = [score for word in words for _, score in word.tokens]
    np.testing.assert_allclose(tokens, scores[1 : len(encoded) - 1], rtol=1e-4)  # without BOS and EOS
    assert all(word.score == max(score for _, score in word.tokens) for word in words)


def test_gradient_of_words_is_that_of_finite_differences_and_its_norm_is_the_generations_own(pipeline):
    """Along the gradient itself, at one token of each text encoder, of two samples with noises of their own."""
    call = first_calls(pipeline, 1, **arguments_of([Job(0, PROMPT, seed) for seed in range(2)], 4, 5.0, 16))[0]
    norm, gradient = words_gradient(pipeline, call, PROMPT)
    torch.testing.assert_close(norm, call.norm(pipeline.scheduler), rtol=1e-4, atol=1e-5)
    encoders = [e for name in ("text_encoder", "text_encoder_2") if (e := getattr(pipeline, name, None)) is not None]
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
    assert gradient.shape == (2, pipeline.tokenizer.model_max_length, sum(widths))
    for encoder, part in zip(encoders, gradient.split(widths, -1), strict=True):
        direction = torch.zeros_like(part)
        direction[:, 3] = part[:, 3] / part[:, 3].norm(dim=-1, keepdim=True)

        def moved(by: float, encoder=encoder, direction=direction):
            handle = encoder.get_input_embeddings().register_forward_hook(lambda module, args, output: output + by * direction)
            try:
                return words_gradient(pipeline, call, PROMPT)[0]
            finally:
                handle.remove()

        slope = (moved(2e-3) - moved(-2e-3)) / 4e-3
        torch.testing.assert_close(slope, part[:, 3].norm(dim=-1), rtol=0.01, atol=1e-3)
    assert not any(encoder.get_input_embeddings()._forward_hooks for encoder in encoders)


def test_falls_are_those_of_generations_without_the_word(pipeline):
    """At the first step, where what is asked of is the noise itself."""
    words = token_significance(pipeline, PROMPT, SAMPLING, of="left_out")
    assert [word.text for word in words] == PROMPT.split()

    def norm(prompt: str) -> np.ndarray:
        call = first_calls(pipeline, 1, **arguments_of([Job(0, prompt, seed) for seed in range(2)], 4, 5.0, 16))[0]
        return call.norm(pipeline.scheduler).numpy()

    parts = PROMPT.split()
    falls = [(norm(PROMPT) - norm(" ".join(parts[:place] + parts[place + 1 :]))).mean() for place in range(len(parts))]
    np.testing.assert_allclose([word.score for word in words], falls, rtol=1e-3, atol=2e-6)
    assert np.std(falls) > 2e-5
    assert all({score for _, score in word.tokens} == {word.score} for word in words)


def test_textual_inversion_has_the_tokens_of_all_its_vectors(tmp_path):
    made = load_pipeline(str(tiny.save_pipeline(tmp_path / "sd1", "sd1")))
    vectors = torch.randn(3, made.text_encoder.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(1))
    made.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    words = token_significance(made, "<toy> on a dog", SAMPLING, of="encoded")
    call = first_calls(made, 1, **arguments_of([Job(0, "<toy> on a dog", seed) for seed in range(2)], 4, 5.0, 16))[0]
    scores = embedding_gradient(made, call)[1].norm(dim=-1).mean(0).tolist()
    assert [word.text for word in words] == ["<toy>", "on", "a", "dog"]
    assert [text for text, _ in words[0].tokens] == ["<toy>", "<toy>_1", "<toy>_2"]
    np.testing.assert_allclose([score for word in words for _, score in word.tokens], scores[1:7], rtol=1e-4)
    assert words[0].score == max(score for _, score in words[0].tokens)
    given = words_gradient(made, call, "<toy> on a dog")[1].norm(dim=-1).mean(0).tolist()
    falls = token_significance(made, "<toy> on a dog", SAMPLING, of="left_out")
    assert [len(word.tokens) for word in falls] == [3, 1, 1, 1]
    own = token_significance(made, "<toy> on a dog", SAMPLING)
    np.testing.assert_allclose([score for word in own for _, score in word.tokens], given[1:7], rtol=1e-4)


def test_scores_do_not_depend_on_how_seeds_are_batched(pipeline):
    sampling = Sampling(seeds=3, steps=4, guidance_scale=5.0, size=16)
    whole = token_significance(pipeline, PROMPT, sampling, steps=(0, 2), batch_size=3)
    sizes = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    split = token_significance(pipeline, PROMPT, sampling, steps=(0, 2), batch_size=2)
    handle.remove()
    np.testing.assert_allclose([word.score for word in split], [word.score for word in whole], rtol=1e-4)
    assert max(sizes) == 4  # two seeds under guidance


def test_the_word_that_the_answer_hangs_on_has_the_highest_score(sd1, monkeypatch):
    length, width = sd1.tokenizer.model_max_length, sd1.text_encoder.config.hidden_size
    weights = torch.full((length, width), 0.01)
    place = 1 + len(sd1.tokenizer("a Red", add_special_tokens=False)["input_ids"])  # BOS before, then "dog"
    weights[place] = 2.0

    def answer(sample, timestep, encoder_hidden_states=None, **_):
        """The sum of w . e over tokens, the same in every element: the norm's gradient at a token is its w."""
        total = (encoder_hidden_states * weights).sum((1, 2)) / sample[0].numel() ** 0.5
        return (total[:, None, None, None].expand_as(sample),)

    monkeypatch.setattr(sd1.unet, "forward", answer)
    words = {word.text: word.score for word in token_significance(sd1, PROMPT, SAMPLING, of="encoded")}
    assert words["dog,"] == pytest.approx(2.0 * width**0.5, rel=1e-4)
    assert words["moon"] == pytest.approx(0.01 * width**0.5, rel=1e-3)


def test_what_is_cut_off_has_no_score(sd1):
    long = " ".join(["dog"] * sd1.tokenizer.model_max_length)
    words = words_of(sd1.tokenizer, long, [1.0] * sd1.tokenizer.model_max_length)
    assert len(words) == sd1.tokenizer.model_max_length
    assert words[0].score == 1.0 and words[-1].score is None and words[-1].tokens == ()


def test_what_the_tokenizer_does_not_know_has_a_score(sd1):
    """Its token has the id of the end."""
    assert sd1.tokenizer.unk_token_id == sd1.tokenizer.eos_token_id
    words = words_of(sd1.tokenizer, "a 中文 dog", [0.0, 1.0, *[5.0] * 6, 2.0, *[9.0] * 23])
    assert [word.score for word in words] == [1.0, 5.0, 2.0]


def test_a_quarter_of_the_steps_is_taken_by_default(sd1, zero_snr):
    sampling = Sampling(seeds=1, steps=12, guidance_scale=5.0, size=16)
    for pipeline, steps in ((sd1, (0, 1, 2)), (zero_snr, (1, 2, 3))):  # whose first tells nothing
        own, by_default = (token_significance(pipeline, PROMPT, sampling, *at) for at in ((steps,), ()))
        assert [word.score for word in own] == [word.score for word in by_default]


def test_unknown_embedding_is_refused(sd1):
    with pytest.raises(ValueError, match="of must be one of words, encoded, left_out, found tokens"):
        token_significance(sd1, PROMPT, SAMPLING, of="tokens")


def test_steps_that_are_not_made_are_refused(sd1):
    for steps in ((4,), (-1,), ()):
        with pytest.raises(ValueError, match=r"among 0 \.\.\. 3"):
            token_significance(sd1, PROMPT, SAMPLING, steps=steps)


def test_empty_prompt_has_no_words(sd1):
    assert [token_significance(sd1, "", SAMPLING, of=of) for of in ("words", "encoded", "left_out")] == [[], [], []]
