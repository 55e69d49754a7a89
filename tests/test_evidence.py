import copy
import math
from collections import Counter, defaultdict

import pytest
import torch
from safetensors.torch import load, save
from simulated import NAN, ByHand, as_signals, reference

from memfilter.evidence import Evidence, Weighing
from memfilter.keys import Census, KeyTable, Sightings, Step
from memfilter.reference import SIGNALS, Reference

LOSS, NORM = SIGNALS.index("loss"), SIGNALS.index("norm")
RHO = torch.tensor([0.3, 0.5, 0.2, 0.1])
FROM_NULL_PASS = [s for s in range(4) if s != LOSS]


def weighed(flag_at: float = math.inf, rho=RHO, size: int = 16, **settings) -> Evidence:
    """Evidence on a full reference; everybody is looked at and every timestep counts unless said otherwise."""
    settings = {"gate": -math.inf, "below": 1.0, "table_size": 64} | settings
    return Evidence(reference(size=size), rho, flag_at, **settings)


def step(slots, z=None, timesteps=None, audit=False, seed: int = 0) -> Step:
    """Encounters with these normal scores, [n, 4] or one for all, by default those of ordinary samples."""
    slots = torch.as_tensor(slots)
    g = torch.Generator().manual_seed(seed)
    if timesteps is None:
        timesteps = torch.randint(1000, (len(slots),), generator=g)
    z = torch.randn(len(slots), 4, generator=g) if z is None else torch.as_tensor(z).float().expand(len(slots), 4)
    timesteps = torch.as_tensor(timesteps)
    audit = torch.as_tensor(audit).expand(len(slots)).clone()
    return Step(slots, timesteps, as_signals(z, timesteps), audit)


def encounters(evidence: Evidence, slot: int, z: float, count: int) -> None:
    for seed in range(count):
        evidence.update(step([slot], z, seed=seed), 1)


def state_of(table: KeyTable) -> dict:
    """Everything that a table knows, by name."""
    known = {name: value for name, value in vars(table).items() if isinstance(value, torch.Tensor | int | bool)}
    if hasattr(table, "reference"):
        known |= {f"reference.{name}": value for name, value in table.reference.state_dict().items()}
    return known


def assert_same(a: dict, b: dict, *but: str) -> None:
    assert a.keys() == b.keys()
    for name in set(a) - set(but):
        x, y = torch.as_tensor(a[name]).double(), torch.as_tensor(b[name]).double()
        assert torch.equal(x.nan_to_num(-9), y.nan_to_num(-9)), name


class WeighedByHand:
    """Evidence as the docstrings of `Weighing` have it, from a list of all encounters, in plain Python."""

    def __init__(self, weighing: Weighing, rho: torch.Tensor):
        self.weighing, self.rho = weighing, rho.tolist()
        self.z = defaultdict(lambda: [[] for _ in SIGNALS])  # of every key and signal, from the first to the last

    def meet(self, slot: int, scores: list[float]) -> None:
        for s, z in enumerate(scores):
            if not math.isnan(z):
                self.z[slot][s].append(z)

    def evidence(self, slot: int) -> float:
        pull, power, half_life = 0.0, 0.0, self.weighing.half_life
        for name, rho, z in zip(SIGNALS, self.rho, self.z[slot], strict=True):
            first, later = z[: self.weighing.first], z[self.weighing.first :]
            strength = self.weighing.strengths.get(name, 0)
            if not later or not strength:
                continue
            # what is usual for the key, and how much of that is left to know
            usual, left = 0.0, rho
            if first:
                noise = (1 - rho) / len(first)
                usual, left = rho / (rho + noise) * sum(first) / len(first), rho * noise / (rho + noise)
            ages = range(len(later) - 1, -1, -1)
            weights = [0.5 ** (age / half_life) for age in ages]
            mean = sum(w * z for w, z in zip(weights, later, strict=True)) / sum(weights)
            variance = left + (1 - rho) * sum(w * w for w in weights) / sum(weights) ** 2
            pull += strength * (mean - usual) / variance
            power += strength**2 / variance
        return pull / math.sqrt(power) if power else 0.0


