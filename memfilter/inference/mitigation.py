"""Pictures of a memorized prompt that are no copies: Wen et al., section 4.2, and random tokens, its rival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memfilter.config import MitigationConfig
from memfilter.data.captions import caption_change
from memfilter.eval.generate import Job, call_arguments, generator_of
from memfilter.inference.calls import Call, first_calls, require_finite
from memfilter.inference.detection import Sampling, named
from memfilter.inference.significance import embedding_gradient, frozen


@dataclass(frozen=True)
class Adjusted:
    """Embeddings that answer less strongly.

    Args:
        prompt_embeds, negative_prompt_embeds: [B, L, D].
        pooled: what SDXL takes besides, by the names of its arguments; unchanged.
        before, after: norms of the first step that can be read, [B].
        iterations: made for each sample, [B].
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    pooled: dict[str, Tensor]
    before: Tensor
    after: Tensor
    iterations: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """For any call of the pipeline, in place of ``prompt``."""
        embeds = {"prompt_embeds": self.prompt_embeds, "negative_prompt_embeds": self.negative_prompt_embeds}
        return embeds | self.pooled


def adjust_prompt(
    pipeline,
    prompt: str | Sequence[str],
    target: float,
    sampling: Sampling = Sampling(),
    generator: Sequence[torch.Generator] | None = None,
    learning_rate: float = 0.05,
    iterations: int = 10,
) -> Adjusted:
    """Moves the embedding of each picture's prompt until the norm of the first step is at most ``target``.

        generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
        adjusted = adjust_prompt(pipeline, "a cat", 3.0, generator=generator)
        images = pipeline(**adjusted.arguments(), generator=generator).images

    Adam on the embedding, the place of the first token (BOS) left alone. Every picture has its own norm, own embedding and own
    end: the official code stops at the norm of the whole batch, which is about twice a picture's where there are four.

    Args:
        pipeline: as `watch` takes it.
        prompt: one for all pictures, or one for each.
        target: the norm to come down to, in the unit of `text_norm`; the paper takes 1 to 5 at 512 px.
        sampling: steps, guidance and size of the generation that is to follow.
        generator: of each picture's noise, which are left as they are; by default those of `memfilter generate`, of as many
            pictures as ``sampling`` has seeds.
        learning_rate, iterations: of Adam; those of the paper. Where ``iterations`` are not enough, ``after`` tells.

    Raises:
        ValueError: prompts and generators do not fit, target or iterations are out of range, or a norm is not finite.
    """
    if generator is None:
        generator = [generator_of(Job(0, "", seed)) for seed in range(sampling.seeds)]
    prompts = [prompt] * len(generator) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(generator):
        raise ValueError(f"there are {len(prompts)} prompts and {len(generator)} generators: expected one for each picture")
    unspent = [torch.Generator(one.device) for one in generator]
    for one, given in zip(unspent, generator, strict=True):
        one.set_state(given.get_state())
    arguments = call_arguments(prompts, unspent, sampling.steps, sampling.guidance_scale, sampling.size)
    call = first_calls(pipeline, sampling.first_readable(pipeline), **arguments)[-1]
    with named([Job(0, text, one.initial_seed()) for text, one in zip(prompts, generator, strict=True)]):
        return adjusted_call(pipeline, call, target, learning_rate, iterations)


def adjusted_call(pipeline, call: Call, target: float, learning_rate: float = 0.05, iterations: int = 10) -> Adjusted:
    """`adjust_prompt`, at a call that has been made."""
    if iterations < 1 or not target > 0:
        raise ValueError(f"target and iterations must be above 0, found {target} and {iterations}")
    given = call.cond["encoder_hidden_states"].detach()  # [B, L, D]
    embeds = given.float().clone() if given.dtype in (torch.float16, torch.bfloat16) else given.clone()  # Adam's epsilon is 0 in fp16
    optimizer = torch.optim.Adam([embeds], lr=learning_rate)
    made, before = torch.zeros(len(embeds), dtype=torch.long), None
    with frozen(pipeline.unet):
        for _ in range(iterations):
            norm, gradient = embedding_gradient(pipeline, call, embeds.to(given.dtype))
            before = norm if before is None else before
            going_on = norm > target  # [B]
            if not going_on.any():
                break
            gradient[:, 0] = 0
            held, embeds.grad = embeds.detach().clone(), gradient.to(embeds.dtype)
            optimizer.step()
            embeds.copy_(torch.where(going_on[:, None, None], embeds, held))  # momentum moves what has no gradient too
            made += going_on.cpu()
    embeds = embeds.detach().to(given.dtype)
    with torch.no_grad():
        after = call.norm(pipeline.scheduler, call.cond_again(pipeline.unet, embeds))
    require_finite(after)
    added = {half: (getattr(call, half).get("added_cond_kwargs") or {}).get("text_embeds") for half in ("cond", "null")}
    pooled = {"pooled_prompt_embeds": added["cond"], "negative_pooled_prompt_embeds": added["null"]}
    pooled = {name: value for name, value in pooled.items() if value is not None}
    return Adjusted(embeds, call.null["encoder_hidden_states"], pooled, before.cpu(), after.cpu(), made)


def add_random_tokens(tokenizer, job: Job, count: int) -> str:
    """The prompt with so many random tokens at random places (Somepalli et al., NeurIPS 2023), drawn from the job's seed."""
    change = caption_change(MitigationConfig(random_tokens=count), tokenizer)
    return job.prompt if change is None else change(job.prompt, job.seed, job.number)
