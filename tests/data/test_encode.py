import random

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from memfilter.data.encode import Encoder
from memfilter.data.experiment import Experiment
from memfilter.data.sampler import SampleDataset, SampleStream, View, collate
from memfilter.data.shards import Shards
from memfilter.pipelines import load_pipeline

CAPTIONS = ["a cat", "", "a dog on red", "a cat", "poster no 7"]
LONG = "a very long caption about everything " * 20
PICTURE_BYTES = (2 * 4 * 8 * 8 + 6) * 4  # posterior and time_ids in fp32
PROMPT_BYTES = 32 * 16 * 4  # of SD 1.x


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Factory: the pipeline of a family, the same one every time."""
    root, loaded = tmp_path_factory.mktemp("pipelines"), {}

    def load(family: str):
        if family not in loaded:
            loaded[family] = load_pipeline(str(tiny.save_pipeline(root / family, family)))
        return loaded[family]

    return load


@pytest.fixture
def encoder(pipelines):
    """Factory: an encoder, and lists that grow by how many new ones every run of VAE and text encoder is for."""
    hooks = []

    def note(runs: list[int]):
        return lambda module, args: runs.append(without_filling(args[0]))

    def make(family: str = "sd1", **settings):
        pipeline = pipelines(family)
        encoder, runs = Encoder(pipeline, "cpu", **settings), ([], [])
        for part, numbers in zip((pipeline.vae.encoder, pipeline.text_encoder), runs, strict=True):
            hooks.append(part.register_forward_pre_hook(note(numbers)))
        return encoder, *runs

    yield make
    for hook in hooks:
        hook.remove()


def without_filling(rows: torch.Tensor) -> int:
    """How many rows there are up to the first of those at the end that are all the same."""
    return max((i for i, row in enumerate(rows) if not torch.equal(row, rows[-1])), default=-1) + 2


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch(pixels, views=None, sizes=None, corners=None) -> dict:
    """As the loader gives it."""
    count = len(pixels)
    return {
        "view": views or [(f"k{i}", None, False) for i in range(count)],
        "pixels": list(pixels),
        "original_size": sizes or [(16, 16)] * count,
        "crop_top_left": corners or [(0, 0)] * count,
    }


def take(full: dict, order: list[int]) -> dict:
    return {name: [values[i] for i in order] for name, values in full.items()}


def latents_of(encoder, batch: dict, draw=None, **settings):
    draw = torch.zeros(len(batch["view"]), 4, 8, 8) if draw is None else draw
    return encoder.pictures(batch, draw, **settings)[0]


@torch.no_grad()
def fresh_latents(pipeline, pixels, draw=None):
    """diffusers' own posterior, picture by picture."""
    posteriors = [pipeline.vae.encode(p[None]).latent_dist for p in pixels]
    draw = torch.zeros(len(pixels), 4, 8, 8) if draw is None else draw
    sampled = [p.mean + p.logvar.div(2).exp() * d for p, d in zip(posteriors, draw, strict=True)]
    return torch.cat(sampled) * pipeline.vae.config.scaling_factor


