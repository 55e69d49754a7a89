"""Which prompts are memorized: the paper's metric (Wen et al., section 3.3), and what it is measured against."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
from tqdm import tqdm

from memfilter.eval.copies import PIXELS, Measure
from memfilter.eval.generate import Job, arguments_of, generate_batch
from memfilter.eval.parts import Parts, fingerprint
from memfilter.inference.calls import Call, NotFiniteError, first_calls, first_readable, hooked
from memfilter.inference.clean import CleanNorms, mean_norm
from memfilter.inference.rivals import RIVALS, anisotropy, decoded, density, distances, own_loss, tiled_distance
from memfilter.inference.watching import watch
from memfilter.pipelines import weights_digest
from memfilter.text import printable

_MODELS = ("unet", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class Sampling:
    """How prompts are generated; what is judged by clean prompts must be generated as they were.

    Args:
        seeds: pictures for each prompt.
        steps: of the pipeline's own scheduler.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; None for what the model was made for.
    """

    seeds: int = 4
    steps: int = 50
    guidance_scale: float = 7.5
    size: int | None = None

    def __post_init__(self):
        if self.guidance_scale <= 1:
            raise ValueError(f"guidance_scale must be above 1, found {self.guidance_scale}: without guidance nothing is "
                             "predicted for no prompt")  # fmt: skip
        if min(self.seeds, self.steps) < 1:
            raise ValueError(f"seeds and steps must be at least 1, found {self.seeds} and {self.steps}")

    def facts(self, pipeline) -> dict:
        """What norms depend on beside prompt and seed. Reads all weights."""
        scheduler = copy.deepcopy(pipeline.scheduler)
        scheduler.set_timesteps(self.steps)  # some set themselves otherwise for it, and one that was used tells what a new one does
        settings = json.loads(scheduler.to_json_string())  # as they are in a file of clean norms, in order
        return {name: value for name, value in asdict(self).items() if name != "seeds"} | {
            "scheduler": type(scheduler).__name__,
            **{f"scheduler.{name}": value for name, value in settings.items() if not name.startswith("_")},
            "weights": weights_digest(*(getattr(pipeline, name, None) for name in _MODELS)),
        }

    def first_readable(self, pipeline) -> int:
        """Steps until the first whose norm can be read; ValueError where there is none."""
        return first_readable(pipeline.scheduler, self.steps)


def jobs_of(number: int, prompt: str, seeds: int, batch_size: int) -> list[list[Job]]:
    """All seeds of one prompt, so many at a time."""
    jobs = [Job(number, prompt, seed) for seed in range(seeds)]
    return [jobs[start : start + batch_size] for start in range(0, seeds, batch_size)]


@contextmanager
def named(jobs: Sequence[Job]) -> Iterator[None]:
    """A norm of theirs that is not finite is told by prompt and seed; inside, pictures have numbers only."""
    try:
        yield
    except NotFiniteError as error:
        names = [f"prompt '{printable(job.prompt)[:100]}', seed {job.seed}" for job in jobs]
        raise NotFiniteError(error.pictures, names) from None


@dataclass
class Signals:
    """What was measured of prompts.

    Args:
        prompts: P of them.
        timesteps: [S].
        norms: of the text-conditional noise prediction, [P, seeds, S].
        raw: what rivals are made of, by name of the rival, [P, seeds, ...] each.
    """

    prompts: list[str]
    timesteps: np.ndarray
    norms: np.ndarray
    raw: dict[str, np.ndarray] = field(default_factory=dict)

    def metric(self, steps: int | None = None, seeds: int | None = None) -> np.ndarray:
        """The paper's: mean norm over the first steps and seeds, [P]; NaN where none of these steps can be read."""
        return mean_norm(self.norms, steps, seeds)

    def rival(self, name: str, seeds: int | None = None, clean: CleanNorms | None = None) -> np.ndarray:
        """Score of another method over the first seeds, [P]; larger speaks of memorization. NaN where a method that compares
        pictures has one only.

        Args:
            clean: asked for by ``anisotropy``, whose parts are weighed by their spread among clean prompts.
        """
        raw = self.raw[name][:, :seeds]
        if name == "loss":
            return -raw.mean(1)
        if name == "anisotropy":
            if clean is None:
                raise ValueError("anisotropy asks for norms of clean prompts")
            first = self.norms[:, :seeds, clean.first_readable - 1].mean(1)
            return anisotropy(first, raw[..., -1].mean(1), clean.spread(raw.shape[1]))
        return density(raw[:, :, :seeds])