WEIGHINGS = {
    "default": Weighing(),
    "short memory": Weighing(half_life=2.0, first=3),
    "nothing is usual": Weighing(first=0),
    "one is usual": Weighing(first=1, half_life=0.5),
    "loss alone": Weighing({"loss": 2.0}),
    "two signals": Weighing({"norm": 0.5, "gain": 1.0}, first=4),
}


@pytest.mark.parametrize("weighing", WEIGHINGS.values(), ids=WEIGHINGS)
def test_evidence_is_that_of_the_formula_redone_by_hand(weighing):
    evidence = weighed(weighing=weighing, below=0.7)
    oracle, scores = WeighedByHand(weighing, RHO), ByHand.like(evidence.reference)
    g = torch.Generator().manual_seed(1)
    for i in range(100):
        one = step(torch.randint(4, (1,), generator=g), seed=i)
        one.signals[torch.rand(1, 4, generator=g) < 0.2] = NAN
        _, found = evidence.update(one, 1)
        t, slot = one.timesteps.item(), one.slots.item()
        if t < 700:
            oracle.meet(slot, scores.scores(t, one.signals[0].tolist()))
        assert found.item() == pytest.approx(oracle.evidence(slot), abs=2e-4)
    found = evidence.evidence(torch.arange(4))
    assert found.tolist() == pytest.approx([oracle.evidence(slot) for slot in range(4)], abs=2e-4)
    assert found.abs().max() > 0.3
    assert evidence.evidence(torch.tensor([9])).item() == 0  # who was never met


@pytest.mark.parametrize("later", [1, 5, 60])
def test_evidence_of_ordinary_keys_is_standard_normal_if_the_model_holds(later):
    keys, g, weighing = 20_000, torch.Generator().manual_seed(0), Weighing(half_life=6.0)
    key = RHO.sqrt() * torch.randn(keys, 4, generator=g)
    sums, counts = torch.zeros(keys, 2, 4), torch.tensor([8, later])[:, None].expand(keys, 2, 4)
    for i in range(8 + later):
        z = key + (1 - RHO).sqrt() * torch.randn(keys, 4, generator=g)
        part = int(i >= 8)
        sums[:, part] = sums[:, part] * (0.5 ** (1 / 6) if part else 1) + z
    found = weighing.evidence(sums, counts, RHO)
    assert abs(found.mean()) < 4 / math.sqrt(keys) and abs(found.var() - 1) < 4 * math.sqrt(2 / keys)


def test_memorization_that_shifts_the_signals_as_expected_is_told_better_by_all_than_by_any_one():
    keys, g, shift = 4000, torch.Generator().manual_seed(0), Weighing().vector()
    counts = torch.tensor([8, 10])[:, None].expand(keys, 2, 4)
    key = RHO.sqrt() * torch.randn(keys, 4, generator=g)
    first = 8 * key + (8 * (1 - RHO)).sqrt() * torch.randn(keys, 4, generator=g)
    later = 10 * (key + shift) + (10 * (1 - RHO)).sqrt() * torch.randn(keys, 4, generator=g)
    gained = {}
    for names in [(name,) for name in SIGNALS] + [SIGNALS]:
        rule = Weighing({name: Weighing().strengths[name] for name in names}, half_life=1e5)
        gained[names] = rule.evidence(torch.stack([first, later], 1), counts, RHO).mean().item()
    assert gained[SIGNALS] > max(gained[(name,)] for name in SIGNALS) + 0.3


