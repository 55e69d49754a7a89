"""A tiny CLIP from configuration; its score redone with numpy from what transformers' own forward gives."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from memfilter.eval.clip import Clip
from memfilter.pipelines import model_dir

TEXTS = ["a cat", "a dog on a red background", "", "many " * 100, "<b>bold</b>"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """32 px, 12 dimensions."""
    out = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(model_dir("scenes") / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    config = CLIPConfig(
        text_config=layers | special | length,
        vision_config=layers | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(out)
    return out


def test_score_is_a_hundred_times_the_cosine_and_never_negative(directory):
    clip = Clip(str(directory))
    pictures = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)  # of the model's own size
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = ((pictures / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    expected = []
    for picture, text in zip(pixels, TEXTS, strict=True):
        ids = clip.tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = clip.model(input_ids=ids, pixel_values=torch.from_numpy(picture[None]).float())
        a, b = out.image_embeds[0].numpy(), out.text_embeds[0].numpy()
        expected.append(100 * max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0))
    assert clip.score(pictures, TEXTS) == pytest.approx(expected, abs=1e-3)
    assert min(expected) == 0 < max(expected)


def test_features_do_not_depend_on_the_batch(directory):
    clip = Clip(str(directory))
    pictures = np.random.default_rng(1).integers(0, 256, (5, 50, 40, 3), dtype=np.uint8)
    assert clip.image_features(pictures, 2) == pytest.approx(clip.image_features(pictures), abs=1e-5)
    assert clip.text_features(TEXTS, 1) == pytest.approx(clip.text_features(TEXTS), abs=1e-5)
    assert clip.image_features(pictures).shape == clip.text_features(TEXTS).shape == (5, 12)


def test_pickled_weights_other_models_and_nothing_are_refused_in_one_line(directory, tmp_path):
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    for source, message in ((tmp_path, "safetensors"), (model_dir("scenes") / "vae", "cannot be loaded as a CLIP"),
                            (tmp_path / "absent", "is no directory, nor does it look like a hub id")):  # fmt: skip
        with pytest.raises(ValueError, match=message) as raised:
            Clip(str(source))
        assert "\n" not in str(raised.value)
