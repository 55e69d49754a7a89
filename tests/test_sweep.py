"""Sweeps: what their files ask for, and two real runs made both ways."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import launching
import psutil
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from safetensors.torch import load_file
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from memfilter.arguments import parse
from memfilter.calibration import Calibration
from memfilter.cli import main
from memfilter.config import ConfigError, digest, make_filter
from memfilter.pipelines import model_dir
from memfilter.sweep import Sweep, SweepError, describe, parts_of_devices, read_sweep

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true"}
LAUNCH = ["accelerate", "launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


@lru_cache
def shipped(name: str):
    """Points of a sweep that comes with the project."""
    return read_sweep(ROOT / "configs" / "sweeps" / f"{name}.yaml")


def written(path: Path, **changes) -> Path:
    sweep = {
        "program": "train_filtered.py",
        "method": "grid",
        "command": [*LAUNCH, "${program}", "--run_dir=runs/{digest}", "--checkpoint.resume=true", "${args}"],
        "parameters": {"train.seed": {"values": [1, 2]}, "filter.tau": {"values": [3.0, None]}},
    }
    path.write_text(yaml.safe_dump(sweep | changes, sort_keys=False))
    return path


@pytest.mark.parametrize(("visible", "processes", "parts"), [
    ("0,1,2,3", 1, [None]), ("", 2, [None, None]), ("0,1,2,3", 2, ["0,1", "2,3"]), ("4,7", 3, ["4", "7", "4"]),
    ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
])  # fmt: skip
def test_runs_at_a_time_have_their_own_parts_of_the_gpus(monkeypatch, visible, processes, parts):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [part.get("CUDA_VISIBLE_DEVICES") for part in parts_of_devices(processes)] == parts


def test_points_are_the_grid_and_words_are_those_of_wandb(tmp_path):
    points = read_sweep(written(tmp_path / "sweep.yaml"))
    assert [(p.config.train.seed, p.config.filter.tau) for p in points] == [(1, 3), (1, None), (2, 3), (2, None)]
    assert points[1].settings == {"train.seed": 1, "filter.tau": None}
    begin = [*LAUNCH, "train_filtered.py", "--run_dir=runs/{digest}", "--checkpoint.resume=true"]
    assert points[1].command == [*begin, "--train.seed=1", "--filter.tau=None"]
    assert len({p.config.run_dir for p in points}) == 4
    assert all(p.config.run_dir == f"runs/{digest(p.config)}" for p in points)


def test_the_study_finds_what_the_benchmark_has_made(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    spec.loader.exec_module(benchmark := importlib.util.module_from_spec(spec))
    wanted = {(*describe(point.config), point.config.train.seed): point.config for point in shipped("study")}
    seeds = {seed for _, _, seed in wanted}
    assert seeds <= {*benchmark.REPORTED_SEEDS}
    made = {parse(benchmark.settings_of(Path("runs/clipart"), "a", seed, method)).run_dir
            for seed in seeds for method in benchmark.WANTED["a"]}  # fmt: skip
    shared = {name for name, config in wanted.items() if config.run_dir in made}
    names = [("none", ""), ("oracle", ""), ("evidence", "0.02"), ("sightings", "30"), ("timestep", "0.02")]
    names += [("tau", f"{tau}") for tau in (3, 4, 5, 6, 7)]
    names += [("base", ""), ("sightings", "10"), ("sightings", "100")]
    assert shared == {(*name, seed) for name in names for seed in seeds}


def test_rules_of_the_study_can_be_made_with_the_calibration_that_comes_with_the_model():
    calibration = Calibration.load(model_dir("scenes") / "calibration.json")
    for point in shipped("study"):
        make_filter(point.config, calibration)


def test_what_is_swept_beside_the_method_is_part_of_the_setting(tmp_path):
    parameters = {"filter.tau": {"values": [3.0, None]}, "train.learning_rate": {"values": [1e-3, 1e-4]}}
    points = read_sweep(written(tmp_path / "sweep.yaml", parameters=parameters))
    assert [point.row for point in points] == [
        ("tau", "3, train.learning_rate=0.001", 0), ("tau", "3, train.learning_rate=0.0001", 0),
        ("none", "train.learning_rate=0.001", 0), ("none", "train.learning_rate=0.0001", 0)]  # fmt: skip
    parameters = {"config": {"values": ["{train: {learning_rate: 1.0e-3}}", "{train: {learning_rate: 1.0e-4}}"]}}
    with pytest.raises(ConfigError, match="several points are called none  0: sweep what tells them apart"):
        read_sweep(written(tmp_path / "sweep.yaml", parameters=parameters | {"filter.tau": {"value": None}}))


def finish(point):
    """Leaves in the run's directory what a finished and evaluated run has, as far as a sweep asks for it."""
    (run := Path(point.config.run_dir)).mkdir(parents=True, exist_ok=True)
    (run / "summary.json").write_text('{"cpu_seconds": 1.0}')
    (run / "evaluation.json").write_text("{}")