def test_long_memory_counts_more_than_a_thousand_encounters():
    weighing = Weighing({"loss": 1.0}, half_life=2000.0, first=2)
    evidence, oracle = weighed(weighing=weighing), WeighedByHand(weighing, RHO)
    one = step([3], 0.8, timesteps=[100])
    z = evidence.reference.scores(one.timesteps, one.signals)[0].tolist()
    many = step([3] * 1500, 0.8, timesteps=[100] * 1500)
    evidence.update(many, 1500)
    for _ in range(1500):
        oracle.meet(3, z)
    assert evidence.evidence(torch.tensor([3])).item() == pytest.approx(oracle.evidence(3), rel=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [({"strengths": {"loss": 1.0, "lpips": 1.0}}, "filter.signals: unknown lpips.*norm, loss, cosine, gain"),
     ({"strengths": {}}, "filter.signals.*at least one"), ({"strengths": {"loss": 0.0}}, "positive strength"),
     ({"strengths": {"loss": -1.0}}, "positive strength"), ({"strengths": {"loss": NAN}}, "positive strength"),
     ({"half_life": 0}, "filter.half_life.*found 0"), ({"half_life": -1.0}, "filter.half_life.*found -1"),
     ({"half_life": NAN}, "filter.half_life.*found nan"), ({"half_life": math.inf}, "filter.half_life.*found inf")],
)  # fmt: skip
def test_weighing_that_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Weighing(**settings)


def test_signal_that_is_switched_off_or_was_not_measured_has_no_part():
    some, all_of_them = weighed(weighing=Weighing({"loss": 1.0, "gain": 1.0})), weighed()
    measured = weighed()
    for seed in range(12):
        one = step([5], seed=seed)
        for evidence in (some, all_of_them):
            evidence.update(one, 1)
        one.signals[:, [NORM, SIGNALS.index("cosine")]] = NAN
        measured.update(one, 1)
    other = copy.deepcopy(some)
    for seed in range(12):
        one = step([5], seed=50 + seed)
        some.update(one, 1)
        one.signals[:, [NORM, SIGNALS.index("cosine")]] = 1e3
        other.update(one, 1)
    slot = torch.tensor([5])
    assert some.evidence(slot) == other.evidence(slot) != 0
    assert all_of_them.evidence(slot) != measured.evidence(slot) != 0


# printf '%s' KEY | b2sum -l 64
DIGESTS = {
    "000000001": "7cfe4d86381157c4",
    "a cat": "67f5dfb40b23dda2",
    "ä": "f04dbbe25e2ba039",
    "": "e4a6a0577479b2b4",
}


def test_place_of_a_key_is_its_hash_and_so_the_same_in_every_process():
    for size in (2**20, 1000, 1):
        expected = [int.from_bytes(bytes.fromhex(digest), "little") % size for digest in DIGESTS.values()]
        assert KeyTable(size).slots(DIGESTS).tolist() == expected
    assert KeyTable().slots([17]) == KeyTable().slots(["17"])
    assert KeyTable().slots(["\udcff"]) < 2**20 and KeyTable().slots([]).shape == (0,)  # no UTF-8, nothing at all


def test_keys_are_spread_evenly_over_the_places():
    counts = Counter(KeyTable(16).slots(range(4000)).tolist())
    assert len(counts) == 16 and max(abs(count - 250) for count in counts.values()) < 5 * math.sqrt(250)


def test_two_keys_on_one_place_share_what_is_found():
    evidence = weighed(table_size=4)
    slots = {}
    for key in range(20):
        slots.setdefault(evidence.slots([key]).item(), []).append(key)
    first, second, *_ = next(keys for keys in slots.values() if len(keys) > 1)
    for seed in range(6):
        evidence.update(step(evidence.slots([first]), 1.5, seed=seed), 1)
        evidence.update(step(evidence.slots([second]), 1.0, seed=seed), 1)
    assert evidence.evidence(evidence.slots([first])) == evidence.evidence(evidence.slots([second])) > 0
    assert (evidence.counts[evidence.slots([first])].sum(1) == 12).all()


