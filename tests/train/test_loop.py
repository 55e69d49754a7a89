"""The loop as a whole: what a run depends on, and what it does not."""

import copy
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from memfilter.config import Config, ConfigError, DataConfig, FilterConfig, LogConfig, TrainConfig
from memfilter.data.encode import Encoder
from memfilter.filter import EmptySteps, NonFiniteNorm
from memfilter.pipelines import model_dir
from memfilter.train import loop
from memfilter.train.engine import Engine


def run(tmp_path, scenes_dir, name="run", tau=2.5, **settings):
    caption_dropout = settings.pop("caption_dropout", 0.1)
    settings = {"samples": 24, "batch_size": 4, "learning_rate": 1e-4, "ema_half_life": 0} | settings
    reduction = settings.pop("reduction", "kept")
    config = Config(
        run_dir=str(tmp_path / name),
        data=DataConfig(path=str(scenes_dir), caption_dropout=caption_dropout),
        filter=FilterConfig(tau=tau, reduction=reduction, max_empty_steps=4),
        train=TrainConfig(**settings),
        log=LogConfig(every=8),
    )
    summary = loop.train(config, progress=False)
    return summary, load_file(tmp_path / name / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def audit(tmp_path, name):
    return pq.read_table(tmp_path / name / "audit.parquet").to_pylist()


def test_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_does_not(tmp_path, scenes_dir):
    first, second, other = (run(tmp_path, scenes_dir, f"run{i}", seed=seed)[1] for i, seed in enumerate((1, 1, 2)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert audit(tmp_path, "run0") == audit(tmp_path, "run1")


def test_what_a_process_holds_until_it_is_written_changes_nothing(tmp_path, scenes_dir, monkeypatch):
    counts, collected = [], []
    collect = loop.Trainer._collect
    monkeypatch.setattr(loop.Trainer, "_collect", lambda self: collected.append(len(self._losses)) or collect(self))
    for held in (1000, 2):
        monkeypatch.setattr(loop, "HELD", held)
        times = len(collected)
        run(tmp_path, scenes_dir, f"run{held}", batch_size=2, accumulation=3)
        counts.append(len(collected) - times)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / f"run{held}" / "metrics.jsonl").read_text().splitlines()]
              for held in (1000, 2)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and audit(tmp_path, "run1000") == audit(tmp_path, "run2")
    assert sum(collected) == 2 * 12 and counts == [3, 3 + 3]  # at the end of steps that leave so many


def test_what_is_drawn_for_a_sample_does_not_depend_on_batch_size_and_accumulation(tmp_path, scenes_dir):
    # a learning rate of nothing: the norms then depend on the draws alone
    run(tmp_path, scenes_dir, "a", tau=float("inf"), batch_size=8, learning_rate=1e-30)
    run(tmp_path, scenes_dir, "b", tau=float("inf"), batch_size=2, accumulation=3, learning_rate=1e-30)
    a, b = audit(tmp_path, "a"), audit(tmp_path, "b")
    assert [row["position"] for row in a] == [row["position"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert (x["key"], x["timestep"]) == (y["key"], y["timestep"])
        assert x["text_norm"] == pytest.approx(y["text_norm"], rel=1e-4)


def test_accumulation_is_one_larger_batch_where_the_mean_is_over_all_that_was_kept(tmp_path, scenes_dir):
    def weights(name, **settings):
        summary, found = run(tmp_path, scenes_dir, name, tau=2.3, caption_dropout=0.0, **settings)
        assert 0 < summary["filter/drop_rate"] < 1
        return torch.cat([tensor.flatten() for tensor in found.values()])

    whole = weights("whole", batch_size=8, reduction="kept_global")
    split = weights("split", batch_size=2, accumulation=4, reduction="kept_global")
    apart = weights("apart", batch_size=2, accumulation=4, reduction="kept")
    # AdamW amplifies rounding; a mean of means is another update altogether
    assert (whole - split).norm() < 0.05 * (whole - apart).norm()


def test_tau_inf_ends_in_the_weights_of_a_run_without_the_extra_pass(tmp_path, scenes_dir):
    _, measured = run(tmp_path, scenes_dir, "measured", tau=float("inf"), samples=8, mixed_precision="bf16")
    summary, plain = run(tmp_path, scenes_dir, "plain", tau=None, samples=8, mixed_precision="bf16")
    assert all(torch.equal(measured[name], plain[name]) for name in plain)
    assert (summary["filter/seen"], summary["filter/checked"], summary["filter/dropped"]) == (8, 0, 0)
    assert audit(tmp_path, "plain") == []


def test_budget_of_nothing_exports_the_model_as_it_was(tmp_path, scenes_dir):
    summary, found = run(tmp_path, scenes_dir, samples=0, ema_half_life=50)
    base = load_file(model_dir("scenes") / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], base[name].to(found[name].dtype)) for name in base) and base.keys() == found.keys()
    assert summary["samples"] == 0 and not audit(tmp_path, "run")


def test_run_that_keeps_nothing_leaves_the_base_untouched_and_then_gives_up(tmp_path, scenes_dir):
    nothing = {"tau": 1e-6, "caption_dropout": 0.0}
    summary, weights = run(tmp_path, scenes_dir, samples=12, ema_half_life=4, **nothing)
    base = load_file(model_dir("scenes") / "unet" / "diffusion_pytorch_model.safetensors")
    assert summary["filter/drop_rate"] == 1
    assert summary["filter/empty_steps"] == 3
    assert all(torch.equal(weights[name], base[name].float()) for name in base)
    with pytest.raises(EmptySteps, match="raise it"):
        run(tmp_path, scenes_dir, "longer", samples=16, **nothing)


def test_metrics_of_the_windows_add_up_to_the_summary(tmp_path, scenes_dir):
    summary, _ = run(tmp_path, scenes_dir)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("filter/seen", "filter/checked", "filter/dropped"):
        assert sum(row[name] for row in rows) == summary[name]
    duplicates = [row for row in audit(tmp_path, "run") if row["duplicate"]]
    share = sum(not row["keep"] for row in duplicates) / len(duplicates)
    assert share == pytest.approx(summary["filter/drop_rate_duplicates"])


def test_warm_up_follows_the_samples_seen(tmp_path, scenes_dir):
    run(tmp_path, scenes_dir, lr_schedule="constant_with_warmup", warmup_samples=16, learning_rate=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # of the step that ends at 8, 16, 24 samples: the 2nd, 4th and 6th of steps 0, 1, 2, ... with 4 of warm-up
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 / 4, 3e-3 / 4, 1e-3])


