import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from simulated import NAN, reference
from torch.nn.functional import mse_loss

from memfilter import MemFilter
from memfilter.agc import LossRule
from memfilter.evidence import Evidence, Weighing
from memfilter.filter import EmptySteps, NonFiniteNorm
from memfilter.keys import Census, Sightings, Step
from memfilter.reference import SIGNALS, Reference
from memfilter.threshold import TimestepThreshold

NULL = torch.linspace(-1, 1, 5 * 16).view(5, 16)
KEYS = ["ant", "bee", "cat", "dog", "elk", "fox"]
LOSS, NORM = SIGNALS.index("loss"), SIGNALS.index("norm")


def evidence_of(**settings) -> Evidence:
    """Of nobody yet, with a full reference; nobody is over the gate, and whoever is audited is looked at."""
    settings = {"gate": math.inf, "below": 1.0, "reference_share": 1.0, "window": 10**6, "table_size": 1024} | settings
    return Evidence(reference(), torch.full((4,), 0.3), settings.pop("flag_at", math.inf), **settings)


def let_see(evidence: Evidence, *due: str) -> None:
    """Of all keys these alone are to be audited, and so to be looked at."""
    evidence.audited[:] = evidence.clock
    evidence.audited[evidence.slots(due)] = evidence.clock - evidence.window


def flag(evidence: Evidence, *keys: str) -> None:
    evidence.flagged[evidence.slots(keys)] = True


def recorded(unet) -> list:
    """Grows by (latents, timesteps, embeddings, prediction) with every forward."""
    calls, forward = [], unet.forward

    def recording(sample, timestep, encoder_hidden_states, **kwargs):
        out = forward(sample, timestep, encoder_hidden_states, **kwargs)
        calls.append((sample, timestep, encoder_hidden_states, out[0].detach()))
        return out

    unet.forward = recording
    return calls


def adamw(module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)


def step(mem_filter, unet, optimizer, batch, keys=KEYS, **facts) -> bool:
    x, t, e, target = batch
    mem_filter.batch(keys=keys, **facts)
    mem_filter.loss(unet(x, t, e).sample, target).backward()
    kept = mem_filter.before_step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return kept


def signals_by_hand(cond, null, target, factor) -> np.ndarray:
    """[B, 4] in fp64, null predictions of all."""
    cond, null, target = (tensor.detach().double().numpy().reshape(len(tensor), -1) for tensor in (cond, null, target))
    found = {
        "norm": np.sqrt(((cond - null) ** 2).sum(1)) * factor,
        "loss": ((cond - target) ** 2).mean(1),
        "cosine": ((cond - null) * null).sum(1) / np.sqrt(((cond - null) ** 2).sum(1) * (null**2).sum(1)),
        "gain": np.log(((null - target) ** 2).mean(1) / ((cond - target) ** 2).mean(1)),
    }
    return np.stack([found[name] for name in SIGNALS], 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("seen", [[], [4], [1, 2, 5], list(range(6))], ids=str)
def test_signals_are_those_redone_from_both_predictions(tiny_unet, tiny_batch, prediction_type, seen):
    bare, batch = tiny_unet(), tiny_batch(size=6)
    x, t, e, target = batch
    evidence = evidence_of()
    let_see(evidence, *(KEYS[i] for i in seen))
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL, scheduler=DDPMScheduler(prediction_type=prediction_type))
    calls = recorded(unet.unet)
    step(mem_filter, unet, adamw(unet), batch)
    # the null pass is made of these rows and no others, and before the other
    assert [len(call[0]) for call in calls] == ([len(seen)] if seen else []) + [6]
    if seen:
        assert torch.equal(calls[0][0], x[seen]) and torch.equal(calls[0][1], t[seen])
        assert torch.equal(calls[0][2], NULL.expand(len(seen), -1, -1))
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].numpy()
    factor = {"epsilon": np.ones(6), "v_prediction": a**0.5, "sample": (a / (1 - a)) ** 0.5}[prediction_type]
    with torch.no_grad():
        null = bare(x, t, NULL.repeat(6, 1, 1)).sample
    expected = signals_by_hand(calls[-1][3], null, target, factor)
    unseen = [i for i in range(6) if i not in seen]
    expected[np.ix_(unseen, [s for s in range(4) if s != LOSS])] = NAN
    found = mem_filter.verdict.signals
    torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=2e-3, atol=1e-5, equal_nan=True)
    assert mem_filter.verdict.checked.nonzero().flatten().tolist() == seen
    assert mem_filter.verdict.text_norm[unseen].tolist() == [0] * len(unseen)


