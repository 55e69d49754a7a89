"""The real command on what it cannot use: refused in one line before the first step, or left out and counted."""

import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import launching
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler

from memfilter.data import scenes

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 24


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_filtered", ROOT / "train_filtered.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(script, capfd, monkeypatch):
    """The script without the start of a process: (exit code, lines of stderr). A traceback fails the test."""
    monkeypatch.setenv("WANDB_MODE", "disabled")  # a run sets it for its process

    def run(*arguments):
        code = script.main([str(argument) for argument in arguments])
        return code, capfd.readouterr().err.splitlines()

    return run


def process(*arguments):
    """The command as a user starts it: (exit code, lines of stderr)."""
    done = subprocess.run(
        [sys.executable, "train_filtered.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB")},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()


def refused(*arguments, **environment):
    """The command in a process of its own, which exits with 1: what it printed, in lines."""
    output = launching.run(arguments, processes=None, code=1, **environment)
    assert "Traceback" not in output
    return output.splitlines()


def errors(lines):
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="module")
def pictures():
    """key -> files, by suffix"""

    def png(scene):
        scenes.render(scene).save(buffer := io.BytesIO(), "png")
        return buffer.getvalue()

    drawn = [scenes.draw(2, scenes.DISTINCT, i) for i in range(SAMPLES)]
    return {f"{i:02d}": {"png": png(scene), "txt": scene.caption.encode()} for i, scene in enumerate(drawn)}


def write_folder(out, samples):
    out.mkdir()
    for key, files in samples.items():
        for suffix, content in files.items():
            with open(os.fsencode(out) + b"/" + os.fsencode(f"{key}.{suffix}"), "wb") as file:
                file.write(content)
    return out


