"""What is stored, what training makes of it, and what is refused: held against runs without a cache and against
diffusers' own encodings. How it is written by processes that are killed is in tests/distributed."""

import dataclasses
import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from clouds import write_clouds
from datasets import Dataset
from datasets import Image as Picture
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from memfilter.cli import main as command
from memfilter.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FilterConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)
from memfilter.data import cache as module
from memfilter.data import make_cache as making
from memfilter.data import shards as shards_module
from memfilter.data.builder import prepare_experiment
from memfilter.data.cache import Cache
from memfilter.data.encode import Encoder
from memfilter.data.experiment import Experiment, prepare_scenes
from memfilter.data.manifest import MANIFEST, SCHEMA, write_manifest
from memfilter.data.plan import Plan
from memfilter.data.sampler import View, posterior_noise, to_pixels
from memfilter.data.shards import ShardError, Shards
from memfilter.pipelines import load_pipeline
from memfilter.train.loop import Trainer

STEPS, BATCH = 30, 4
TAU = {"sd1": 1.05, "sdxl": 0.55}  # drops about half


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny.save_pipeline(root / family, family) for family in ("sd1", "sdxl")}


@pytest.fixture
def config(bases, scenes_dir, tmp_path):
    """Factory: the configuration of a run."""

    def make(family="sd1", cache=None, run="run", model=None, path=None, batch_size=BATCH, **data) -> Config:
        return Config(
            run_dir=str(tmp_path / run),
            model=ModelConfig(path=str(model or bases[family])),
            data=DataConfig(path=str(path or scenes_dir), cache=None if cache is None else str(cache), **data),
            filter=FilterConfig(tau=TAU[family]),
            train=TrainConfig(samples=STEPS * BATCH, batch_size=batch_size, learning_rate=1e-3, ema_half_life=0),
            log=LogConfig(every=40, gallery=0),
        )

    return make


@pytest.fixture
def folder(tmp_path):
    """Wide and upright pictures, two with one caption, one without any."""
    (out := tmp_path / "folder").mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        size = (16 + 3 * i, 21) if i % 2 else (20, 17 + 2 * i)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(out / f"p{i}.png")
        (out / f"p{i}.txt").write_text("" if i == 4 else f"poster no {i % 5}")
    return out


def made(config: Config, **settings):
    return making.make_cache(config, progress=False, **settings)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def encodings(trainer: Trainer) -> list[tuple[torch.Tensor, ...]]:
    """Latents, time_ids and embeddings of every batch of the run."""
    encoder, side, found = trainer.objective.encoder, trainer.objective.latent_shape, []
    for batch in trainer.loader():
        draw = torch.stack([posterior_noise(0, position, side) for position in batch["position"]])
        named = encoder.prompts(batch["caption"])
        added = named.get("added_cond_kwargs", {}).values()
        found.append((*encoder.pictures(batch, draw), named["encoder_hidden_states"], *added))
    return found


def audit(config: Config) -> list[dict]:
    return pq.read_table(f"{config.run_dir}/audit.parquet").to_pylist()


def runs_of(module) -> list:
    """Grows with every forward of a module."""
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    return seen