def measure_prompts(
    pipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    rivals: Sequence[str] = (),
    measure: Measure = PIXELS,
    batch_size: int = 16,
    until: int | None = None,
    parts: Parts | None = None,
    progress: bool = True,
) -> Signals:
    """Generates every prompt with every seed and reads the signals; the noise is that of `generate`.

    Args:
        pipeline: as `watch` takes it.
        rivals: of `RIVALS`, to be had of `Signals.rival`. ``density_l2``: nearness of a prompt's pictures to each other by
            the largest distance of their tiles (Carlini et al., 2023); ``density_copies``: by a measure of copies;
            ``anisotropy``: norm of the first step and cosine of the last (Asthana and Belagiannis, ICLR 2026), each over
            its deviation among clean prompts; ``loss``: of denoising the model's own picture under fresh noise, with its
            sign turned.
        measure: for ``density_copies``.
        batch_size: pictures at a time.
        until: so many steps are made and no more, which costs less; rivals then go by the picture that the last of them
            predicts (section 3.3 of the paper), and ``anisotropy`` by its cosine.
        parts: where results are kept, for several processes and for going on after an interruption.
        progress: whether to show a bar.

    Raises:
        ValueError: an unknown rival, guidance is off, or a norm is not finite; names prompt and seed.
    """
    require_rivals(rivals, sampling.seeds)
    if batch_size < 1 or until is not None and not 1 <= until <= sampling.steps:
        raise ValueError(f"batch_size must be at least 1 and until among 1 ... {sampling.steps}, found {batch_size} and {until}")
    count = max(1, batch_size // sampling.seeds)  # prompts at a time, with all their seeds
    groups = [range(start, min(start + count, len(prompts))) for start in range(0, len(prompts), count)]

    def work(number: int) -> dict[str, np.ndarray]:
        jobs = [Job(p, prompts[p], seed) for p in groups[number] for seed in range(sampling.seeds)]
        batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        found = [_measure_batch(pipeline, batch, sampling, rivals, until) for batch in batches]
        joined = {name: np.concatenate([one[name] for one in found]) for name in found[0] if name != "timesteps"}
        by_prompt = {name: v.reshape(len(groups[number]), sampling.seeds, *v.shape[1:]) for name, v in joined.items()}
        pictures = by_prompt.pop("pictures", None)
        if "density_l2" in rivals:
            by_prompt["density_l2"] = distances(pictures, tiled_distance)
        if "density_copies" in rivals:
            by_prompt["density_copies"] = distances(measure.seen(pictures), lambda a, b: 1 - measure.similarity_seen(a, b))
        return by_prompt | {"timesteps": found[0]["timesteps"]}

    if parts:
        results = parts.run(len(groups), work, progress)
    else:
        results = [work(number) for number in tqdm(range(len(groups)), desc="detect", disable=not progress)]
    found = {name: np.concatenate([r[name] for r in results]) for name in results[0] if name != "timesteps"}
    return Signals(list(prompts), results[0]["timesteps"], found["norms"], {name: found[name] for name in rivals})


def require_rivals(rivals: Sequence[str], seeds: int) -> None:
    """Raises ValueError where one of them is unknown, or compares pictures of which there is one only."""
    if unknown := [name for name in rivals if name not in RIVALS]:
        raise ValueError(f"unknown rival {', '.join(unknown)}: expected some of {', '.join(RIVALS)}")
    if seeds < 2 and (compared := [name for name in rivals if name.startswith("density")]):
        raise ValueError(f"{', '.join(compared)} compares the pictures of a prompt: ask for two seeds at least")


def _measure_batch(pipeline, batch: list[Job], sampling: Sampling, rivals: Sequence[str], until: int | None) -> dict:
    form = (sampling.steps, sampling.guidance_scale, sampling.size)
    looked_at = {"density_l2", "density_copies", "loss"} & {*rivals}
    made: list[Call] = []  # the last one

    def see(_, call: Call) -> None:
        made[:] = [call]

    with named(batch), watch(pipeline, cosine="anisotropy" in rivals) as seen:
        if until is None:
            with hooked(pipeline, see):
                pictures = generate_batch(pipeline, batch, *form)
        else:
            made = first_calls(pipeline, until, **arguments_of(batch, *form))[-1:]
            if looked_at:
                pictures = decoded(pipeline, made[0].predicted_x0(pipeline.scheduler, sampling.guidance_scale))
        found = {"norms": seen.norms.numpy(), "timesteps": seen.timesteps.numpy()}
    if "anisotropy" in rivals:
        found["anisotropy"] = seen.cosines.numpy()
    if looked_at - {"loss"}:
        found["pictures"] = pictures
    if "loss" in rivals:
        found["loss"] = own_loss(pipeline, batch, pictures, made[0])
    return found


def clean_norms(
    pipeline, prompts: Sequence[str], sampling: Sampling, *, until: int | None = None, facts: dict | None = None, **more
) -> CleanNorms:
    """Calibrates on prompts that are known not to be memorized; further arguments as of `measure_prompts`.

    Args:
        facts: `Sampling.facts`, where they are known already.
    """
    signals = measure_prompts(pipeline, prompts, sampling, until=until, rivals=() if until else ("anisotropy",), **more)
    cosines = None if until else signals.raw["anisotropy"][..., -1]
    about = about_clean(prompts, facts or sampling.facts(pipeline), until)
    return CleanNorms(signals.norms, signals.timesteps, about, cosines)


def about_clean(prompts: Sequence[str], facts: dict, until: int | None) -> dict:
    """What is written beside norms of clean prompts."""
    return facts | {"prompts": fingerprint({"prompts": list(prompts)})[:16], "whole": until is None}


def judge(signals: Signals, clean: CleanNorms, false_positive_rate: float, steps: int | None) -> tuple[float, np.ndarray]:
    """Threshold on the metric of the first steps, and a p-value for every prompt, [P]."""
    seeds = signals.norms.shape[1]
    return clean.threshold(false_positive_rate, steps, seeds), clean.p_values(signals.metric(steps), steps, seeds)
