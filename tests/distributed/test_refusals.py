"""Launches that cannot be right end before anything is trained, and say why."""

import json
import re
from types import SimpleNamespace

import launching
import pytest
import torch
from accelerate.utils import DistributedType

from memfilter.config import Config
from memfilter.train.engine import _refusals


@pytest.fixture
def settings(tmp_path, scenes_dir, tiny_base):
    return [f"--run_dir={tmp_path / 'run'}", f"--model.path={tiny_base}", f"--data.path={scenes_dir}", "--train.samples=64"]


def errors(output: str) -> list[str]:
    """What is said, by whichever rank: both find the same, and torchrun ends the other when one is gone."""
    told = (re.sub(r"^error: (rank \d+: )?", "", line) for line in output.splitlines() if line.startswith("error: "))
    return list(dict.fromkeys(told))


def test_everything_that_does_not_go_with_a_deepspeed_stage_is_told_at_once(tmp_path, settings):
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam", "params": {}}}))
    settings += ["--model.lora_rank=4", "--train.compile=aot_eager", "--train.optimizer=paged_adamw"]
    output = launching.run(settings, 1, config, code=1)
    told = errors(output)
    for start in ("the DeepSpeed configuration has a section 'optimizer'", "train.ema_half_life", "model.lora_rank",
                  "train.optimizer=paged_adamw", "train.compile"):  # fmt: skip
        assert [line for line in told if line.startswith(start)], (start, told)
    assert len(told) == 5 and not (tmp_path / "run").exists()


def test_average_of_weights_that_fsdp_shards_is_refused():
    launch = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, device=torch.device("cuda"))
    config = Config()
    assert [line.partition(":")[0] for line in _refusals(config, launch)] == ["train.ema_half_life"]
    config.train.ema_half_life = 0
    assert not list(_refusals(config, launch))


@pytest.mark.parametrize(("stage", "precision", "refused"), [(1, "bf16", 1), (2, "bf16", 0), (1, "no", 0)])
def test_sums_in_fp32_that_take_zero_1_to_another_optimizer_are_refused(stage, precision, refused):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"data_types": {"grad_accum_dtype": "fp32"}})
    launch = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin, device=torch.device("cuda")
    )
    config = Config()
    config.train.mixed_precision = precision
    assert [line.partition(": ")[0] for line in _refusals(config, launch)] == [
        "the DeepSpeed configuration has data_types.grad_accum_dtype=fp32"
    ] * refused


def test_fp16_under_deepspeed_on_cpus_is_refused(settings):
    told = errors(launching.run([*settings, "--train.mixed_precision=fp16"], 1, "zero2", code=1))
    assert told == ["train.mixed_precision=fp16: DeepSpeed has no fp16 on CPUs; use bf16 or no"]


def test_processes_that_do_not_know_each_other_are_refused(settings):
    output = launching.run(settings, 2, code=1, ACCELERATE_USE_CPU="false")
    (told,) = errors(output)
    assert told.startswith("the launcher started 2 processes") and "ACCELERATE_USE_CPU=true" in told


def test_deepspeed_that_accelerate_would_forget_is_refused(settings):
    (told,) = errors(launching.run(settings, 1, "zero2", code=1, ACCELERATE_USE_CPU="true"))
    assert "DS_ACCELERATOR=cpu" in told


def test_budget_that_the_processes_cannot_share_is_refused(tmp_path, settings):
    (told,) = errors(launching.run([*settings, "--train.samples=72", "--train.batch_size=8"], 2, code=1))
    assert told.startswith("train.samples") and "= 16" in told and not (tmp_path / "run").exists()


def test_mistakes_in_settings_are_told_once(settings):
    output = launching.run([*settings, "--train.sample=72"], 2, code=1)
    assert output.count("train.sample is no setting") == 1
