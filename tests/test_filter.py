import copy
import json
import math
import re

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from memfilter import MemFilter
from memfilter.filter import EmptySteps, NonFiniteNorm
from memfilter.stats import FilterStats

NULL = torch.linspace(-1, 1, 5 * 16).view(5, 16)
TINY_TAU = 1e-9  # only a sample whose prompt is the empty one, norm 0, is below it


def embeds(keep: str) -> torch.Tensor:
    """'10' is a sample whose norm is exactly 0 and one that a tiny tau drops."""
    drawn = torch.randn(len(keep), 5, 16)
    return torch.stack([NULL if k == "1" else e for k, e in zip(keep, drawn, strict=True)])


def forwards(module) -> list:
    """Grows by one entry, the batch size, for every forward of the module."""
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    return seen


def adamw(module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)


def snapshot(module, optimizer) -> list:
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [torch.as_tensor(v).clone() for v in [*module.state_dict().values(), *state]]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step(mem_filter, unet, optimizer, x, t, e, target, **facts) -> bool:
    mem_filter.batch(**facts)
    mem_filter.loss(unet(x, t, e).sample, target).backward()
    kept = mem_filter.before_step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return kept


def test_without_tau_there_is_one_forward_and_plain_mse(tiny_unet, tiny_batch):
    bare, (x, t, e, target) = tiny_unet(), tiny_batch()
    mem_filter = MemFilter(tau=None)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL)
    seen = forwards(unet.unet)
    loss = mem_filter.loss(unet(x, t, e).sample, target)
    assert seen == [4]
    metrics = mem_filter.metrics()
    assert [metrics[f"filter/{name}"] for name in ("seen", "checked", "dropped")] == [4, 0, 0]
    torch.testing.assert_close(loss, mse_loss(bare(x, t, e).sample, target), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [math.inf, 4.0])
def test_with_tau_there_are_two_forwards_in_training_and_one_in_validation(tiny_unet, tiny_batch, tau):
    x, t, e, _ = tiny_batch()
    mem_filter = MemFilter(tau=tau)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    seen = forwards(unet.unet)
    unet(x, t, e)
    assert seen == [4, 4]
    with torch.no_grad():
        unet(x, t, e)
    unet.eval()(x, t, e)
    assert seen == [4] * 4
    assert mem_filter.metrics()["filter/seen"] == 4


@pytest.mark.parametrize("reduction", ["kept", "batch"])
def test_loss_and_gradients_are_those_of_the_samples_below_tau(tiny_unet, tiny_batch, reduction):
    bare, (x, t, e, target) = tiny_unet(), tiny_batch(size=6)
    with torch.no_grad():
        norms = (bare(x, t, e).sample - bare(x, t, NULL.repeat(6, 1, 1)).sample).flatten(1).norm(dim=1)
    tau = norms.sort().values[2:4].mean().item()
    keep = norms < tau
    assert keep.sum() == 3

    mem_filter = MemFilter(tau=tau, reduction=reduction)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL)
    out = unet(x, t, e)
    assert out.keep.tolist() == keep.tolist()
    torch.testing.assert_close(out.text_norm, norms, rtol=1e-5, atol=0)
    loss = mem_filter.loss(out.sample, target)
    loss.backward()
    expected = mse_loss(bare(x[keep], t[keep], e[keep]).sample, target[keep]) * (0.5 if reduction == "batch" else 1)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for p, q in zip(unet.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16+checkpointing"])
def test_fifty_steps_that_only_measure_give_the_weights_of_no_filter_bit_for_bit(tiny_unet, tiny_batch, bf16):
    weights = []
    for tau in (None, math.inf):
        mem_filter = MemFilter(tau=tau)
        unet = mem_filter.wrap(tiny_unet(), null=NULL)
        seen = forwards(unet.unet)
        if bf16:
            unet.enable_gradient_checkpointing()
        optimizer = adamw(unet)
        for i in range(50):
            x, t, e, target = tiny_batch(i, size=2)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = mem_filter.loss(unet(x, t, e).sample, target)
            loss.backward()
            mem_filter.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        assert len(seen) == (50 if tau is None else 100)
        weights.append(snapshot(unet, optimizer))
    assert same(*weights)
    assert not torch.equal(weights[0][0], next(iter(tiny_unet().state_dict().values())))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tau", [4.0, math.inf])
@pytest.mark.parametrize("keys, named", [(["ant", "bee", "cat", "dog"], "(bee, dog)"), (None, "(row 1, row 3)")])
def test_non_finite_norm_names_exactly_the_bad_samples_before_the_step(tiny_unet, tiny_batch, tau, bad, keys, named):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=tau)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    step(mem_filter, unet, optimizer, x, t, embeds("1111"), target)
    before = snapshot(unet, optimizer)
    x[1, 0, 0, 0] = x[3, 2, 5, 5] = bad
    with pytest.raises(NonFiniteNorm, match=rf"2 of 4 samples.*{re.escape(named)}"):
        step(mem_filter, unet, optimizer, x, t, e, target, keys=keys)
    assert same(before, snapshot(unet, optimizer))