@torch.no_grad()
def fresh_prompt(pipeline, caption):
    """Embeddings and, for SDXL, pooled ones, as the trainers in diffusers' examples make them: [L, D], [P]."""
    ids = pipeline.tokenizer(
        caption, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids  # fmt: skip
    if not hasattr(pipeline, "text_encoder_2"):
        return (pipeline.text_encoder(ids)[0][0],)
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    return torch.cat([output.hidden_states[-2] for output in outputs], -1)[0], outputs[1][0][0]


def encodings_of(encoder, batch: dict, captions: list[str], draw) -> list[torch.Tensor]:
    """Latents and what becomes of the captions, each [B, ...]."""
    latents, named = latents_of(encoder, batch, draw), encoder.prompts(captions)
    return [latents, named["encoder_hidden_states"], *named.get("added_cond_kwargs", {}).values()]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_latents_are_the_scaled_posterior(pipelines, encoder, pixels, family):
    draw = torch.randn(4, 4, 8, 8)
    memory = encoder(family)[0]
    close(latents_of(memory, batch(pixels)), fresh_latents(pipelines(family), pixels))
    sampled = latents_of(memory, batch(pixels), draw)
    close(sampled, fresh_latents(pipelines(family), pixels, draw))
    assert sampled.dtype == torch.float32 and not sampled.requires_grad


def test_time_ids_are_original_size_crop_and_target_size(encoder, pixels):
    sizes, corners = [(16, 24), (40, 30), (16, 16), (99, 33)], [(0, 4), (2, 0), (0, 0), (7, 0)]
    full = batch(pixels, sizes=sizes, corners=corners)
    memory = encoder("sdxl")[0]
    expected = [[*size, *corner, 16, 16] for size, corner in zip(sizes, corners, strict=True)]
    for order in ([0, 1, 2], [3, 1, 3, 0]):  # the second time partly from memory
        _, time_ids = memory.pictures(take(full, order), torch.zeros(len(order), 4, 8, 8))
        assert time_ids.tolist() == [expected[i] for i in order]


def test_picture_seen_before_is_not_encoded_again_and_comes_out_the_same(pipelines, encoder, pixels):
    memory, vae_runs, _ = encoder()
    full = batch(pixels)
    first = latents_of(memory, take(full, [0, 1, 2]))
    latents_of(memory, take(full, [0, 1, 2])).zero_()  # what a caller does with the result is his own business
    assert vae_runs == [3]
    order = [2, 0, 3, 0]
    for i in (2, 0):
        full["pixels"][i] = full["original_size"][i] = full["crop_top_left"][i] = None  # as the loader leaves it
    mixed = latents_of(memory, take(full, order))
    assert vae_runs == [3, 1]
    close(mixed, fresh_latents(pipelines("sd1"), pixels[order]))
    assert torch.equal(mixed[[1, 0]], first[[0, 2]]) and torch.equal(mixed[1], mixed[3])


def test_posterior_is_remembered_not_one_sample_of_it(pipelines, encoder, pixels):
    memory, vae_runs, _ = encoder()
    draws = torch.randn(2, 4, 4, 8, 8)
    sampled = [latents_of(memory, batch(pixels), draw) for draw in draws]
    assert vae_runs == [4]
    for found, draw in zip(sampled, draws, strict=True):
        close(found, fresh_latents(pipelines("sd1"), pixels, draw))


def test_view_that_stands_twice_in_a_batch_is_encoded_once(pipelines, encoder, pixels):
    memory, vae_runs, _ = encoder()
    order = [0, 1, 0, 0]
    draw = torch.randn(4, 4, 8, 8)
    latents = latents_of(memory, take(batch(pixels), order), draw)
    assert vae_runs == [2]
    close(latents, fresh_latents(pipelines("sd1"), pixels[order], draw))


def test_views_of_one_picture_are_encoded_apart(pipelines, encoder, pixels):
    expected, (memory, vae_runs, _) = fresh_latents(pipelines("sd1"), pixels), encoder()
    views = [("a", None, False), ("a", None, True), ("a", (0.0, 0.5), False), ("b", None, False)]
    for _ in range(2):
        close(latents_of(memory, batch(pixels, views)), expected)
    assert vae_runs == [4] and memory.remembered == set(views)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, [[0], [1], [2], [3]]), (3, [[0, 1, 2], [3, 3, 3]]), (4, [[0, 1, 2, 3]]), (6, [[0, 1, 2, 3, 3, 3]])],
)  # fmt: skip
def test_so_many_are_encoded_at_once_and_the_last_new_one_fills_up(pipelines, pixels, rows, expected):
    pipeline, captions = pipelines("sd1"), ["a", "b", "a cat", "a dog"]
    memory, inputs = Encoder(pipeline, "cpu", rows=rows), ([], [])
    hooks = [part.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
             for part, seen in zip((pipeline.vae.encoder, pipeline.text_encoder), inputs, strict=True)]  # fmt: skip
    try:
        latents = latents_of(memory, take(batch(pixels), [0, 0, 1, 2, 3, 1]))
        embeds = memory.prompts([captions[0], *captions, ""])["encoder_hidden_states"]
    finally:
        for hook in hooks:
            hook.remove()
    ids = pipeline.tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
    for seen, all_rows in zip(inputs, (pixels, ids), strict=True):
        assert len(seen) == len(expected)
        assert all(torch.equal(found, all_rows[order]) for found, order in zip(seen, expected, strict=True))
    close(latents, fresh_latents(pipeline, pixels[[0, 0, 1, 2, 3, 1]]))
    close(embeds, torch.stack([fresh_prompt(pipeline, caption)[0] for caption in (captions[0], *captions, "")]))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_encoding_depends_neither_on_what_else_is_in_its_batch_nor_on_what_is_remembered(encoder, family):
    count, rng = 12, random.Random(0)
    full = batch(torch.rand(count, 3, 16, 16) * 2 - 1)
    captions, draw = [f"poster no {i}" + " on red" * i for i in range(count)], torch.randn(count, 4, 8, 8)

    def encode(memory: Encoder, order: list[int]) -> list[torch.Tensor]:
        return encodings_of(memory, take(full, order), [captions[i] for i in order], draw[order])

    alone = [encode(encoder(family)[0], [i]) for i in range(count)]
    for before in range(count):
        memory = encoder(family, memory=rng.choice([0, 1 << 30]))[0]
        encode(memory, rng.sample(range(count), before) or [0])
        order = rng.choices(range(count), k=rng.randint(2, count))
        expected = [torch.cat(parts) for parts in zip(*(alone[i] for i in order), strict=True)]
        for found, part in zip(encode(memory, order), expected, strict=True):
            assert torch.equal(found, part), (before, order)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_beyond_so_many_bytes_nothing_is_remembered_and_everything_is_right(pipelines, encoder, pixels, limit):
    latents = fresh_latents(pipelines("sd1"), pixels)
    memory, vae_runs, _ = encoder(memory=(limit + 1) * PICTURE_BYTES - 1)
    for _ in range(3):
        close(latents_of(memory, batch(pixels)), latents)
    assert vae_runs == [4, 4 - limit, 4 - limit] and len(memory.remembered) == limit

    embeds = torch.stack([fresh_prompt(pipelines("sd1"), caption)[0] for caption in "abcd"])
    memory, _, text_runs = encoder(memory=limit * PROMPT_BYTES)
    for _ in range(3):
        close(memory.prompts(list("abcd"))["encoder_hidden_states"], embeds)
    assert text_runs == [4, 4 - limit, 4 - limit]


