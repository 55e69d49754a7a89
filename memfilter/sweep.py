"""Sweeps: the runs of a W&B sweep file, one after the other on one machine and without a server.

The file is W&B's own (``wandb sweep FILE`` and ``wandb agent`` take it too), and the commands are made by W&B's own code, so
that equal settings reach a run as equal words. A run lives where its settings say (``{digest}`` in run_dir): what was made
for one table is found by another, and a sweep that was killed goes on.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from queue import SimpleQueue

import yaml
from tqdm import tqdm

from memfilter.arguments import parse
from memfilter.children import Children, children
from memfilter.config import Config, ConfigError, FilterConfig, MitigationConfig, digest
from memfilter.eval.results import RESULTS, read_figures, recorded_figures, write_results

log = logging.getLogger(__name__)

_KNOWN = {"program", "command", "method", "parameters", "name", "description", "project", "entity", "metric"}


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        settings: parameter -> value.
        command: its words.
        config: what it asks for.
    """

    settings: dict[str, object]
    command: list[str]
    config: Config

    @property
    def row(self) -> tuple[str, str, int]:
        """Its name in the table: method, setting, seed. What is swept beside filter and mitigation is part of the setting."""
        method, setting = describe(self.config)
        others = [f"{name}={_short(value)}" for name, value in self.settings.items()
                  if name not in ("config", "train.seed") and name.partition(".")[0] not in ("filter", "mitigation")]  # fmt: skip
        return method, ", ".join(filter(None, [setting, *others])), self.config.train.seed


@dataclass
class Sweep:
    """Runs a sweep.

    Args:
        points: its runs.
        out: directory for results.csv, results.parquet and logs/.
        evaluate: words for `memfilter evaluate`, after the run's directory.
        processes: so many runs at a time; they share the GPUs, each has its own part of them.
    """

    points: list[Point]
    out: Path
    evaluate: list[str] = field(default_factory=list)
    processes: int = 1

    def run(self, progress: bool = True) -> list[dict]:
        """Trains and evaluates what is not there yet; rows of the table, which is written anew after every run.

        A run that the table has and whose directory is gone is not made again: its row is kept.

        Raises:
            ValueError: the table that is there cannot be read, or it is all that is left of runs that are no points of this
                sweep, or that were evaluated with other words than ``evaluate``.
            SweepError: runs have failed; all others were made.
        """
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self._free = SimpleQueue()
        for part in parts_of_devices(self.processes):
            self._free.put(part)
        rows, failed, recorded = {}, [], self._recorded()
        gone = [p for p in self.points if p.config.run_dir in recorded and not Path(p.config.run_dir).exists()]
        for point in self.points:  # those of an earlier call stay in the table until they are read again
            known = recorded.get(point.config.run_dir, {})
            with suppress(ValueError):
                rows[point.row] = self._row(point, known.get("evaluated"), known if point in gone else None)
        if gone:
            write_results(_with_time_ratios([*rows.values()]), self.out)
            log.warning("%d runs are not there any more: their rows are kept; a run is made again when its row is deleted", len(gone))
        with (
            children() as started,
            tqdm(total=len(self.points), initial=len(gone), unit="run", desc=self.out.name, disable=not progress) as bar,
            ThreadPoolExecutor(self.processes) as pool,
        ):
            jobs = {pool.submit(self._make, point, started): point for point in self.points if point not in gone}
            try:
                for job in as_completed(jobs):
                    if told := job.result():
                        failed.append(f"run {jobs[job].config.run_dir} failed: see {told}")
                        changed = rows.pop(jobs[job].row, None)  # what an earlier call has read there
                    else:
                        changed = rows[jobs[job].row] = self._row(jobs[job], self._words)
                    if changed:
                        write_results(_with_time_ratios([*rows.values()]), self.out)
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if failed:
            raise SweepError("\n".join(failed))
        return _with_time_ratios([*rows.values()])

    def _recorded(self) -> dict[str, dict]:
        """`recorded_figures`, where the table that is written next can have all that is known by this one alone."""
        recorded, own = recorded_figures(self.out), {point.config.run_dir for point in self.points}
        if lost := [run for run in recorded if run not in own and not Path(run).exists()]:
            raise ValueError(f"{self.out / RESULTS} is the only record of {len(lost)} runs that are no points of this sweep "
                             f"and whose directories are gone: {', '.join(lost)}; name another --out, or delete their rows")  # fmt: skip
        kept = {known["evaluated"] for run, known in recorded.items() if not Path(run).exists()}
        if others := kept - {None, self._words}:
            raise ValueError(f"{self.out / RESULTS} has rows of runs whose directories are gone and that were evaluated with "
                             f"{' and '.join(map(repr, sorted(others)))}, not {self._words!r}: their figures mean other "
                             "things; evaluate with the same words, name another --out, or delete their rows")  # fmt: skip
        return recorded

    @property
    def _words(self) -> str:
        """By which the table tells how a run was evaluated."""
        return shlex.join(self.evaluate) or "as usual"

    def _make(self, point: Point, started: Children) -> Path | None:
        """The run and its evaluation; the log where one of them failed."""
        run = Path(point.config.run_dir)
        file = self.out / "logs" / f"{digest(point.config)}.log"
        evaluate = [sys.executable, "-m", "memfilter.cli", "evaluate", str(run), *self.evaluate]
        steps = [point.command] if not (run / "summary.json").is_file() else []
        devices = self._free.get()
        try:
            return file if any(started.call(step, file, devices) for step in (*steps, evaluate)) else None
        finally:
            self._free.put(devices)

    def _row(self, point: Point, evaluated: str | None, figures: dict | None = None) -> dict:
        """Of these figures, or those that its directory has, and the words that it was evaluated with, None if nobody knows."""
        names = dict(zip(("method", "setting", "seed"), point.row, strict=True))
        plain = replace(point.config, filter=FilterConfig(tau=None), mitigation=MitigationConfig())
        about = {"run": point.config.run_dir, "evaluated": evaluated, "_base": digest(plain)}
        swept = {name: value for name, value in point.settings.items() if name not in ("config", "train.seed")}
        return names | (figures or read_figures(Path(point.config.run_dir))) | swept | about