def test_loop_without_before_step_hears_of_a_non_finite_norm_at_the_next_training_forward(tiny_unet, tiny_batch):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=4.0)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    broken = x.clone()
    broken[2] = math.nan
    mem_filter.batch(keys=["ant", "bee", "cat", "dog"])
    mem_filter.loss(unet(broken, t, e).sample, target)
    unet.eval()(x, t, e)  # a validation in between reads nothing
    mem_filter.batch(keys=["elk", "fox", "gnu", "hen"])
    with pytest.raises(NonFiniteNorm, match=r"1 of 4 samples.*\(cat\)"):
        unet.train()(x, t, e)
    unet(x, t, e)  # said once
    assert mem_filter.before_step(adamw(unet))


def test_bad_micro_batch_is_named_before_the_step_that_accumulates_it(tiny_unet, tiny_batch):
    x, t, e, target = tiny_batch(size=2)
    mem_filter = MemFilter(tau=4.0)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.loss(unet(x, t, e).sample, target).backward()
    mem_filter.batch(keys=["ant", "bee"])
    mem_filter.loss(unet(x * torch.tensor([1, math.inf]).view(2, 1, 1, 1), t, e).sample, target).backward()
    with pytest.raises(NonFiniteNorm, match=r"1 of 2 samples.*\(bee\)"):
        mem_filter.before_step(adamw(unet))


@pytest.mark.parametrize("tau", [4.0, None])
def test_loss_without_a_training_forward_of_its_batch_raises(tiny_unet, tiny_batch, tau):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=tau)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    with pytest.raises(RuntimeError, match="call the wrapped denoiser first"):
        mem_filter.loss(x, target)
    with torch.no_grad():
        out = unet(x, t, e)
    with pytest.raises(RuntimeError, match="with gradients on"):
        mem_filter.loss(out.sample, target)
    unet(x, t, e)
    with pytest.raises(RuntimeError, match="same batch"):
        mem_filter.loss(x[:3], target[:3])


def test_step_that_keeps_nothing_leaves_weights_and_optimizer_state_alone(tiny_unet, tiny_batch):
    x, t, _, target = tiny_batch()
    mem_filter = MemFilter(tau=TINY_TAU)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    assert step(mem_filter, unet, optimizer, x, t, embeds("1010"), target)  # momentum that would move the weights
    before = snapshot(unet, optimizer)
    assert not step(mem_filter, unet, optimizer, x, t, embeds("0000"), target)
    assert same(before, snapshot(unet, optimizer))
    assert mem_filter.metrics()["filter/empty_steps"] == 1
    assert step(mem_filter, unet, optimizer, x, t, embeds("0001"), target)
    assert not same(before, snapshot(unet, optimizer))
    assert mem_filter.metrics()["filter/empty_steps"] == 1


