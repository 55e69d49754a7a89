"""kept_global under every launcher: the weights do not depend on how the samples of a step are split."""

import json

import launching
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

STEPS, STEP = 30, 8
SPLITS = {"1 x 8": (1, 8, 1), "2 x 4": (2, 4, 1), "2 x 2 x 2": (2, 2, 2)}
# without clipping the scale of a gradient shows in SGD's update; with clipping, whether it was scaled before shows
OPTIMIZERS = {
    "sgd": ["--train.learning_rate=0.01", "--train.max_grad_norm=1000", "--filter.tau=1"],
    "adamw": ["--train.learning_rate=1e-3", "--train.max_grad_norm=0.1", "--filter.tau=0.85"],
    "adamw, large eps": [
        "--train.learning_rate=1e-3", "--train.max_grad_norm=0.1", "--filter.tau=0.85", "--train.adam_eps=0.01"
    ],  # fmt: skip
    "adamw_8bit": ["--train.learning_rate=1e-3", "--train.optimizer=adamw_8bit", "--filter.tau=0.85"],
}
# fp32 sums in another order; AdamW divides each by its own size, be it as small as rounding: see the test below
TOLERANCE = {"sgd": 1e-6, "adamw": 2e-4, "adamw, large eps": 1e-6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes_dir, tiny_base):
    """Factory: trained(optimizer, split, zero) launches, once, and gives the run's directory."""
    runs = {}

    def train(optimizer: str, split: str, zero: str | None = None):
        name = (optimizer, split, zero)
        if name not in runs:
            processes, batch_size, accumulation = SPLITS[split]
            run = tmp_path_factory.mktemp("runs") / "run"
            sgd = optimizer == "sgd"
            checkpointing = zero == "zero3" and sgd  # it gathers weights once more, amid the backward
            launching.run(
                [
                    f"--run_dir={run}",
                    f"--model.path={tiny_base}",
                    f"--data.path={scenes_dir}",
                    f"--train.samples={STEPS * STEP}",
                    f"--train.batch_size={batch_size}",
                    f"--train.accumulation={accumulation}",
                    "--train.ema_half_life=0",
                    "--filter.reduction=kept_global",
                    f"--checkpoint.every={STEPS * STEP}",
                    f"--train.gradient_checkpointing={checkpointing}",
                    *OPTIMIZERS[optimizer],
                ],
                processes,
                launching.sharded(run.parent) if zero == "zero3" else zero,
                script="tests/distributed/train_with_sgd.py" if sgd else "train_filtered.py",
                PYTHONPATH=str(launching.ROOT),
            )
            (state,) = run.glob("checkpoints/*/state.json")
            found = json.loads(state.read_text())
            assert found["processes"] == processes
            assert found["kind"] == (f"DeepSpeed ZeRO-{zero[4]}" if zero else "DDP or one process")
            runs[name] = run
        return runs[name]

    return train


def weights(run) -> dict[str, np.ndarray]:
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def largest_difference(run, other) -> float:
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    return max(abs(a[name] - b[name]).max() for name in a)


def kept(run) -> np.ndarray:
    """bool [steps, samples of a step]"""
    audit = pq.read_table(run / "audit.parquet")
    assert audit["position"].to_pylist() == list(range(STEPS * STEP))
    return audit["keep"].to_numpy().reshape(STEPS, STEP)


def assert_same(run, one, optimizer) -> None:
    assert (kept(run) == kept(one)).all()
    assert largest_difference(run, one) < TOLERANCE[optimizer]


@pytest.mark.parametrize(("split", "optimizer"), [("2 x 4", "adamw"), ("2 x 2 x 2", "sgd"), ("2 x 2 x 2", "adamw")])
def test_ranks_and_micro_batches_train_as_one_process_does(trained, split, optimizer):
    one = trained(optimizer, "1 x 8")
    assert_same(trained(optimizer, split), one, optimizer)


@pytest.mark.parametrize(("zero", "optimizer"), [("zero1", "sgd"), ("zero2", "adamw"), ("zero3", "sgd"), ("zero3", "adamw")])
def test_deepspeed_trains_as_one_process_does(trained, zero, optimizer):
    assert_same(trained(optimizer, "2 x 2 x 2", zero), trained(optimizer, "1 x 8"), optimizer)


@pytest.mark.parametrize("split", ["2 x 4", "2 x 2 x 2"])  # DeepSpeed keeps the gradients of the two in different places
def test_offloaded_states_train_as_others_do(trained, split):
    assert_same(trained("adamw", split, "zero2_offload"), trained("adamw", "1 x 8"), "adamw")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_some_steps_keep_nothing_and_some_ranks_keep_nothing(trained, optimizer):
    keep = kept(trained(optimizer, "1 x 8"))
    anywhere = keep.any(1)
    assert not anywhere.all()
    for split in ("2 x 4", "2 x 2 x 2"):
        _, batch_size, accumulation = SPLITS[split]
        by_rank = keep.reshape(STEPS, accumulation, 2, batch_size).any((1, 3))  # [steps, ranks]
        assert (by_rank.any(1) & ~by_rank.all(1)).any()
    assert 0.05 < keep.mean() < 0.6


def test_adamw_differs_more_only_because_it_divides_by_the_size_of_a_gradient(trained):
    small, large = (
        largest_difference(trained(optimizer, "1 x 8"), trained(optimizer, "2 x 2 x 2"))
        for optimizer in ("adamw, large eps", "adamw")
    )
    assert small < TOLERANCE["adamw, large eps"]
    assert large > small


def test_8_bit_states_in_shards_learn_as_whole_ones_do(trained):
    runs = trained("adamw_8bit", "1 x 8"), trained("adamw_8bit", "2 x 4", "zero2")
    one, sharded = (launching.lines(run / "metrics.jsonl")[-1]["loss"] for run in runs)
    assert sharded == pytest.approx(one, rel=0.03)