def test_table_of_one_place_holds_everybody():
    evidence = weighed(table_size=1, window=10)
    slots = evidence.slots(["a", "b", "c"])
    assert slots.tolist() == [0, 0, 0]
    for seed in range(5):
        decisions = evidence.decide(slots)
        evidence.update(step(slots, 1.5, audit=decisions.audit, seed=seed), 3)
    assert evidence.evidence(slots)[0] > 1 and not evidence.flagged.any()
    state = load(save(evidence.state_dict()))
    other = weighed(table_size=1, window=10)
    other.load_state_dict(state)
    assert_same(state_of(evidence), state_of(other), "flag_at")


def test_key_that_comes_several_times_in_a_step_is_taken_as_in_so_many_steps():
    together, apart = weighed(), weighed()
    one = step([7, 2, 7, 7, 2, 9, -1, 7], seed=3)
    several = [step(one.slots.tolist(), seed=seed) for seed in range(5)]
    for many in several:
        _, found = together.update(many, 8)
        for row in range(8):
            part = Step(*(column[row : row + 1] for column in vars(many).values()))
            _, last = apart.update(part, 1)
            if row == 7:
                assert found[[0, 2, 3, 7]].tolist() == [last.item()] * 4  # all that the step brought
    assert together.counts[7].sum(0).tolist() == [20] * 4
    assert_same(state_of(together), state_of(apart))


def test_evidence_that_is_told_of_a_row_has_the_step_in_it_and_the_p_value_has_not():
    evidence = weighed(weighing=Weighing(first=0))
    before = copy.deepcopy(evidence.reference)
    many = step([1, 2, -1, 3], seed=5, audit=True)
    many.signals[3] = NAN
    p, found = evidence.update(many, 4)
    assert torch.equal(p.nan_to_num(-9), before.p_values(many.timesteps, many.signals)[:, NORM].nan_to_num(-9))
    assert p[:3].isfinite().all() and p[3].isnan()
    assert found[[0, 1]].tolist() == evidence.evidence(torch.tensor([1, 2])).tolist() and (found[[0, 1]] != 0).all()
    assert found[2].isnan() and found[3] == 0
    assert not torch.equal(before.values, evidence.reference.values)


def test_rows_without_a_key_say_nothing():
    evidence = weighed()
    before = copy.deepcopy(state_of(evidence))
    evidence.update(step([-1, -1], 3.0, audit=True), 2)
    assert evidence.clock == 2
    assert_same(before, state_of(evidence), "clock")


def test_key_is_flagged_from_the_bar_on_and_readmitted_below_the_other():
    weighing = Weighing({"loss": 1.0}, half_life=3.0, first=2)
    probe, oracle = weighed(weighing=weighing), []
    course = [0.5] * 2 + [1.2] * 6 + [-1.0] * 8 + [1.8] * 12
    for seed, z in enumerate(course):
        probe.update(step([4], z, timesteps=[50], seed=seed), 1)
        oracle.append(probe.evidence(torch.tensor([4])).item())
    bar = oracle[4]  # it is reached to the bit
    evidence = weighed(bar, weighing=weighing)
    flagged, flags, readmissions = False, 0, 0
    for seed, (z, level) in enumerate(zip(course, oracle, strict=True)):
        was = flagged
        evidence.update(step([4], z, timesteps=[50], seed=seed), 1)
        flagged = level >= bar / 2 if was else level >= bar
        flags, readmissions = flags + (flagged and not was), readmissions + (was and not flagged)
        assert evidence.evidence(torch.tensor([4])).item() == level  # nothing restarts
        assert evidence.flagged.tolist() == [slot == 4 and flagged for slot in range(64)]
        assert evidence.decide(torch.tensor([4, 5])).drop.tolist() == [flagged, False]
        assert evidence.metrics() == {
            "filter/keys_flagged": int(flagged), "filter/flags": flags, "filter/readmissions": readmissions
        }  # fmt: skip
    assert (flags, readmissions) == (2, 1)


