"""What ZeRO steps and averages, and its device computes with only after rounding: the fp32 weights."""

import shutil

import launching
import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.mark.parametrize(("zero", "processes"), [("zero1", 2), ("zero2_offload", 1)])
def test_average_under_zero_is_of_the_weights_in_fp32(tmp_path, tiny_base, scenes_dir, zero, processes):
    run, base = tmp_path / "run", load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    settings = [
        f"--run_dir={run}", f"--model.path={tiny_base}", f"--data.path={scenes_dir}", f"--train.batch_size={4 // processes}",
        "--train.learning_rate=1e-5", "--train.ema_half_life=12", "--train.mixed_precision=bf16", "--filter.tau=null",
        "--log.validation_every=16", "--checkpoint.every=16", "--checkpoint.keep=9",
    ]  # fmt: skip
    script = "tests/distributed/train_and_average.py"
    more = {"script": script, "PYTHONPATH": str(launching.ROOT)}
    launching.run([*settings, "--train.samples=32"], processes, zero, **more)
    exported = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    first, average, last = (load_file(run / f"{name}.safetensors") for name in ("first", "average", "last"))
    moved = np.concatenate([(average[name] - base[name]).ravel() for name in base])
    seen = np.concatenate([(last[name] - base[name].astype(np.float32)).ravel() for name in base])
    assert all(np.array_equal(first[name], base[name]) for name in base)  # not as bf16 has them
    assert 1e-5 < abs(moved).max() < 1e-4 and abs(seen).max() > 1e-4  # the latter is rounding
    for name in base:
        np.testing.assert_allclose(exported[name], average[name], rtol=1e-6, atol=1e-8)  # rounding of eight steps

    # and goes on from a checkpoint
    shutil.rmtree(run / "pipeline")
    (run / "summary.json").unlink()
    shutil.rmtree(max(run.glob("checkpoints/*")))
    output = launching.run([*settings, "--train.samples=32", "--checkpoint.resume=true"], processes, zero, **more)
    assert f"goes on from {min(run.glob('checkpoints/*'))}" in output
    again = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(again[name], exported[name]) for name in base)