def test_timestep_that_says_nothing_about_the_noise_leaves_the_loss_alone(tiny_unet, tiny_batch):
    x, _, e, target = tiny_batch(size=6)
    evidence = evidence_of(gate=-math.inf)
    mem_filter = MemFilter(evidence=evidence)
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    unet = mem_filter.wrap(tiny_unet(), null=NULL, scheduler=scheduler)
    step(mem_filter, unet, adamw(unet), (x, torch.tensor([999, 3, 999, 998, 0, 999]), e, target))
    measured = ~mem_filter.verdict.signals.isnan()
    assert measured[:, LOSS].all()
    assert measured[:, NORM].tolist() == [False, True, False, True, True, False]


def test_evidence_that_goes_by_the_loss_alone_makes_no_null_pass(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf, weighing=Weighing({"loss": 1.0}))
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    calls = recorded(unet.unet)
    step(mem_filter, unet, adamw(unet), tiny_batch(size=6))
    assert [len(call[0]) for call in calls] == [6]
    assert (~mem_filter.verdict.signals.isnan()).all(0).tolist() == [s == LOSS for s in range(4)]
    assert not mem_filter.verdict.checked.any() and "filter/pass_share" not in mem_filter.metrics()


@pytest.mark.parametrize("unit", ["l2", "rms"])
def test_norm_that_is_evidence_has_the_unit_of_the_filter(tiny_unet, tiny_batch, unit):
    evidence = evidence_of()
    let_see(evidence, "bee")
    mem_filter = MemFilter(evidence=evidence, unit=unit)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    calls = recorded(unet.unet)
    step(mem_filter, unet, adamw(unet), tiny_batch(size=6))
    norm = (calls[1][3][1] - calls[0][3][0]).norm() / (16 if unit == "rms" else 1)  # root of 4 x 8 x 8
    assert mem_filter.verdict.signals[1, NORM].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("gate", [math.inf, 0.5, -math.inf])
def test_where_nobody_is_flagged_weights_are_those_of_no_filter_bit_for_bit(tiny_unet, tiny_batch, gate):
    weights, sizes = [], []
    for evidence in (None, evidence_of(gate=gate, window=8, reference_share=0.5)):
        mem_filter = MemFilter(evidence=evidence)
        unet = mem_filter.wrap(tiny_unet(), null=NULL)
        calls, optimizer = recorded(unet.unet), adamw(unet)
        torch.manual_seed(5)
        for i in range(6):
            keys = [f"{number % 5}" for number in range(3 * i, 3 * i + 3)]
            assert step(mem_filter, unet, optimizer, tiny_batch(i, 3), keys=keys)
        weights.append([*unet.state_dict().values(), torch.get_rng_state()])
        sizes.append([len(call[0]) for call in calls])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert sizes[0] == [3] * 6 and (sizes[1] == [3] * 12 if gate == -math.inf else min(sizes[1]) < 3)
    assert evidence.clock == 18