def test_not_a_number_in_a_latent_ends_the_run_naming_the_sample(tmp_path, scenes_dir, monkeypatch):
    encode = Encoder.pictures

    def broken(self, batch, *rest):
        latents, time_ids = encode(self, batch, *rest)
        broken.key = batch["key"][1]
        latents[1] = torch.nan
        return latents, time_ids

    monkeypatch.setattr(Encoder, "pictures", broken)
    with pytest.raises(NonFiniteNorm) as error:
        run(tmp_path, scenes_dir)
    assert broken.key in str(error.value)


@pytest.mark.parametrize("broken", [1, 6])  # of 6 steps; after the last there is no loss that would tell
def test_gradient_that_is_no_number_ends_a_run_without_null_passes(tmp_path, scenes_dir, monkeypatch, broken):
    step = Engine.step

    def poisoned(self, *args):
        poisoned.count += 1
        if poisoned.count == broken:
            self.trained[0].grad[0] = torch.nan
        return step(self, *args)

    poisoned.count = 0
    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(NonFiniteNorm, match=f"a gradient was NaN or infinite by sample {8 if broken == 1 else 24}: "):
        run(tmp_path, scenes_dir, tau=None)
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "pipeline").exists()


@pytest.mark.parametrize(
    ("precision", "message"),
    [("no", "a gradient was NaN or infinite by sample 8: "), ("fp16", "the loss was NaN or infinite by sample 8: ")],
)
def test_latent_that_is_no_number_ends_a_run_without_null_passes(tmp_path, scenes_dir, monkeypatch, precision, message):
    encode = Encoder.pictures

    def broken(self, batch, *rest):
        latents, time_ids = encode(self, batch, *rest)
        latents[1] = torch.nan
        return latents, time_ids

    monkeypatch.setattr(Encoder, "pictures", broken)
    with pytest.raises(NonFiniteNorm, match=message):
        run(tmp_path, scenes_dir, tau=None, mixed_precision=precision)


def test_steps_that_fp16_skips_for_ever_end_the_run(tmp_path, scenes_dir, monkeypatch):
    step = Engine.step

    def poisoned(self, *args):
        self.trained[0].grad[0] = torch.inf
        return step(self, *args)

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(NonFiniteNorm, match="gradients of 4 optimizer steps in a row were NaN or infinite"):
        run(tmp_path, scenes_dir, tau=None, mixed_precision="fp16")


def test_accumulation_is_that_of_the_settings_whatever_the_environment_says(tmp_path, scenes_dir, monkeypatch):
    _, expected = run(tmp_path, scenes_dir, "alone")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    _, found = run(tmp_path, scenes_dir, "other")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_all_settings_out_of_range_are_named_at_once(scenes_dir):
    config = copy.deepcopy(Config())
    config.train.samples, config.data.caption_dropout, config.filter.tau = -1, 1.5, -1.0
    with pytest.raises(ConfigError) as error:
        loop.train(config)
    assert all(name in str(error.value) for name in ("train.samples", "data.caption_dropout", "filter.tau"))


def test_run_at_which_another_process_is_at_work_is_refused(tmp_path, scenes_dir):
    script = "import sys; from pathlib import Path; from memfilter.files import held\n"
    script += "with held(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    (tmp_path / "run").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    config = Config(run_dir=str(tmp_path / "run"), data=DataConfig(path=str(scenes_dir)))
    config.checkpoint.resume = True
    config.train.samples = 0
    try:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="run_dir: another process is at work in .*run"):
            loop.train(config, progress=False)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        other.communicate()
    loop.train(config, progress=False)