def test_rows_of_an_earlier_call_stay_in_the_table_of_one_that_is_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = read_sweep(written(tmp_path / "sweep.yaml"))
    for point in points:
        finish(point)

    def make(self, point, children):
        if point is points[-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sweep, "_make", make)
    with pytest.raises(KeyboardInterrupt):
        Sweep(points, tmp_path / "out").run(progress=False)
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open(newline="")))
    assert len(rows) == len(points) == 4


def test_rows_of_runs_that_are_not_there_any_more_are_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    points, made = read_sweep(written(tmp_path / "sweep.yaml")), []

    def make(self, point, children):
        made.append(point.row)
        (run := Path(point.config.run_dir)).mkdir(parents=True, exist_ok=True)
        (run / "summary.json").write_text(f'{{"cpu_seconds": {len(made)}.5}}')
        (run / "evaluation.json").write_text('{"duplicates": {"memorization_rate": 0.25}}')

    monkeypatch.setattr(Sweep, "_make", make)
    table = tmp_path / "out" / "results.csv"
    Sweep(points, tmp_path / "out").run(progress=False)
    first, parquet = table.read_text(), pq.read_table(table.with_suffix(".parquet"))
    for point in points[:3]:
        shutil.rmtree(point.config.run_dir)
    Sweep(points, tmp_path / "out").run(progress=False)
    assert made[4:] == [points[3].row] and "3 runs are not there any more" in caplog.text
    kept = list(csv.DictReader(table.open(newline="")))
    assert [row["cpu_seconds"] for row in kept if row["run"] != points[3].config.run_dir] == ["2.5", "1.5", "3.5"]
    assert pq.read_table(table.with_suffix(".parquet")).schema == parquet.schema

    lines = first.splitlines(keepends=True)
    gone = next(line for line in lines if points[0].config.run_dir in line)
    table.write_text("".join(line for line in lines if line != gone))
    Sweep(points, tmp_path / "out").run(progress=False)
    assert points[0].row in made[5:] and points[1].row not in made[5:]
    table.write_text("run,cpu_seconds\nx,y\n")
    with pytest.raises(ValueError, match=r"results.csv is not the table of a sweep"):
        Sweep(points, tmp_path / "out").run(progress=False)


def test_table_that_is_all_that_is_left_of_other_runs_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points, made = read_sweep(written(tmp_path / "sweep.yaml")), []

    def make(self, point, children):
        made.append(point)
        finish(point)

    monkeypatch.setattr(Sweep, "_make", make)
    table = tmp_path / "out" / "results.csv"
    Sweep(points, tmp_path / "out").run(progress=False)
    before, gone = table.read_text(), points[0].config.run_dir
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match=f"only record of 1 runs that are no points of this sweep .* gone: {gone}; name"):
        Sweep(points[1:], tmp_path / "out").run(progress=False)
    assert table.read_text() == before and len(made) == 4
    Path(gone).mkdir()  # a run that is there can be read again
    assert len(Sweep(points[1:], tmp_path / "out").run(progress=False)) == 3


def test_rows_that_are_kept_were_evaluated_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = read_sweep(written(tmp_path / "sweep.yaml"))

    def make(self, point, children):
        finish(point)

    monkeypatch.setattr(Sweep, "_make", make)
    table = tmp_path / "out" / "results.csv"
    Sweep(points, tmp_path / "out", ["--seeds=2", "--steps=3"]).run(progress=False)
    shutil.rmtree(points[0].config.run_dir)
    before = table.read_text()
    for words in ([], ["--seeds=3", "--steps=3"]):
        with pytest.raises(ValueError, match="gone and that were evaluated with '--seeds=2 --steps=3', not "):
            Sweep(points, tmp_path / "out", words).run(progress=False)
        assert table.read_text() == before
    for words in (["--seeds=2", "--steps=3"], []):
        rows = Sweep(points, tmp_path / "out", words).run(progress=False)
        assert {row["evaluated"] for row in rows if row["run"] != points[0].config.run_dir} == {" ".join(words) or "as usual"}
        # tables that do not tell, as those that are published, are taken as they are
        told = list(csv.reader(table.open(newline="")))
        place = told[0].index("evaluated")
        with table.open("w", newline="") as file:
            csv.writer(file).writerows(line[:place] + line[place + 1 :] for line in told)