def test_empty_steps_raise_when_so_many_come_in_a_row(tiny_unet, tiny_batch):
    x, t, _, target = tiny_batch(size=2)
    mem_filter = MemFilter(tau=TINY_TAU, max_empty_steps=3)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    for keep in ("00", "00", "10", "00", "00"):  # the kept one starts the count anew
        step(mem_filter, unet, optimizer, x, t, embeds(keep), target)
    with pytest.raises(EmptySteps, match="3 optimizer steps in a row.*tau=1e-09"):
        step(mem_filter, unet, optimizer, x, t, embeds("00"), target)
    assert mem_filter.metrics()["filter/empty_steps"] == 5


def test_empty_steps_by_a_rule_of_ones_own_are_told_too(tiny_unet, tiny_batch):
    mem_filter = MemFilter(threshold=lambda norm, timesteps: norm < 0, max_empty_steps=1)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    x, t, e, target = tiny_batch()
    mem_filter.loss(unet(x, t, e).sample, target).backward()
    with pytest.raises(EmptySteps, match="the threshold keeps nothing"):
        mem_filter.before_step(torch.optim.AdamW(unet.parameters()))


def test_count_of_empty_steps_survives_a_restart(tiny_unet, tiny_batch):
    x, t, _, target = tiny_batch(size=2)
    state = None
    for _ in range(2):
        mem_filter = MemFilter(tau=TINY_TAU, max_empty_steps=2)
        if state:
            mem_filter.load_state_dict(json.loads(state))
        unet = mem_filter.wrap(tiny_unet(), null=NULL)
        if state:
            with pytest.raises(EmptySteps):
                step(mem_filter, unet, adamw(unet), x, t, embeds("00"), target)
        else:
            step(mem_filter, unet, adamw(unet), x, t, embeds("00"), target)
        state = json.dumps(mem_filter.state_dict())
    totals = mem_filter.stats.totals()
    assert (totals["filter/seen"], totals["filter/dropped"], totals["filter/empty_steps"]) == (4, 4, 2)