def write_shards(out, samples):
    out.mkdir()
    with tarfile.open(out / "00000.tar", "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out


def bomb(width, height):
    """A small PNG file of very many black pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit to the pixel
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# before the first step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter.taau=3"], "filter.taau is no setting: did you mean filter.tau?"),
        (["--filter.tau=0"], "filter.tau must be a positive number, found 0.0"),
        (["--filter.tau=nan"], "filter.tau must be a positive number, found nan"),
        (["--train.warmup_samples=8"], "train.warmup_samples=8 has no effect"),
        (["--train.seed=18446744073709551616"], "train.seed must be "),
        (["--train.lr_schedule=polynomial", "--train.learning_rate=1e-8"], "train.learning_rate"),
        (["--train.compile=nonsense"], "train.compile"),
        (["--data.path=nowhere/at/all"], "nothing to read: nowhere/at/all does not exist"),
        (["--data.path=nowhere/at/all.tar"], "nothing to read: nowhere/at/all.tar does not exist"),
        (["--data.index=nowhere.parquet"], "data.index: nowhere.parquet does not exist"),
        (["--data.resolution=17"], "data.resolution: 17 is not a multiple of 2"),
        (["--model.path=nowhere/at/all"], "model.path: nowhere/at/all is not a pipeline directory"),
        (["--model.lora_rank=4", '--model.lora_targets=["nonsense"]'], "model.lora_targets: "),
    ],
)
def test_bad_setting_is_named_in_one_line_and_nothing_is_written(command, tmp_path, scenes_dir, arguments, message):
    run = tmp_path / "run"
    code, lines = command(f"--run_dir={run}", f"--data.path={scenes_dir}", *arguments)
    assert code == 1
    (line,) = errors(lines)
    assert line.startswith(message)
    assert not run.exists()


def test_run_dir_that_cannot_be_made_is_named_in_one_line(command, tmp_path, scenes_dir):
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        code, lines = command(f"--run_dir={run}", f"--data.path={scenes_dir}", "--train.samples=8")
        assert code == 1
        (line,) = errors(lines)
        assert line.startswith("run_dir: ") and str(run) in line


def test_shards_that_are_not_whole_are_named_in_one_line(command, tmp_path, scenes_dir):
    run = tmp_path / "run"
    truncated = shutil.copytree(scenes_dir, tmp_path / "truncated")
    (tar,) = truncated.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:100_000])
    fewer = shutil.copytree(scenes_dir, tmp_path / "fewer")
    pq.write_table(pa.table({"key": ["elsewhere"], "role": ["duplicate"], "repeats": [1]}), fewer / "index.parquet")
    (tmp_path / "empty").mkdir()
    for data, message in (
        (truncated, f"shard {tar} cannot be read"),
        (fewer, "data.index: 1 samples of the index are not in the shards, such as 'elsewhere'"),
        (tmp_path / "empty", f"nothing to read: {tmp_path / 'empty'}"),
    ):
        code, lines = command(f"--run_dir={run}", f"--data.path={data}")
        assert code == 1
        (line,) = errors(lines)
        assert line.startswith(message)
        assert not run.exists()


def remove(*parts):
    return lambda model: [shutil.rmtree(model / part) for part in parts]


def index(**entries):
    def change(model):
        file = model / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def without(entry):
    def change(model):
        file = model / "model_index.json"
        file.write_text(
            json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != entry})
        )

    return change


def scheduler(kind, **settings):
    def change(model):
        kind(**settings).save_pretrained(model / "scheduler")
        index(scheduler=["diffusers", kind.__name__])(model)

    return change


def vae(**settings):
    def change(model):
        file = model / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def cut(model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (remove("vae"), "vae"),
        (remove("unet"), "unet"),
        (remove("text_encoder"), "text_encoder"),
        (remove("tokenizer"), "tokenizer"),
        (remove("scheduler"), "scheduler"),
        (index(vae=[None, None]), "vae"),
        (without("tokenizer"), "tokenizer"),
        (cut, "cannot be loaded"),
        (index(_class_name="FluxPipeline"), "is a FluxPipeline: expected one of StableDiffusionPipeline, "),
        (index(_class_name="StableDiffusionInpaintPipeline"), "is a StableDiffusionInpaintPipeline"),
        (lambda model: (model / "model_index.json").write_text("{"), "cannot be loaded"),
        (lambda model: (model / "model_index.json").unlink(), "has no model_index.json"),
        (scheduler(EDMEulerScheduler), "has a EDMEulerScheduler that says that it was not trained as a diffusion in steps"),
        (scheduler(DPMSolverMultistepScheduler, use_flow_sigmas=True), "was not trained as a diffusion in steps"),
        (vae(latents_mean=[0.1] * 4, latents_std=[1.0] * 4), "has a VAE with latents_mean and latents_std: "),
    ],
    ids=[
        "vae",
        "unet",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "null",
        "unnamed",
        "cut",
        "flux",
        "inpaint",
        "json",
        "no index",
        "edm",
        "flow",
        "normalised latents",
    ],
)
def test_model_directory_that_cannot_be_trained_is_named_in_one_line(
    command, tmp_path, scenes_dir, base, change, named
):
    model, run = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    change(model)
    code, lines = command(f"--run_dir={run}", f"--data.path={scenes_dir}", f"--model.path={model}")
    assert code == 1
    (line,) = errors(lines)
    assert line.startswith(f"model.path: {model} ") and named in line
    assert not run.exists()


def test_package_that_is_missing_is_named_with_what_installs_it(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "memfilter.arguments")
    code, lines = command(f"--run_dir={tmp_path / 'run'}")
    assert (code, errors(lines)) == (1, ["this needs the package jsonargparse: pip install '.[train]'"])


def test_real_process_ends_in_the_same_line_and_exit_code(tmp_path, scenes_dir):
    arguments = [f"--run_dir={tmp_path / 'run'}", f"--data.path={scenes_dir}"]
    code, lines = process(*arguments, "--filter.taau=3", "--train.seed=-1")
    assert code == 1
    assert lines == [
        "error: filter.taau is no setting: did you mean filter.tau?",
        "error: train.seed must be at least 0, found -1",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "log.wandb=online needs a key"),
        # offline would ask for no key
        ({"WANDB_API_KEY": "short", "WANDB_MODE": "offline"}, "log.wandb=online: WANDB_API_KEY invalid"),
    ],
)
def test_wandb_online_without_a_good_key_is_refused_before_a_model_is_loaded(
    tmp_path, scenes_dir, environment, message
):
    arguments = [f"--run_dir={tmp_path / 'run'}", f"--data.path={scenes_dir}", "--log.wandb=online"]
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}
    (line,) = errors(refused(*arguments, "--model.path=nowhere", **home | environment))
    assert line.startswith(message) and "WANDB_API_KEY" in line
    assert not (tmp_path / "run").exists()


# while it runs


def arguments(run, data, *more):
    return [
        f"--run_dir={run}", f"--data.path={data}", "--data.caption_dropout=0", "--filter.tau=2.5",
        f"--train.samples={2 * SAMPLES}", "--train.batch_size=4", "--train.ema_half_life=0", "--log.every=8", *more,
    ]  # fmt: skip


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("write", "workers"), [(write_folder, 0), (write_shards, 1)])
def test_what_cannot_be_read_is_left_out_listed_and_counted(command, tmp_path, pictures, write, workers):
    bad = {
        "03": {"png": b"no picture at all"},
        "05": {"png": pictures["05"]["png"][:200]},
        "07": {"jpg": b""},
        "11": {"png": bomb(20_000, 20_000)},
        "13": {"png": bomb(9_000, 9_000)},  # Pillow itself would only warn
    }
    odd = {"15": {"txt": b"word " * (2**20 // 5)}, "17": {"txt": b"\xff\xfe\x00"}, "19": {"txt": b""}}
    samples = {key: files | odd.get(key, {}) for key, files in pictures.items()}
    samples |= {key: {"txt": pictures[key]["txt"]} | files for key, files in bad.items()}
    run = tmp_path / "run"
    code, lines = command(
        *arguments(run, write(tmp_path / "data", samples), "--data.max_bad_share=0.3", f"--data.workers={workers}")
    )
    assert code == 0 and not errors(lines)
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["key"] for row in listed} == bad.keys()
    assert all(f"'{row['key']}'" in row["bad"] and str(tmp_path / "data") in row["bad"] for row in listed)
    # two epochs show each of them twice
    summary = json.loads((run / "summary.json").read_text())
    assert summary["filter/excluded"] == len(listed) == len({row["position"] for row in listed}) == 2 * len(bad)
    assert sum(row["filter/excluded"] for row in metrics_of(run)) == 2 * len(bad)
    audit = pq.read_table(run / "audit.parquet").to_pydict()
    checked = {key for key in samples if key not in bad and samples[key]["txt"]}
    assert set(audit["key"]) == checked
    assert len(audit["key"]) == summary["filter/checked"] == 2 * len(checked)
    assert (run / "pipeline" / "model_index.json").is_file()


def test_too_many_unreadable_samples_end_the_run_with_a_list_and_leave_readable_files(tmp_path, pictures):
    bad = {key: {"png": b"no picture"} for key in ("01", "04", "09", "12", "20")}
    data, run = write_folder(tmp_path / "data", pictures | bad), tmp_path / "run"
    first, *listed = errors(refused(*arguments(run, data, "--data.max_bad_share=0.05")))  # 2.4 of 48
    assert "samples could not be read" in first and "data.max_bad_share" in first
    rows = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert len(rows) == len(listed) >= 3
    for line in listed:
        assert any(f"'{key}'" in line and str(data / f"{key}.png") in line for key in bad)
    last = max(row["position"] for row in rows)
    metrics, audit = metrics_of(run), pq.read_table(run / "audit.parquet").to_pydict()
    # the batch of the last one is not trained on
    before = last // 4 * 4
    assert [row["samples"] for row in metrics] == list(range(8, before + 1, 8))
    known = {row["position"] for row in rows}
    assert audit["position"] == [position for position in range(before) if position not in known]
    assert not (run / "summary.json").exists() and not (run / "pipeline").exists()


def test_unreadable_sample_that_comes_again_stands_in_the_list_once(command, tmp_path, pictures):
    data = write_folder(tmp_path / "data", {"broken": {"png": b"no picture"}} | pictures)
    keys = ["broken", *pictures]
    table = {"key": keys, "role": ["distinct"] * len(keys), "repeats": [8] + [1] * SAMPLES}
    pq.write_table(pa.table(table), data / "index.parquet")
    code, lines = command(*arguments(tmp_path / "run", data, "--data.max_bad_share=0.1"))
    assert code == 1
    assert len(errors(lines)) == 2
    assert "'broken'" in errors(lines)[1] and " object at 0x" not in errors(lines)[1]


def test_picture_of_an_extreme_shape_does_not_end_the_run(command, tmp_path, pictures):
    # within the limit as it is; with its shorter side at 64 pixels it would have more than 2^31 in the other
    samples = pictures | {"06": pictures["06"] | {"png": bomb(1, 40_000_000)}}
    data, run = write_folder(tmp_path / "data", samples), tmp_path / "run"
    code, _ = command(*arguments(run, data, "--data.max_bad_share=0.2", "--data.resolution=64"))
    assert code == 0
    assert json.loads((run / "summary.json").read_text())["filter/excluded"] in (0, 2)


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_name_that_is_no_utf_8_is_no_reason_to_break_down(command, tmp_path, pictures, write):
    samples = {(os.fsdecode(b"\xff") if key == "06" else key): files for key, files in pictures.items()}
    run = tmp_path / "run"
    code, lines = command(*arguments(run, write(tmp_path / "data", samples), "--data.max_bad_share=0.2"))
    assert (code, len(errors(lines)), run.exists()) in ((0, 0, True), (1, 1, False))


def test_run_on_nothing_but_unreadable_samples_gives_up(command, tmp_path, pictures):
    data = write_folder(tmp_path / "data", {key: {"png": b"no picture"} for key in pictures})
    code, lines = command(*arguments(tmp_path / "run", data, "--data.max_bad_share=0.99", "--log.validation_every=8"))
    assert code == 1
    assert "samples could not be read" in errors(lines)[0]