def test_memory_holds_no_more_bytes_than_it_is_given(encoder, pixels):
    budget = 2 * PICTURE_BYTES + 3 * PROMPT_BYTES
    memory = encoder(memory=budget)[0]
    memory.prompts(["a", "b", "c"])
    latents_of(memory, batch(pixels))
    captions = [parts for caption, parts in memory._prompts.items() if caption]  # the empty prompt is for free
    found = [part for parts in (*memory._pictures.values(), *captions) for part in parts]
    # a slice would keep the storage of its whole batch alive
    assert sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found}.values()) == budget


def test_pictures_and_prompts_share_the_bytes(encoder, pixels):
    memory, vae_runs, text_runs = encoder(memory=PICTURE_BYTES + PROMPT_BYTES)
    for _ in range(2):
        latents_of(memory, batch(pixels))  # one of four finds a place, and leaves enough for one prompt
        memory.prompts(["a", "b", "c"])
    assert vae_runs == [4, 3] and text_runs == [3, 2]


def test_only_what_is_worth_remembering_takes_a_place_in_memory(encoder, pixels):
    memory, vae_runs, text_runs = encoder()
    latents_of(memory, batch(pixels), remember=[True, False, False, True])
    latents_of(memory, batch(pixels), remember=[False] * 4)
    assert vae_runs == [4, 2]
    memory.prompts(["ab", "ba"], remember=[False, True])
    memory.prompts(["ab", "ba"])
    assert text_runs == [2, 1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompts_are_those_of_diffusers_trainers(pipelines, encoder, family):
    captions = ["a cat", "a dog on red", "a cat", LONG]  # what is too long is cut
    named = encoder(family)[0].prompts(captions)
    fresh = [fresh_prompt(pipelines(family), caption) for caption in captions]
    expected = [torch.stack(parts) for parts in zip(*fresh, strict=True)]
    close(named["encoder_hidden_states"], expected[0])
    if family == "sdxl":
        assert named["added_cond_kwargs"].keys() == {"text_embeds"}
        close(named["added_cond_kwargs"]["text_embeds"], expected[1])
    else:
        assert named.keys() == {"encoder_hidden_states"}
    assert not named["encoder_hidden_states"].requires_grad


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_denoiser_is_told_what_generation_will_tell_it(pipelines, encoder, family):
    pipeline, memory, calls = pipelines(family), encoder(family)[0], []
    hook = pipeline.unet.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    sizes = {"original_size": (24, 20), "crops_coords_top_left": (0, 3), "target_size": (16, 16)}
    try:
        pipeline("a dog on red", num_inference_steps=1, guidance_scale=3.0, output_type="latent",
                 **sizes if family == "sdxl" else {})  # fmt: skip
    finally:
        hook.remove()
    null, prompt = calls[0]["encoder_hidden_states"]
    _, time_ids = memory.pictures(batch(torch.zeros(1, 3, 16, 16), sizes=[(24, 20)], corners=[(0, 3)]),
                                  torch.zeros(1, 4, 8, 8))  # fmt: skip
    named = memory.prompts(["a dog on red"], time_ids=time_ids)
    close(named["encoder_hidden_states"][0], prompt)
    close(memory.null["encoder_hidden_states"][0], null)
    if family == "sdxl":
        generation, ours = calls[0]["added_cond_kwargs"], named["added_cond_kwargs"]
        null_pooled, pooled = generation["text_embeds"]
        close(ours["text_embeds"][0], pooled)
        assert torch.equal(ours["time_ids"][0], generation["time_ids"][1])
        close(memory.null["added_cond_kwargs"]["text_embeds"][0], null_pooled)
        assert memory.null["added_cond_kwargs"].keys() == {"text_embeds"}  # the sizes are those of the call


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_null_is_the_encoded_empty_prompt(pipelines, encoder, family):
    null = encoder(family)[0].null
    assert null.keys() == {"encoder_hidden_states"} and null["encoder_hidden_states"].shape == (1, 32, 16)
    close(null["encoder_hidden_states"][0], fresh_prompt(pipelines(family), "")[0])


def test_null_of_sdxl_is_zeros_where_its_configuration_says_so(tmp_path):
    pipeline = load_pipeline(str(tiny.save_pipeline(tmp_path / "xl", "sdxl")))
    shapes = (1, 32, 32), (1, 16)
    for zeros in (True, False):
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        null = Encoder(pipeline, "cpu").null
        parts = null["encoder_hidden_states"], null["added_cond_kwargs"]["text_embeds"]
        for part, fresh, shape in zip(parts, fresh_prompt(pipeline, ""), shapes, strict=True):
            assert part.shape == shape
            close(part[0], torch.zeros_like(fresh) if zeros else fresh)
            assert fresh.any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_empty_caption_is_the_null_and_needs_no_encoding_even_without_memory(encoder, family):
    memory, _, text_runs = encoder(family, memory=0)
    named = memory.prompts(CAPTIONS)
    assert text_runs == [3]  # "a cat" stands twice, and "" is known from the start
    assert torch.equal(named["encoder_hidden_states"][1], memory.null["encoder_hidden_states"][0])
    if family == "sdxl":
        null = memory.null["added_cond_kwargs"]["text_embeds"][0]
        assert torch.equal(named["added_cond_kwargs"]["text_embeds"][1], null)
    assert not torch.equal(named["encoder_hidden_states"][0], named["encoder_hidden_states"][1])
    memory.prompts(["", ""])
    assert text_runs == [3]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_caption_seen_before_is_not_encoded_again(encoder, family):
    memory, _, text_runs = encoder(family)

    def parts(captions):
        named = memory.prompts(captions)
        return [named["encoder_hidden_states"], *named.get("added_cond_kwargs", {}).values()]

    first = parts(CAPTIONS)
    assert text_runs == [3] and len(first) == (2 if family == "sdxl" else 1)
    for found, part in zip(parts(CAPTIONS[::-1]), first, strict=True):
        assert torch.equal(found, part.flip(0))
    assert text_runs == [3]
    for part in first:
        part.zero_()  # what a caller does with the result is his own business
    assert all(part.any() for part in parts(["a cat"]))
    parts(["a cat", "new"])
    assert text_runs == [3, 1]


def test_second_epoch_decodes_and_encodes_nothing(encoder, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(tmp_path / f"p{i}.png")
    shards, (memory, vae_runs, _) = Shards.open(tmp_path), encoder("sdxl")
    experiment = Experiment.of_shards(shards)
    stream = SampleStream(experiment.virtual(), seed=0)
    dataset = SampleDataset(shards, experiment, stream, View(16), 8, memory.remembered)
    epochs = []
    for start in (0, 4):
        samples = collate([dataset[position] for position in range(start, start + 4)])
        latents, time_ids = memory.pictures(samples, torch.zeros(4, 4, 8, 8), samples["repeats"])
        epochs.append(dict(zip(samples["key"], zip(latents, time_ids, strict=True), strict=True)))
        assert [part is None for part in samples["pixels"]] == [start == 4] * 4
    assert vae_runs == [4]
    for key, (latents, time_ids) in epochs[0].items():
        assert torch.equal(latents, epochs[1][key][0]) and torch.equal(time_ids, epochs[1][key][1])
        assert time_ids.tolist() == [16, 20, 0, 2, 16, 16]


def test_encoders_are_frozen_and_in_eval_mode_and_the_denoiser_is_left_alone(pipelines):
    pipeline = pipelines("sdxl")
    parts = [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    for part in (*parts, pipeline.unet):
        part.train().requires_grad_()
    Encoder(pipeline, "cpu")
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert pipeline.unet.training and all(p.requires_grad for p in pipeline.unet.parameters())


def test_half_precision_encoders_give_single_precision(pipelines, pixels, tmp_path):
    tiny.save_pipeline(tmp_path / "sd1", "sd1")
    half = Encoder(load_pipeline(str(tmp_path / "sd1"), torch.bfloat16), "cpu")
    latents, embeds = latents_of(half, batch(pixels)), half.prompts(["a cat"])["encoder_hidden_states"]
    assert half.vae.dtype == torch.bfloat16 and latents.dtype == embeds.dtype == torch.float32
    assert half.null["encoder_hidden_states"].dtype == torch.float32
    torch.testing.assert_close(latents, fresh_latents(pipelines("sd1"), pixels), rtol=0.1, atol=0.02)
    torch.testing.assert_close(embeds[0], fresh_prompt(pipelines("sd1"), "a cat")[0], rtol=0.1, atol=0.05)