def test_micro_batch_that_keeps_nothing_leaves_the_gradients_of_the_others(tiny_unet, tiny_batch):
    bare, (x, t, _, target) = tiny_unet(), tiny_batch()
    mem_filter = MemFilter(tau=TINY_TAU)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL)
    optimizer, oracle = adamw(unet), adamw(bare)
    for keep in ("1111", "0000"):
        mem_filter.loss(unet(x, t, embeds(keep)).sample, target).backward()
    assert mem_filter.before_step(optimizer)
    optimizer.step()
    mse_loss(bare(x, t, embeds("1111")).sample, target).backward()
    oracle.step()
    for p, q in zip(unet.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert mem_filter.stats.empty_steps == 0


def test_caption_dropped_samples_are_kept_and_unchecked(tiny_unet, tiny_batch):
    x, t, e, _ = tiny_batch()
    mem_filter = MemFilter(tau=TINY_TAU)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.batch(caption_dropped=[True, False, True, False])
    out = unet(x, t, e)
    assert out.keep.tolist() == [True, False, True, False]
    assert out.text_norm[[0, 2]].tolist() == [0, 0] and (out.text_norm[[1, 3]] > TINY_TAU).all()
    metrics = mem_filter.metrics()
    assert [metrics[f"filter/{name}"] for name in ("seen", "checked", "dropped")] == [4, 2, 2]


def test_without_tau_every_sample_is_kept_and_none_checked(tiny_unet, tiny_batch):
    x, t, e, _ = tiny_batch()
    x[1] = math.nan  # nobody looks at the norm
    mem_filter = MemFilter(tau=None)
    unet = mem_filter.wrap(tiny_unet(), null=NULL, scheduler=DDPMScheduler(prediction_type="v_prediction"))
    mem_filter.batch(keys=list("abcd"), caption_dropped=[True, False] * 2)
    out = unet(x, t, e)
    verdict = mem_filter.verdict
    assert out.keep.tolist() == verdict.keep.tolist() == [True] * 4
    assert verdict.checked.tolist() == [False] * 4 and verdict.text_norm.tolist() == [0] * 4
    assert verdict.keys == list("abcd") and torch.equal(verdict.timesteps, t)
    assert mem_filter.before_step(adamw(unet))
    assert mem_filter.histograms() == {}


@pytest.mark.parametrize("tau", [None, 1e9])
def test_excluded_samples_teach_what_a_batch_without_them_teaches(tiny_unet, tiny_batch, tau):
    bare, (x, t, e, target) = tiny_unet(), tiny_batch(size=5)
    mem_filter = MemFilter(tau=tau)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL)
    mem_filter.batch(excluded=[False, True, False, False, True])
    out = unet(x, t, e)
    assert out.keep.tolist() == [True, False, True, True, False]
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan])
    loss = mem_filter.loss(out.sample, target, weight)
    loss.backward()
    rows = [0, 2, 3]
    errors = (bare(x[rows], t[rows], e[rows]).sample - target[rows]).square().flatten(1).mean(1)
    expected = (errors * weight[rows]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for p, q in zip(unet.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
    metrics = mem_filter.metrics()
    found = [metrics[f"filter/{name}"] for name in ("seen", "checked", "dropped", "excluded")]
    assert found == [5, 0 if tau is None else 3, 0, 2]


def test_excluded_samples_are_unchecked_whatever_else_is_known_of_them(tiny_unet, tiny_batch):
    x, t, e, _ = tiny_batch()
    x[[0, 1]] = math.nan
    mem_filter = MemFilter(tau=TINY_TAU)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.batch(excluded=[True, True, False, False], caption_dropped=[True, False, True, False],
                     duplicate=[True] * 4)  # fmt: skip
    out = unet(x, t, e)
    assert out.keep.tolist() == [False, False, True, False]
    assert mem_filter.verdict.checked.tolist() == [False, False, False, True]
    assert out.text_norm[:3].tolist() == [0, 0, 0] and out.text_norm[3] > TINY_TAU
    mem_filter.before_step(adamw(unet))  # their norm is nobody's business
    metrics = mem_filter.metrics()
    assert [metrics[f"filter/{name}"] for name in ("checked", "dropped", "excluded")] == [1, 1, 2]
    assert metrics["filter/drop_rate_duplicates"] == 1
    assert sum(mem_filter.histograms()["filter/norm_histogram_duplicates"]) == 1


def test_step_whose_only_samples_are_excluded_changes_nothing_without_tau(tiny_unet, tiny_batch):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=None)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    assert step(mem_filter, unet, optimizer, x, t, e, target, excluded=[True, False, True, True])
    before = snapshot(unet, optimizer)
    assert not step(mem_filter, unet, optimizer, x, t, e, target, excluded=[True] * 4)
    assert same(before, snapshot(unet, optimizer))
    assert mem_filter.stats.empty_steps == 1
    assert step(mem_filter, unet, optimizer, x, t, e, target)
    assert not same(before, snapshot(unet, optimizer))


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("tau", [None, 4.0])
@pytest.mark.parametrize("facts", [False, True], ids=["alone", "facts"])
def test_host_reads_nothing_before_the_step(tiny_unet, tiny_batch, tau, facts):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=tau)
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    unet = mem_filter.wrap(tiny_unet(), null=NULL, scheduler=scheduler)
    with HostReads() as reads:
        if facts:
            mem_filter.batch(keys=list("abcd"), excluded=[True, False, False, False], duplicate=[True, False] * 2,
                             caption_dropped=[False, False, True, False])  # fmt: skip
        loss = mem_filter.loss(unet(x, t, e).sample, target, torch.ones(4))
        loss.backward()
    assert reads.count == 0
    with reads:
        mem_filter.before_step(adamw(unet))
    assert reads.count > 0  # the counter does count


def test_facts_hold_for_the_next_training_forward_and_no_longer(tiny_unet, tiny_batch):
    x, t, e, _ = tiny_batch()
    mem_filter = MemFilter(tau=TINY_TAU)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.batch(keys=list("abcd"), duplicate=[True] * 4, caption_dropped=[True] * 4)
    with torch.no_grad():
        unet(x, t, e)
    unet.eval()(x, t, e)
    assert unet.train()(x, t, e).keep.all()
    assert mem_filter.verdict.keys == list("abcd")
    assert not unet(x, t, e).keep.any()
    assert mem_filter.verdict.keys is None
    assert "filter/drop_rate_duplicates" not in mem_filter.metrics()