@pytest.mark.parametrize("t, tell", [(0, False), (699, True), (700, True), (999, False)])
def test_flagged_key_is_left_out_at_every_timestep(tiny_unet, tiny_batch, t, tell):
    bare, (x, _, e, target) = tiny_unet(), tiny_batch(size=6)
    timesteps = torch.full((6,), t)
    evidence = evidence_of(below=0.7)
    let_see(evidence)
    flag(evidence, "bee", "fox")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL)
    mem_filter.batch(keys=KEYS, **({"timesteps": timesteps} if tell else {}))
    out = unet(x, timesteps, e)
    assert out.keep.tolist() == [key not in ("bee", "fox") for key in KEYS]
    loss = mem_filter.loss(out.sample, target)
    loss.backward()
    rows = [0, 2, 3, 4]
    expected = mse_loss(bare(x[rows], timesteps[rows], e[rows]).sample, target[rows])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for p, q in zip(unet.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
    assert mem_filter.before_step(adamw(unet))
    metrics = mem_filter.metrics()
    assert (metrics["filter/dropped"], metrics["filter/checked"]) == (2, 0)
    assert metrics["filter/drop_rate"] == pytest.approx(2 / 6) and "filter/pass_share" not in metrics


def test_flagged_key_is_left_out_where_its_caption_was_dropped_too(tiny_unet, tiny_batch):
    bare, (x, t, e, target) = tiny_unet(), tiny_batch(size=6)
    evidence = evidence_of(gate=-math.inf, readmit_below=-9.0)
    flag(evidence, "bee", "fox")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(copy.deepcopy(bare), null=NULL)
    mem_filter.batch(keys=KEYS, caption_dropped=[key in ("bee", "cat") for key in KEYS])
    out = unet(x, t, e)
    loss = mem_filter.loss(out.sample, target)
    rows = [0, 2, 3, 4]  # cat among them, which nobody flagged
    assert out.keep.nonzero().flatten().tolist() == rows
    torch.testing.assert_close(loss, mse_loss(bare(x, t, e).sample[rows], target[rows]), rtol=1e-5, atol=0)
    loss.backward()
    assert mem_filter.before_step(adamw(unet))
    assert mem_filter.verdict.skipped == [None, "caption dropped", "caption dropped", None, None, None]
    assert not evidence.counts[evidence.slots(["bee", "cat"])].any()  # what was shown says nothing of them
    assert mem_filter.metrics()["filter/dropped"] == 2 and evidence.flagged.sum() == 2


def test_key_that_is_flagged_by_a_step_is_left_out_from_the_next_one_on(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf, flag_at=-math.inf, readmit_below=-math.inf)  # whoever comes is flagged
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    assert step(mem_filter, unet, optimizer, tiny_batch(0, 6))
    assert mem_filter.verdict.keep.all()
    keys = ["ant", "new", "cat", "dog", "elk", "fox"]
    assert step(mem_filter, unet, optimizer, tiny_batch(1, 6), keys=keys)
    assert mem_filter.verdict.keep.tolist() == [key == "new" for key in keys]
    metrics = mem_filter.metrics()
    assert metrics["filter/keys_flagged"] == metrics["filter/flags"] == 7 and metrics["filter/readmissions"] == 0


def test_samples_without_caption_and_excluded_ones_add_nothing_to_what_is_known(tiny_unet, tiny_batch):
    tables, batch = [], tiny_batch(size=6)
    for rows, facts in (
        (range(6), {"caption_dropped": [False, True, False, False, True, False],
                    "excluded": [False, False, True, False, True, False]}),
        ([0, 3, 5], {}),
    ):  # fmt: skip
        evidence = evidence_of(gate=-math.inf)
        mem_filter = MemFilter(evidence=evidence)
        unet = mem_filter.wrap(tiny_unet(), null=NULL)
        calls, rows = recorded(unet.unet), list(rows)
        step(mem_filter, unet, adamw(unet), [tensor[rows] for tensor in batch], [KEYS[i] for i in rows], **facts)
        assert [len(call[0]) for call in calls] == [3, len(rows)]  # no null pass for those either
        tables.append(evidence)
        if facts:
            verdict = mem_filter.verdict
            others = [None, "caption dropped", "excluded", None, "excluded", None]
            assert verdict.skipped == others
            assert verdict.keep.tolist() == [True, True, False, True, False, True]
            silent = torch.tensor([other is not None for other in others])
            assert verdict.evidence.isnan().tolist() == silent.tolist()
            assert verdict.signals[:, NORM].isnan().tolist() == silent.tolist()
            assert (evidence.audited[evidence.slots(["bee", "cat", "elk"])] < 0).all()
    for name in ("sums", "counts", "flagged"):
        torch.testing.assert_close(*(getattr(table, name) for table in tables), rtol=1e-3, atol=1e-4)
    assert torch.equal(tables[0].reference.added, tables[1].reference.added)
    torch.testing.assert_close(*(table.reference.values for table in tables), rtol=1e-3, atol=1e-5)
    assert [table.clock for table in tables] == [6, 3]


def test_null_pass_is_not_made_where_it_could_tell_nothing(tiny_unet, tiny_batch):
    x, _, e, target = tiny_batch(size=6)
    t = torch.tensor([0, 999, 699, 700, 5, 5])
    evidence = evidence_of(gate=0.5, below=0.7, readmit_below=-9.0)
    let_see(evidence, *KEYS[:5])
    flag(evidence, "elk")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    calls = recorded(unet.unet)
    step(mem_filter, unet, adamw(unet), (x, t, e, target), timesteps=t.tolist())
    assert calls[0][1].tolist() == [0, 699, 5]
    assert mem_filter.verdict.skipped == [None, "high noise", None, "high noise", None, "no evidence"]
    let_see(evidence)
    step(mem_filter, unet, adamw(unet), (x, t, e, target), timesteps=t)
    assert mem_filter.verdict.skipped == ["no evidence", "high noise", "no evidence", "high noise", "flagged",
                                          "no evidence"]  # fmt: skip
    assert len(calls) == 3


def test_samples_without_keys_are_refused_with_what_to_do(tiny_unet, tiny_batch):
    x, t, e, _ = tiny_batch()
    mem_filter = MemFilter(evidence=evidence_of())
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    with pytest.raises(ValueError, match=r"evidence.*MemFilter.batch\(keys=...\) before the forward"):
        unet(x, t, e)
    with pytest.raises(ValueError, match=r"MemFilter.batch\(keys=...\).*none are given"):
        mem_filter.batch(excluded=[False] * 4)
    mem_filter.batch(keys=KEYS[:4])
    unet(x, t, e)
    with pytest.raises(ValueError, match=r"MemFilter.batch\(keys=...\)"):  # they were for one forward
        unet(x, t, e)


@pytest.mark.parametrize("name", ["duplicate", "caption_dropped", "excluded", "keys", "shared_keys", "timesteps"])
@pytest.mark.parametrize("length", [1, 5])
def test_facts_of_another_length_are_refused_by_name(tiny_unet, tiny_batch, name, length):
    x, t, e, target = tiny_batch()
    mem_filter = MemFilter(evidence=evidence_of(gate=-math.inf))
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    with pytest.raises(ValueError, match=f"{name}"):
        mem_filter.batch(**{"keys": KEYS[:4]} | {name: [True] * length})
        mem_filter.loss(unet(x, t, e).sample, target)


@pytest.mark.parametrize("count, size", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_static_shapes_fill_the_null_pass_up_to_a_power_of_two_by_rows_that_count_for_nothing(
    tiny_unet, tiny_batch, count, size
):
    found = []
    for static_shapes in (False, True):
        evidence = evidence_of()
        let_see(evidence, *KEYS[6 - count :])
        mem_filter = MemFilter(evidence=evidence)
        unet = mem_filter.wrap(tiny_unet(), null=NULL, static_shapes=static_shapes)
        calls = recorded(unet.unet)
        step(mem_filter, unet, adamw(unet), tiny_batch(size=6))
        assert [len(call[0]) for call in calls] == [size if static_shapes else count, 6]
        found.append((mem_filter, evidence))
    (one, plain), (other, padded) = found
    torch.testing.assert_close(other.verdict.signals, one.verdict.signals, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert other.metrics()["filter/pass_share"] == one.metrics()["filter/pass_share"] == count / 6
    assert torch.equal(plain.reference.added, padded.reference.added)


def test_samples_that_were_passed_over_count_as_seen_and_dropped(tiny_unet, tiny_batch):
    x, _, e, target = tiny_batch()
    evidence = evidence_of()
    let_see(evidence, "cat")
    flag(evidence, "dog")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    mem_filter.passed_over(torch.tensor([50, 950, 999]), [True, True, False])
    mem_filter.passed_over(torch.tensor([450]))
    mem_filter.passed_over(torch.tensor([], dtype=torch.long), [])
    step(mem_filter, unet, adamw(unet), (x, torch.tensor([50, 450, 450, 950]), e, target), KEYS[:4])
    assert evidence.clock == 8
    metrics = mem_filter.metrics()
    wanted = {"seen": 8, "checked": 1, "dropped": 5, "excluded": 0, "drop_rate": 5 / 8, "pass_share": 1 / 8,
              "drop_rate_duplicates": 1.0, "drop_rate_distinct": 1.0, "seen/bin0": 2, "dropped/bin0": 1,
              "drop_rate/bin4": 1 / 3, "seen/bin9": 3, "drop_rate/bin9": 1.0,
              "norm": mem_filter.verdict.text_norm[2].item()}  # fmt: skip
    assert {name: metrics[f"filter/{name}"] for name in wanted} == pytest.approx(wanted)
    assert mem_filter.stats.totals()["filter/dropped"] == 5
    step(mem_filter, unet, adamw(unet), tiny_batch(1), KEYS[:4])
    assert evidence.clock == 12  # they were told of once


def test_p_value_and_evidence_are_on_the_verdict_once_the_step_is_due(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf)
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    for i in range(12):
        step(mem_filter, unet, optimizer, tiny_batch(i, 6))
    x, t, e, target = tiny_batch(20, 6)
    before = copy.deepcopy(evidence.reference)
    mem_filter.batch(keys=KEYS)
    out = unet(x, t, e)
    mem_filter.loss(out.sample, target).backward()
    verdict = mem_filter.verdict
    assert verdict.p_value is None and verdict.evidence is None
    mem_filter.before_step(optimizer)
    bins = (t // 100).tolist()
    held = [[v for v in before.values[NORM, b].tolist() if not math.isnan(v)] for b in bins]
    expected = [(1 + sum(v >= norm for v in some)) / (len(some) + 1)
                for some, norm in zip(held, out.text_norm.tolist(), strict=True)]  # fmt: skip
    assert verdict.p_value.tolist() == pytest.approx(expected)
    assert verdict.evidence.tolist() == evidence.evidence(evidence.slots(KEYS)).tolist()
    assert (verdict.evidence != 0).all()


def test_step_of_several_micro_batches_is_taken_in_as_one_in_the_order_of_the_stream(tiny_unet, tiny_batch):
    settings = {"gate": -math.inf, "window": 10}
    evidence, twin = evidence_of(**settings), evidence_of(**settings)
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer, order = adamw(unet), [["ant", "bee", "ant", "cat"], ["dog", "ant", "bee", "elk"]]
    for number in range(6):
        parts, verdicts = [], []
        for i, keys in enumerate(order):
            x, t, e, target = tiny_batch(2 * number + i)
            excluded = [i == 1 and number == 3, False, False, False]
            mem_filter.batch(keys=keys, excluded=excluded)
            mem_filter.loss(unet(x, t, e).sample, target).backward()
            verdicts.append(mem_filter.verdict)
            slots = torch.where(torch.tensor(excluded), -1, twin.slots(keys))
            parts.append((slots, t, twin.decide(twin.slots(keys)).audit))
        mem_filter.passed_over(torch.tensor([3, 4]))
        mem_filter.before_step(optimizer)
        optimizer.zero_grad()
        slots, timesteps, audit = (torch.cat(column) for column in zip(*parts, strict=True))
        p, found = twin.update(Step(slots, timesteps, torch.cat([v.signals for v in verdicts]), audit), 10)
        for name, values in (("p_value", p), ("evidence", found)):
            told = torch.cat([getattr(verdict, name) for verdict in verdicts])
            assert torch.equal(told.nan_to_num(-9), values.nan_to_num(-9))
    states = [table.state_dict() for table in (evidence, twin)]
    assert states[0].keys() == states[1].keys() and evidence.clock == 60
    for name, value in states[0].items():
        assert torch.equal(value.nan_to_num(-9), states[1][name].nan_to_num(-9)), name


def test_keys_may_share_their_evidence_under_another_name(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf)
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer, shared = adamw(unet), ["a", "a", "b", "b", "b", "c"]
    for i in range(4):
        step(mem_filter, unet, optimizer, tiny_batch(i, 6), shared_keys=shared)
    assert mem_filter.verdict.keys == KEYS  # for errors and audits
    assert evidence.counts[evidence.slots("abc")].sum(1)[:, LOSS].tolist() == [8, 12, 4]
    assert not evidence.counts[evidence.slots(KEYS)].any()
    told = mem_filter.verdict.evidence.tolist()
    assert told[0] == told[1] and told[2] == told[3] == told[4] and len(set(told)) > 1
    flag(evidence, "b")
    step(mem_filter, unet, optimizer, tiny_batch(4, 6), shared_keys=shared)
    assert mem_filter.verdict.keep.tolist() == [True, True, False, False, False, True]


def test_sightings_make_no_pass_and_drop_what_was_seen_so_often(tiny_unet, tiny_batch):
    mem_filter = MemFilter(evidence=Sightings(2, table_size=1024))
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    calls, optimizer = recorded(unet.unet), adamw(unet)
    kept = []
    for i, keys in enumerate([["a", "b", "c", "d"], ["a", "b", "x", "y"], ["a", "b", "c", "z"], ["a", "a", "c", "z"]]):
        step(mem_filter, unet, optimizer, tiny_batch(i), keys)
        kept.append(mem_filter.verdict.keep.tolist())
    assert kept == [[True] * 4, [True] * 4, [False, False, True, True], [False, False, False, True]]
    assert [len(call[0]) for call in calls] == [4] * 4
    metrics = mem_filter.metrics()
    assert metrics["filter/drop_rate"] == 5 / 16 and metrics["filter/checked"] == 0
    assert metrics["filter/keys_flagged"] == 4 and "filter/pass_share" not in metrics


def test_threshold_by_timestep_goes_by_a_reference_that_a_census_keeps(tiny_unet, tiny_batch):
    census = Census(Reference(19, bins=1), window=4, reference_share=1.0, table_size=1024)
    mem_filter = MemFilter(threshold=TimestepThreshold(census.reference, 0.2), evidence=census)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer, norms = adamw(unet), []
    for i in range(8):
        mem_filter.batch(keys=[f"{(4 * i + j) % 5}" for j in range(4)])
        x, t, e, target = tiny_batch(i)
        out = unet(x, t, e)
        held = torch.tensor(norms[-19:])
        p = [(1 + int((held >= norm).sum())) / (len(held) + 1) for norm in out.text_norm]
        assert out.keep.tolist() == [value > 0.2 for value in p]
        mem_filter.loss(out.sample, target).backward()
        mem_filter.before_step(optimizer)
        assert mem_filter.verdict.p_value.tolist() == pytest.approx(p)
        norms += out.text_norm.tolist()  # each key comes once in five, and so is audited every time
    assert mem_filter.metrics()["filter/dropped"] > 0


def test_tau_and_another_threshold_exclude_each_other():
    with pytest.raises(ValueError, match="filter.tau=4.0 and a threshold exclude each other"):
        MemFilter(4.0, threshold=TimestepThreshold(Reference(64), 0.02))


@pytest.mark.parametrize("rule", [Sightings(100), LossRule()], ids=lambda rule: type(rule).__name__)
def test_tau_beside_a_rule_that_makes_no_pass_is_refused(rule):
    with pytest.raises(ValueError, match=f"{type(rule).__name__} makes no null pass"):
        MemFilter(1e-9, evidence=rule)


class Elsewhere(torch.Tensor):
    """Names its device, as what stands on another one does."""

    def __repr__(self, **_):
        return f"tensor({self.item()}, device='cuda:1')"

    __str__ = __repr__
    __format__ = lambda self, _: repr(self)  # noqa: E731


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, lambda keys: torch.tensor(keys).as_subclass(Elsewhere)])
def test_numbers_are_one_key_however_they_come(tiny_unet, tiny_batch, kind):
    evidence = evidence_of()
    flag(evidence, "17")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    step(mem_filter, unet, adamw(unet), tiny_batch(), kind([3, 17, 5, 17]), caption_dropped=torch.tensor([False] * 4))
    assert mem_filter.verdict.keep.tolist() == [True, False, True, False]


def test_tau_and_evidence_both_drop(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf)
    flag(evidence, "bee")
    mem_filter = MemFilter(1e-9, evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    x, t, e, target = tiny_batch()
    e[[0, 1]] = NULL  # their norm is 0
    step(mem_filter, unet, adamw(unet), (x, t, e, target), KEYS[:4])
    assert mem_filter.verdict.keep.tolist() == [True, False, False, False]


def test_step_whose_samples_are_all_flagged_changes_nothing_and_is_blamed_on_the_flags(tiny_unet, tiny_batch):
    evidence = evidence_of()
    let_see(evidence)
    mem_filter = MemFilter(evidence=evidence, max_empty_steps=2)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    assert step(mem_filter, unet, optimizer, tiny_batch(0, 6))
    before = [p.clone() for p in unet.parameters()]
    evidence.readmit_below = -9.0
    flag(evidence, *KEYS)
    assert not step(mem_filter, unet, optimizer, tiny_batch(1, 6))
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), before, strict=True))
    with pytest.raises(EmptySteps, match="2 optimizer steps in a row kept no sample: all.*flagged"):
        step(mem_filter, unet, optimizer, tiny_batch(2, 6))
    assert evidence.counts.sum(1)[evidence.slots(KEYS), LOSS].tolist() == [3] * 6  # the dropped speak too