def test_run_that_fails_has_no_row_of_an_earlier_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = read_sweep(written(tmp_path / "sweep.yaml"))
    for point in points:
        finish(point)
    table, failing = tmp_path / "out" / "results.csv", []
    monkeypatch.setattr(Sweep, "_make", lambda self, point, children: Path("log") if point in failing else None)
    Sweep(points, tmp_path / "out").run(progress=False)
    for number in (1, len(points)):
        failing[:] = points[:number]
        with pytest.raises(SweepError):
            Sweep(points, tmp_path / "out").run(progress=False)
        rows = list(csv.DictReader(table.open(newline="")))
        assert {row["run"] for row in rows} == {point.config.run_dir for point in points[number:]}
        assert pq.read_table(table.with_suffix(".parquet")).num_rows == len(rows)


def test_name_of_a_run_depends_on_what_the_weights_depend_on():
    def name(*settings):
        return digest(parse(["--filter.tau=3", *settings]))

    assert name() == name("--run_dir=elsewhere", "--log.every=8", "--checkpoint.every=8", "--data.cache_gb=2")
    others = ("--filter.tau=4", "--train.seed=1", "--data.path=other", "--mitigation.random_tokens=1", "--data.workers=2",
              "--data.cache=half")  # fmt: skip
    assert len({name(), *map(name, others)}) == 7


def test_seed_stands_in_paths():
    config = parse(["--run_dir=runs/{seed}", "--data.path=scenes-{seed}", "--data.index=i-{seed}", "--train.seed=7"])
    assert (config.run_dir, config.data.path, config.data.index) == ("runs/7", "scenes-7", "i-7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "method=bayes needs W&B's server; here only grid works"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate has no meaning here"),
        ({"run_cap": 3}, "run_cap has no meaning here"),
        ({"parameters": {"filter.tau": {"min": 1, "max": 5}}}, "parameter filter.tau needs value or values, and nothing else"),
        ({"parameters": {"filter.tau": {"values": []}}}, "parameter filter.tau: values must be a list"),
        ({"parameters": {"filter.tua": {"values": [3]}}}, "filter.tua is no setting: did you mean filter.tau?"),
        ({"parameters": {"log.every": {"values": [8, 80]}}}, "several points go to runs/"),
        ({"command": ["${program}", "${args}"]}, "the command must say --checkpoint.resume=true"),
        ({"command": "python train_filtered.py"}, "command must be a list with ${program} or train_filtered.py in it"),
        ({"command": ["python", "./train_filtered.py", "${args}"]}, "command must be a list with ${program} or"),
        ({"program": None}, "is no sweep: it needs program and parameters"),
    ],
)
def test_what_does_not_run_here_is_told_before_anything_runs(tmp_path, changes, message):
    path = written(tmp_path / "sweep.yaml", **changes)
    with pytest.raises(ConfigError) as error:
        read_sweep(path)
    assert message in str(error.value) and all(line.startswith(str(path)) for line in str(error.value).splitlines())


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "", "\x00"])
def test_file_that_is_no_sweep_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    assert main(["sweep", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweeps_that_come_with_the_project_can_be_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    points = shipped(path.stem)
    assert all(point.command[:2] == ["accelerate", "launch"] for point in points)
    first = path.read_text().splitlines()[0].removeprefix("# ").split()
    assert first[:3] == ["memfilter", "sweep", f"configs/sweeps/{path.name}"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--filter.tau=null"], ("none", "")),
        (["--filter.tau=null", "--train.samples=0"], ("base", "")),
        (["--filter.tau=3"], ("tau", "3")),
        (["--filter.tau=3", "--filter.unit=rms"], ("tau", "3, unit=rms")),
        (["--filter.method=evidence", "--filter.gate=-inf"], ("evidence", "0.02, gate=-inf")),
        (["--filter.method=timestep", "--filter.tau=9"], ("timestep", "0.02")),
        (["--filter.method=oracle"], ("oracle", "")),
        (["--filter.tau=null", "--mitigation.random_tokens=4"], ("rta", "n=4")),
        (["--filter.tau=null", "--mitigation.deduplicate=true"], ("dedup", "")),
        (["--filter.tau=3", "--mitigation.random_caption=0.4"], ("tau+random_caption", "3 + 0.4")),
        (["--filter.method=agc", "--mitigation.embedding_noise=0.1"], ("agc+embedding_noise", "1.25 + 0.1")),
    ],
)
def test_run_is_called_by_what_it_does_against_memorization(settings, expected):
    assert describe(parse(settings)) == expected


# real runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd1", "sd1")


@pytest.fixture
def sweep(tmp_path, scenes_dir, base):
    """Factory: a sweep of two tiny runs, which go to a directory."""

    def make(name: str, samples: int = 16, **parameters) -> Path:
        command = [
            *LAUNCH, "${program}", f"--run_dir={tmp_path / name}/{{digest}}", f"--data.path={scenes_dir}",
            f"--model.path={base}",
            f"--train.samples={samples}", "--train.batch_size=8", "--log.every=8", "--log.gallery=0",
            "--checkpoint.resume=true", "--checkpoint.every=8", "${args}",
        ]  # fmt: skip
        parameters = {"filter.tau": {"values": [3.0, None]}} | parameters
        return written(tmp_path / f"{name}.yaml", command=command, parameters=parameters)

    return make


@contextmanager
def started(command, errors=subprocess.DEVNULL):
    """A sweep's process, of which nothing is left afterwards."""
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=errors)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            launching.kill(process)