def refusal(config: Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Trainer(config)
    return str(caught.value).splitlines()


# training from it


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(("flip", "made_with"), [(False, BATCH), (True, 6)])
def test_training_from_it_is_training_without_it(config, tmp_path, family, flip, made_with):
    plain = config(family, run="plain", random_flip=flip)
    cached = config(family, tmp_path / "cache", "cached", random_flip=flip)
    maker = dataclasses.replace(cached, train=dataclasses.replace(cached.train, batch_size=made_with))
    made(maker, samples_per_shard=9)
    for expected, found in zip(encodings(Trainer(plain)), encodings(Trainer(cached)), strict=True):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
            assert b.dtype == torch.float32 and (made_with != BATCH or torch.equal(a, b))
    summaries = [Trainer(c).run(progress=False) for c in (plain, cached)]
    assert summaries[0]["filter/dropped"] == summaries[1]["filter/dropped"] > STEPS
    for a, b in zip(audit(plain), audit(cached), strict=True):
        assert b.pop("text_norm") == pytest.approx(a.pop("text_norm"), abs=1e-4)
        assert a == b
    if made_with == BATCH:
        weights = [load_file(f"{c.run_dir}/pipeline/unet/diffusion_pytorch_model.safetensors") for c in (plain, cached)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_picture_is_decoded_and_nothing_is_encoded(config, tmp_path, monkeypatch, workers):
    cached = config(cache=tmp_path / "cache", workers=workers)
    made(cached)

    def decoded(*_):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(Shards, "image", decoded)
    trainer = Trainer(cached)
    vae, text = runs_of(trainer.pipeline.vae.encoder), runs_of(trainer.pipeline.text_encoder)
    assert all(part is None for batch in trainer.loader() for part in batch["pixels"])
    trainer.run(progress=False)
    assert len(audit(cached)) == STEPS * BATCH and vae == text == []


def test_posterior_is_sampled_anew_every_time(config, folder, tmp_path):
    cached = config(cache=tmp_path / "cache", path=folder)
    made(cached)
    encoder = Trainer(cached).objective.encoder
    batch = {"view": [("p0", None, False)] * 2}
    latents, _ = encoder.pictures(batch, torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)]))
    assert (latents[1] - latents[0]).min() > 0


def test_half_precision_takes_half_the_space_and_is_read_as_single(config, tmp_path):
    whole, half = config(cache=tmp_path / "whole"), config(cache=tmp_path / "half")
    made(whole), made(half, dtype="fp16")
    name = "prompts-00000.safetensors"
    assert (tmp_path / "half" / name).stat().st_size < 0.51 * (tmp_path / "whole" / name).stat().st_size
    assert load_file(tmp_path / "half" / "pictures-00000.safetensors")["time_ids"].dtype == torch.float32
    for expected, found in zip(encodings(Trainer(whole)), encodings(Trainer(half)), strict=True):
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == torch.float32
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert not torch.equal(expected[0], found[0])