def test_broken_sample_is_named_and_the_step_after_it_is_taken_in(tiny_unet, tiny_batch):
    evidence = evidence_of()
    let_see(evidence, "bee", "dog")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = adamw(unet)
    x, t, e, target = tiny_batch(size=6)
    broken = x.clone()
    broken[3] = NAN
    with pytest.raises(NonFiniteNorm, match=r"1 of 6 samples.*\(dog\)"):
        step(mem_filter, unet, optimizer, (broken, t, e, target))
    optimizer.zero_grad()
    let_see(evidence, "cat")
    assert step(mem_filter, unet, optimizer, (x, t, e, target))
    assert mem_filter.verdict.checked.tolist() == [key == "cat" for key in KEYS]
    assert evidence.counts.sum(1)[evidence.slots(KEYS), LOSS].max() == 1


@pytest.mark.parametrize("state", ["shown", "flagged", "without caption"])
def test_broken_sample_is_named_though_nobody_looked_at_it(tiny_unet, tiny_batch, state):
    # be it left out of the loss: times 0 its gradient is NaN still
    evidence = evidence_of()
    let_see(evidence, "bee")
    if state == "flagged":
        flag(evidence, "dog")
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    x, t, e, target = tiny_batch(size=6)
    x[3] = NAN
    without = [state == "without caption" and key == "dog" for key in KEYS]
    with pytest.raises(NonFiniteNorm, match=r"loss of 1 of 6 samples.*\(dog\)"):
        step(mem_filter, unet, adamw(unet), (x, t, e, target), caption_dropped=without)


