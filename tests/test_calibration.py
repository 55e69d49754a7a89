import json
import math
from dataclasses import replace

import pytest
import torch
from simulated import NAN, as_signals, calibration, draw

from memfilter.calibration import Calibration, CalibrationError
from memfilter.evidence import Evidence, Weighing
from memfilter.keys import Step
from memfilter.reference import SIGNALS


@pytest.fixture
def written(tmp_path):
    calibration(6, 5).save(tmp_path / "calibration.json")
    return tmp_path / "calibration.json"


def test_calibration_is_read_as_it_was_written(tmp_path):
    made, path = calibration(7, 5), tmp_path / "calibration.json"
    made.signals[0, 0] = torch.tensor([1e-30, 1e30, 0.0, -123456.0])
    made.save(path)
    found = Calibration.load(path)
    assert found.about == made.about and torch.equal(found.timesteps, made.timesteps)
    assert found.timesteps.dtype == torch.long and found.signals.dtype == torch.float32
    torch.testing.assert_close(found.signals, made.signals, rtol=1e-4, atol=0)
    again = tmp_path / "again.json"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "calibration.json"]


def test_calibration_that_could_not_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "calibration.json"
    made = calibration(6, 5)
    made.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        replace(made, about={"model": object()}).save(path)
    assert path.read_bytes() == before


REFUSED = {
    "not JSON": "{",
    "a list": "[1, 2]",
    "nested without end": "[" * 100_000,
    "another format": {"format": "memfilter calibration 0"},
    "no format": {"format": None},
    "other signals": {"signals": ["loss", "norm", "cosine", "gain"]},
    "fewer signals": {"signals": ["norm"], "values": [[[1.0]] * 5] * 6},
    "NaN": {"values": [[[1.0, NAN, 1.0, 1.0]] * 5] * 6},
    "infinity": {"values": [[[1.0, math.inf, 1.0, 1.0]] * 5] * 6},
    "a number beyond all bounds": {"values": [[[1.0, 10**400, 1.0, 1.0]] * 5] * 6},
    "a word": {"values": [[[1.0, "low", 1.0, 1.0]] * 5] * 6},
    "nothing": {"values": None},
    "values of fewer keys": {"values": [[[1.0] * 4] * 5] * 5},
    "values of more looks": {"values": [[[1.0] * 4] * 6] * 6},
    "a signal more": {"values": [[[1.0] * 5] * 5] * 6},
    "looks of unequal number": {"values": [[[1.0] * 4] * 5] * 5 + [[[1.0] * 4] * 4]},
    "timesteps of one look": {"timesteps": [1] * 6, "values": [[1.0] * 4] * 6},
    "a timestep beyond all bounds": {"timesteps": [[10**30] * 5] * 6},
    "no key": {"timesteps": [], "values": []},
    "facts that are a word": {"about": "epsilon"},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_file_that_is_no_calibration_is_refused_with_what_to_do(written, change):
    if not isinstance(change, str):
        change = json.dumps(json.loads(written.read_text()) | change)
    written.write_text(change)
    with pytest.raises(CalibrationError, match=f"filter.calibration: {written} is no calibration.*memfilter calib"):
        Calibration.load(written)


@pytest.mark.parametrize("name", ["format", "signals", "values", "timesteps", "about"])
def test_file_that_lacks_something_is_refused_by_name(written, name):
    content = json.loads(written.read_text())
    del content[name]
    written.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=f"is no calibration.*{name}"):
        Calibration.load(written)


@pytest.mark.parametrize(
    "change",
    [{"about": {"unit": "l2"}}, {"about": {"num_train_timesteps": "many"}}, {"timesteps": [[1000] * 5] * 6},
     {"timesteps": [[-1] * 5] * 6}, {"timesteps": [[0.5] * 5] * 6}],
    ids=["no num_train_timesteps", "no number", "beyond the last", "before the first", "between two"],
)  # fmt: skip
def test_timesteps_that_cannot_be_those_of_the_model_are_refused(written, change):
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(CalibrationError, match="is no calibration.*timesteps"):
        Calibration.load(written)


