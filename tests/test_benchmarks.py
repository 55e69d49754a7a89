"""What benchmarks make of their rows: the figures that are published, redone by hand on rows of known outcome."""

import csv
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy import stats

from memfilter.eval import results
from memfilter.eval.copies import PIXELS
from memfilter.eval.generate import Job, generator_of
from memfilter.eval.parts import Parts
from memfilter.inference import Sampling, measure_prompts
from memfilter.pipelines import load_pipeline
from memfilter.processes import processes
from memfilter.sweep import read_sweep

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SWEEPS = BENCHMARKS.parent / "configs" / "sweeps"
SEEDS = (311, 312, 313)


@pytest.fixture
def benchmark(monkeypatch):
    """Factory: a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_interval_is_students(benchmark):
    common = benchmark("common")
    values = np.array([0.1, 0.25, 0.05, 0.4])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert common.half_width(values) == pytest.approx((high - low) / 2)
    assert common.mean(values) == f"0.200 ± {(high - low) / 2:.3f}"
    assert np.isnan(common.half_width(values[:1]))


def test_seeds_of_the_same_recipe_in_the_table_are_not_made_again(benchmark, tmp_path):
    common = benchmark("common")
    table, columns, asked = tmp_path / "table.csv", ["seed", "steps", "copied", "rate", "recipe"], []

    def make(seed: int) -> list[dict]:
        if seed == 3:
            raise SystemExit("failed")
        asked.append(seed)
        return [{"seed": seed, "steps": "all", "copied": True, "rate": 0.5 * seed, "recipe": "123456789012"}]

    def call(seeds) -> list[dict]:
        rows = common.kept(table, "123456789012")
        common.complete(rows, seeds, make, lambda: common.write_csv(table, columns, rows), 1)
        return rows

    with pytest.raises(SystemExit, match="failed"):
        call((1, 3))
    assert call((1, 2)) == make(1) + make(2)
    assert asked == [1, 2, 1, 2]  # the last two by the line above
    assert common.kept(table, "y") == [] == common.kept(tmp_path / "none.csv", "y")
    common.write_csv(table, columns, [row | {"rate": rate} for row, rate in zip(make(1) + make(2), (0.5, float("nan")), strict=True)])
    assert [row["rate"] for row in common.kept(table, "123456789012")] == [0.5, pytest.approx(float("nan"), nan_ok=True)]


def test_recipe_names_the_code_of_the_functions_that_are_asked_for(benchmark):
    common = benchmark("common")
    whole, one = common.code_of("benchmarks/watching"), common.code_of("benchmarks/watching", "blocks")
    assert 0 < len(one) < len(whole)
    with pytest.raises(AssertionError, match="has not all of"):
        common.code_of("benchmarks/watching", "block")


# ---- of evidence


@pytest.fixture
def table(benchmark, tmp_path):
    """Factory: evidence_tables.Table of settings of scenario a with a memorization rate for each seed."""
    module = benchmark("evidence_tables")

    def make(**settings) -> tuple:
        columns = ["scenario", "method", "setting", "seed", "run", *module.FIGURES]
        with (tmp_path / "evidence.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval=0)
            writer.writeheader()
            for name, (rates, more) in settings.items():
                method, _, setting = name.partition("_")
                for seed, rate in zip(SEEDS, rates, strict=False):
                    known = {"scenario": "a", "method": method, "setting": setting.replace("_", " "), "seed": seed}
                    writer.writerow(known | {"memorization_rate": rate, "agreement_distinct": 0.8} | more)
        return module, module.Table(tmp_path / "evidence.csv")

    return make


def test_best_tau_is_that_which_memorizes_least_of_those_that_may_be_chosen(table):
    module, rows = table(
        tau_3=((0.05, 0.05, 0.05), {"distinct_dropped": 0.6}),
        tau_5=((0.10, 0.20, 0.30), {"distinct_dropped": 0.1}),
        tau_6=((0.30, 0.30, 0.30), {"distinct_dropped": 0.05}),
        tau_7=((0.00, 0.00), {"distinct_dropped": 0.0}),  # not of every seed
    )
    assert module.best_tau(rows, "a", [*SEEDS], 1.0) == ("tau", "3")
    assert module.best_tau(rows, "a", [*SEEDS], 0.1) == ("tau", "5")
    assert module.best_tau(rows, "a", [*SEEDS], 0.07) == ("tau", "6")
    assert module.best_tau(rows, "a", [*SEEDS], 0.01) is None
    assert module.best_tau(rows, "a", [311, 312], 0.01) == ("tau", "7")
    module, rows = table(none=((0.4, 0.4, 0.4), {}), tau_6=((0.3, 0.3, 0.3), {"distinct_dropped": 0.05}))
    assert module.best_tau(rows, "a", [*SEEDS], 0.05) == ("tau", "6")
    assert module.best_tau(rows, "a", [*SEEDS], 0.01) == module.NONE  # tau = inf


def test_claims_are_paired_and_over_the_seeds_that_both_have(table):
    module, rows = table(
        none=((0.2, 0.4, 0.6), {"agreement_distinct": 0.8}),
        tau_5=((0.1, 0.2, 0.3), {"distinct_dropped": 0.1}),
        oracle=((0.0, 0.02), {}),
        evidence_with_savings=((0.02, 0.05, 0.05), {"distinct_dropped": 0.1, "agreement_distinct": 0.78}),
    )
    own, lines = module.EVIDENCE, module.claims(rows, "a", module.EVIDENCE)
    differences = module.mean([0.08, 0.15, 0.25])
    assert any("best fixed tau" in line and "tau 5" in line and "80% lower" in line and differences in line for line in lines)
    assert f"- above the oracle by {module.mean([0.02, 0.03])}" in lines
    assert f"- agreement on distinct prompts is {module.mean([0.975] * 3)} of that without a filter" in lines
    assert f"- memorization is 0.040, without a filter 0.400; paired difference {module.mean([0.18, 0.35, 0.55])}" in lines
    assert rows.seeds("a", own, module.ORACLE) == [311, 312]


def test_taus_of_too_few_seeds_are_named_where_they_are_not_compared(table):
    module, rows = table(
        none=((0.4, 0.4, 0.4), {}),
        tau_3=((0.0, 0.0), {"distinct_dropped": 0.6}),
        tau_5=((0.1, 0.2, 0.3), {"distinct_dropped": 0.1}),
        sightings_5=((0.1, 0.2), {}),
        evidence_with_savings=((0.02, 0.05, 0.05), {"distinct_dropped": 0.1}),
    )
    fixed, other = [], []
    for line in module.claims(rows, "a", module.EVIDENCE):
        (fixed if "fixed tau" in line else other).append(line)
    assert len(fixed) == 2 and all(line.endswith("; not compared, too few seeds: tau 3") for line in fixed)
    assert not any("too few seeds" in line for line in other)


def test_costs_are_measured_again_unless_all_rows_of_a_seed_are_of_the_present_recipes(benchmark, tmp_path):
    costs, common = benchmark("evidence_costs"), benchmark("common")
    table = tmp_path / "evidence_costs.csv"
    rows = [
        dict.fromkeys(costs.COLUMNS, 1.0)
        | {"scenario": scenario, "method": method, "setting": setting, "seed": seed}
        | {"recipe": costs.recipe(scenario, (method, setting))}
        for scenario, seed in (("a", 320), ("a", 321), ("d", 320))
        for method, setting in costs.COMPARED
    ]
    assert costs.current(table) == []
    common.write_csv(table, costs.COLUMNS, rows)
    assert len(costs.current(table)) == len(rows)
    rows[-1]["recipe"] = "another"
    common.write_csv(table, costs.COLUMNS, rows[1:])
    assert {(row["scenario"], row["seed"]) for row in costs.current(table)} == {("a", "321")}
    common.write_csv(table, costs.COLUMNS[:-1], [{name: row[name] for name in costs.COLUMNS[:-1]} for row in rows])
    assert costs.current(table) == []


def test_steps_are_compared_over_those_that_all_runs_have_made_and_runs_by_how_many_they_make(benchmark):
    costs = benchmark("evidence_costs")

    def run(method: str, *seconds: float):
        made = object.__new__(costs.Run)
        rule, budget = SimpleNamespace(method=method, replace=True), SimpleNamespace(samples=400, batch_size=8)
        made.config, made.clock = SimpleNamespace(filter=rule, train=budget), [0.0, *itertools.accumulate(seconds)]
        return made

    warm_up = [9.0] * costs.WARM_UP
    plain = run("tau", *warm_up, *[1.0] * 10, *[0.5] * 20)  # left alone it is faster; it was stopped before its end
    found = costs.rows_of({("none", ""): plain, ("evidence", "x"): run("evidence", *warm_up, *[1.0, 1.4] * 5)})
    assert [row["steps"] for row in found] == [50, costs.WARM_UP + 10]
    assert [row["step_ratio"] for row in found] == pytest.approx([1, 1.2])
    assert [row["time_ratio"] for row in found] == pytest.approx([1, 1.2 * (costs.WARM_UP + 10) / 50])


def test_share_of_the_effect_is_of_evidence_without_savings(table, tmp_path):
    module, rows = table(
        none=((0.2, 0.4, 0.6), {}),
        evidence_without_savings=((0.0, 0.0, 0.0), {"passes": 1.0}),
        evidence_with_savings=((0.04, 0.04, 0.04), {"passes": 0.15}),
    )
    assert module.effects(rows, tmp_path) == []  # nothing is known of times
    (tmp_path / "evidence_costs.csv").write_text(
        "scenario,method,setting,time_ratio,step_ratio\n"
        "a,evidence,with savings,0.52,1.02\na,evidence,with savings,0.54,1.04\nd,evidence,with savings,1.1,1.2\n"
    )
    with pytest.raises(SystemExit, match="no rows of .a. evidence without savings"):
        module.effects(table(none=((0.2, 0.4, 0.6), {}), evidence_with_savings=((0.04, 0.04, 0.04), {}))[1], tmp_path)
    lines, both = module.effects(rows, tmp_path), [module.mean([0.52, 0.54]), module.mean([1.02, 1.04])]
    # of falls of 0.2, 0.4 and 0.6 all but 0.04 are left: the least and the most that three seeds drawn anew can give
    own = f"0.90 ({1 - 0.04 / 0.2:.2f} to {1 - 0.04 / 0.6:.2f})"
    assert f"| with savings | 3 | {own} | 0.150 | {both[1]} | 1.200 | {both[0]} | 1.100 |" in lines
    assert "| without savings | 3 | 1.00 (1.00 to 1.00) | 1.000 |  |  |  |  |" in lines
    assert lines[-2].endswith("has, of a step: none; of the whole run, which sees as many samples: with savings.")
    (tmp_path / "evidence_costs.csv").write_text(
        "scenario,method,setting,time_ratio,step_ratio\na,evidence,with savings,1.04,1.03\nd,evidence,with savings,1.1,1.1\n"
    )
    assert "of a step: with savings; of the whole run, which sees as many samples: none" in module.effects(
        rows, tmp_path)[-2]  # fmt: skip
    module.draw_costs(rows, tmp_path)
    assert (tmp_path / "evidence_costs.png").stat().st_size > 10_000


def test_rows_of_another_recipe_are_made_anew_and_ratios_of_time_are_by_seed(benchmark, tmp_path):
    evidence = benchmark("evidence")
    path, known = tmp_path / "evidence.csv", dict.fromkeys(evidence.COLUMNS, 0) | {"scenario": "a", "setting": "", "run": "x"}
    rows = [known | {"method": method, "seed": seed, "seconds": seconds, "recipe": evidence.recipe("a", (method, ""))}
            for method, seed, seconds in (("oracle", 312, 60.0), ("none", 311, 100.0), ("oracle", 311, 50.0))]  # fmt: skip
    evidence.write_rows(path, rows)
    found = {(row["method"], row["seed"]): row["time_ratio"] for row in evidence.read_rows(path)}
    assert found == {("none", 311): 1.0, ("oracle", 311): 0.5, ("oracle", 312): None}
    path.write_text(path.read_text().replace(evidence.recipe("a", ("oracle", "")), "another"))
    assert [row["method"] for row in evidence.read_rows(path)] == ["none"]


# ---- of the study


def study_of(module, **settings):
    rows = [
        {"method": name.partition("_")[0], "setting": name.partition("_")[2], "seed": seed, "memorization_rate": rate,
         "agreement_distinct": agrees, "agreement_duplicates": 0.9, "distinct_dropped": dropped}
        for name, (rates, agreement, dropped) in settings.items()
        for seed, rate, agrees in zip(SEEDS, rates, np.broadcast_to(agreement, len(SEEDS)), strict=True)
    ]  # fmt: skip
    return module.Study(pd.DataFrame(rows))


def test_setting_of_the_study_is_chosen_by_agreement_then_by_memorization(benchmark):
    module = benchmark("study")
    study = study_of(
        module,
        none=((0.2, 0.2, 0.2), 0.80, 0.0),
        tau_3=((0.0, 0.0, 0.0), 0.80, 0.6),  # drops too much
        tau_5=((0.1, 0.1, 0.1), 0.79, 0.1),
        tau_7=((0.15, 0.15, 0.15), 0.80, 0.02),
        rta_1=((0.12, 0.16, 0.2), 0.80, 0.0),
        rta_8=((0.0, 0.0, 0.0), 0.70, 0.0),  # agrees too little
        evidence_x=((0.05, 0.08, 0.12), 0.80, 0.0),
    )
    assert study.best(("tau",)) == ("tau", "5") and study.best(("rta",)) == ("rta", "1")
    assert study.opposed(module.FILTERS, ("rta",)) == (("evidence", "x"), ("rta", "1"))
    lines = module.comparisons(study)
    (half,) = (line for line in lines if "in every seed" in line)
    assert "half or less in 2 of 3 seeds" in half and module.mean([0.07, 0.08, 0.08]) in half
    (first,) = (line for line in lines if "beat random tokens at equal agreement" in line)
    assert "tau 5 0.100, rta 1 0.160" in first
    assert any("AGC" in line and line.endswith("agrees well enough and drops at most 20% of the distinct samples") for line in lines)
    assert [line for line in lines if line.startswith("  - rta")] == [
        "  - rta 1 (agreement 0.800): 0.120, 0.160, 0.200; evidence x (agreement 0.800): 0.050, 0.080, 0.120; half or less in 2 of 3 seeds",
        "  - rta 8 (agreement 0.700): 0.000, 0.000, 0.000; evidence x (agreement 0.800): 0.050, 0.080, 0.120; half or less in 0 of 3 seeds",
    ]


def test_study_holds_a_filter_against_random_tokens_at_exactly_its_agreement(benchmark):
    """A quarter of the way from no filter, with none of them, to one of them; more of them are further away."""
    module = benchmark("study")
    study = study_of(
        module,
        none=((0.2, 0.4, 0.1), 0.80, 0.0),
        rta_1=((0.12, 0.0, 0.1), 0.76, 0.0),
        rta_2=((0.0, 0.0, 0.0), 0.40, 0.0),
        evidence_x=((0.08, 0.14, 0.06), (0.78, 0.79, 0.80), 0.0),
        evidence_y=((0.08, 0.14, 0.06), 0.9, 0.0),
    )
    found = [study.at_equal_agreement(("evidence", name), ("rta",)) for name in "xy"]
    assert found == [
        "evidence x (agreement 0.790): 0.080, 0.140, 0.060; rta: 0.180, 0.300, 0.100, less by "
        f"{module.mean([0.1, 0.16, 0.04])}; half or less in 2 of 3 seeds",
        "evidence y (agreement 0.900): 0.080, 0.140, 0.060; rta: 0.200, 0.400, 0.100, less by "
        f"{module.mean([0.12, 0.26, 0.04])}; half or less in 2 of 3 seeds",
    ]
    lines = module.comparisons(study)
    assert lines[-5:-3] == [f"  - {line}" for line in found]
    of_duplicates = study_of(module, none=((0.2,) * 3, 0.80, 0.0), rta_1=((0.1,) * 3, 0.80, 0.0), tau_5=((0.0,) * 3, 0.80, 0.0))
    rows = of_duplicates.results
    rows["agreement_duplicates"] = rows["method"].map({"none": 0.9, "rta": 0.5, "tau": 0.6})
    assert "tau 5 (agreement 0.600): 0.000, 0.000, 0.000; rta: 0.125, 0.125, 0.125" in module.Study(rows).at_equal_agreement(
        ("tau", "5"), ("rta",), "duplicates")  # fmt: skip
    without = module.Study(study.results[study.results["method"] != "none"])
    assert without.at_equal_agreement(("evidence", "x"), ("rta",)) == "not every run is there"


def test_study_of_one_seed_and_of_one_whose_plain_run_is_missing_says_so(benchmark):
    module = benchmark("study")
    study = study_of(module, none=((0.2, 0.2, 0.2), 0.80, 0.0), tau_5=((0.1, 0.1, 0.1), 0.80, 0.0), rta_1=((0.1, 0.1, 0.1), 0.80, 0.0))
    for chosen in (study.results["seed"] == SEEDS[0],
                   (study.results["seed"] != SEEDS[2]) & ~((study.results["method"] == "none") & (study.results["seed"] == SEEDS[1]))):
        lines = module.comparisons(module.Study(study.results[chosen]))  # fmt: skip
        (first,) = (line for line in lines if "beat random tokens at equal agreement" in line)
        assert ("fewer than two seeds in common" in first) == (study.results[chosen]["seed"].nunique() == 1)


def test_what_is_held_against_random_tokens_agrees_as_they_do_and_not_as_no_filter_does(benchmark):
    study = study_of(
        benchmark("study"),
        none=((0.2, 0.2, 0.2), 0.80, 0.0),
        rta_1=((0.1, 0.1, 0.1), 0.88, 0.0),
        tau_5=((0.0, 0.0, 0.0), 0.80, 0.0),
        tau_7=((0.1, 0.1, 0.1), 0.88, 0.0),
    )
    assert study.opposed(("tau",), ("rta",)) == (("tau", "7"), ("rta", "1"))
    assert study.opposed(("tau",), ("none",))[0] == ("tau", "5")


def test_noise_of_agreement_is_that_of_what_setting_and_seed_do_not_explain(benchmark):
    """Held against an analysis of variance by least squares."""
    module, rng = benchmark("study"), np.random.default_rng(0)
    agreement = rng.normal(0.8, 0.03, (4, len(SEEDS)))
    names = [("none", ""), ("tau", "5"), ("tau", "6"), ("rta", "1")]
    rows = [{"method": method, "setting": setting, "seed": seed, "memorization_rate": 0.1, "distinct_dropped": 0.0,
             "agreement_distinct": agreement[i, j], "agreement_duplicates": 0.9}
            for i, (method, setting) in enumerate(names) for j, seed in enumerate(SEEDS)]  # fmt: skip
    rows += [rows[0] | {"method": "base", "agreement_distinct": 0.1, "seed": seed} for seed in SEEDS]  # was never trained
    settings, seeds = np.repeat(np.eye(4), len(SEEDS), axis=0), np.tile(np.eye(len(SEEDS)), (4, 1))
    _, (squares,), rank, _ = np.linalg.lstsq(np.hstack([settings, seeds[:, 1:]]), agreement.ravel(), rcond=None)
    free = agreement.size - rank
    expected = stats.t.ppf(0.975, free) * np.sqrt(squares / free) * np.sqrt(2 / len(SEEDS))
    assert module.Study(pd.DataFrame(rows)).noise() == pytest.approx(expected)


def test_choice_of_the_study_among_settings_that_agree_less_by_chance_stands_beside_it(benchmark):
    module = benchmark("study")
    study = study_of(
        module,
        none=((0.2, 0.2, 0.2), (0.80, 0.84, 0.76), 0.0),
        tau_5=((0.0, 0.0, 0.0), (0.80, 0.72, 0.79), 0.0),  # 4% less, by chance
        tau_7=((0.1, 0.1, 0.1), (0.80, 0.83, 0.77), 0.0),
        oracle_=((0.0, 0.0, 0.0), 0.80, 0.0),
    )
    (line,) = (line for line in module.comparisons(study) if "tau from the oracle" in line)
    assert line.index("tau 7 0.100, oracle 0.000") < line.index(f"less by {study.noise():.3f} more: tau 5 0.000, oracle 0.000")


def test_settings_of_the_study_are_also_chosen_on_the_seeds_that_are_not_reported(benchmark):
    module = benchmark("study")
    study = study_of(
        module,
        none=((0.4, 0.4, 0.4), 0.80, 0.0),
        tau_5=((0.0, 0.3, 0.3), 0.80, 0.0),  # better than 6 in the mean, and on each pair of seeds but the last
        tau_6=((0.3, 0.2, 0.2), 0.80, 0.0),
        dedup_=((0.1, 0.1, 0.1), 0.70, 0.0),  # agrees too little, and is a reference all the same
        oracle_=((0.0, 0.0, 0.0), 0.80, 0.0),
    )
    (line,) = (line for line in module.comparisons(study) if "tau from de-duplication" in line)
    assert "tau 5 0.200, dedup 0.100" in line
    # without the first seed 6 is chosen; without another 5 is
    assert "chosen on the other seeds 0.300 and 0.100, less by " + module.mean([-0.2, -0.2, -0.2]) in line


def test_study_writes_table_hours_and_comparisons(benchmark, tmp_path, monkeypatch, capsys):
    module, sweep, out = benchmark("study"), tmp_path / "sweep", tmp_path / "out"
    sweep.mkdir()
    out.mkdir()
    figures = dict.fromkeys(results.COLUMNS, 0.5) | {"cpu_seconds": 1800.0, "distinct_dropped": 0.0}
    results.write_results([
        figures | {"method": method, "setting": setting, "seed": seed, "run": f"{method}{setting}{seed}"}
        for method, setting in (("none", ""), ("tau", "5"), ("rta", "1"), ("oracle", "")) for seed in SEEDS
    ], sweep)  # fmt: skip
    monkeypatch.setattr("sys.argv", ["study.py", f"--sweep={sweep}", f"--out={out}"])
    module.main()
    text = (out / "study.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "Training took 6.0 core hours" in text and "| tau | 5 | 3 | 0.500 ± 0.000 |" in text
    assert "beat random tokens at equal agreement? tau 5 0.500, rta 1 0.500" in text
    assert (out / "study.csv").read_bytes() == (sweep / "results.csv").read_bytes()


def test_study_begins_with_the_rows_that_are_published(benchmark, tmp_path):
    study, evidence = benchmark("study"), benchmark("evidence")
    points = [point.config.run_dir for point in read_sweep(SWEEPS / "study.yaml")]
    assert all(run.startswith(f"{study.RUNS}/") for run in points)
    known = dict.fromkeys(evidence.COLUMNS, 0.5) | {"setting": "", "method": "none", "seed": 311}
    evidence.write_rows(tmp_path / "evidence.csv", [
        known | {"scenario": scenario, "seconds": 100.0, "run": run, "recipe": evidence.recipe(scenario, ("none", ""))}
        for scenario, run in (("a", Path(points[0]).name), ("a", "no-point"), ("b", Path(points[1]).name))
    ])  # fmt: skip
    published = {"memorization_rate": 0.25, "cpu_seconds": 90.0, "run": points[2]}
    results.write_results([published, published | {"cpu_seconds": 100.0, "memorization_rate": 0.5, "run": points[0]}], tmp_path)
    (tmp_path / "results.csv").rename(tmp_path / "study.csv")
    study.begin(tmp_path / "sweep", tmp_path)
    found = results.recorded_figures(tmp_path / "sweep")
    assert [(run, row["memorization_rate"], row["cpu_seconds"]) for run, row in found.items()] == [
        (points[2], 0.25, 90.0), (points[0], 0.5, 100.0)]  # fmt: skip
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 3  # what both tables have has one row
    (tmp_path / "evidence.csv").unlink()
    study.begin(tmp_path / "sweep", tmp_path)  # has a table
    assert results.recorded_figures(tmp_path / "sweep") == found


# ---- of detection


def test_detection_says_where_the_norm_is_behind_a_density(benchmark):
    module = benchmark("detection")
    rows = [
        {"method": method, "steps": steps, "n": n, "seed": seed, "auc": auc + 0.01 * seed, "tpr_at_1pct_fpr": tpr, "negative": 500}
        for method, steps, n, auc, tpr in (
            ("norm", "1", 1, 0.8, 0.5), ("norm", "all", 4, 0.8, 0.5), ("norm", "1", 4, 0.9, 0.6),
            ("density_l2", "all", 4, 0.7, 0.55), ("density_sscd", "all", 4, 0.7, 0.5), ("loss", "1", 1, 0.99, 0.99),
        )
        for seed in (1, 2)
    ]  # fmt: skip
    *lines, _, last, level = module.order(rows)
    assert level == "Level are they in: tpr_at_1pct_fpr at n=4, steps all, against density_sscd (500 negatives)."
    assert last == "The paper's order, the norm ahead of both densities, does not hold in: tpr_at_1pct_fpr at n=4, steps all, "\
        "against density_l2 (500 negatives), clear of chance."  # fmt: skip
    assert f"| 500 | 1 | 1 | loss | {module.mean([-0.19, -0.19])} | {module.mean([-0.49, -0.49])} |" in lines
    assert f"| 500 | 4 | all | density_l2 | {module.mean([0.1, 0.1])} | {module.mean([-0.05, -0.05])} |" in lines


def late_cosines(pipeline, prompts: list[str], n: int, steps: int, guidance: float) -> np.ndarray:
    """Of eps(prompt) - eps(null) with eps(null), at the third-last timestep, of the noise that the generation begins with. [P, n]"""
    pipeline.scheduler.set_timesteps(steps)
    late = pipeline.scheduler.timesteps[-3]
    found = []
    for number, prompt in enumerate(prompts):
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator_of(Job(number, prompt, seed))) for seed in range(n)])
        cond, null = pipeline.encode_prompt([prompt] * n, "cpu", 1, True)
        with torch.no_grad():
            cond, null = (pipeline.unet(noise, late, embeds).sample.double().numpy() for embeds in (cond, null))
        product = ((cond - null) * null).sum(1) / np.linalg.norm(cond - null, axis=1) / np.linalg.norm(null, axis=1)
        found.append(product.mean((1, 2)))
    return np.array(found)


def test_detection_reads_off_whole_generations_what_the_package_measures_step_by_step(benchmark, tmp_path, monkeypatch):
    module = benchmark("detection")
    monkeypatch.setattr(module, "SCORED", 5)
    monkeypatch.setattr(module, "BY", {"1": 1, "3": 3, "all": None})
    monkeypatch.setattr(module, "BATCH", 6)  # one that a prompt's pictures do not fill, and prompts that do not fill a group
    pipeline = load_pipeline(str(tiny.save_pipeline(tmp_path / "sd1", "sd1")))
    pipeline.set_progress_bar_config(disable=True)
    prompts, sampling = ["a cat", "a red dog", "a house"], Sampling(3, 5, module.GUIDANCE)

    def made(name: str, n: int, prompts: list[str], measure) -> dict[str, np.ndarray]:
        parts = Parts(tmp_path, name, {"n": n}, processes())
        return module.measured(pipeline, dict(enumerate(prompts)), n, measure, parts)

    raw, clean = made("all", 3, prompts, PIXELS), made("clean", 3, prompts[::-1], None)
    for steps, until in module.BY.items():
        rivals = ("density_l2", "density_copies", "loss", "anisotropy")
        signals = measure_prompts(pipeline, prompts, sampling, rivals=rivals, until=until, batch_size=6, progress=False)
        for n in (1, 2, 3):
            found = module.scores(raw, clean, steps, n)
            expected = {"norm": signals.metric(seeds=n), "loss": signals.rival("loss", n)}
            if n > 1:
                expected |= {"density_l2": signals.rival("density_l2", n), "density_sscd": signals.rival("density_copies", n)}
            cosines, at = (signals.raw["anisotropy"][:, :, -1], (until or 5) - 1)
            ordinary = clean["cosines"][..., at]
            if steps == "1":  # there it is of the noise itself, at another timestep
                cosines, ordinary = (late_cosines(pipeline, texts, 3, 5, module.GUIDANCE) for texts in (prompts, prompts[::-1]))
            expected["anisotropy"] = (signals.norms[:, :n, 0].mean(1) / clean["norms"][:, :n, 0].mean(1).std()
                                      + cosines[:, :n].mean(1) / ordinary[:, :n].mean(1).std())  # fmt: skip
            assert found.keys() == expected.keys()
            for name, score in expected.items():
                # the late cosine is of a difference that is small here, of other batches
                rtol = 1e-3 if (name, steps) == ("anisotropy", "1") else 1e-5
                np.testing.assert_allclose(found[name], score, rtol=rtol, atol=1e-7, err_msg=f"{name} {steps} {n}")


# ---- of significance


def test_significance_is_judged_on_prompts_that_the_trigger_alone_makes_copies(benchmark):
    module = benchmark("significance")
    rows = [
        {"seed": seed, "trigger": trigger, "memorized": memorized, "ablated_copies": copies, "words": 8, "plain": 0.9,
         "without_top_2": 0.2, "without_2_others": 0.7, **dict.fromkeys((*module.SCORES, "longest", "rarest"), "a"),
         "top": trigger, "top_planted": trigger if seed == 1 else "a"}
        for seed in (1, 2) for trigger in ("cat", "dog")
        for memorized, copies in ((True, 0), (True, 0), (True, 1), (False, 0))
    ]  # fmt: skip
    lines = module.table(rows).splitlines()
    assert lines[0] == "8 of 16 prompts are memorized by a known trigger."
    assert "| top | 1.000 (1.000 to 1.000) | 1.00, 1.00 |" in lines and "| longest | 0.000 (0.000 to 0.000) | 0.00, 0.00 |" in lines
    assert "| top planted | 0.500 (0.000 to 1.000) | 1.00, 0.00 |" in lines  # models differ: their bootstrap is widest
    assert "| chance among all words | 0.125 | |" in lines
    assert "falls by 0.700 (0.700 to 0.700)" in lines[-1] and "by 0.200 (0.200 to 0.200)" in lines[-1]
    assert "difference 0.500 (0.500 to 0.500)" in lines[-1]
    assert module.table([row | {"memorized": False} for row in rows]) == "0 of 16 prompts are memorized by a known trigger."


# ---- of mitigation


def test_gradient_of_the_embedding_is_that_of_finite_differences(benchmark):
    assert benchmark("mitigation").gradient_error(directions=1) < 1e-5


def test_mitigations_are_compared_by_what_copies_least_at_the_agreement_that_is_asked_for(benchmark):
    module = benchmark("mitigation")

    def less(**curves) -> float:
        rows = [{"method": method, "setting": i, "seed": 1, "agreement distinct": agreement, "copy_similarity": copies}
                for method, points in curves.items() for i, (agreement, copies) in enumerate(points)]  # fmt: skip
        return module.copies_less(pd.DataFrame(rows).set_index(["method", "setting", "seed"]), "agreement distinct")

    none = [(0.8, 0.9)]
    # from .7 to .8 the one copies .3, then nobody but none; a worse setting that agrees more does not count
    assert less(none=none, prompt=[(0.81, 0.3), (0.815, 0.5)], rta=[(0.7, 0.5)]) == pytest.approx(0.9 - 0.3)
    assert less(none=none, prompt=[(0.75, 0.3)], rta=[(0.7, 0.5)]) == pytest.approx(0.5 * (0.9 - 0.3), abs=0.02)
    assert less(none=none, prompt=[(0.7, 0.5)], rta=[(0.7, 0.5)]) == 0
    assert less(none=none, prompt=[(0.85, 0.5)], rta=[(0.82, 0.7)]) == pytest.approx(0.2)  # neither costs agreement


def test_mitigations_that_do_the_same_differ_by_nothing_whatever_is_drawn(benchmark):
    module, rng = benchmark("mitigation"), np.random.default_rng(0)
    settings = [("none", 0.0), ("prompt", 1.0), ("rta", 4)]
    rows = [
        {"method": method, "setting": setting, "seed": seed, "prompt": prompt, "duplicate": prompt < 4, "memorization_rate": 0.5,
         "copy_similarity": copies, "agreement": agreement, "first_norm": 1.0}
        for seed in (1, 2, 3) for prompt in range(8) for copies, agreement in [rng.random(2)] for method, setting in settings
    ]  # fmt: skip
    lines = module.compared(pd.DataFrame(rows), draws=20)
    assert [line.partition(": ")[2] for line in lines] == ["0.000 (0.000 to 0.000); of each model alone 0.000, 0.000, 0.000"] * 2
    better = [row | {"copy_similarity": row["copy_similarity"] - 0.25} if row["method"] == "prompt" else row for row in rows]
    assert all("0.250 (0.250 to 0.250)" in line for line in module.compared(pd.DataFrame(better), draws=20))