EVALUATE = "--evaluate=--distinct=1 --seeds=2 --steps=2"


def test_wandb_agent_and_this_make_the_same_weights_and_the_table_says_what_came_of_them(sweep, tmp_path):
    assert subprocess.run(
        [sys.executable, "-m", "memfilter.cli", "sweep", sweep("here"), "--out", tmp_path / "out", EVALUATE],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True,
    ).returncode == 0  # fmt: skip
    agent = yaml.safe_load(sweep("agent").read_text())
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open(newline="")))
    assert pq.read_table(tmp_path / "out" / "results.parquet").num_rows == len(rows) == 2
    assert [(row["method"], row["setting"], row["seed"]) for row in rows] == [("none", "", "0"), ("tau", "3", "0")]
    assert rows[0]["time_ratio"] == "1.0" and float(rows[1]["time_ratio"]) > 0
    assert float(rows[0]["passes"]) == 0 and float(rows[1]["passes"]) == 1
    for row in rows:
        evaluation = json.loads(Path(row["run"], "evaluation.json").read_text())
        assert float(row["copy_similarity"]) == pytest.approx(evaluation["duplicates"]["copy_similarity"], rel=1e-5)
        assert row["agreement_distinct"] == ""  # the scorer reads no pictures of 16 px
    for tau in (3.0, None):
        words = create_sweep_command_args({"args": {"filter.tau": {"value": tau}}})["args"]
        place = {"${program}": [agent["program"]], "${args}": words}
        command = [part for word in create_sweep_command(list(agent["command"])) for part in place.get(word, [word])]
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    here, there = (sorted((tmp_path / name).iterdir()) for name in ("here", "agent"))
    assert len(here) == 2 and [run.name for run in here] == [run.name for run in there]
    for one, other in zip(here, there, strict=True):
        a, b = (load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors") for run in (one, other))
        assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def test_sweep_that_was_killed_goes_on_and_a_run_that_fails_fails_it(sweep, tmp_path):
    # the first run is killed in its midst; all is dropped at 0.001, which is an error after three steps
    parameters = {"filter.max_empty_steps": {"value": 3}, "filter.tau": {"values": [3.0, 0.001]}}
    command = [sys.executable, "-m", "memfilter.cli", "sweep", sweep("runs", 240, **parameters), "--out", tmp_path / "out", EVALUATE]
    with started(command) as process:
        made = launching.wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/[0-9]*")), process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
    run = made[0].parents[1]
    assert children and not (run / "summary.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    log = Path(line.rpartition("see ")[2])
    assert log.parent == tmp_path / "out" / "logs" and "filter.tau=0.001 is below the norm of everything" in log.read_text()
    assert "goes on from" in (log.parent / f"{run.name}.log").read_text()
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").open(newline=""))
    assert (row["method"], row["setting"], row["time_ratio"]) == ("tau", "3", "")


def test_stopping_the_sweep_stops_its_runs(sweep, tmp_path):
    command = [sys.executable, "-m", "memfilter.cli", "sweep", sweep("runs", samples=80_000), "--out", tmp_path / "out"]
    with (tmp_path / "errors").open("w") as errors, started(command, errors) as process:
        launching.wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/[0-9]*")), process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=launching.PATIENCE) == 130
    assert (tmp_path / "errors").read_text().endswith("interrupted\n") and "Traceback" not in (tmp_path / "errors").read_text()
    launching.wait_for_end_of(children, seconds=1)  # it has waited for them


@pytest.mark.parametrize(
    "words, said",
    [
        (["--evaluate=--distnct=40"], "--evaluate: "),
        (["--evaluate=--measure=wen"], "measure wen needs sscd"),
        (["--evaluate=--seeds=1"], "seeds must be at least 2"),
        (["--processes=0"], "processes must be at least 1"),
    ],
)
def test_what_no_run_could_use_is_refused_before_the_first(sweep, capsys, words, said):
    assert main(["sweep", str(sweep("runs")), *words]) == 1
    assert said in capsys.readouterr().err
