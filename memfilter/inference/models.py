"""The model that a command names, and the clean prompts that it is judged by."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from memfilter.data import scenes
from memfilter.data.prompts import read_prompts
from memfilter.eval.parts import Parts, processes
from memfilter.eval.runs import FinishedRun
from memfilter.inference.clean import CleanNorms
from memfilter.inference.detection import Sampling, clean_norms
from memfilter.pipelines import load_pipeline, load_trained, model_dir

CLEAN_PROMPTS, CLEAN_SEED = 200, 20261126  # clipart scenes that no model was trained on
KEPT, KEPT_PROMPTS = "clean_norms.json", 99  # beside a model; as many as a false positive rate of 1% asks for


class Model:
    """A pipeline by the name that a user gives it: the directory of a run, one in the diffusers layout, a hub id, "scenes"; on
    the device that accelerate chooses.

    Raises:
        ModelError: there is none.
    """

    def __init__(self, name: str):
        self.name = name
        self.run = FinishedRun(Path(name)) if (Path(name) / "summary.json").is_file() else None
        self.pipeline = (load_trained(Path(name)) if self.run else load_pipeline(name)).to(processes().device)

    @property
    def of_scenes(self) -> bool:
        """Whether it answers captions of clipart scenes."""
        return self.name == "scenes" if self.run is None else self.run.summary["config"]["model"]["path"] == "scenes"

    def stamp(self) -> dict:
        """What tells the weights: names, sizes and dates of their files."""
        if self.run:
            return self.run.stamp()
        files = sorted(path for path in model_dir(self.name).rglob("*") if path.is_file())  # none of a hub id
        return {"model": self.name, "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]}

    @property
    def size(self) -> int | None:
        """Pixels a side that it was fine-tuned at; None for what the model was made for."""
        return self.run.config.data.resolution if self.run else None

    def clean_prompts(self, file: Path | None, count: int = CLEAN_PROMPTS) -> list[str]:
        """Prompts that are known not to be memorized: from a file, or captions of clipart scenes that nobody has seen, half of
        them of the more specific kind.

        Raises:
            ValueError: there is no file, and the model is not one of clipart scenes.
        """
        if file is not None:
            return [row["prompt"] for _, row in read_prompts(file)]
        if not self.of_scenes:
            raise ValueError(f"clean: name a file of prompts that {self.name} has certainly not memorized, or norms of such "
                             "prompts that were saved before: without them no norm is high or low")  # fmt: skip
        return [scenes.draw(CLEAN_SEED, scenes.CLEAN, i, specific=0.5).caption for i in range(count)]

    def clean_norms(self, file: Path | None, sampling: Sampling, kept: Path, parts: Parts | None = None, **more) -> CleanNorms:
        """Norms of clean prompts, as saved in a .json file or measured now, and then saved at ``kept``.

        Args:
            more: as of `measure_prompts`.

        Raises:
            ValueError: as `clean_prompts`; or those of the file were generated otherwise.
        """
        if file is not None and file.suffix == ".json":
            found = CleanNorms.load(file)
        else:
            prompts = self.clean_prompts(file)
            found = clean_norms(self.pipeline, prompts, sampling, parts=parts, **more)
            if parts is None or parts.is_main_process:
                kept.parent.mkdir(parents=True, exist_ok=True)
                found.save(kept)
        found.require(sampling.facts(self.pipeline))
        return found

    def kept_norms(self, file: Path | None, sampling: Sampling) -> CleanNorms:
        """As `clean_norms`, of fewer prompts, and found where an earlier call has left them: in the run's directory, beside
        the file of prompts, or among what comes with the package."""
        if file is not None:
            kept = file if file.suffix == ".json" else file.with_suffix(".clean.json")
        elif self.run:
            kept = self.run.directory / KEPT
        else:
            kept = model_dir(self.name) / KEPT
        try:
            found = CleanNorms.load(kept)
            found.require(sampling.facts(self.pipeline) | {"whole": True})
            found.metric(seeds=sampling.seeds)
            return found
        except ValueError:
            if file is not None and file.suffix == ".json":
                raise
        prompts = self.clean_prompts(file, KEPT_PROMPTS)
        found = clean_norms(self.pipeline, prompts, sampling)
        with suppress(OSError):  # a place where nothing may be written only costs the time again
            found.save(kept)
        return found
