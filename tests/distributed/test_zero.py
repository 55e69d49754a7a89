"""What ZeRO makes of weights: parts of them, and states of the trained ones alone."""

import launching
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file


@pytest.fixture
def settings(tmp_path, tiny_base, scenes_dir):
    return [
        f"--run_dir={tmp_path / 'run'}", f"--model.path={tiny_base}", f"--data.path={scenes_dir}", "--train.batch_size=2",
        "--train.mixed_precision=bf16", "--train.ema_half_life=0", "--filter.tau=null", "--log.gallery=0",
    ]  # fmt: skip


def test_fp32_weights_of_zero3_are_those_that_were_loaded_whatever_the_number_of_ranks(settings, tmp_path, tiny_base):
    """conv_out.bias has four elements: of three ranks the first two have them, and the last a part of padding."""
    launching.run([*settings, "--train.samples=12", "--train.learning_rate=1e-30"], 3, launching.sharded(tmp_path))
    base = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    exported = load_file(tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == base.keys()
    for name in base:  # what is 0 moves by the rate
        np.testing.assert_allclose(exported[name], base[name], rtol=0, atol=1e-20)


def test_checkpoint_of_lora_under_zero2_holds_no_frozen_weight_and_is_gone_on_from(settings, tmp_path):
    lora = [*settings, "--model.lora_rank=4", "--checkpoint.every=8", "--checkpoint.resume=true"]
    launching.run([*lora, "--train.samples=8"], 1, "zero2")
    (state,) = tmp_path.glob("run/checkpoints/000000000008/**/mp_rank_00_model_states.pt")
    names = torch.load(state, weights_only=False, map_location="cpu")["module"].keys()
    assert names and all(".lora_" in name for name in names)
    (tmp_path / "run" / "summary.json").unlink()
    assert "goes on from" in launching.run([*lora, "--train.samples=16"], 1, "zero2")


def test_calibration_under_zero_is_made_in_the_precision_of_the_run(settings, tmp_path):
    """With LoRA the denoiser is in bf16, and what it is given in fp32."""
    words = [word for word in settings if not word.startswith("--run_dir")]
    words += ["--model.lora_rank=4", f"--out={tmp_path / 'calibration.json'}", "--keys=8", "--looks=2"]
    launching.run(["memfilter.cli", "calibrate", *words], 1, "zero2", script="-m")
    assert (tmp_path / "calibration.json").exists()
