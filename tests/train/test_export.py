"""What a finished run leaves: weights that the stock pipelines load, and a card that may be published."""

import copy
import json
import re
from importlib.metadata import version

import pytest
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import CLIPImageProcessor

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.data import scenes
from memfilter.pipelines import load_trained
from memfilter.train.export import export_pipeline, model_card
from memfilter.train.loop import Trainer

SECRET = "customers-of-acme"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp(SECRET)


@pytest.fixture(scope="module")
def folder(out):
    folder = out / "private" / "holidays"
    folder.mkdir(parents=True)
    for i in range(8):
        scene = scenes.draw(3, scenes.DISTINCT, i)
        scenes.render(scene).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder


@pytest.fixture(scope="module")
def finished(out, folder):
    """Factory: the trainer of a finished run of this family; its pipeline holds what was trained."""
    trainers = {}

    def make(family, lora_rank=None):
        if (family, lora_rank) not in trainers:
            name = f"{family}-{lora_rank}"
            base = out / "models" / family
            if not base.exists():
                tiny.save_pipeline(base, family)
            trainer = Trainer(
                Config(
                    run_dir=str(out / "runs" / name),
                    model=ModelConfig(path=str(base), lora_rank=lora_rank),
                    data=DataConfig(path=str(folder), caption_dropout=0.0),
                    filter=FilterConfig(tau=1.25),
                    train=TrainConfig(samples=16, batch_size=4, learning_rate=1e-2, ema_half_life=8),
                    log=LogConfig(gallery=0),
                )
            )
            trainer.run(progress=False)
            trainers[family, lora_rank] = trainer
        return trainers[family, lora_rank]

    yield make


@torch.no_grad()
def prediction(pipeline):
    """Of the denoiser, for inputs that are always the same."""
    g = torch.Generator().manual_seed(0)
    unet = pipeline.unet.eval()
    latents, prompt = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.randn(2, 5, unet.config.cross_attention_dim, generator=g),
    )
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.full((2, 6), 16.0)}
    return unet(latents, torch.tensor([10, 900]), prompt, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_pipeline_is_the_stock_class_with_the_trained_denoiser(finished, out, family):
    trainer = finished(family)
    exported = DiffusionPipeline.from_pretrained(out / "runs" / f"{family}-None" / "pipeline")
    base = DiffusionPipeline.from_pretrained(out / "models" / family)
    assert type(exported) is type(base)
    assert torch.equal(prediction(exported), prediction(trainer.pipeline))
    assert not torch.allclose(prediction(exported), prediction(base))
    for part in ("vae", "text_encoder"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (exported, base))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert exported.scheduler.config.prediction_type == base.scheduler.config.prediction_type


def test_index_names_the_feature_extractor_as_every_release_of_transformers_does(finished, out, tmp_path):
    trainer = finished("sd1")
    pipeline = copy.copy(trainer.pipeline)
    pipeline._internal_dict = copy.copy(pipeline.config)
    pipeline.register_modules(feature_extractor=CLIPImageProcessor())
    summary = json.loads((out / "runs" / "sd1-None" / "summary.json").read_text())
    index = json.loads((export_pipeline(pipeline, pipeline.unet, tmp_path, summary) / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "pipeline").feature_extractor, CLIPImageProcessor)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_directory_is_loaded_by_the_stock_pipeline(finished, out, family):
    trainer, run_dir = finished(family, 4), out / "runs" / f"{family}-4"
    assert not (run_dir / "pipeline").exists()
    pipeline = DiffusionPipeline.from_pretrained(out / "models" / family)
    before = prediction(pipeline)
    pipeline.load_lora_weights(run_dir / "lora")
    after = prediction(pipeline)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, prediction(trainer.pipeline))
    torch.testing.assert_close(prediction(load_trained(run_dir)), after)


def test_scale_of_the_lora_update_is_read_back(out, folder, finished):
    config = copy.deepcopy(finished("sd1", 4).config)
    config.run_dir, config.model.lora_alpha, config.model.lora_targets = (
        str(out / "runs" / "alpha"),
        1.0,
        ["to_q", "to_v"],
    )
    trainer = Trainer(config)
    trainer.run(progress=False)
    pipeline = DiffusionPipeline.from_pretrained(out / "models" / "sd1")
    pipeline.load_lora_weights(out / "runs" / "alpha" / "lora")
    torch.testing.assert_close(prediction(pipeline), prediction(trainer.pipeline))


@pytest.mark.parametrize(("lora_rank", "kind"), [(None, "pipeline"), (4, "lora")])
def test_card_says_from_what_with_which_tau_and_how_much_was_dropped(finished, out, lora_rank, kind):
    finished("sd1", lora_rank)
    run_dir = out / "runs" / f"sd1-{lora_rank}"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert 0 < summary["filter/dropped"] < summary["filter/checked"] == 16
    card = ModelCard.load(run_dir / kind / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"memfilter", "text-to-image"} <= set(card.data.tags) and ("lora" in card.data.tags) == (kind == "lora")
    table = dict(re.findall(r"^\| (.+) \| (.+) \|$", card.text, re.MULTILINE))
    expected = {
        "base model": "sd1", "data": "holidays", "samples seen": "16", "tau": "1.25 (l2)", "samples checked": "16",
        "dropped": str(summary["filter/dropped"]), "unreadable samples": "0",
        "optimizer steps that kept nothing": str(summary["filter/empty_steps"]),
    }  # fmt: skip
    assert expected.items() <= table.items()
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["filter"] == summary["config"]["filter"] and settings["train"] == summary["config"]["train"]
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        assert f"{package} {version(package)}" in card.text


@pytest.mark.parametrize(("family", "lora_rank"), [("sd1", None), ("sdxl", 4)])
def test_what_may_be_published_does_not_say_where_it_was_made(finished, out, folder, family, lora_rank):
    finished(family, lora_rank)
    run_dir = out / "runs" / f"{family}-{lora_rank}"
    published = run_dir / ("pipeline" if lora_rank is None else "lora")
    files = {path.name: path.read_bytes() for path in published.rglob("*") if path.is_file()}
    assert SECRET not in files["README.md"].decode() and str(out.parent) not in files["README.md"].decode()
    for name, content in files.items():
        assert str(run_dir).encode() not in content and str(folder).encode() not in content, name


def test_weights_are_safetensors_with_the_adapter_described(finished, out):
    finished("sd1", 4)
    (weights,) = (out / "runs" / "sd1-4" / "lora").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert names and all(".lora." in name for name in names)
    assert adapter["unet.r"] == adapter["unet.lora_alpha"] == 4
    assert not [path for path in out.rglob("*.bin")]


def test_card_of_a_hub_model_names_it_and_an_unfiltered_run_says_so():
    counts = {
        "filter/checked": 0,
        "filter/dropped": 0,
        "filter/excluded": 3,
        "filter/empty_steps": 0,
        "skipped_steps": 2,
    }
    config = {
        "run_dir": "/home/somebody/runs/1",
        "model": {"path": "owner/model"},
        "data": {"path": "/home/somebody/data/", "index": "/home/somebody/a.parquet"},
        "filter": {"tau": None, "unit": "l2"},
    }
    card = model_card({"samples": 12_345, "config": config, **counts}, lora=False)
    assert card.data.base_model == "owner/model"
    assert "# owner/model, fine-tuned" in card.text and "| tau | none (no filter) |" in card.text
    assert "| data | data |" in card.text and "| samples seen | 12,345 |" in card.text
    assert "| unreadable samples | 3 |" in card.text and "| optimizer steps skipped by loss scaling | 2 |" in card.text
    assert "somebody" not in str(card)