def test_missing_file_and_directory_are_refused_with_what_to_do(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(CalibrationError, match=rf"{path} is no calibration.*memfilter calibrate"):
            Calibration.load(path)


def test_calibration_of_another_model_is_refused_with_everything_in_which_it_differs():
    made = calibration(3, 2)
    made.require(prediction_type="epsilon", resolution=64)
    made.require(**made.about)
    with pytest.raises(CalibrationError) as caught:
        made.require(prediction_type="v_prediction", resolution=64, unit="rms", family="sdxl")
    message = str(caught.value)
    assert "prediction_type 'epsilon', the run has 'v_prediction'" in message
    assert "unit 'l2', the run has 'rms'" in message and "family None, the run has 'sdxl'" in message
    assert "resolution" not in message and "make another one" in message and "\n" not in message


def test_reference_is_of_the_first_third_of_the_keys_and_of_nobody_else():
    made = calibration(30, 20)
    held = made.reference(1000)
    known = set(made.signals[:10, :, 0].flatten().tolist())
    values = held.values[SIGNALS.index("norm")]
    assert set(values[~values.isnan()].tolist()) == known
    changed = replace(made, signals=torch.cat([made.signals[:10], made.signals[10:] + 1]))
    for a, b in zip(held.state_dict().values(), changed.reference(1000).state_dict().values(), strict=True):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))
    assert torch.equal(made.rho(), changed.rho())


def test_every_key_of_the_reference_has_its_share_of_a_bin_that_overflows():
    made = calibration(30, 60)
    values = made.reference(20).values[SIGNALS.index("norm")]
    assert not values.isnan().any()
    whose = {value: key for key, looks in enumerate(made.signals[:10, :, 0].tolist()) for value in looks}
    for held in values.tolist():
        assert len({whose[value] for value in held}) >= 6  # 20 draws from 10 keys meet 8.8 of them on average


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_share_of_the_variance_between_keys_is_found(rho):
    # 100 keys, 28 looks that count: the standard error of the estimate is at most 0.04
    found = calibration(300, 40, rho).rho(0.7)
    assert found.dtype == torch.float32 and found.shape == (4,)
    assert (found - rho).abs().max() < 0.12


def test_every_signal_has_a_share_of_its_own():
    wanted = [0.1, 0.7, 0.3, 0.5]
    assert (calibration(300, 40, wanted).rho(0.7) - torch.tensor(wanted)).abs().max() < 0.12


@pytest.mark.parametrize("rho, low, high", [(0.0, 0.01, 0.03), (1.0, 0.9, 0.99)])
def test_share_stays_away_from_nothing_and_everything(rho, low, high):
    found = calibration(300, 40, rho).rho(0.7)
    assert low - 1e-6 <= found.min() and found.max() <= high + 1e-6


def test_only_timesteps_below_the_share_count():
    timesteps, _ = draw(300, 40, seed=2)
    g = torch.Generator().manual_seed(2)
    key, look = torch.randn(300, 1, 4, generator=g), torch.randn(300, 40, 4, generator=g)
    z = torch.where((timesteps < 500)[..., None], 0.8**0.5 * key + 0.2**0.5 * look, look)
    made = replace(calibration(3, 2), timesteps=timesteps, signals=as_signals(z, timesteps))
    assert (made.rho(0.5) - 0.8).abs().max() < 0.12
    assert made.rho(1.0).max() < 0.5


def fresh(keys: int, looks: int, rho, seed: int, alike: bool = False):
    """Timesteps and signals of keys; alike: all their signals say the same."""
    if not alike:
        return draw(keys, looks, rho, seed)
    g = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(1000, (keys, looks), generator=g)
    z = rho**0.5 * torch.randn(keys, 1, 1, generator=g) + (1 - rho) ** 0.5 * torch.randn(keys, looks, 1, generator=g)
    return timesteps, as_signals(z.expand(-1, -1, 4), timesteps)


def encounters(slots, timesteps, signals) -> Step:
    return Step(slots, timesteps, signals, torch.zeros(len(slots), dtype=torch.bool))


@pytest.mark.parametrize("alike", [False, True], ids=["independent signals", "signals that say the same"])
def test_of_clean_keys_at_most_the_rate_is_ever_flagged(alike):
    # 200 keys make the bar: by exchangeability a fresh key is flagged with probability 20 / 201, over the draw of both
    runs, keys, looks, rate, flagged = 6, 400, 20, 0.1, 0
    for run in range(runs):
        timesteps, signals = fresh(300 + keys, looks, 0.5, run, alike)
        made = replace(calibration(3, 2), timesteps=timesteps[:300], signals=signals[:300])
        evidence = Evidence.of(made, rate, table_size=512)
        ever = torch.zeros(keys, dtype=torch.bool)
        for look in range(looks):
            evidence.update(encounters(torch.arange(keys), timesteps[300:, look], signals[300:, look]), keys)
            ever |= evidence.flagged[:keys]
        flagged += int(ever.sum()) / (runs * keys)
    error = math.sqrt(rate * (1 - rate) * (1 / 202 + 1 / keys) / runs)  # of the bars, Beta(20, 181), and of the keys
    assert 20 / 201 - 4 * error <= flagged <= rate + 3 * error


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5])
def test_bar_lies_just_above_as_many_of_the_keys_as_the_rate_asks_for(rate):
    made = calibration(180, 24)
    evidence = Evidence.of(made, rate, table_size=64)
    largest = made.largest_evidence(evidence).double().numpy()
    assert len(largest) == 120
    over = int((largest >= evidence.flag_at).sum())
    # p of a key that reaches the bar: (1 + over) / (n + 1), and with one more it were too much
    assert (over + 1) / 121 <= rate < (over + 2) / 121
    assert evidence.readmit_below == evidence.flag_at / 2
    assert Evidence.of(made, rate, table_size=64, readmit_below=0.3).readmit_below == 0.3


