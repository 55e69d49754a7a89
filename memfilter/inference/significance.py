"""Which words make a prompt memorized: the significance score of Wen et al. (section 4.1, Eq. 5), and one that tells words apart.

The paper takes the gradient at the text encoder's output. CLIP looks back, so that the output at a word holds all words before it,
and a word of no meaning that follows the trigger may have the higher score. What the encoder is given at a word is that word alone.
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

Of = Literal["words", "encoded"]


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
    and over some steps of the sampler.

    Args:
        pipeline: as `watch` takes it.
        sampling: its seeds are those of the mean.
        steps: of the sampler, counted from 0, at which the gradient is taken; the paper takes all. By default a quarter of
            them, from the first that can be read.
        number: of the prompt, which tells the noise (`memfilter.eval.generate.Job`).
        batch_size: pictures at a time.
        of: which embedding: of "words", as the text encoder is given them, or "encoded", as it puts them out, which is the
            paper's score.

    Returns:
        The prompt's words, in order; a textual inversion has the tokens of all its vectors.

    Raises:
        ValueError: a step that the sampler does not make, or whose norm cannot be read or is not finite; an unknown embedding.
    """
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {', '.join(get_args(Of))}, found {of}")
    first = sampling.first_readable(pipeline) - 1
    steps = tuple(range(sampling.steps)[first : first + max(1, sampling.steps // 4)] if steps is None else steps)
    if steps and 0 <= min(steps) < first:
        raise ValueError(f"steps: the norm of the first cannot be read, at zero terminal SNR: begin with {first}")
    if not steps or min(steps) < 0 or max(steps) >= sampling.steps:
        raise ValueError(f"steps must be among 0 ... {sampling.steps - 1}, found {', '.join(map(str, steps)) or 'none'}")
    scores, form = [], (sampling.steps, sampling.guidance_scale, sampling.size)
    for jobs in jobs_of(number, prompt, sampling.seeds, batch_size):
        calls = first_calls(pipeline, max(steps) + 1, **arguments_of(jobs, *form))
        gradient_at = {"words": partial(words_gradient, prompt=prompt), "encoded": embedding_gradient}[of]
        with named(jobs), frozen(pipeline.unet):
            found = [gradient_at(pipeline, calls[step])[1] for step in steps]  # [B, L, D] each
        scores.append(torch.stack([gradient.float().norm(dim=-1) for gradient in found]).mean(0))  # [B, L]
    # a word of the prompt may be encoded as several: a textual inversion of several vectors
    encoded_as = partial(getattr(pipeline, "maybe_convert_prompt", lambda text, tokenizer: text), tokenizer=pipeline.tokenizer)
    encoded = iter(words_of(pipeline.tokenizer, encoded_as(prompt), torch.cat(scores).mean(0).tolist()))
    return [_joined(word, [*islice(encoded, len(encoded_as(word).split()))]) for word in prompt.split()]


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
        # a row for each sample, so that each row has its own gradient
        embeds, _, *pooled = pipeline.encode_prompt(
            [prompt] * len(call.sample), device=call.sample.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        norm = call.norm(pipeline.scheduler, call.cond_again(pipeline.unet, embeds, pooled[0] if pooled else None))
        require_finite(norm.detach())
        gradients = torch.autograd.grad(norm.sum(), given)
    return norm.detach(), torch.cat(gradients, -1)


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