def test_forwards_that_are_no_training_take_no_part(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf)
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    x, t, e, target = tiny_batch(size=6)
    mem_filter.batch(keys=KEYS)
    unet.eval()(x, t, e)
    with torch.no_grad():
        unet.train()(x, t, e)
    out = unet(x, t, e)
    unet.eval()(x, t, e)
    mem_filter.loss(out.sample, target).backward()
    mem_filter.before_step(adamw(unet))
    assert evidence.clock == 6 and evidence.counts.sum(1)[evidence.slots(KEYS), LOSS].tolist() == [1] * 6


def test_loss_of_the_callers_own_leaves_the_signals_of_the_predictions(tiny_unet, tiny_batch):
    evidence = evidence_of(gate=-math.inf)
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    x, t, e, target = tiny_batch(size=6)
    mem_filter.batch(keys=KEYS)
    mse_loss(unet(x, t, e).sample, target).backward()
    assert mem_filter.before_step(adamw(unet))
    measured = (~mem_filter.verdict.signals.isnan()).all(0)
    assert dict(zip(SIGNALS, measured.tolist(), strict=True)) == {
        "norm": True, "loss": False, "cosine": True, "gain": False
    }  # fmt: skip


def test_before_step_in_every_micro_batch_weighs_only_where_accelerate_steps(tiny_unet, tiny_batch):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    evidence = evidence_of(gate=-math.inf)
    mem_filter = MemFilter(evidence=evidence)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    unet, optimizer = accelerator.prepare(unet, adamw(unet))
    clocks = []
    for i in range(4):
        x, t, e, target = tiny_batch(i, 6)
        with accelerator.accumulate(unet):
            mem_filter.batch(keys=KEYS)
            accelerator.backward(mem_filter.loss(unet(x, t, e).sample, target))
            mem_filter.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        clocks.append(evidence.clock)
    assert clocks == [0, 12, 12, 24]
    assert evidence.counts.sum(1)[evidence.slots(KEYS), LOSS].tolist() == [4] * 6