def test_what_does_not_fit_into_half_precision_is_said_so(config, bases, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(bases["sd1"])
    with torch.no_grad():
        pipeline.text_encoder.final_layer_norm.bias.fill_(1e5)
    pipeline.save_pretrained(tmp_path / "large")
    large = config(cache=tmp_path / "cache", model=tmp_path / "large")
    with pytest.raises(ValueError, match=r"prompt_embeds of prompts-00000\.safetensors.*--dtype=fp32"):
        made(large, dtype="fp16")
    assert not (tmp_path / "cache" / "cache.json").exists()


# what cannot be read


@pytest.mark.parametrize("flip", [False, True])
def test_what_cannot_be_read_counts_as_without_a_cache_and_is_not_tried_again(
    config, folder, tmp_path, monkeypatch, flip
):
    for i in (1, 2, 6):
        (folder / f"p{i}.png").write_bytes((folder / f"p{i}.png").read_bytes()[: 40 * i])
    data = {"path": folder, "random_flip": flip, "max_bad_share": 0.9}
    plain, cached = config(run="plain", **data), config(cache=tmp_path / "cache", run="cached", **data)
    made(cached, samples_per_shard=2)  # one shard holds nothing else
    Trainer(plain).run(progress=False)

    def decoded(shards, key):
        raise AssertionError(f"{key} was opened")

    monkeypatch.setattr(Shards, "image", decoded)
    Trainer(cached).run(progress=False)
    for name in ("bad_samples.jsonl", "metrics.jsonl"):
        texts = ((tmp_path / run / name).read_text() for run in ("plain", "cached"))
        before, after = ([json.loads(line) for line in text.splitlines()] for text in texts)
        for line in (*before, *after):
            line.pop("samples_per_second", None)
        assert before == after and before
    assert audit(plain) == audit(cached)
    table = pq.read_table(tmp_path / "cache" / "index.parquet").to_pylist()
    assert {row["key"] for row in table if row["bad"]} == {"p1", "p2", "p6"}
    assert all((row["row"] is None) == (row["bad"] is not None) for row in table)


def test_what_could_not_be_read_once_is_tried_again_and_nothing_else(config, folder, tmp_path, monkeypatch):
    settings = {"path": folder, "max_bad_share": 0.9}
    read = shards_module.read_bytes

    def ill(path, offset, size):
        if path.name == "p3.png":
            raise OSError(errno.EIO, "Input/output error")
        return read(path, offset, size)

    with monkeypatch.context() as disk:
        disk.setattr(shards_module, "read_bytes", ill)
        out = made(config(cache=tmp_path / "cache", **settings), samples_per_shard=2)
    assert json.loads((out / "cache.json").read_text())["counts"]["bad"] == 1
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    made(config(cache=out, **settings), samples_per_shard=2)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert [name for name in before if before[name] != after[name]] == ["pictures-00001.safetensors"]
    assert contents(out) == contents(made(config(cache=tmp_path / "well", **settings), samples_per_shard=2))


def test_more_bad_samples_than_allowed_end_it_with_their_names(config, folder, tmp_path):
    (folder / "p3.png").write_text("no picture")
    cached = config(cache=tmp_path / "cache", path=folder, max_bad_share=0.1)
    with pytest.raises(ShardError) as caught:
        made(cached)
    first, named = str(caught.value).splitlines()
    assert first.startswith("1 samples could not be read") and "'p3'" in named
    assert refusal(cached) == [
        f"data.cache: {tmp_path}/cache is not complete: run memfilter cache with the settings of this run"
    ]
    cached.data.max_bad_share = 0.2
    made(cached)
    Trainer(cached)


# what is stored


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_files_hold_diffusers_own_encodings_where_the_index_says(config, folder, bases, tmp_path, family):
    out = made(config(family, tmp_path / "cache", path=folder, random_flip=True), samples_per_shard=3)
    pipeline = DiffusionPipeline.from_pretrained(bases[family])
    table = pq.read_table(out / "index.parquet").to_pylist()
    assert [(row["key"], row["flip"]) for row in table] == [(f"p{i}", flip) for i in range(7) for flip in (False, True)]
    for row in table:
        picture = Image.open(folder / f"{row['key']}.png")
        pixels, corner = to_pixels(picture, 16, flip=row["flip"])
        found = load_file(out / f"pictures-{row['shard']:05d}.safetensors")
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels[None]).latent_dist
        expected = torch.stack([posterior.mean[0], posterior.std[0]])
        torch.testing.assert_close(found["posterior"][row["row"]], expected, rtol=1e-4, atol=1e-5)
        assert found["time_ids"][row["row"]].tolist() == [picture.height, picture.width, *corner, 16, 16]
        if not row["caption"]:
            assert row["prompt_shard"] is row["prompt_row"] is None
            continue
        found = load_file(out / f"prompts-{row['prompt_shard']:05d}.safetensors")
        with torch.no_grad():
            embeds, _, *pooled = pipeline.encode_prompt(
                row["caption"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        assert found.keys() == {"prompt_embeds"} | ({"pooled_prompt_embeds"} if family == "sdxl" else set())
        torch.testing.assert_close(found["prompt_embeds"][row["prompt_row"]], embeds[0], rtol=1e-4, atol=1e-5)
        if pooled:
            pooled = pooled[0][0]
            torch.testing.assert_close(found["pooled_prompt_embeds"][row["prompt_row"]], pooled, rtol=1e-4, atol=1e-5)
    assert sum(len(load_file(path)["posterior"]) for path in out.glob("pictures-*")) == 14
    assert sum(len(load_file(path)["prompt_embeds"]) for path in out.glob("prompts-*")) == 4  # one is said three times


def test_caption_that_was_changed_since_is_encoded(config, folder, tmp_path):
    cached = config(cache=tmp_path / "cache", path=folder)
    made(cached)
    (folder / "p0.txt").write_text("something else")
    trainer = Trainer(cached)
    text = runs_of(trainer.pipeline.text_encoder)
    found = encodings(trainer)
    assert len(text) > 0
    for a, b in zip(encodings(Trainer(config(path=folder))), found, strict=True):
        assert all(map(torch.equal, a, b))


def test_a_row_is_read_without_its_shard(tmp_path):
    rows = 4000
    tensors = {"posterior": torch.arange(rows).float()[:, None, None, None, None].repeat(1, 2, 4, 16, 16)}
    save_file(tensors | {"time_ids": torch.zeros(rows, 6)}, tmp_path / "pictures-00000.safetensors")
    size = (tmp_path / "pictures-00000.safetensors").stat().st_size
    table = {name: [None] * rows for name in module.SCHEMA.names}
    table |= {"key": [f"k{i}" for i in range(rows)], "flip": [False] * rows}
    table |= {"shard": [0] * rows, "row": list(range(rows))}
    pq.write_table(pa.table(table, module.SCHEMA), tmp_path / "index.parquet")
    pictures = Cache(tmp_path).pictures
    for row in (3999, 0, 1234):
        posterior, time_ids = pictures[f"k{row}", None, False]
        assert posterior.shape == (2, 4, 16, 16) and (posterior == row).all() and not time_ids.any()
    maps = open("/proc/self/smaps").read()
    (held,) = re.findall(rf"{re.escape(str(tmp_path))}/pictures-00000\.safetensors\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    assert size > 32e6 and int(held) * 1024 < size / 8


# how it is written


def test_files_do_not_depend_on_threads_workers_or_place(config, folder, tmp_path):
    first = contents(made(config("sdxl", tmp_path / "a", path=folder, random_flip=True), samples_per_shard=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = config("sdxl", tmp_path / "b", path=folder, random_flip=True, workers=2)
        assert contents(made(other, samples_per_shard=2)) == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_picture_of_several_samples_is_encoded_once(config, bases, tmp_path):
    data = write_clouds(tmp_path / "data", range(9))
    plan = Plan(duplicates=2, repeats=3, distinct=5, variant="other_captions")
    prepare_experiment(data, tmp_path / "out", plan, processes=1)
    index = str(tmp_path / "out" / MANIFEST)
    plain, cached = (config(run=run, cache=cache, path=data, index=index, random_flip=True, resolution=16)
                     for run, cache in (("plain", None), ("cached", tmp_path / "cache")))  # fmt: skip
    made(cached, samples_per_shard=4)
    stored = [load_file(path)["posterior"] for path in sorted((tmp_path / "cache").glob("pictures-*.safetensors"))]
    assert [len(part) for part in stored] == [8, 6]  # of 2 and 5 pictures, plain and mirrored; of 6 and 5 samples
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["counts"]["samples"] == 11
    for expected, found in zip(encodings(Trainer(plain)), encodings(Trainer(cached)), strict=True):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("processes", "rank"), [(2, 1), (3, 2), (5, 4), (40, 39)])
def test_process_writes_every_nth_shard_and_no_other(config, folder, bases, tmp_path, processes, rank):
    whole = contents(made(config(cache=tmp_path / "whole", path=folder), samples_per_shard=1))
    one = config(cache=tmp_path / "one", path=folder)
    shards = Shards.open(folder)
    views = making._Views(shards, Experiment.of_shards(shards), None, View(16))
    encoder = Encoder(load_pipeline(str(bases["sd1"])), "cpu", memory=0, rows=BATCH)
    facts = json.loads(whole["cache.json"])["fingerprint"]
    rounds, names = [], sorted(name for name in whole if name.endswith("safetensors"))
    place = {"num_processes": processes, "process_index": rank, "is_main_process": False}
    launch = SimpleNamespace(**place, wait_for_everyone=lambda: rounds.append(len(list(tmp_path.glob("one/*")))))
    (tmp_path / "one").mkdir()  # as the main process does
    making._Writer(one, encoder, views, facts, "fp32", 1).run(launch, progress=False)
    mine = names[rank::processes]
    assert contents(tmp_path / "one") == {name: whole[name] for name in mine}
    turns = -(-len(names) // processes)  # nobody is further ahead than by a shard
    assert rounds == [min(turn + 1, len(mine)) for turn in range(turns)] + rounds[-1:]


def test_whatever_is_missing_is_written_again_and_nothing_else(config, folder, tmp_path):
    cached = config(cache=tmp_path / "cache", path=folder)
    whole = contents(out := made(cached, samples_per_shard=2))
    order = [*sorted(name for name in whole if name.endswith("safetensors")), "index.parquet", "cache.json"]
    assert set(order) == whole.keys() and len(order) == 8
    for there in range(len(order) + 1):  # as a job leaves it that is killed before it writes the next
        shutil.rmtree(out)
        out.mkdir()
        for name in order[:there]:
            (out / name).write_bytes(whole[name])
        if there < len(order):
            (out / f".{order[there]}.partial").write_bytes(whole[order[there]][:100])
            (out / ".tmpAb3dEf").write_bytes(whole[order[there]][:100])  # where safetensors writes
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        made(cached, samples_per_shard=2)
        assert contents(out) == whole
        assert before == {name: (out / name).stat().st_mtime_ns for name in before}


def test_shards_that_were_cut_or_lost_later_are_refused_and_written_again(config, folder, tmp_path):
    cached = config(cache=tmp_path / "cache", path=folder)
    whole = contents(out := made(cached, samples_per_shard=2))
    (out / "pictures-00001.safetensors").write_bytes(whole["pictures-00001.safetensors"][:-4])
    (out / "prompts-00000.safetensors").unlink()
    assert refusal(cached) == [
        f"data.cache: {out} is not complete: {name} is missing or cut; run memfilter cache again"
        for name in ("pictures-00001.safetensors", "prompts-00000.safetensors")
    ]
    made(cached, samples_per_shard=2)
    assert contents(out) == whole
    (out / "cache.json").write_text("[]")
    (line,) = refusal(cached)
    assert re.fullmatch(rf"data\.cache: {out} cannot be read \(.*\): remove it and run memfilter cache", line)


def test_others_may_read_what_they_may_list(config, folder, tmp_path):
    out = made(config(cache=tmp_path / "cache", path=folder))
    assert {path.stat().st_mode & 0o777 for path in out.glob("*.safetensors")} == {out.stat().st_mode & 0o666}


def test_one_call_at_a_time_is_at_work(config, folder, tmp_path):
    settings = config(cache=tmp_path / "cache", path=folder)
    before = contents(made(settings))
    (tmp_path / "cache" / ".pictures.1-2.partial").touch()  # which the other one may be writing
    hold = (f"import sys; from pathlib import Path; from memfilter.files import held\n"
            f"with held(Path({str(tmp_path / 'cache' / making.LOCK)!r})): print(flush=True); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another memfilter cache is at work in"):
            made(settings)
        assert (tmp_path / "cache" / ".pictures.1-2.partial").exists()
        other.stdin.close()
    assert contents(made(settings)) == before


def test_directory_with_other_things_is_left_alone(config, folder, tmp_path):
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"folder holds 'p0\.png'"):
        made(config(cache=folder, path=folder))
    assert contents(folder) == before


def test_what_was_begun_otherwise_is_refused_with_every_difference(config, folder, tmp_path):
    cached = config(cache=tmp_path / "cache", path=folder)
    before = contents(out := made(cached, samples_per_shard=2))
    (out / "cache.json").unlink()  # as if it had been killed
    with pytest.raises(ConfigError) as caught:
        made(config(cache=out, path=folder, batch_size=2, resolution=24), samples_per_shard=3, dtype="fp16")
    wrong = "data.resolution was 16, found 24", "dtype was fp32, found fp16", "samples_per_shard was 2, found 3"
    assert str(caught.value).splitlines() == [
        f"data.cache: {out} was begun otherwise: {what}; remove it or choose another directory"
        for what in (*wrong, "train.batch_size was 4, found 2")
    ]
    made(cached, samples_per_shard=2)
    assert contents(out) == before


# stale


def other_weights(base, part, out):
    """A copy of a pipeline in which one weight of one part is another."""
    shutil.copytree(base, out)
    (file,) = (out / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, file, {"format": "pt"})
    return out


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_other_model_is_refused(config, bases, scenes_dir, tmp_path, part):
    made(config("sdxl", tmp_path / "cache"))
    if part.startswith("tokenizer"):
        shutil.copytree(bases["sdxl"], model := tmp_path / "model")
        file = model / part / "tokenizer.json"
        facts = json.loads(file.read_text())
        facts["model"]["merges"] = facts["model"]["merges"][:-1]
        file.write_text(json.dumps(facts))
    else:
        model = other_weights(bases["sdxl"], part, tmp_path / "model")
    (line,) = refusal(config("sdxl", tmp_path / "cache", model=model))
    assert re.fullmatch(
        rf"data\.cache: {tmp_path}/cache was made from something else: {part} was \w{{12}}, found \w{{12}}; make "
        "another with memfilter cache, or go back to what it was made from", line,
    )  # fmt: skip


def test_use_of_a_pipeline_leaves_its_fingerprint_as_it_is(config, bases, folder):
    pipeline, shards = load_pipeline(str(bases["sdxl"])), Shards.open(folder)
    facts = config("sdxl", path=folder), pipeline, shards, Experiment.of_shards(shards), 16
    before = module.fingerprint(*facts)
    Encoder(pipeline, "cpu").prompts(["a cat", "a dog on red"])
    pipeline("a dog", num_inference_steps=1, output_type="latent")
    assert module.fingerprint(*facts) == before and len(before) == 11


def test_other_denoiser_is_not_refused(config, bases, tmp_path):
    made(config(cache=tmp_path / "cache"))
    Trainer(config(cache=tmp_path / "cache", model=other_weights(bases["sd1"], "unet", tmp_path / "model")))


def test_settings_that_encodings_do_not_depend_on_are_not_refused(config, tmp_path):
    cached = config(cache=tmp_path / "cache")
    made(cached, dtype="fp16")
    cached.train = dataclasses.replace(cached.train, batch_size=2, seed=7, snr_gamma=5.0)
    cached.data = dataclasses.replace(cached.data, caption_dropout=0.3, cache_gb=0.0, workers=1)
    cached.checkpoint = CheckpointConfig(every=20)
    Trainer(cached)


def test_other_data_are_refused(config, scenes_dir, tmp_path):
    cached = config(cache=tmp_path / "cache")
    made(cached)
    plan = {"seed": 5, "duplicates": 4, "repeats": 20, "distinct": 100}
    for change, wrong in (({}, []), ({"seed": 6}, ["pictures"]), ({"repeats": 21}, ["samples"]),
                          ({"distinct": 101}, ["samples", "pictures"])):  # fmt: skip
        name = "-".join(change) or "same"
        other = config(cache=tmp_path / "cache", path=prepare_scenes(tmp_path / name, **plan | change))
        if not wrong:
            Trainer(other)  # the same in another place
            continue
        assert [re.search(r"else: (\w+) was", line)[1] for line in refusal(other)] == wrong


def test_manifest_tells_pictures_by_what_they_hash_to(config, folder, tmp_path):
    def manifest(name: str) -> str:
        rows = []
        for path in sorted(folder.glob("*.png")):
            content, caption = path.read_bytes(), path.with_suffix(".txt").read_text()
            digest = hashlib.sha256(content).digest()
            rows.append((path.stem, path.name, 0, len(content), digest, caption, 2, "duplicate"))
        columns = dict(zip(SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
        write_manifest(tmp_path / name, pa.table(columns, SCHEMA), {})
        return str(tmp_path / name)

    plain = config(path=folder, index=manifest("before.parquet"))
    cached = config(cache=tmp_path / "cache", path=folder, index=plain.data.index)
    made(cached)
    for a, b in zip(encodings(Trainer(plain)), encodings(Trainer(cached)), strict=True):
        assert all(map(torch.equal, a, b))
    content = bytearray((folder / "p3.png").read_bytes())
    content[-1] ^= 1
    (folder / "p3.png").write_bytes(content)
    (line,) = refusal(config(cache=tmp_path / "cache", path=folder, index=manifest("after.parquet")))
    assert "else: samples was" in line


@pytest.mark.parametrize("indexed", [False, True])
def test_another_saved_dataset_of_as_many_rows_is_refused(config, folder, tmp_path, indexed):
    def saved(name: str, first: str) -> Config:
        paths = sorted(folder.glob("*.png"), key=lambda path: (path.name != first, path.name))
        rows = Dataset.from_dict({"image": list(map(str, paths)), "text": ["a poster"] * 7}).cast_column("image", Picture())
        rows.save_to_disk(tmp_path / name)
        return config(cache=tmp_path / "cache", path=tmp_path / name, index=index)

    index = None
    if indexed:
        columns = {"key": [f"{row:09d}" for row in range(7)], "role": ["distinct"] * 7, "repeats": [2] * 7}
        pq.write_table(pa.table(columns), index := str(tmp_path / "index.parquet"))
    made(saved("a", "p0.png"))
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    Trainer(config(cache=tmp_path / "cache", path=tmp_path / "moved", index=index))
    (line,) = refusal(saved("b", "p6.png"))
    assert "else: samples was" in line


def test_every_difference_is_named_at_once(config, bases, tmp_path):
    made(config(cache=tmp_path / "cache"))
    model = other_weights(bases["sd1"], "vae", tmp_path / "model")
    lines = refusal(config(cache=tmp_path / "cache", model=model, resolution=24, random_flip=True))
    names = [re.search(r"else: ([\w.]+) was", line)[1] for line in lines]
    assert names == ["vae", "data.resolution", "data.random_flip"]
    assert "data.resolution was 16, found 24;" in lines[1]


def test_cache_of_another_format_is_refused(config, tmp_path, monkeypatch):
    cached = config(cache=tmp_path / "cache")
    made(cached)
    monkeypatch.setattr(module, "FORMAT", 2)
    assert ["format was 1, found 2" in line for line in refusal(cached)] == [True]


def test_cache_that_is_not_there_is_refused(config, tmp_path):
    assert refusal(config(cache=tmp_path / "cache")) == [
        f"data.cache: {tmp_path}/cache does not exist: run memfilter cache with the settings of this run"
    ]


def test_random_crop_is_refused(config, tmp_path):
    cropped = config(cache=tmp_path / "cache", random_crop=True)
    for attempt in (made, Trainer):
        with pytest.raises(ConfigError, match="data.random_crop=true and data.cache exclude each other"):
            attempt(cropped)
    assert not (tmp_path / "cache").exists()


# the command


def test_command_takes_the_settings_of_training(config, bases, folder, tmp_path, capsys):
    expected = contents(made(config(cache=tmp_path / "expected", path=folder), samples_per_shard=3, dtype="fp16"))
    (tmp_path / "run.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {bases['sd1']}}}\ndata: {{path: {folder}, cache: elsewhere}}\n"
        f"filter: {{tau: 2}}\ntrain: {{batch_size: {BATCH}}}\n"
    )
    arguments = ["--config", str(tmp_path / "run.yaml"), f"--data.cache={tmp_path / 'cache'}", "--dtype=fp16"]
    assert command(["cache", *arguments, "--samples_per_shard", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache")
    assert contents(tmp_path / "cache") == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["data.cache must say where the cache is to be"]),
        (["--data.cache=x", "--dtype=int8"], ["argument --dtype: invalid choice: 'int8'"]),
        (["--data.cache=x", "--samples_per_shard=0"], ["samples_per_shard must be above 0, found 0"]),
        (["--data.cashe=x", "--data.workers=-1"], ["data.cashe is no setting", "data.workers must be at least 0"]),
        (["--data.cache=x", "--data.path=nowhere"], ["nothing to read: nowhere does not exist"]),
    ],
)
def test_command_says_what_is_wrong(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert command(["cache", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == len(expected) and all(f"error: {e}" in line for e, line in zip(expected, errors, strict=True))
    assert not list(tmp_path.iterdir())