@pytest.mark.parametrize("name", ["duplicate", "caption_dropped", "excluded", "keys"])
@pytest.mark.parametrize("length", [3, 5])
def test_facts_of_another_length_are_refused_by_name(tiny_unet, tiny_batch, name, length):
    x, t, e, _ = tiny_batch()
    mem_filter = MemFilter(tau=4.0)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.batch(**{name: [True] * length})
    with pytest.raises(ValueError, match=f"{name}.*4 samples"):
        unet(x, t, e)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_scheduler_brings_the_norm_into_noise_space(tiny_unet, tiny_batch, prediction_type):
    bare, (x, _, e, _) = tiny_unet(), tiny_batch()
    t = torch.tensor([0, 300, 700, 999])
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
    factor = {"epsilon": torch.ones(4), "v_prediction": a.sqrt(), "sample": (a / (1 - a)).sqrt()}[prediction_type]
    out = MemFilter(tau=4.0).wrap(copy.deepcopy(bare), null=NULL, scheduler=scheduler)(x, t, e)
    difference = (bare(x, t, e).sample - bare(x, t, NULL.repeat(4, 1, 1)).sample).detach().double()
    torch.testing.assert_close(out.text_norm.double(), difference.flatten(1).norm(dim=1) * factor, rtol=1e-3, atol=0)


def test_prediction_type_that_is_set_after_wrapping_counts_too(tiny_unet, tiny_batch):
    """As diffusers' own scripts set it, in the loop."""
    x, _, e, _ = tiny_batch()
    t, found = torch.tensor([10, 500, 900, 990]), {}
    for when in ("before", "after"):
        scheduler = DDPMScheduler(prediction_type="v_prediction" if when == "before" else "epsilon")
        mem_filter = MemFilter(tau=4.0)
        unet = mem_filter.wrap(tiny_unet(), null=NULL, scheduler=scheduler)
        scheduler.register_to_config(prediction_type="v_prediction")
        found[when] = unet(x, t, e).text_norm
    assert torch.equal(found["after"], found["before"])


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 1), (1,), ()])
def test_weights_and_targets_that_would_be_spread_are_refused(tiny_unet, tiny_batch, shape):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=4.0)
    pred = mem_filter.wrap(tiny_unet(), null=NULL)(x, t, e).sample
    with pytest.raises(ValueError, match="weight must have one factor for each of the 4 samples"):
        mem_filter.loss(pred, target, torch.ones(shape))
    with pytest.raises(ValueError, match="pred and target must have one shape"):
        mem_filter.loss(pred, target[:1])
    assert mem_filter.loss(pred, target, torch.ones(4)).isfinite()


def test_timestep_that_says_nothing_about_the_noise_is_unchecked(tiny_unet, tiny_batch):
    x, _, e, _ = tiny_batch()
    mem_filter = MemFilter(tau=TINY_TAU)
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    out = mem_filter.wrap(tiny_unet(), null=NULL, scheduler=scheduler)(x, torch.tensor([999, 998, 0, 999]), e)
    assert out.keep.tolist() == [True, False, False, True]
    assert mem_filter.verdict.checked.tolist() == [False, True, True, False]


def test_scheduler_that_cannot_convert_is_refused_before_training(tiny_unet):
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        MemFilter(tau=4.0).wrap(tiny_unet(), null=NULL, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    "settings, named",
    [({"tau": 0}, "tau"), ({"tau": math.nan}, "tau"), ({"tau": 1, "reduction": "sum"}, "reduction"),
     ({"tau": 1, "unit": "l1"}, "unit"), ({"tau": 1, "max_empty_steps": 0}, "max_empty_steps")],
)  # fmt: skip
def test_setting_out_of_range_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=f"filter.{named}"):
        MemFilter(**settings)


def test_stats_of_ones_own_are_used():
    stats = FilterStats(bins=4)
    assert MemFilter(tau=4.0, stats=stats).stats is stats


