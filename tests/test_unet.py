import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import mse_loss

from memfilter.functional import text_norm
from memfilter.unet import FilteredUNet

NULL = torch.linspace(-1, 1, 5 * 16).view(5, 16)
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}


class Judge:
    """Keeps everything and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, cond, null, timesteps, rows):
        self.calls.append((cond, null, timesteps))
        norm = torch.zeros(len(cond)) if null is None else text_norm(cond, null)
        return norm, torch.ones(len(cond), dtype=torch.bool)


@pytest.fixture
def judge():
    return Judge()


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("return_dict", [True, False])
def test_forward_outside_training_is_that_of_the_bare_unet(tiny_unet, tiny_batch, judge, mode, active, return_dict):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    wrapped = FilteredUNet(copy.deepcopy(bare), NULL, judge, (lambda size: None) if active else (lambda size: []))
    for unet in (bare, wrapped):
        unet.train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        expected, out = (unet(x, t, e, return_dict=return_dict) for unet in (bare, wrapped))
    assert type(out) is type(expected) and len(out) == len(expected) == 1
    assert torch.equal(out[0], expected[0])
    assert not hasattr(out, "text_norm")
    assert judge.calls == []


@pytest.mark.parametrize("return_dict", [True, False])
def test_inactive_training_forward_runs_the_bare_unet_once_and_judges_without_null(
    tiny_unet, tiny_batch, judge, return_dict
):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    wrapped, seen = FilteredUNet(copy.deepcopy(bare), NULL, judge, lambda size: []), []
    wrapped.unet.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    out, expected = wrapped(x, t, e, return_dict=return_dict), bare(x, t, e).sample
    assert seen == [4] and torch.equal(out[0], expected)
    cond, null, timesteps = judge.calls[0]
    assert torch.equal(cond, expected) and null is None and torch.equal(timesteps, t)
    norm, keep = out[1:] if isinstance(out, tuple) else (out.text_norm, out.keep)
    assert norm.tolist() == [0] * 4 and keep.tolist() == [True] * 4


def test_checked_forward_gives_the_bare_sample_with_norm_and_verdict(tiny_unet, tiny_batch, judge):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    out = FilteredUNet(copy.deepcopy(bare), NULL, judge)(x, t, e)
    expected, null = bare(x, t, e).sample, bare(x, t, NULL.expand(4, -1, -1)).sample
    assert torch.equal(out.sample, expected) and out.sample.requires_grad
    oracle = (expected - null).double().flatten(1).pow(2).sum(1).sqrt()
    torch.testing.assert_close(out.text_norm.double(), oracle, rtol=1e-5, atol=0)
    assert not out.text_norm.requires_grad and out.keep.tolist() == [True] * 4
    cond, null_pred, timesteps = judge.calls[0]
    assert not cond.requires_grad and not null_pred.requires_grad and torch.equal(timesteps, t)


def test_tuple_starts_with_the_sample(tiny_unet, tiny_batch, judge):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    sample, norm, keep = FilteredUNet(copy.deepcopy(bare), NULL, judge)(x, t, e, return_dict=False)
    assert torch.equal(sample, bare(x, t, e, return_dict=False)[0])
    assert norm.shape == keep.shape == (4,) and keep.dtype == torch.bool


@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7])], ids=["int", "0-d", "1-d"])
def test_one_timestep_stands_for_the_whole_batch(tiny_unet, tiny_batch, judge, timestep):
    bare, (x, _, e, _) = tiny_unet(), tiny_batch()
    out = FilteredUNet(copy.deepcopy(bare), NULL, judge)(x, timestep, e)
    assert torch.equal(out.sample, bare(x, torch.full((4,), 7), e).sample)
    assert judge.calls[0][2].tolist() == [7] * 4


def test_everything_by_keyword_is_the_same_call(tiny_unet, tiny_batch, judge):
    x, t, e, _ = tiny_batch()
    wrapped = FilteredUNet(tiny_unet(), NULL, judge)
    by_keyword = wrapped(sample=x, timestep=t, encoder_hidden_states=e)
    assert torch.equal(by_keyword.sample, wrapped(x, t, e).sample)
    assert torch.equal(judge.calls[0][1], judge.calls[1][1])
    with pytest.raises(TypeError, match="by keyword"):
        wrapped(x, t, e, None)


@pytest.mark.parametrize("null", [NULL, NULL[None], {"encoder_hidden_states": NULL}], ids=["LD", "1LD", "mapping"])
def test_null_embedding_is_taken_in_every_form(tiny_unet, tiny_batch, judge, null):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    FilteredUNet(copy.deepcopy(bare), null, judge)(x, t, e)
    assert torch.equal(judge.calls[0][1], bare(x, t, NULL.repeat(4, 1, 1)).sample)


@pytest.mark.parametrize("rows", [1, None], ids=["1D", "D"])
def test_sdxl_null_pass_replaces_text_embeds_and_keeps_time_ids(tiny_unet, tiny_batch, judge, rows):
    bare, (x, t, e, _) = tiny_unet(**SDXL), tiny_batch()
    pooled, time_ids = torch.randn(4, 12), torch.randint(64, (4, 6)).float()
    null_pooled = torch.randn(12) if rows is None else torch.randn(rows, 12)
    null = {"encoder_hidden_states": NULL, "added_cond_kwargs": {"text_embeds": null_pooled}}
    given = {"text_embeds": pooled, "time_ids": time_ids}
    out = FilteredUNet(copy.deepcopy(bare), null, judge)(x, t, e, added_cond_kwargs=given)
    oracle = bare(x, t, NULL.repeat(4, 1, 1), added_cond_kwargs={
        "text_embeds": null_pooled.view(1, 12).repeat(4, 1), "time_ids": time_ids})  # fmt: skip
    assert torch.equal(judge.calls[0][1], oracle.sample)
    assert torch.equal(out.sample, bare(x, t, e, added_cond_kwargs=given).sample)
    assert given["text_embeds"] is pooled  # the caller's mapping is left alone


def test_null_pass_of_some_rows_is_theirs_of_the_whole_with_everything_that_sdxl_is_given(tiny_unet, tiny_batch):
    bare, (x, t, e, _), rows, judged = tiny_unet(**SDXL), tiny_batch(), [1, 3], []
    pooled, null_pooled, time_ids = torch.randn(4, 12), torch.randn(12), torch.randint(64, (4, 6)).float()
    null = {"encoder_hidden_states": NULL, "added_cond_kwargs": {"text_embeds": null_pooled}}

    def judge(cond, null, timesteps, rows):
        judged.append((null, rows))
        return torch.zeros(len(cond)), torch.ones(len(cond), dtype=torch.bool)

    given = {"text_embeds": pooled, "time_ids": time_ids}
    wrapped = FilteredUNet(copy.deepcopy(bare), null, judge, lambda size: rows)
    out = wrapped(x, t, e, added_cond_kwargs=given)
    whole = bare(x, t, NULL.repeat(4, 1, 1), added_cond_kwargs={
        "text_embeds": null_pooled.expand(4, -1), "time_ids": time_ids}).sample  # fmt: skip
    ((found, of),) = judged
    assert of == rows and found.shape == (2, 4, 8, 8)
    torch.testing.assert_close(found, whole[rows], rtol=1e-4, atol=1e-5)
    assert (whole[rows] - whole[[0, 2]]).abs().max() > 0.1  # another row's would not do
    assert torch.equal(out.sample, bare(x, t, e, added_cond_kwargs=given).sample)
    assert given["text_embeds"] is pooled and given["time_ids"] is time_ids


def test_null_is_no_parameter_moves_with_the_module_and_is_a_copy(tiny_unet, judge):
    null = NULL.clone().requires_grad_()
    bare = tiny_unet()
    wrapped = FilteredUNet(bare, null, judge)
    assert [p.shape for p in wrapped.parameters()] == [p.shape for p in bare.parameters()]
    assert [b.dtype for b in wrapped.to(torch.float64).buffers()] == [torch.float64]
    null.data.zero_()
    assert torch.equal(*wrapped.buffers(), NULL.double())


def test_attention_mask_of_the_prompt_is_not_that_of_the_empty_one(tiny_unet, tiny_batch, judge):
    x, t, e, _ = tiny_batch()
    bare, mask = tiny_unet(), torch.ones(e.shape[:2])
    mask[:, 2:] = 0
    FilteredUNet(bare, NULL, judge)(x, t, e, encoder_attention_mask=mask)
    cond, null = judge.calls[0][:2]
    assert torch.equal(null, bare(x, t, NULL.repeat(len(x), 1, 1)).sample)
    assert torch.equal(cond, bare(x, t, e, encoder_attention_mask=mask).sample) and not torch.equal(cond, bare(x, t, e).sample)
    own = torch.tensor([[1.0] + [0.0] * (NULL.shape[-2] - 1)])
    FilteredUNet(bare, {"encoder_hidden_states": NULL, "encoder_attention_mask": own}, judge)(x, t, e, encoder_attention_mask=mask)
    masked = bare(x, t, NULL.repeat(len(x), 1, 1), encoder_attention_mask=own.repeat(len(x), 1)).sample
    assert torch.equal(judge.calls[1][1], masked) and not torch.equal(masked, null)


def test_null_follows_the_type_of_the_call(tiny_unet, tiny_batch, judge):
    x, t, e, _ = tiny_batch()
    bare = tiny_unet().to(torch.bfloat16)
    FilteredUNet(bare, NULL, judge)(x.bfloat16(), t, e.bfloat16())
    assert torch.equal(judge.calls[0][1], bare(x.bfloat16(), t, NULL.bfloat16().repeat(4, 1, 1)).sample)


def test_state_dict_is_that_of_the_bare_unet_and_loads_both_ways(tiny_unet, judge):
    source, other = tiny_unet(1), tiny_unet(2)
    wrapped = FilteredUNet(copy.deepcopy(source), NULL, judge)
    state = wrapped.state_dict()
    assert list(state) == list(source.state_dict())
    other.load_state_dict(state, strict=True)
    assert_same_weights(other, source)

    wrapped = FilteredUNet(tiny_unet(3), NULL, judge)
    bare_state = source.state_dict()
    keys = list(bare_state)
    wrapped.load_state_dict(bare_state, strict=True)
    assert_same_weights(wrapped.unet, source)
    assert list(bare_state) == keys


def test_strict_loading_still_notices_what_is_missing_or_too_much(tiny_unet, judge):
    wrapped, state = FilteredUNet(tiny_unet(), NULL, judge), tiny_unet(1).state_dict()
    weight = state.pop("conv_in.weight")
    with pytest.raises(RuntimeError, match="Missing key.*conv_in.weight"):
        wrapped.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key.*stranger"):
        wrapped.load_state_dict(state | {"conv_in.weight": weight, "stranger": weight})


def test_state_dict_has_no_prefix_of_its_own_inside_a_parent(tiny_unet, judge):
    def parent(seed, wrap):
        unet = tiny_unet(seed)
        return torch.nn.ModuleDict(
            {"unet": FilteredUNet(unet, NULL, judge) if wrap else unet, "text_encoder": torch.nn.Linear(2, 2)}
        )

    bare, wrapped = parent(1, wrap=False), parent(2, wrap=True)
    assert set(wrapped.state_dict()) == set(bare.state_dict())
    wrapped.load_state_dict(bare.state_dict(), strict=True)
    assert_same_weights(wrapped["unet"].unet, bare["unet"])
    assert_same_weights(wrapped["text_encoder"], bare["text_encoder"])
    bare = parent(3, wrap=False)
    bare.load_state_dict(wrapped.state_dict(), strict=True)
    assert_same_weights(bare["unet"], wrapped["unet"].unet)


def test_attributes_of_the_unet_are_reached_through_the_wrapper(tiny_unet, judge):
    bare = tiny_unet()
    wrapped = FilteredUNet(bare, NULL, judge)
    assert wrapped.config is bare.config and wrapped.config.cross_attention_dim == 16
    assert not bare.is_gradient_checkpointing
    wrapped.enable_gradient_checkpointing()
    assert bare.is_gradient_checkpointing
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapped.nonsense


def test_save_pretrained_writes_what_diffusers_loads(tiny_unet, judge, tmp_path):
    bare = tiny_unet()
    FilteredUNet(bare, NULL, judge).save_pretrained(tmp_path)
    loaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(loaded, bare)


def test_a_copy_of_the_wrapper_works_on_its_own(tiny_unet, tiny_batch, judge):
    x, t, e, _ = tiny_batch()
    wrapped = FilteredUNet(tiny_unet(), NULL, judge)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        wrapped.unet.conv_out.weight.zero_()
    assert not torch.equal(twin(x, t, e).sample, wrapped(x, t, e).sample)


def test_extra_pass_draws_nothing_from_the_random_state(tiny_unet, tiny_batch, judge):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    states = []
    for unet in (bare, FilteredUNet(bare, NULL, judge)):
        torch.manual_seed(11)
        unet(x, t, e).sample.square().mean().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert len(judge.calls) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_those_of_the_bare_unet_bit_for_bit(tiny_unet, tiny_batch, judge, dtype, checkpointing):
    # bf16: in older torch, casts of the weights made without gradient stay in autocast's cache (pytorch#112583)
    bare, (x, t, e, target) = tiny_unet(), tiny_batch()
    wrapped = FilteredUNet(copy.deepcopy(bare), NULL, judge)
    for unet in (bare, wrapped):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = mse_loss(unet(x, t, e).sample.float(), target)
        loss.backward()
    assert len(judge.calls) == 1
    assert judge.calls[0][1].dtype == (dtype or torch.float32)  # the null pass runs in the same precision
    for (name, p), q in zip(bare.named_parameters(), wrapped.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name


def test_null_pass_stays_out_of_autocasts_weight_cache(tiny_unet, tiny_batch, judge):
    # newer torch mends this itself (pytorch#165068), so that there the gradients alone would not tell
    x, t, e, _ = tiny_batch()
    wrapped, cached = FilteredUNet(tiny_unet(), NULL, judge), []
    wrapped.unet.register_forward_pre_hook(lambda m, args: cached.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(x, t, e)
        assert torch.is_autocast_cache_enabled()
    assert cached == [False, True]


def test_no_activation_of_the_null_pass_is_kept_for_backward(tiny_unet, tiny_batch, judge):
    bare, (x, t, e, _) = tiny_unet(), tiny_batch()
    sizes = []
    for unet in (bare, FilteredUNet(bare, NULL, judge)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda s, saved=saved: saved.append(s.numel()) or s, lambda s: s):
            unet(x, t, e)
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1] > 0


def assert_same_weights(module, other):
    for (name, p), q in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