def parts_of_devices(processes: int) -> list[dict[str, str]]:
    """For each of so many runs at a time the variable that shows it its part of the GPUs, one of them where they are fewer; nothing
    where there is one run, or no GPU."""
    if processes == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",") if visible else []
    each = max(1, len(devices) // processes)
    parts = [[devices[(run * each + i) % len(devices)] for i in range(each)] if devices else [] for run in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} if part else {} for part in parts]


class SweepError(ValueError):
    """Some runs of a sweep have failed; a line for each."""


def read_sweep(path: Path) -> list[Point]:
    """The points of a grid, in its order: the last parameter changes fastest.

    Raises:
        ConfigError: the file is no sweep that runs here, or a point cannot be run; with all that is wrong.
    """
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("parameters"), dict) or not asked.get("program"):
        raise ConfigError(f"{path} is no sweep: it needs program and parameters, as W&B has them")
    errors = [f"{path}: {name} has no meaning here" for name in asked if name not in _KNOWN]
    named = asked.get("command")
    if named is not None and not (isinstance(named, list) and {"${program}", asked["program"]} & {*map(str, named)}):
        errors.append(f"{path}: command must be a list with ${{program}} or {asked['program']} in it")
    if asked.get("method") != "grid":
        errors.append(f"{path}: method={asked.get('method')} needs W&B's server; here only grid works")
    values = {}
    for name, said in asked["parameters"].items():
        if not isinstance(said, dict) or len(said.keys() & {"value", "values"}) != 1 or len(said) > 1:
            errors.append(f"{path}: parameter {name} needs value or values, and nothing else")
        elif "values" in said and not (isinstance(said["values"], list) and said["values"]):
            errors.append(f"{path}: parameter {name}: values must be a list")
        else:
            values[name] = said.get("values", [said.get("value")])
    if errors:
        raise ConfigError("\n".join(errors))

    points = []
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        words = create_sweep_command(list(asked.get("command") or []) or None)
        filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in settings.items()}})
        filled |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [asked["program"]]}
        command: list[str] = []
        for word in map(str, words):
            macro = word.startswith("${") and word.endswith("}")
            command += filled.get(word[2:-1], []) if macro else [word]
        try:
            after = command[command.index(asked["program"]) + 1 :]
            config = parse(after)
            if not config.checkpoint.resume:
                raise ConfigError("the command must say --checkpoint.resume=true, for a sweep that was killed to go on")
        except (ConfigError, ValueError) as error:
            errors += [f"{path}: {line}" for line in str(error).splitlines()]
            continue
        points.append(Point(settings, command, config))
    places: dict[str, Point] = {}
    rows: dict[tuple, Point] = {}
    for point in points:
        if point.config.run_dir in places:
            errors.append(f"{path}: several points go to {point.config.run_dir}: put {{digest}} into run_dir")
        elif point.row in rows:
            errors.append(f"{path}: several points are called {' '.join(map(str, point.row))}: sweep what tells them apart by a "
                          "parameter of its own, not within config")  # fmt: skip
        places[point.config.run_dir] = rows[point.row] = point
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    return points


def describe(config: Config) -> tuple[str, str]:
    """What is done against memorization, by the names of the table: (method, setting); several are joined by +. A model that
    is not trained at all is called base."""
    if not config.train.samples:
        return "base", ""
    rule, others, methods, settings = config.filter, config.mitigation, [], []
    chief = {"tau": "tau", "timestep": "false_positive_rate", "evidence": "false_flag_rate", "agc": "loss_ratio",
             "sightings": "sightings"}  # fmt: skip
    if rule.method != "tau" or rule.tau is not None:
        usual = FilterConfig()
        changed = [
            f"{setting.name}={_short(getattr(rule, setting.name))}"
            for setting in fields(FilterConfig)
            if setting.name not in ("method", "tau", "calibration", "max_empty_steps", "table_size", chief.get(rule.method))
            and getattr(rule, setting.name) != getattr(usual, setting.name)
        ]
        main = [_short(getattr(rule, chief[rule.method]))] if rule.method in chief else []
        methods.append(rule.method)
        settings.append(", ".join(main + changed))
    for name, label, form in (
        ("random_tokens", "rta", "n={}"),
        ("repeated_words", "repeat", "n={}"),
        ("random_caption", "random_caption", "{}"),
        ("embedding_noise", "embedding_noise", "{}"),
        ("deduplicate", "dedup", ""),
    ):
        if value := getattr(others, name):
            methods.append(label)
            settings.append(form.format(_short(value)))
    return "+".join(methods) or "none", " + ".join(filter(None, settings))


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_time_ratios(rows: list[dict]) -> list[dict]:
    """CPU seconds of training to those of the run that differs in nothing but filter and mitigation, where it is there."""
    base = {row["_base"]: row["cpu_seconds"] for row in rows if row["method"] == "none"}
    made = []
    for row in rows:
        ratio = row["cpu_seconds"] / base[row["_base"]] if row["_base"] in base else None
        made.append({name: value for name, value in row.items() if not name.startswith("_")} | {"time_ratio": ratio})
    return sorted(made, key=lambda row: (row["method"] != "none", row["method"], row["setting"], row["seed"]))
