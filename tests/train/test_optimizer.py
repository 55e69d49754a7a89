"""Learning rates, the average and the optimizer, in samples, against diffusers and plain numpy."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from bitsandbytes import optim as bitsandbytes
from diffusers.optimization import get_scheduler

from memfilter.config import Config, DataConfig, FilterConfig, LRSchedule, TrainConfig
from memfilter.train.loop import Trainer
from memfilter.train.optimizer import lr_schedule, make_ema, make_optimizer

SAMPLES, BATCH, LR = 160, 4, 3e-4
SETTINGS = {
    "constant": {},
    "piecewise_constant": {"lr_rules": "1:40,0.5:100,0.1"},
    "cosine_with_restarts": {"warmup_samples": 40, "lr_cycles": 3},
    "polynomial": {"warmup_samples": 40, "lr_power": 2.0},
}
KINDS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bitsandbytes.AdamW8bit,
    "paged_adamw": bitsandbytes.PagedAdamW,
    "paged_adamw_8bit": bitsandbytes.PagedAdamW8bit,
}


def config_of(schedule, **settings):
    settings = {"batch_size": BATCH} | SETTINGS.get(schedule, {"warmup_samples": 40}) | settings
    return TrainConfig(samples=SAMPLES, learning_rate=LR, lr_schedule=schedule, **settings)


def rates(config, processes=1):
    """Learning rate for every number of samples seen before."""
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    at = lr_schedule(config, optimizer, config.batch_size * config.accumulation * processes)
    return [at(samples) for samples in range(config.samples)]


@pytest.mark.parametrize("schedule", get_args(LRSchedule))
def test_learning_rate_is_that_of_the_schedule_of_diffusers_stepped_one_by_one(schedule):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    stepped = get_scheduler(
        schedule, optimizer, step_rules="1:10,0.5:25,0.1", num_warmup_steps=10, num_training_steps=SAMPLES // BATCH,
        num_cycles=SETTINGS.get(schedule, {}).get("lr_cycles", 1), power=2.0,
    )  # fmt: skip
    expected = []
    for _ in range(SAMPLES // BATCH):
        expected += stepped.get_last_lr() * BATCH
        optimizer.step()
        stepped.step()
    assert rates(config_of(schedule)) == pytest.approx(expected, rel=1e-12)
    assert schedule == "constant" or len(set(expected)) > 2


@pytest.mark.parametrize("schedule", get_args(LRSchedule))
def test_learning_rate_at_a_sample_does_not_depend_on_how_a_step_is_split(schedule):
    whole = rates(config_of(schedule))
    assert rates(config_of(schedule, batch_size=2, accumulation=2)) == whole
    assert rates(config_of(schedule, batch_size=2), processes=2) == whole
    assert rates(config_of(schedule, batch_size=1, accumulation=2), processes=2) == whole


def test_rules_hold_up_to_their_samples_whatever_the_step():
    for batch in (1, 4, 10, 20):
        found = rates(config_of("piecewise_constant", batch_size=batch))
        assert found == pytest.approx([LR] * 40 + [LR / 2] * 60 + [LR / 10] * 60)
    # a step of 16 samples begins within a rule or behind it
    found = rates(config_of("piecewise_constant", batch_size=16))
    assert found == pytest.approx([LR] * 48 + [LR / 2] * 64 + [LR / 10] * 48)


def test_average_is_that_of_plain_numpy_with_the_half_life_in_samples():
    generator = torch.Generator()
    weights = [torch.nn.Parameter(torch.randn(5, generator=generator)) for _ in range(2)]
    ema, expected = make_ema(weights, TrainConfig(ema_half_life=90), step_samples=6), None
    for step in range(100):
        with torch.no_grad():
            for weight in weights:
                weight.copy_(torch.randn(5, generator=generator))
        ema.step(weights)
        now = np.stack([weight.detach().numpy() for weight in weights]).astype(np.float64)
        decay = 0.5 ** (6 / 90) if step else 0
        expected = now if expected is None else decay * expected + (1 - decay) * now
    np.testing.assert_allclose(np.stack([s.numpy() for s in ema.shadow_params]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(1, 1, 1), (5, 2, 1), (5, 2, 4)])
def test_weight_of_old_is_half_its_own_after_the_half_life(batch_size, accumulation, processes):
    half_life, step = 200, batch_size * accumulation * processes
    config = TrainConfig(batch_size=batch_size, accumulation=accumulation, ema_half_life=half_life)
    weight = torch.nn.Parameter(torch.ones(1))
    ema = make_ema([weight], config, step)
    ema.step([weight])
    with torch.no_grad():
        weight.zero_()
    for _ in range(half_life // step):
        ema.step([weight])
    assert ema.shadow_params[0].item() == pytest.approx(0.5, rel=1e-3)
    assert make_ema([weight], TrainConfig(ema_half_life=0), step) is None


def test_average_of_bf16_weights_is_kept_in_fp32():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = make_ema([weight], TrainConfig(ema_half_life=1000), step_samples=1)
    ema.step([weight])
    with torch.no_grad():
        weight.zero_()
    for _ in range(10):  # by so little each time that bf16 would stay at 1
        ema.step([weight])
    (shadow,) = ema.shadow_params
    assert shadow.dtype == torch.float32 and weight.dtype == torch.bfloat16
    assert shadow.tolist() == pytest.approx([0.5 ** (10 / 1000)] * 3, rel=1e-6)


@pytest.mark.parametrize("optimizer", get_args(get_type_hints(TrainConfig)["optimizer"]))
def test_settings_of_adamw_reach_the_optimizer(optimizer):
    config = TrainConfig(
        optimizer=optimizer, learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6, weight_decay=0.2
    )
    made = make_optimizer([torch.nn.Parameter(torch.ones(8))], config)
    assert type(made) is KINDS[optimizer]
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-3, (0.8, 0.95), 1e-6, 0.2)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_state_of_a_paged_optimizer_is_paged_again_when_it_is_loaded(monkeypatch, name):
    def stepped(optimizer, weight, steps=1):
        for _ in range(steps):
            weight.grad = torch.linspace(-1, 1, weight.numel())
            optimizer.step()

    config = TrainConfig(optimizer=name, learning_rate=1e-2)
    weight = torch.nn.Parameter(torch.ones(8192))  # what has fewer elements stays in 32 bits
    optimizer = make_optimizer([weight], config)
    stepped(optimizer, weight)
    given, real = [], KINDS[name].get_state_buffer
    monkeypatch.setattr(KINDS[name], "get_state_buffer", lambda *args, **more: given.append(real(*args, **more)) or given[-1])
    again = torch.nn.Parameter(weight.detach().clone())
    other = make_optimizer([again], config)
    other.load_state_dict(optimizer.state_dict())
    (found,), (left,) = other.state.values(), optimizer.state.values()
    assert all(any(found[moment] is buffer for buffer in given) for moment in ("state1", "state2"))
    assert all(torch.equal(found[moment], left[moment]) for moment in ("state1", "state2"))
    stepped(optimizer, weight, 3)
    stepped(other, again, 3)
    assert torch.equal(weight, again)


def test_run_with_8_bit_adamw_keeps_its_state_in_8_bits_and_moves_the_weights(tmp_path, scenes_dir):
    config = Config(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(path=str(scenes_dir)),
        filter=FilterConfig(tau=float("inf")),
        train=TrainConfig(samples=16, batch_size=4, optimizer="adamw_8bit", learning_rate=1e-3, ema_half_life=0),
    )
    trainer = Trainer(config)
    trained = list(trainer.trained.values())
    before = [p.detach().clone() for p in trained]
    summary = trainer.run(progress=False)
    moments = [state["state1"] for state in trainer.engine.optimizer.state.values()]
    # bitsandbytes keeps what is smaller than 4096 numbers in full
    assert {m.dtype for m in moments if m.numel() >= 4096} == {torch.uint8}
    assert summary["samples"] == 16 and (tmp_path / "run" / "pipeline").is_dir()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert all(torch.isfinite(p).all() for p in trained)
