"""Which words make a prompt memorized: the significance score of Wen et al. (section 4.1, Eq. 5), and two that tell words apart.

The paper takes the gradient at the text encoder's output. CLIP looks back, so that the output at a word holds all words before it,
and a word of no meaning that follows the trigger may have the higher score. What the encoder is given at a word is that word alone.
And what a word does shows where it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from memfilter.eval.generate import arguments_of
from memfilter.inference.calls import Call, first_calls, require_finite
from memfilter.inference.detection import Sampling, jobs_of, named

Of = Literal["words", "encoded", "left_out"]


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Args:
        text: as it stands there.
        score: the largest of its tokens'; None where the text encoder's length cuts it off.
        tokens: its tokens and their scores, in order.
    """

    text: str
    score: float | None
    tokens: tuple[tuple[str, float], ...]


def token_significance(
    pipeline,
    prompt: str,
    sampling: Sampling = Sampling(),
    steps: Sequence[int] | None = None,
    number: int = 0,
    batch_size: int = 16,
    of: Of = "words",
) -> list[Word]:
    """How much each word has to do with a prompt's norm.

    Score of a token: l2 norm of the gradient of the text-conditional norm with respect to the token's embedding, mean over seeds
    and over some steps of the sampler. Or, of a word and so of each of its tokens, by how much the norm falls without it.

    Args:
        pipeline: as `watch` takes it.
        sampling: its seeds are those of the mean.
        steps: of the sampler, counted from 0, at which the score is taken; the paper takes all. By default a quarter of them,
            from the first that can be read; of "left_out" that one alone.
        number: of the prompt, which tells the noise (`memfilter.eval.generate.Job`).
        batch_size: pictures at a time.
        of: gradient at which embedding: of "words", as the text encoder is given them, or "encoded", as it puts them out,
            which is the paper's score. Or "left_out": no gradient, but a call of the denoiser for each word, without it.

    Returns:
        The prompt's words, in order; a textual inversion has the tokens of all its vectors.

    Raises:
        ValueError: a step that the sampler does not make, or whose norm cannot be read or is not finite; an unknown score.
    """
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {', '.join(get_args(Of))}, found {of}")
    first = sampling.first_readable(pipeline) - 1
    if steps is None:
        steps = range(sampling.steps)[first : first + (1 if of == "left_out" else max(1, sampling.steps // 4))]
    steps = tuple(steps)
    if steps and 0 <= min(steps) < first:
        raise ValueError(f"steps: the norm of the first cannot be read, at zero terminal SNR: begin with {first}")
    if not steps or min(steps) < 0 or max(steps) >= sampling.steps:
        raise ValueError(f"steps must be among 0 ... {sampling.steps - 1}, found {', '.join(map(str, steps)) or 'none'}")
    scores, form = [], (sampling.steps, sampling.guidance_scale, sampling.size)
    for jobs in jobs_of(number, prompt, sampling.seeds, batch_size):
        calls = first_calls(pipeline, max(steps) + 1, **arguments_of(jobs, *form))
        with named(jobs), frozen(pipeline.unet):
            found = [_scores_at(pipeline, calls[step], prompt, of) for step in steps]
        scores.append(torch.stack(found).mean(0))  # [B, L], of left_out [B, words]
    mean = torch.cat(scores).mean(0).tolist()
    # a word of the prompt may be encoded as several: a textual inversion of several vectors
    encoded_as = partial(getattr(pipeline, "maybe_convert_prompt", lambda text, tokenizer: text), tokenizer=pipeline.tokenizer)
    by_place = [0.0] * pipeline.tokenizer.model_max_length if of == "left_out" else mean
    encoded = iter(words_of(pipeline.tokenizer, encoded_as(prompt), by_place))
    words = [_joined(word, [*islice(encoded, len(encoded_as(word).split()))]) for word in prompt.split()]
    if of != "left_out":
        return words
    return [Word(word.text, score if word.tokens else None, tuple((text, score) for text, _ in word.tokens))
            for word, score in zip(words, mean, strict=True)]  # fmt: skip


def _scores_at(pipeline, call: Call, prompt: str, of: Of) -> Tensor:
    """Of every sample and token, [B, L]; of left_out of every word, [B, words]."""
    if of == "left_out":
        return falls_without(pipeline, call, prompt)
    gradient = words_gradient(pipeline, call, prompt)[1] if of == "words" else embedding_gradient(pipeline, call)[1]
    return gradient.float().norm(dim=-1)


def _joined(text: str, parts: list[Word]) -> Word:
    """A word of its parts."""
    tokens = tuple(token for part in parts for token in part.tokens)
    return Word(text, max((score for _, score in tokens), default=None), tokens)


def embedding_gradient(pipeline, call: Call, prompt_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The norm of every sample, [B], and its gradient with respect to the prompt's embedding, [B, L, D].

    Args:
        prompt_embeds: another embedding than the call's, [B, L, D].

    Raises:
        NotFiniteError: of a norm.
    """
    embeds = (call.cond["encoder_hidden_states"] if prompt_embeds is None else prompt_embeds).detach().clone()
    with torch.enable_grad():
        embeds.requires_grad_()
        norm = call.norm(pipeline.scheduler, call.cond_again(pipeline.unet, embeds))
        require_finite(norm.detach())
        (gradient,) = torch.autograd.grad(norm.sum(), embeds)  # samples do not meet, so each row is its own gradient
    return norm.detach(), gradient


def words_gradient(pipeline, call: Call, prompt: str) -> tuple[Tensor, Tensor]:
    """The norm of every sample, [B], and its gradient with respect to what the text encoders are given of the prompt's tokens
    (without their places), [B, L, D], one encoder's behind another's.

    Args:
        prompt: which the call is of.

    Raises:
        NotFiniteError: of a norm.
    """
    encoders = [encoder for name in ("text_encoder", "text_encoder_2") if (encoder := getattr(pipeline, name, None)) is not None]
    given: list[Tensor] = []

    def begin(module, args, output: Tensor) -> Tensor:
        given.append(output.detach().clone().requires_grad_())
        return given[-1]

    with ExitStack() as stack:
        for encoder in encoders:
            stack.enter_context(frozen(encoder))
            stack.callback(encoder.get_input_embeddings().register_forward_hook(begin).remove)
        stack.enter_context(torch.enable_grad())
        norm = call.norm(pipeline.scheduler, _asked_again(pipeline, call, prompt))  # each row has its own gradient
        require_finite(norm.detach())
        gradients = torch.autograd.grad(norm.sum(), given)
    return norm.detach(), torch.cat(gradients, -1)


@torch.no_grad()
def falls_without(pipeline, call: Call, prompt: str) -> Tensor:
    """By how much the norm of every sample is smaller without each word of the prompt, [B, words]; negative where it is larger.

    Args:
        prompt: which the call is of.

    Raises:
        NotFiniteError: of a norm.
    """
    whole, words, found = call.norm(pipeline.scheduler), prompt.split(), []
    for place in range(len(words)):
        norm = call.norm(pipeline.scheduler, _asked_again(pipeline, call, " ".join(words[:place] + words[place + 1 :])))
        require_finite(norm)
        found.append(whole - norm)
    return torch.stack(found, 1).float() if found else whole.new_zeros(len(whole), 0)


def _asked_again(pipeline, call: Call, prompt: str) -> Tensor:
    """The call's prediction for a prompt, [B, C, H, W]; a row of the text encoder's for each sample."""
    embeds, _, *pooled = pipeline.encode_prompt(
        [prompt] * len(call.sample), device=call.sample.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return call.cond_again(pipeline.unet, embeds, pooled[0] if pooled else None)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of the weights, which nobody asks for."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def words_of(tokenizer, prompt: str, scores: Sequence[float]) -> list[Word]:
    """Words, between white space, with the scores of their tokens.

    Args:
        scores: one for every place of the embedding, [L].

    Raises:
        ValueError: a tokenizer that does not say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say where in the prompt its tokens stand: use a fast one")
    encoded = tokenizer(prompt, truncation=True, max_length=len(scores), return_offsets_mapping=True)
    # what is put around the prompt stands nowhere in it; an unknown token does, and its id may be that of the end (CLIP)
    placed = [(place, begin, end) for place, (begin, end) in enumerate(encoded["offset_mapping"]) if end > begin]
    words = []
    for match in re.finditer(r"\S+", prompt):
        tokens = tuple((prompt[b:e], float(scores[p])) for p, b, e in placed if match.start() <= b < match.end())
        words.append(Word(match.group(), max((s for _, s in tokens), default=None), tokens))
    return words