def test_bar_is_made_with_the_settings_of_the_run():
    made = calibration(90, 30)
    bar = lambda **settings: Evidence.of(made, 0.1, table_size=64, **settings).flag_at  # noqa: E731
    assert len({bar(), bar(gate=-math.inf), bar(below=0.4), bar(weighing=Weighing(first=2))}) == 4
    assert bar(gate=math.inf) == bar(weighing=Weighing({"loss": 3.0}))  # no null pass ever: the loss alone
    assert bar(looks=15) < bar()


@pytest.mark.parametrize(("below", "gate"), [(0.4, 0.5), (0.7, 0.5), (1.0, 0.5), (0.7, -math.inf), (0.7, math.inf)])
def test_largest_evidence_is_that_of_the_rule_led_through_the_looks_one_key_at_a_time(below, gate):
    made = calibration(12, 24)
    evidence = Evidence.of(made, 0.25, table_size=64, below=below, gate=gate)
    assert torch.equal(evidence.rho, made.rho(below))
    found, levels, settings = made.largest_evidence(evidence, looks=20), [], {"below": below, "gate": gate, "table_size": 1}
    for key in range(4, 12):
        alone, slot = Evidence(made.reference(), made.rho(below), math.inf, **settings), torch.tensor([0])
        levels.append([])
        for look in range(24):
            step = encounters(slot, made.timesteps[key, [look]], made.signals[key, [look]])
            levels[-1].append(alone.update(step, 1)[1].item())
    assert found.tolist() == pytest.approx([max(some[:20]) for some in levels], rel=1e-5)
    # (1 + 1) / (8 + 1) <= 0.25 < (2 + 1) / (8 + 1): one of the eight lies over the bar
    assert evidence.flag_at == pytest.approx(sorted(map(max, levels))[6], rel=1e-5)
    assert not evidence.sums.any() and not evidence.flagged.any()  # the rule's own table is left alone


@pytest.mark.parametrize("rate, needed", [(0.02, 49), (0.04, 24), (0.001, 999)])
def test_too_few_keys_for_the_rate_are_refused_with_how_many_it_needs(rate, needed):
    with pytest.raises(ValueError, match=f"false_flag_rate={rate} needs at least {needed} clean keys.*has 20"):
        Evidence.of(calibration(30, 24), rate)


@pytest.mark.parametrize("keys", [14, 29, 48, 98])
def test_smallest_rate_that_the_keys_allow_is_taken(keys):
    made = calibration(keys * 3 // 2 + keys % 2, 24)
    count = len(made.timesteps) - len(made.timesteps) // 3
    evidence = Evidence.of(made, 1 / (count + 1), table_size=64)
    assert evidence.flag_at > made.largest_evidence(evidence).max()


@pytest.mark.parametrize("looks", [0, -1, 25])
def test_guarantee_for_more_looks_than_the_calibration_has_is_refused(looks):
    with pytest.raises(ValueError, match=f"filter.calibration holds 24 looks.*found {looks}"):
        Evidence.of(calibration(30, 24), 0.1, looks=looks)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, NAN])
def test_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=f"filter.false_flag_rate must lie between 0 and 1, found {rate}"):
        Evidence.of(calibration(30, 24), rate)


@pytest.mark.parametrize("keys", [1, 2, 3, 5])
def test_keys_too_few_to_tell_how_much_they_differ_are_refused_and_make_no_bar_that_is_no_number(keys):
    with pytest.raises(ValueError, match="keys"):
        Evidence.of(calibration(keys, 24), 0.5)


def test_looks_too_few_for_any_evidence_are_refused_and_make_no_bar_at_zero():
    # the first eight only tell what is usual: after them, half of all keys would be above a bar at 0
    with pytest.raises(ValueError, match="looks"):
        Evidence.of(calibration(90, 8), 0.1)
