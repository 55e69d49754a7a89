"""Sheets of pictures while a model trains: when, of what, and without a trace in the weights."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.data import scenes
from memfilter.data.experiment import INDEX, Experiment
from memfilter.data.shards import Shards
from memfilter.train.loop import Trainer, train


def run(run_dir, data, every, ema_half_life=0.0, max_bad_share=0.0, prompts=2):
    train(
        Config(
            run_dir=str(run_dir),
            data=DataConfig(path=str(data), max_bad_share=max_bad_share),
            filter=FilterConfig(tau=2.5),
            train=TrainConfig(samples=24, batch_size=4, learning_rate=1e-3, ema_half_life=ema_half_life),
            log=LogConfig(validation_every=every, validation_prompts=prompts, validation_steps=2, gallery=0),
        ),
        progress=False,
    )
    return run_dir / "validation"


def columns(sheet):
    """uint8 [rows, 5, 32, 32, 3]"""
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[0] % 32 == 0 and pixels.shape[1:] == (5 * 32, 3)
    return pixels.reshape(-1, 32, 5, 32, 3).transpose(0, 2, 1, 3, 4)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, scenes_dir):
    out = tmp_path_factory.mktemp("runs") / "averaged"
    run(out, scenes_dir, every=10, ema_half_life=12)
    return out


def test_sheets_are_made_whenever_so_many_samples_have_been_seen(averaged):
    # batches of 4 pass 10 at 12, and 20 at 20
    found = sorted(path.name for path in (averaged / "validation").iterdir())
    assert found == ["000000012.png", "000000020.png", "prompts.txt"]


def test_rows_are_duplicates_then_distinct_samples_led_by_their_training_picture(averaged, scenes_dir):
    shards, experiment = Shards.open(scenes_dir), Experiment.read(scenes_dir / INDEX)
    keys = list(experiment.keys)
    shown = [key for key in keys if experiment.repeats[keys.index(key)] > 1][:2]
    shown += [key for key in keys if experiment.repeats[keys.index(key)] == 1][:2]
    prompts = (averaged / "validation" / "prompts.txt").read_text().splitlines()
    assert prompts == [shards.caption(key) for key in shown]
    for name in ("000000012.png", "000000020.png"):
        rows = columns(averaged / "validation" / name)
        assert np.array_equal(rows[:, 0], np.stack([np.asarray(shards.image(key)) for key in shown]))


@pytest.mark.parametrize("ema_half_life", [0, 12])
def test_sheet_of_the_last_step_shows_what_the_exported_pipeline_makes(tmp_path, scenes_dir, ema_half_life):
    sheet = run(tmp_path / "run", scenes_dir, every=24, ema_half_life=ema_half_life) / "000000024.png"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    prompts = (sheet.parent / "prompts.txt").read_text().splitlines()
    for row, prompt in enumerate(prompts):
        made = pipeline(
            [prompt] * 4,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + row) for seed in range(4)],
            num_inference_steps=2,
            guidance_scale=7.5,
            output_type="np",
        ).images
        shown = columns(sheet)[row, 1:]
        assert abs(np.round(made * 255) - shown).max() <= 1
        assert len({picture.tobytes() for picture in shown}) == 4


@pytest.mark.parametrize("ema_half_life", [0, 12])
def test_validation_leaves_no_trace_in_the_weights(tmp_path, scenes_dir, averaged, ema_half_life):
    watched = averaged if ema_half_life else tmp_path / "watched"
    if not ema_half_life:
        run(watched, scenes_dir, every=10)
    run(tmp_path / "plain", scenes_dir, every=0, ema_half_life=ema_half_life)
    assert not (tmp_path / "plain" / "validation").exists()
    with_sheets, without = (
        load_file(out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        for out in (watched, tmp_path / "plain")
    )
    assert all(torch.equal(with_sheets[name], without[name]) for name in without)
    audits = [(out / "audit.parquet").read_bytes() for out in (watched, tmp_path / "plain")]
    assert audits[0] == audits[1]


def test_where_nothing_is_known_the_first_readable_samples_are_shown(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(5):
        scene = scenes.draw(1, scenes.DISTINCT, i)
        scenes.render(scene).crop((0, 4, 32, 28)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption\nno {i}")
    (folder / "1.png").write_bytes(b"no picture")
    out = run(tmp_path / "run", folder, every=24, max_bad_share=0.5, prompts=3)
    assert (out / "prompts.txt").read_text().splitlines() == ["caption no 0", "caption no 2"]
    assert len(columns(out / "000000024.png")) == 2


@pytest.mark.parametrize("mixed_precision", ["no", "fp16", "bf16"])
def test_sheet_of_a_lora_in_any_precision_shows_pictures_and_asks_no_safety_checker(tmp_path, scenes_dir, mixed_precision):
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny.save_pipeline(tmp_path / "base", "sdxl")), lora_rank=2),
        data=DataConfig(path=str(scenes_dir)),
        train=TrainConfig(samples=4, batch_size=4, mixed_precision=mixed_precision),
        log=LogConfig(every=4, validation_every=4, validation_prompts=1, validation_steps=2),
    )
    Trainer(config).run(progress=False)
    sheet = np.asarray(Image.open(tmp_path / "run" / "validation" / "000000004.png"))
    assert all(picture.std() > 1 for picture in np.split(sheet[:, 16:], 4, axis=1))