def test_readmission_has_a_bar_of_its_own_where_one_is_given():
    weighing = Weighing({"loss": 1.0}, half_life=2.0, first=0)
    kept, back = (weighed(1.0, readmit_below=bar, weighing=weighing) for bar in (-9.0, 0.9))
    for evidence in (kept, back):
        encounters(evidence, 4, 2.0, 10)
        assert evidence.flagged[4]
        encounters(evidence, 4, -1.0, 6)
    assert kept.flagged[4] and not back.flagged[4]


def test_flagged_key_is_passed_over_until_its_next_audit():
    evidence = weighed(0.5, window=10, weighing=Weighing(first=0))
    slots = torch.tensor([4, 5])
    evidence.update(step([4, 5], torch.tensor([[2.0], [-2.0]]), audit=True), 1)
    assert evidence.flagged.nonzero().flatten().tolist() == [4]
    passed = []
    for _ in range(14):
        passed.append(evidence.passes_over(slots).tolist())
        evidence.update(step([6], audit=False), 1)
    # audited at clock 0; here the clock is 1 and on
    assert passed == [[True, False]] * 9 + [[False, False]] * 5
    assert evidence.decide(slots).audit.tolist() == [True, True]
    evidence.update(step([4], 2.0, audit=True), 1)
    assert evidence.passes_over(slots).tolist() == [True, False]
    evidence.replace = False
    assert evidence.passes_over(slots).tolist() == [False, False]


def test_samples_that_were_passed_over_bring_the_next_audit_nearer():
    evidence = weighed(0.5, window=10, weighing=Weighing(first=0))
    evidence.update(step([4], 2.0, audit=True), 1)
    evidence.update(step([6]), 9)  # one that was shown, eight that were not
    assert not evidence.passes_over(torch.tensor([4])).any()


def lead(table: Census, stream: list[int], batch: int = 4, shift: dict[int, float] | None = None) -> list[int]:
    """Shows a stream of keys to a table as a training loop does, which makes a null pass where it is told to; says how
    many audits every step had. Who is passed over is shown all the same."""
    audits = []
    for start in range(0, len(stream), batch):
        slots = torch.tensor(stream[start : start + batch])
        decisions = table.decide(slots)
        z = torch.randn(len(slots), 4, generator=torch.Generator().manual_seed(start))
        z += torch.tensor([[(shift or {}).get(slot, 0.0)] for slot in slots.tolist()])
        brought = step(slots, z, audit=decisions.audit, seed=start)
        unseen = torch.zeros(4, dtype=torch.bool)
        unseen[FROM_NULL_PASS] = True
        brought.signals[~decisions.look[:, None] & unseen] = NAN
        table.update(brought, len(slots))
        audits.append(int(decisions.audit.sum()))
    return audits


def keys_in_turn(keys: int, rounds: int) -> list[int]:
    return [key for _ in range(rounds) for key in range(keys)]