@pytest.fixture
def make_accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def make(**settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_plug_in_under_accelerate_trains_as_a_loop_written_by_hand(
    tiny_unet, tiny_batch, make_accelerator, mixed_precision
):
    bare, batches = tiny_unet(), [tiny_batch(i, size=6) for i in range(4)]
    by_hand, tau = adamw(bare), 0.0
    rows = []  # the oracle leaves rows out by hand, two separate calls of the bare unet
    start = copy.deepcopy(bare)
    for x, t, e, target in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16",
                                                 cache_enabled=False):  # fmt: skip
                null = bare(x, t, NULL.repeat(6, 1, 1)).sample.float()
            pred = bare(x, t, e).sample.float()
        norms = (pred.detach() - null).flatten(1).norm(dim=1)
        tau = tau or norms.sort().values[2:4].mean().item()
        assert (norms / tau - 1).abs().min() > 1e-3  # no verdict hangs on rounding
        rows.append((norms < tau).tolist())
        mse_loss(pred[norms < tau], target[norms < tau]).backward()
        by_hand.step()
        by_hand.zero_grad()

    accelerator = make_accelerator(mixed_precision=mixed_precision)
    mem_filter = MemFilter(tau=tau)
    unet = mem_filter.wrap(start, null=NULL)
    unet, optimizer = accelerator.prepare(unet, adamw(unet))
    verdicts = []
    for x, t, e, target in batches:
        out = unet(x, t, e)
        loss = mem_filter.loss(out.sample, target)
        accelerator.backward(loss)
        mem_filter.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        verdicts.append(out.keep.tolist())
    assert verdicts == rows and 0 < sum(map(sum, rows)) < 24
    metrics = mem_filter.metrics(accelerator)
    assert metrics["filter/dropped"] == 24 - sum(map(sum, rows))
    for p, q in zip(accelerator.unwrap_model(unet).parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_before_step_in_every_micro_batch_acts_only_where_accelerate_steps(tiny_unet, tiny_batch, make_accelerator):
    # the usual shape of diffusers scripts: everything stands inside accelerator.accumulate
    x, t, _, target = tiny_batch()
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    mem_filter = MemFilter(tau=TINY_TAU)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    unet, optimizer = accelerator.prepare(unet, adamw(unet))
    before = snapshot(unet, optimizer)
    for keep in ("1111", "0000"):
        with accelerator.accumulate(unet):
            accelerator.backward(mem_filter.loss(unet(x, t, embeds(keep)).sample, target))
            mem_filter.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert not same(before, snapshot(unet, optimizer))
    assert mem_filter.stats.empty_steps == 0


def test_step_that_keeps_nothing_is_left_out_in_fp16_which_would_fail_at_it(tiny_unet, tiny_batch):
    x, t, _, target = tiny_batch()
    mem_filter, scaler = MemFilter(tau=TINY_TAU), torch.amp.GradScaler("cpu")
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    before = snapshot(unet, optimizer)
    for keep in ("0000", "1010"):
        scaler.scale(mem_filter.loss(unet(x, t, embeds(keep)).sample, target)).backward()
        if mem_filter.before_step(optimizer):
            scaler.step(optimizer)
            scaler.update()
        else:
            (other := torch.amp.GradScaler("cpu")).scale(torch.ones(1))
            with pytest.raises(AssertionError, match="No inf checks"):
                other.step(optimizer)
            assert same(before, snapshot(unet, optimizer))
    assert not same(before, snapshot(unet, optimizer))


def test_several_optimizers_of_a_step_are_told_at_once(tiny_unet, tiny_batch):
    x, t, _, target = tiny_batch()
    stepped = {}
    for several in (False, True):
        mem_filter = MemFilter(tau=TINY_TAU, reduction="kept_global")
        unet = mem_filter.wrap(tiny_unet(), null=NULL)
        first, *rest = unet.parameters()
        optimizers = [torch.optim.SGD(some, lr=1.0) for some in ([[first], rest] if several else [[first, *rest]])]
        for keep in ("0000", "0110"):
            mem_filter.loss(unet(x, t, embeds(keep)).sample, target).backward()
            assert mem_filter.before_step(*optimizers) == (keep != "0000")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="all optimizers of a step at once"):
            mem_filter.before_step(optimizers[-1])
        stepped[several] = [parameter.detach().clone() for parameter in unet.parameters()]
    assert all(map(torch.equal, *stepped.values()))


