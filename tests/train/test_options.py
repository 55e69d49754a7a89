"""Every option of the loop with the filter on: what is masked counts as if it had been left out.

The gradients of a batch of which the filter drops a part are held against those of an unfiltered run on the kept
samples alone. Options are combined so that every pair of values occurs.
"""

import itertools
import math
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from allpairspy import AllPairs

from memfilter.config import Config, DataConfig, FilterConfig, LRSchedule, ModelConfig, TrainConfig
from memfilter.data import scenes
from memfilter.data.sampler import collate
from memfilter.threshold import FixedThreshold
from memfilter.train.loop import Trainer

BATCH = 8
OPTIONS = {
    "family": tiny.FAMILIES,
    "lora_rank": (None, 4),
    "optimizer": ("adamw", "adamw_8bit"),
    "lr_schedule": get_args(LRSchedule),
    "snr_gamma": (None, 5.0),
    "noise_offset": (0.0, 0.1),
    "caption_dropout": (0.0, 0.3),
    "gradient_checkpointing": (False, True),
    "mixed_precision": ("no", "fp16", "bf16"),
    "compile": (None, "aot_eager"),
    "ema_half_life": (0, 100),
    "resolution": (16, 24),
    "random_crop": (False, True),
    "random_flip": (False, True),
    "reduction": ("kept", "kept_global", "batch"),
}
COMBINATIONS = [dict(zip(OPTIONS, values, strict=True)) for values in AllPairs(list(OPTIONS.values()))]
# a half-precision weight gradient is summed over the batch in other blocks when the batch is smaller: two roundings
TOLERANCE = {"no": 1e-5, "fp16": 2 * torch.finfo(torch.float16).eps, "bf16": 2 * torch.finfo(torch.bfloat16).eps}
# one level: compiling is what takes time here, and every combination must be compiled anew
UNET = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A flat folder of upright and wide pictures, half of them known duplicates."""
    out = tmp_path_factory.mktemp("folder")
    keys = []
    for i in range(2 * BATCH):
        scene = scenes.draw(11, scenes.DISTINCT, i, specific=0)
        box = (0, 0, 32, 22) if i % 2 else (0, 0, 22, 32)
        scenes.render(scene).crop(box).save(out / f"{i:03d}.png")
        (out / f"{i:03d}.txt").write_text(scene.caption)
        keys.append(f"{i:03d}")
    roles = ["duplicate" if i % 2 else "distinct" for i in range(len(keys))]
    pq.write_table(pa.table({"key": keys, "role": roles, "repeats": [1] * len(keys)}), out / "index.parquet")
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    return {family: tiny.save_pipeline(out / family, family, unet=UNET) for family in tiny.FAMILIES}


def make_trainer(tmp_path, folder, models, options: dict, tau: float | None) -> Trainer:
    warm = options["lr_schedule"] not in ("constant", "piecewise_constant")
    train = {name: options[name] for name in TrainConfig.__dataclass_fields__ if name in options}
    return Trainer(
        Config(
            run_dir=str(tmp_path / "run"),
            model=ModelConfig(path=str(models[options["family"]]), lora_rank=options["lora_rank"]),
            data=DataConfig(
                path=str(folder),
                **{n: options[n] for n in ("resolution", "random_crop", "random_flip", "caption_dropout")},
            ),
            filter=FilterConfig(tau=tau, reduction=options["reduction"]),
            train=TrainConfig(
                samples=4 * BATCH,
                batch_size=BATCH,
                learning_rate=1e-3,
                warmup_samples=BATCH if warm else 0,
                lr_rules=f"1:{BATCH},0.1" if options["lr_schedule"] == "piecewise_constant" else None,
                seed=3,
                **train,
            ),
        )
    )


def gradients(trainer: Trainer, positions) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, all gradients in one vector) of the samples at these positions."""
    loss = trainer.objective(collate([trainer.dataset[p] for p in positions]))
    trainer.accelerator.backward(loss)
    scale = 1.0 if trainer.accelerator.scaler is None else trainer.accelerator.scaler.get_scale()
    return loss.detach(), torch.cat([p.grad.flatten().double() / scale for p in trainer.engine.trained])


def mean_of_kept(pred, target, weight, keep, reduction: str) -> torch.Tensor:
    """The paper's loss by indexing, of a batch of the same shape: half precision then rounds alike."""
    errors = (pred.float() - target.float()).pow(2).mean((1, 2, 3)) * (1 if weight is None else weight)
    return errors[keep].sum() / {"kept": keep.sum(), "kept_global": 1, "batch": len(keep)}[reduction]


def test_all_pairs_of_option_values_occur():
    for (a, values), (b, others) in itertools.combinations(OPTIONS.items(), 2):
        found = {(combination[a], combination[b]) for combination in COMBINATIONS}
        assert found == set(itertools.product(values, others)), (a, b)


@pytest.mark.parametrize("options", COMBINATIONS, ids=range(len(COMBINATIONS)))
def test_masking_equals_leaving_out(tmp_path, folder, models, options):
    torch._dynamo.reset()
    trainer = make_trainer(tmp_path, folder, models, options, tau=math.inf)
    positions = range(BATCH)
    gradients(trainer, positions)
    verdict = trainer.mem_filter.verdict
    norms = verdict.text_norm[verdict.checked].sort().values
    tau = ((norms[len(norms) // 2 - 1] + norms[len(norms) // 2]) / 2).item()
    trainer.engine.optimizer.zero_grad()
    trainer.mem_filter.threshold = FixedThreshold(tau)

    tolerance = TOLERANCE[options["mixed_precision"]]
    loss, masked = gradients(trainer, positions)
    keep = trainer.mem_filter.verdict.keep
    assert 0 < keep.sum() < BATCH
    assert np.isfinite(loss.item()) and masked.isfinite().all() and masked.norm() > 0
    trainer.engine.step(trainer.mem_filter, trainer.lr_at(BATCH - 1))
    assert all(parameter.isfinite().all() for parameter in trainer.engine.trained)

    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if options["mixed_precision"] != "no":
        by_hand = make_trainer(tmp_path, folder, models, options | {"compile": None}, tau=None)
        by_hand.mem_filter.loss = lambda *args: mean_of_kept(*args, keep, options["reduction"])
        _, expected = gradients(by_hand, positions)
        assert (masked - expected).norm() <= (1e-5 if options["compile"] is None else tolerance) * expected.norm()
        AcceleratorState._reset_state(reset_partial_state=True)
    # not compiled: half the time, and an oracle for the compiled one
    alone = make_trainer(tmp_path, folder, models, options | {"compile": None}, tau=None)
    loss_alone, left_out = gradients(alone, [p for p, kept in zip(positions, keep, strict=True) if kept])
    share = keep.sum().item() / BATCH if options["reduction"] == "batch" else 1.0
    assert loss.item() == pytest.approx(share * loss_alone.item(), rel=tolerance)
    assert (masked - share * left_out).norm() <= tolerance * left_out.norm()
