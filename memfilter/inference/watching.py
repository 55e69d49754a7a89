"""Watching a generation: the norm of the text-conditional prediction, read from what guidance computes anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memfilter.functional import text_cosine, text_norm
from memfilter.inference.calls import Call, Timestep, UnguidedError, hooked, readable_factor, require_finite


class MemorizationDetected(RuntimeError):
    """A prompt that is being generated is memorized, by its norm.

    Attributes:
        prompts: numbers of the prompts that reach the threshold, in the order of the call.
        metric: of every prompt, mean norm of its pictures over the steps so far, [P].
        threshold: what was reached.
        steps: seen until then.
    """

    def __init__(self, prompts: list[int], metric: Tensor, threshold: float, steps: int):
        self.prompts, self.metric, self.threshold, self.steps = prompts, metric, threshold, steps
        which = ", ".join(f"{number} ({metric[number]:.4g})" for number in prompts)
        super().__init__(f"memorized: prompt {which}, the threshold being {threshold:.4g} after {steps} steps")


@dataclass
class Generation:
    """What was seen of one call of a pipeline; a row for each picture, in the pipeline's order.

    Everything stays on the device until it is asked for: reading it would make the device wait.
    """

    _scheduler: object
    _timesteps: list = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)
    _cosines: list[Tensor] = field(default_factory=list)
    _compared: bool = False

    @property
    def timesteps(self) -> Tensor:
        """[S], noisiest first."""
        return torch.stack([torch.as_tensor(t).float().cpu().flatten()[0] for t in self._timesteps])

    @property
    def norms(self) -> Tensor:
        """Of the text-conditional noise prediction, fp32 [B, S]; NaN where the prediction tells nothing of the noise.

        Raises:
            NotFiniteError: one that can be read is not finite.
        """
        factors = torch.tensor([readable_factor(self._scheduler, t) for t in self._timesteps])
        norms = torch.stack(self._norms, dim=1).cpu()
        require_finite(norms[:, factors.isfinite()])
        return norms * factors

    @property
    def cosines(self) -> Tensor:
        """Between the text-conditional prediction and the null one, fp32 [B, S]; where they were asked for."""
        return torch.stack(self._cosines, dim=1).cpu()

    def metric(self, steps: int | None = None, images_per_prompt: int = 1) -> Tensor:
        """Mean norm of each prompt's pictures over the first steps, all by default (section 3.3 of the paper). [P]"""
        return self.norms[:, :steps].nanmean(1).view(-1, images_per_prompt).mean(1)  # [B, S] -> [P]


class Watch:
    """What a `watch` has seen: ``generations``, the newest last, and the newest one's figures under their own names."""

    def __init__(self):
        self.generations: list[Generation] = []

    def __getattr__(self, name: str):
        if name in ("timesteps", "norms", "cosines", "metric"):
            if not self.generations:
                raise ValueError("nothing was generated while watching")
            return getattr(self.generations[-1], name)
        raise AttributeError(name)


@contextmanager
def watch(
    pipeline,
    *,
    threshold: float | None = None,
    after: int = 1,
    images_per_prompt: int = 1,
    on_memorized: Callable[[MemorizationDetected], None] | None = None,
    cosine: bool = False,
    unit: str = "l2",
) -> Iterator[Watch]:
    """Reads the norms of all generations of a pipeline meanwhile; the pictures are bit for bit what they would be.

        with watch(pipeline) as seen:
            images = pipeline("a cat", num_images_per_prompt=4).images
        seen.norms           # [4, steps]
        seen.metric(10)      # the paper's, of the first ten steps

    The predictions with and without prompt, which classifier-free guidance makes, are those whose difference is
    measured; a negative prompt takes the place of the empty one there. Any scheduler of diffusers but EDM's will do (where v
    is predicted, not Euler's with timestep_type=continuous). A second-order one calls the denoiser more often than once a
    step; each call counts as a step here.

    Args:
        pipeline: StableDiffusionPipeline, StableDiffusionXLPipeline, or one with ``unet`` and
            ``do_classifier_free_guidance`` that puts the negative half of a batch first.
        threshold: the metric from which a prompt counts as memorized (`CleanNorms.threshold`); None: measure only.
        after: so many steps, when it is compared; where none of them can be read, after the first that can. That makes
            the device wait once.
        images_per_prompt: as the pipeline is called with; their mean is compared.
        on_memorized: called where a prompt is memorized; without it `MemorizationDetected` is raised, which ends the
            generation.
        cosine: whether ``cosines`` are measured too (`memfilter.functional.text_cosine`).
        unit: of the norms, ``l2`` or ``rms``.

    Raises:
        ValueError: after or images_per_prompt do not fit the generation, or a norm that is compared is not finite.
        UnguidedError: a generation begins without guidance (guidance_scale of 1 or less).
        MemorizationDetected: see ``threshold``.
    """
    if min(after, images_per_prompt) < 1:
        raise ValueError(f"after and images_per_prompt must be at least 1, found {after} and {images_per_prompt}")
    seen, open_generation = Watch(), None

    def see(timestep: Timestep, call: Call | None) -> None:
        nonlocal open_generation
        begins = open_generation is None or _ended(open_generation, timestep, pipeline)
        if call is None:
            if begins:
                raise UnguidedError("watch needs guidance_scale above 1: without guidance nothing is predicted for no prompt")
            return  # guidance was switched off on the way
        if begins:
            if threshold is not None:
                _require_fit(call, pipeline, after, images_per_prompt)
            open_generation = Generation(pipeline.scheduler)
            seen.generations.append(open_generation)
        with torch.no_grad():
            open_generation._timesteps.append(call.timestep)
            open_generation._norms.append(text_norm(call.cond_pred, call.null_pred, unit=unit))
            if cosine:
                open_generation._cosines.append(text_cosine(call.cond_pred, call.null_pred))
        if threshold is not None and not open_generation._compared and (steps := len(open_generation._norms)) >= after:
            metric = open_generation.metric(None, images_per_prompt)
            open_generation._compared = not metric.isnan().any()
            if memorized := (metric >= threshold).nonzero().flatten().tolist():
                found = MemorizationDetected(memorized, metric, threshold, steps)
                if on_memorized is None:
                    if hasattr(pipeline, "maybe_free_model_hooks"):  # what is offloaded goes back, as at a generation's end
                        pipeline.maybe_free_model_hooks()
                    raise found
                on_memorized(found)

    with hooked(pipeline, see):
        yield seen


def _require_fit(call: Call, pipeline, after: int, images_per_prompt: int) -> None:
    if len(call.sample) % images_per_prompt:
        raise ValueError(f"images_per_prompt is {images_per_prompt}, the generation has {len(call.sample)} pictures")
    if after > pipeline.num_timesteps:
        raise ValueError(f"after is {after}, the generation has {pipeline.num_timesteps} steps")


def _ended(generation: Generation, now: Timestep, pipeline) -> bool:
    """Whether a timestep belongs to another generation: the last one has made all its steps, or was broken off."""
    before = generation._timesteps[-1]
    if isinstance(before, Tensor) and isinstance(now, Tensor):  # a generation's are slices of one tensor
        return before.untyped_storage().data_ptr() != now.untyped_storage().data_ptr()
    return len(generation._norms) >= pipeline.num_timesteps
