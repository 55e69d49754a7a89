"""The model that a command names, and the clean prompts that it is judged by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from memfilter.data import scenes
from memfilter.data.prompts import read_prompts
from memfilter.eval.copies import PIXELS, Measure
from memfilter.eval.parts import Parts, fingerprint
from memfilter.eval.runs import FinishedRun
from memfilter.inference.clean import CleanNorms, allowed_above
from memfilter.inference.detection import Sampling, Signals, about_clean, clean_norms, measure_prompts
from memfilter.pipelines import load_pipeline, load_trained, model_dir
from memfilter.processes import processes

CLEAN_PROMPTS, CLEAN_SEED = 200, 20261126  # clipart scenes that no model was trained on
SHIPPED, SHIPPED_PROMPTS = "clean_norms.json", 99  # beside the embedded model; as many as a false positive rate of 1% asks for


class Model:
    """A pipeline by the name that a user gives it: the directory of a run, one in the diffusers layout, a hub id, "scenes"; on
    the device that accelerate chooses.

    Raises:
        ModelError: there is none.
    """

    def __init__(self, name: str):
        self.name, self.state = name, processes()
        self.run = FinishedRun(Path(name)) if (Path(name) / "summary.json").is_file() else None
        self.pipeline = (load_trained(Path(name)) if self.run else load_pipeline(name)).to(self.state.device)
        self.facts = lru_cache(lambda sampling: sampling.facts(self.pipeline))

    @property
    def of_scenes(self) -> bool:
        """Whether it answers captions of clipart scenes."""
        return self.name == "scenes" if self.run is None else self.run.summary["config"]["model"]["path"] == "scenes"

    @property
    def size(self) -> int | None:
        """Pixels a side that it was fine-tuned at; None for what the model was made for."""
        return self.run.config.data.resolution if self.run else None

    def parts(self, work: Path, kind: str, sampling: Sampling, **facts) -> Parts:
        """Where results are kept as they come, so that several processes share the work and what was interrupted goes on.

        Args:
            facts: what decides the results beside the model and the sampling.
        """
        return Parts(work, kind, self.facts(sampling) | {"seeds": sampling.seeds} | facts, self.state)

    def measure(
        self,
        prompts: list[str],
        sampling: Sampling,
        work: Path,
        *,
        rivals: Sequence[str] = (),
        measure: Measure = PIXELS,
        batch_size: int = 16,
        until: int | None = None,
    ) -> tuple[Signals, Parts]:
        """`measure_prompts`, and where its results were kept as they came: to be removed once they are written elsewhere."""
        facts = {"prompts": prompts, "rivals": list(rivals), "batch_size": batch_size, "until": until}
        parts = self.parts(work, "detect", sampling, **facts, **(measure.facts() if rivals else {}))
        return measure_prompts(self.pipeline, prompts, sampling, rivals=rivals, measure=measure, batch_size=batch_size,
                               until=until, parts=parts), parts  # fmt: skip

    def clean_prompts(self, file: Path | None = None, count: int = CLEAN_PROMPTS) -> list[str]:
        """Prompts that are known not to be memorized: from a file, or captions of clipart scenes that the run was not shown,
        half of them of the more specific kind.

        Raises:
            ValueError: there is no file, and the model is not one of clipart scenes.
        """
        if file is not None:
            return [row["prompt"] for _, row in read_prompts(file)]
        if not self.of_scenes:
            raise ValueError(f"clean: name a file of prompts that {self.name} has certainly not memorized, or norms of such "
                             "prompts that were saved before: without them no norm is high or low")  # fmt: skip
        drawn, known = (scenes.draw(CLEAN_SEED, scenes.CLEAN, i, specific=0.5).caption for i in range(10 * count)), self._shown()
        return [caption for caption, _ in zip((c for c in drawn if c not in known), range(count), strict=False)]

    def _shown(self) -> set[str]:
        """Captions that the run was shown, where they can still be had."""
        with suppress(ValueError):
            return self.run.captions() if self.run else set()
        return set()

    def clean_norms(
        self,
        file: Path | None,
        sampling: Sampling,
        kept: Path | None = None,
        *,
        rate: float | None = None,
        until: int | None = None,
        count: int = CLEAN_PROMPTS,
        batch_size: int = 16,
    ) -> CleanNorms:
        """Norms of clean prompts: as a .json file has them, or as an earlier call has kept them, or measured now.

        Args:
            file: of prompts, or .json of norms; None for captions of new clipart scenes.
            kept: where they are kept; by default a file in the user's cache, named by all that decides them.
            rate: false positive rate that will be asked of them.
            until: as of `measure_prompts`.
            count: prompts, where there is no file.

        Raises:
            ValueError: as `clean_prompts` and `allowed_above`; or those of a .json file were generated otherwise.
        """
        found = CleanNorms.load(file) if file is not None and file.suffix == ".json" else None
        prompts = self.clean_prompts(file, count) if found is None else []
        if rate is not None:
            allowed_above(rate, len(prompts) if found is None else len(found.norms))
        facts = self.facts(sampling)
        if found is not None:
            found.require(facts)
            return found
        about = about_clean(prompts, facts, until)
        kept = kept or _cache() / f"{fingerprint(about | {'seeds': sampling.seeds})[:16]}.json"
        for path in (kept, model_dir(self.name) / SHIPPED):
            with suppress(ValueError):
                found = CleanNorms.load(path)
                found.require({name: value for name, value in about.items() if name != "whole"})
                found.metric(until, sampling.seeds)  # there are as many steps and seeds
                return found
        parts = self.parts(kept.with_name(f".{kept.name}.parts"), "clean", sampling, **about, batch_size=batch_size)
        found = clean_norms(self.pipeline, prompts, sampling, until=until, facts=facts, batch_size=batch_size, parts=parts)
        if self.state.is_main_process:
            found.save(kept)
        parts.remove()
        return found


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memfilter" / "clean_norms"