def test_every_key_votes_once_in_a_window_however_often_it_comes():
    table = Census(Reference(4096, bins=1), window=40, reference_share=1.0, table_size=64)
    votes, stream = Counter(), [3, 1, 2] * 160  # four times in ten
    for start in range(0, 480, 4):
        slots = torch.tensor([3, *stream[start : start + 3]])  # and one more than once in a step
        before = table.reference.added[LOSS, 0].item()
        audit = table.decide(slots).audit
        table.update(step(slots, audit=audit, seed=start), 4)
        assert table.reference.added[LOSS, 0].item() - before == len(set(slots[audit].tolist()))
        votes.update(set(slots[audit].tolist()))
    assert set(votes.values()) == {480 // 40}
    assert table.reference.added[LOSS, 0] == 3 * 480 // 40


def test_key_that_comes_several_times_in_its_first_step_votes_once():
    table = Census(Reference(64, bins=1), window=100, reference_share=1.0, table_size=64)
    slots = torch.tensor([5, 5, 5, 6])
    table.update(step(slots, audit=table.decide(slots).audit), 4)
    assert table.reference.added[:, 0].tolist() == [2] * 4


def test_nothing_but_audits_changes_the_reference():
    evidence = weighed(0.5, window=50, table_size=8)
    before = copy.deepcopy(evidence.reference.state_dict())
    for seed in range(20):
        evidence.update(step([1, 2, 3], 1.0, seed=seed), 3)
    assert_same(before, evidence.reference.state_dict())
    evidence.update(step([1, 2, 3], audit=[False, True, False]), 3)
    assert evidence.reference.added[LOSS].sum() == before["added"][LOSS].sum() + 1


@pytest.mark.parametrize("gate", [-math.inf, 0.5, math.inf])
def test_reference_is_the_same_whoever_is_flagged(gate):
    stream = keys_in_turn(24, 12)
    settings = {"window": 48, "gate": gate, "below": 0.7}
    nobody, everybody = (weighed(bar, readmit_below=bar, **settings) for bar in (math.inf, -math.inf))
    some = weighed(0.5, **settings)
    for evidence in (nobody, everybody, some):
        audits = lead(evidence, stream)
        assert sum(audits) == len(stream) / 2
    assert not nobody.flagged.any() and everybody.flagged.sum() == 24 and 0 < some.flags < 100
    for other in (everybody, some):
        assert_same(nobody.reference.state_dict(), other.reference.state_dict())


@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
def test_only_the_share_of_the_keys_that_pays_brings_null_passes_into_the_reference(share):
    keys = 1024
    evidence = Evidence(Reference(4096, bins=1), RHO, math.inf, reference_share=share, table_size=keys, window=10**6)
    slots = torch.randperm(keys, generator=torch.Generator().manual_seed(0))
    looks = 0
    for some in slots.split(64):
        decisions = evidence.decide(some)
        assert decisions.audit.all()
        looks += int(decisions.look.sum())
        evidence.update(step(some, audit=decisions.audit), 64)  # whoever was not looked at: signals all the same
    added = evidence.reference.added[:, 0]
    assert added[LOSS] == keys
    assert (added[FROM_NULL_PASS] == looks).all()
    assert abs(looks - share * keys) <= 5 * math.sqrt(keys * share * (1 - share))


def test_same_keys_pay_every_time():
    evidence = Evidence(Reference(64), RHO, math.inf, reference_share=0.3, table_size=64, window=1)
    first = evidence.decide(torch.arange(64)).look
    lead(evidence, keys_in_turn(64, 3))
    evidence.gate = math.inf
    assert torch.equal(evidence.decide(torch.arange(64)).look, first) and 0 < first.sum() < 64


@pytest.mark.parametrize("state", ["below the gate", "at the gate", "flagged"])
def test_null_pass_speaks_of_a_key_only_at_the_gate_or_when_flagged(state):
    evidence = weighed(math.inf, gate=math.inf, weighing=Weighing(first=0), reference_share=1.0, window=5)
    encounters(evidence, 4, 1.0, 3)
    level = evidence.evidence(torch.tensor([4])).item()
    assert level > 0 and evidence.counts[4].sum(0).tolist() == [3 if s == LOSS else 0 for s in range(4)]
    if state == "flagged":
        evidence.flagged[4], evidence.readmit_below = True, -9.0
    if state == "at the gate":
        evidence.gate = level
    looked = evidence.decide(torch.tensor([4])).look.item()
    assert looked == (state == "at the gate") or evidence.decide(torch.tensor([4])).audit
    evidence.update(step([4], 2.0, audit=True), 1)  # an audit's pass is made in any case
    heard = state != "below the gate"
    assert evidence.counts[4].sum(0).tolist() == [4 if s == LOSS else int(heard) for s in range(4)]


def test_gate_goes_by_what_was_known_before_the_step():
    evidence = weighed(gate=0.2, weighing=Weighing(first=0))
    evidence.update(step([4, 4, 4], 2.0), 3)
    assert evidence.counts[4].sum(0).tolist() == [3 if s == LOSS else 0 for s in range(4)]
    evidence.update(step([4, 4, 4], 2.0), 3)
    assert evidence.counts[4].sum(0).tolist() == [6 if s == LOSS else 3 for s in range(4)]


def test_looking_only_where_it_is_told_finds_what_looking_everywhere_finds():
    # the calibration's keys were looked at every time, those of a run where it was worth it
    looked, told = (weighed(gate=0.3, window=60, reference_share=0.25) for _ in range(2))
    shift = {3: 1.5, 8: 0.8}
    for start in range(0, 400, 4):
        slots = torch.arange(start, start + 4) % 20
        z = torch.randn(4, 4, generator=torch.Generator().manual_seed(start))
        z += torch.tensor([[shift.get(slot, 0.0)] for slot in slots.tolist()])
        decisions = told.decide(slots)
        brought = step(slots, z, audit=decisions.audit, seed=start)
        looked.update(brought, 4)
        brought.signals[:, FROM_NULL_PASS] = torch.where(
            decisions.look[:, None], brought.signals[:, FROM_NULL_PASS], NAN
        )
        told.update(brought, 4)
    assert_same(state_of(looked), state_of(told))
    assert 0 < told.counts[:20, :, NORM].sum() < told.counts[:20, :, LOSS].sum()


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("audited", [False, True])
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("pays", [False, True])
def test_null_pass_is_made_for_who_is_over_the_gate_and_for_audits(flagged, audited, over, pays):
    evidence = weighed(gate=0.5, window=10, weighing=Weighing(first=0), reference_share=1.0 if pays else 1e-9)
    encounters(evidence, 5, 2.0 if over else -2.0, 3)
    evidence.flagged[5] = flagged
    evidence.clock, evidence.audited[5] = 20, 11 - audited  # ten samples ago it is due
    decisions = evidence.decide(torch.tensor([5]))
    assert decisions.drop.item() == flagged and decisions.audit.item() == audited
    # the way back for who was flagged; what the reference needs; what the evidence needs
    expected = (audited and flagged) or (audited and pays) or (over and not flagged)
    assert decisions.look.item() == expected
    evidence.gate = -math.inf
    assert evidence.decide(torch.tensor([5, 6])).look.tolist() == [True, True]


def test_asking_changes_nothing():
    evidence = weighed(0.5, window=7)
    lead(evidence, keys_in_turn(10, 4))
    before = copy.deepcopy(state_of(evidence))
    evidence.decide(torch.arange(64)), evidence.passes_over(torch.arange(64)), evidence.evidence(torch.arange(64))
    evidence.worth_looking(torch.arange(1000)), evidence.metrics(), evidence.state_dict()
    assert_same(before, state_of(evidence))


@pytest.mark.parametrize("below, last", [(0.7, 699), (1.0, 999), (0.05, 49)])
def test_encounters_count_below_their_share_of_the_timesteps_and_no_others(below, last):
    evidence = weighed(below=below)
    assert evidence.worth_looking(torch.arange(1000)).nonzero().flatten().tolist() == list(range(last + 1))
    for t in {0, last, min(last + 1, 999), 999}:
        evidence.update(step([5], timesteps=[t]), 1)
    assert evidence.counts[5].sum(0).tolist() == [2] * 4


def test_audit_at_high_noise_enters_the_reference_though_it_is_no_evidence():
    evidence = weighed(below=0.7, reference_share=1.0)
    before = evidence.reference.added.clone()
    evidence.update(step([5], timesteps=[950], audit=True), 1)
    assert (evidence.reference.added - before)[:, 9].tolist() == [1] * 4
    assert not evidence.counts.any()


def test_state_goes_through_a_file_and_on_as_if_nothing_had_been():
    stream, shift = keys_in_turn(24, 20), {3: 1.0, 9: 0.7, 11: -1.0}
    whole, begun = (weighed(0.6, window=60, gate=0.3, weighing=Weighing(first=2)) for _ in range(2))
    lead(begun, stream[:240], shift=shift)
    assert begun.flagged.any() and begun.readmissions
    content = save(begun.state_dict())
    resumed = weighed(0.6, window=60, gate=0.3, weighing=Weighing(first=2), size=16)
    lead(resumed, [50, 51, 52, 53] * 10, shift={50: 3.0})  # whatever it knew is forgotten
    resumed.load_state_dict(load(content))
    assert_same(state_of(begun), state_of(resumed))
    lead(whole, stream[:240], shift=shift)
    for evidence in (whole, resumed):
        lead(evidence, stream[240:], shift=shift)
    assert_same(state_of(whole), state_of(resumed))
    assert whole.metrics() == resumed.metrics()


def test_state_holds_only_the_places_that_were_used():
    evidence = Evidence(Reference(4, bins=2), RHO, math.inf, table_size=2**16)
    lead(evidence, [7, 1000, 7, 65535])
    state = evidence.state_dict()
    assert state["used"].tolist() == [7, 1000, 65535]
    assert sum(value.numel() * value.element_size() for value in state.values()) < 2000


def test_census_drops_nobody_looks_at_everybody_and_keeps_its_reference_up_to_date():
    census = Census(Reference(4096, bins=1), window=50, reference_share=0.5, table_size=64)
    slots = torch.arange(10)
    decisions = census.decide(slots)
    assert not decisions.drop.any() and decisions.look.all() and decisions.audit.all()
    assert not census.passes_over(slots).any() and census.worth_looking(torch.arange(1000)).all()
    many = step(slots, audit=decisions.audit)
    p, found = census.update(many, 10)
    assert (p == 1).all() and found.isnan().all()
    assert not census.decide(slots).audit.any() and census.decide(slots).look.all()
    added = census.reference.added[:, 0]
    assert added[LOSS] == 10 and 0 < added[NORM] < 10
    other = Census(Reference(4096, bins=1), window=50, reference_share=0.5, table_size=64)
    other.load_state_dict(load(save(census.state_dict())))
    assert_same(state_of(census), state_of(other))
    assert census.metrics() == {}


@pytest.mark.parametrize(
    "settings, message",
    [({"window": 0}, "filter.window must be at least 1, found 0"), ({"table_size": 0}, "filter.table_size.*found 0"),
     ({"reference_share": 0}, "filter.reference_share.*found 0"),
     ({"reference_share": 1.1}, "filter.reference_share.*found 1.1")],
)  # fmt: skip
def test_census_that_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Census(Reference(4), **settings)


def test_sightings_drop_a_key_after_it_was_trained_on_so_often_and_never_look():
    table, seen = Sightings(3, table_size=64), Counter()
    g = torch.Generator().manual_seed(0)
    assert not table.makes_passes and KeyTable.makes_passes
    for i in range(40):
        slots = torch.randint(20, (5,), generator=g)
        slots[i % 5] = -1
        known = slots[slots >= 0]
        decisions = table.decide(known)
        assert decisions.drop.tolist() == table.passes_over(known).tolist() == [seen[s] >= 3 for s in known.tolist()]
        assert not decisions.look.any() and not decisions.audit.any()
        p, found = table.update(step(slots), 5)
        assert p.isnan().all() and found.isnan().all() and len(p) == 5
        seen.update(known.tolist())
    assert table.clock == 200
    assert table.metrics() == {"filter/keys_flagged": sum(count >= 3 for count in seen.values())}
    other = Sightings(3, table_size=64)
    other.update(step([63, 63, 63]), 3)
    other.load_state_dict(load(save(table.state_dict())))
    assert_same(state_of(table), state_of(other))


def test_sightings_of_a_key_within_one_step_all_count():
    table = Sightings(3, table_size=8)
    table.update(step([1, 1, 2]), 3)
    table.update(step([1, 2, 2]), 3)
    assert table.passes_over(torch.arange(4)).tolist() == [False, True, True, False]


@pytest.mark.parametrize("k", [0, -1])
def test_sightings_of_less_than_one_are_refused(k):
    with pytest.raises(ValueError, match=f"filter.sightings must be at least 1, found {k}"):
        Sightings(k)