def test_verdict_serves_one_loss_so_that_a_forgotten_train_call_is_noticed(tiny_unet, tiny_batch):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=4.0)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.loss(unet(x, t, e).sample, target)
    unchecked = unet.eval()(x, t, e).sample
    with pytest.raises(RuntimeError, match="in train mode"):
        mem_filter.loss(unchecked, target)


@pytest.mark.parametrize("tau", [None, math.inf])
def test_before_step_leaves_the_gradients_of_a_loss_that_is_the_callers_own(tiny_unet, tiny_batch, tau):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(tau=tau)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    mse_loss(unet(x, t, e).sample, target).backward()
    assert mem_filter.before_step(optimizer)
    assert all(p.grad is not None for p in unet.parameters())


def test_facts_of_a_forward_that_failed_do_not_reach_the_next_one(tiny_unet, tiny_batch):
    mem_filter, (latents, timesteps, embeds, _) = MemFilter(4.0), tiny_batch()
    unet = mem_filter.wrap(tiny_unet(), null=torch.zeros(5, 16))
    broken = latents.clone()
    broken[1] = float("nan")
    unet(broken, timesteps, embeds)
    mem_filter.batch(keys=["a", "b", "c", "d"], excluded=[True] * 4)
    with pytest.raises(NonFiniteNorm):
        unet(latents, timesteps, embeds)
    unet(latents, timesteps, embeds)
    assert mem_filter.verdict.keys is None
    assert mem_filter.verdict.checked.all()


def test_not_a_number_is_noticed_where_the_caption_was_dropped_too(tiny_unet, tiny_batch):
    mem_filter, (latents, timesteps, embeds, target) = MemFilter(4.0), tiny_batch()
    unet = mem_filter.wrap(tiny_unet(), null=torch.zeros(5, 16))
    latents[2] = float("nan")
    mem_filter.batch(keys=["a", "b", "c", "d"], caption_dropped=[False, False, True, False])
    mem_filter.loss(unet(latents, timesteps, embeds).sample, target).backward()
    with pytest.raises(NonFiniteNorm, match=r"1 of 4 samples is not finite \(c\)"):
        mem_filter.before_step(torch.optim.SGD(unet.parameters(), lr=1.0))


def test_steps_of_excluded_samples_alone_do_not_blame_tau(tiny_unet, tiny_batch):
    mem_filter, (latents, timesteps, embeds, target) = MemFilter(None, max_empty_steps=1), tiny_batch()
    unet = mem_filter.wrap(tiny_unet(), null=torch.zeros(5, 16))
    mem_filter.batch(excluded=[True] * 4)
    mem_filter.loss(unet(latents, timesteps, embeds).sample, target).backward()
    with pytest.raises(EmptySteps, match="all of them were excluded"):
        mem_filter.before_step(torch.optim.SGD(unet.parameters(), lr=1.0))


def test_filter_that_is_off_and_was_not_asked_lets_the_step_happen(tiny_unet):
    mem_filter = MemFilter(None)
    unet = mem_filter.wrap(tiny_unet(), null=torch.zeros(5, 16))
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    next(unet.parameters()).grad = torch.ones_like(next(unet.parameters()))
    assert mem_filter.before_step(optimizer)
    assert next(unet.parameters()).grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forward_and_loss_never_wait_for_the_device(tiny_unet, tiny_batch):
    latents, timesteps, embeds, target = (tensor.cuda() for tensor in tiny_batch())
    mem_filter = MemFilter(4.0)
    unet = mem_filter.wrap(tiny_unet().cuda(), null=torch.zeros(5, 16, device="cuda"))
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
    try:
        for step in range(3):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one moves the counters
            mem_filter.batch(duplicate=[True, False, True, False], excluded=[False] * 4)
            mem_filter.loss(unet(latents, timesteps, embeds).sample, target).backward()
            mem_filter.before_step(optimizer)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
