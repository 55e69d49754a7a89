import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memfilter.data.encode import Encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz,0123456789"
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
CAPTIONS = ["a cat", "", "a dog on red", "a cat", "poster no 7"]
KEYS = ["k0", "k1", "k2", "k3"]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
    )
    text = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(VOCABULARY) - 2,
        eos_token_id=len(VOCABULARY) - 1,
        pad_token_id=len(VOCABULARY) - 1,
    )
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(VOCABULARY)}, merges=[], model_max_length=12)
    return vae, CLIPTextModel(text), tokenizer


@pytest.fixture
def encoder(parts):
    """Factory: an encoder, and lists that grow by the batch size of every run of the VAE and of the text encoder."""
    hooks = []

    def make(**settings):
        vae, text_encoder, tokenizer = parts
        encoder, runs = Encoder(vae, text_encoder, tokenizer, "cpu", **settings), ([], [])
        hooks.append(vae.encoder.register_forward_hook(lambda m, args, out: runs[0].append(len(out))))
        hooks.append(text_encoder.register_forward_hook(lambda m, args, out: runs[1].append(len(out[0]))))
        return encoder, *runs

    yield make
    for hook in hooks:
        hook.remove()


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def fresh_latents(parts, pixels, draw=None):
    """diffusers' own posterior, picture by picture."""
    posteriors = [parts[0].encode(p[None]).latent_dist for p in pixels]
    if draw is None:
        return torch.cat([p.mode() for p in posteriors]) * 0.3
    return torch.cat([p.mean + p.logvar.div(2).exp() * d for p, d in zip(posteriors, draw, strict=True)]) * 0.3


@torch.no_grad()
def fresh_prompt(parts, caption):
    """Token ids by hand, [1, L] -> [L, D]."""
    ids = [VOCABULARY.index("<|startoftext|>")]
    for word in caption.split():
        ids += [VOCABULARY.index(letter) for letter in word[:-1]] + [VOCABULARY.index(word[-1] + "</w>")]
    ids = (ids[:11] + [VOCABULARY.index("<|endoftext|>")] * 12)[:12]
    return parts[1](torch.tensor([ids])).last_hidden_state[0]


def test_latents_are_the_scaled_posterior(parts, encoder, pixels):
    draw = torch.randn(4, 4, 8, 8)
    torch.testing.assert_close(encoder()[0].latents(KEYS, pixels), fresh_latents(parts, pixels), rtol=1e-4, atol=1e-5)
    sampled = encoder()[0].latents(KEYS, pixels, draw)
    torch.testing.assert_close(sampled, fresh_latents(parts, pixels, draw), rtol=1e-4, atol=1e-5)
    assert sampled.dtype == torch.float32 and not sampled.requires_grad


def test_picture_seen_before_is_not_encoded_again_and_comes_out_the_same(parts, encoder, pixels):
    memory, vae_runs, _ = encoder()
    first = memory.latents(KEYS[:3], pixels[:3])
    memory.latents(KEYS[:3], pixels[:3]).zero_()  # what a caller does with the result is his own business
    assert vae_runs == [3]
    order = [2, 0, 3, 0]
    mixed = memory.latents([KEYS[i] for i in order], pixels[order])
    assert vae_runs == [3, 1]
    torch.testing.assert_close(mixed, fresh_latents(parts, pixels[order]), rtol=1e-4, atol=1e-5)
    assert torch.equal(mixed[[1, 0]], first[[0, 2]]) and torch.equal(mixed[1], mixed[3])


def test_posterior_is_remembered_not_one_sample_of_it(parts, encoder, pixels):
    memory, vae_runs, _ = encoder()
    draws = torch.randn(2, 4, 4, 8, 8)
    sampled = [memory.latents(KEYS, pixels, draw) for draw in draws]
    assert vae_runs == [4]
    for found, draw in zip(sampled, draws, strict=True):
        torch.testing.assert_close(found, fresh_latents(parts, pixels, draw), rtol=1e-4, atol=1e-5)


def test_key_that_stands_twice_in_a_batch_is_encoded_once(parts, encoder, pixels):
    memory, vae_runs, _ = encoder()
    order = [0, 1, 0, 0]
    latents = memory.latents([KEYS[i] for i in order], pixels[order])
    assert vae_runs == [2]
    torch.testing.assert_close(latents, fresh_latents(parts, pixels[order]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_beyond_its_limit_nothing_is_remembered_and_everything_is_right(parts, encoder, pixels, limit):
    latents = fresh_latents(parts, pixels)
    embeds = torch.stack([fresh_prompt(parts, caption) for caption in "abcd"])
    memory, vae_runs, text_runs = encoder(memory=limit)
    for _ in range(3):
        torch.testing.assert_close(memory.latents(KEYS, pixels), latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(memory.prompts(list("abcd")), embeds, rtol=1e-4, atol=1e-5)
    assert vae_runs == text_runs == [4, 4 - limit, 4 - limit]


def test_prompts_are_the_last_hidden_state_of_each_caption(parts, encoder):
    embeds = encoder()[0].prompts(CAPTIONS)
    expected = torch.stack([fresh_prompt(parts, caption) for caption in CAPTIONS])
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)
    assert embeds.shape == (5, 12, 16) and not embeds.requires_grad


def test_caption_that_is_too_long_is_cut(parts, encoder):
    caption = "abcdefghijklmnopqrst uvw"
    torch.testing.assert_close(encoder()[0].prompts([caption])[0], fresh_prompt(parts, caption), rtol=1e-4, atol=1e-5)


def test_caption_seen_before_is_not_encoded_again(encoder):
    memory, _, text_runs = encoder()
    first = memory.prompts(CAPTIONS)
    assert text_runs == [4]  # "a cat" stands twice
    assert torch.equal(memory.prompts(CAPTIONS[::-1]), first.flip(0))
    assert text_runs == [4]
    memory.prompts(["a cat", "new"])
    assert text_runs == [4, 1]


def test_encoders_are_frozen_and_in_eval_mode(parts):
    vae, text_encoder, tokenizer = parts
    vae.train(), text_encoder.train()
    Encoder(vae, text_encoder, tokenizer, "cpu")
    assert not vae.training and not text_encoder.training
    assert not any(p.requires_grad for part in (vae, text_encoder) for p in part.parameters())


def test_half_precision_encoder_gives_single_precision_latents(parts, encoder, pixels):
    vae = parts[0]
    expected = fresh_latents(parts, pixels)
    try:
        latents = Encoder(vae.to(torch.bfloat16), *parts[1:], "cpu").latents(KEYS, pixels)
    finally:
        vae.to(torch.float32)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0.1, atol=0.02)


def test_only_what_is_worth_remembering_takes_a_place_in_memory(encoder, pixels):
    memory, vae_runs, text_runs = encoder()
    memory.latents(KEYS, pixels, remember=[True, False, False, True])
    memory.latents(KEYS, pixels, remember=[False] * 4)
    assert vae_runs == [4, 2]
    memory.prompts(["ab", "ba"], remember=[False, True])
    memory.prompts(["ab", "ba"])
    assert text_runs == [2, 1]
