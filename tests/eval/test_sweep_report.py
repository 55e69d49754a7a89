"""Sweeps are made up here, file by file, and their figures redone with scipy and by hand."""

import csv
import html
import json
import shutil
import warnings
from base64 import b64decode
from io import BytesIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Page, browse, needs_chromium
from PIL import Image
from scipy import stats

from memfilter.cli import main
from memfilter.eval.report import ReportError
from memfilter.eval.results import OWN_LIMIT
from memfilter.eval.sweep_report import CHARTS, PROMPTS, SHOTS, SIDE, charts, data, drawing, gallery, write_sweep_report

COLUMNS = ["method", "setting", "seed", *data.FIGURES, "run"]
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    r"</script><b>$\frac$ %{x}",  # half a formula
    "\ud800 half \u202e a character",
]
# method, setting -> memorization rate, agreement on distinct prompts, of each seed
FIGURES = {
    ("none", ""): ([0.7, 0.65, 0.72], [0.67, 0.66, 0.71]),
    ("tau", "10"): ([0.6, 0.5, 0.7], [0.6, 0.65, 0.62]),
    ("tau", HOSTILE[2]): ([0.62, 0.6, 0.7], [0.6, 0.65, 0.6]),
    ("tau", "2.5"): ([0.0, 0.1, 0.05], [0.2, 0.3, 0.22]),
    ("evidence", HOSTILE[0]): ([0.1, 0.0, 0.02], [0.67, 0.66, 0.70]),
    ("evidence", HOSTILE[1]): ([0.0, 0.0, 0.0], [0.4, 0.5, 0.4]),
    ("oracle", ""): ([0.0, 0.01, 0.0], [0.68, 0.67, 0.7]),
    ("a method of $next$ year <b>", "x"): ([0.3, 0.4, 0.3], [0.6, 0.6, 0.6]),
}


def rows_of(figures=FIGURES, seeds=(1, 2, 3)) -> list[dict]:
    """Rows of results.csv, without their runs."""
    rng, rows = np.random.default_rng(0), []
    for (method, setting), values in figures.items():
        for seed, rate, agreement in zip(seeds, *values, strict=False):
            others = dict(zip(data.FIGURES, rng.uniform(0.3, 0.9, len(data.FIGURES)).round(4).tolist(), strict=True))
            others["distinct_dropped"] = 0.01 if setting == "10" else round(others["distinct_dropped"] / 10, 4)
            rows.append({"method": method, "setting": setting, "seed": seed, **others, "memorization_rate": rate,
                         "agreement_distinct": agreement, "run": ""})  # fmt: skip
    return rows


def write_results(sweep, rows, columns=COLUMNS):
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return sweep


def write_run(directory, seed: int, drops: bool, score: str | None, prompts: int = 10):
    """A run of 400 samples; its pictures and captions are those of the seed."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    rates = [{"filter/drop_rate_duplicates": 0.2 * i + seed / 100, "filter/drop_rate_distinct": 0.01 * i} for i in range(3)]
    lines = [{"samples": 100 * (i + 1) + seed, "loss": 0.1, **(rates[i] if drops else {})} for i in range(3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    position = np.arange(400)
    duplicate = position % 2 == 0
    values = (rng.normal(0, 1, 400) + duplicate).astype(np.float32)
    columns = {"text_norm": values, "evidence": None} if score == "norm" else {"text_norm": None, "evidence": values}
    audit = pa.table({
        "position": position, "key": [f"{p % 20:09d}" for p in position], "duplicate": duplicate,
        "timestep": rng.integers(0, 1000, 400).astype(np.int32),
        **{name: pa.array([None] * 400 if column is None else column, pa.float32()) for name, column in columns.items()},
    })  # fmt: skip
    pq.write_table(audit if score else audit[:0], directory / "audit.parquet")
    captions = [*HOSTILE, *(f"caption {i}" for i in range(prompts))][: prompts + 1]
    similarity = rng.uniform(0, 1, (len(captions), 5))
    evaluation = {"measure": "pixel correlation", "memorized_above": 0.9, "steps": 20, "guidance_scale": 4.0}
    evaluation["prompts"] = [
        {"key": f"{i}\" onload='alert(3)'", "caption": caption, "duplicate": i != 4, "similarity": similarity[i].tolist()}
        for i, caption in enumerate(captions)
    ]
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    training = rng.integers(0, 256, (len(captions), 16, 16, 3), dtype=np.uint8)
    np.savez(directory / "evaluation.npz", training=training, generations=np.stack([training] * 5, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The sweep of `FIGURES` with all its runs, reported."""
    sweep = tmp_path_factory.mktemp("sweeps") / "<i>study"
    rows = rows_of()
    for i, row in enumerate(rows):
        row["run"] = str(sweep / "runs" / str(i))
        method = row["method"]
        score = {"tau": "norm", "evidence": "evidence"}.get(method)
        write_run(sweep / "runs" / str(i), row["seed"], method in ("tau", "evidence"), score)
    rows[0]["time_ratio"] = rows[3]["seed_agreement"] = ""  # not known
    for row in rows[-3:]:
        row["distinct_dropped"] = ""
    write_results(sweep, rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MathText.*|.*invalid value.*")
        write_sweep_report(sweep)
    return sweep


@pytest.fixture(scope="module")
def page(made):
    return Page(made / "report.html")


def read(sweep) -> pd.DataFrame:
    return data.read_results(sweep)


def test_means_and_intervals_are_those_of_scipy(made):
    rows = list(csv.DictReader((made / "results.csv").open(newline="", encoding="utf-8")))
    table = csv.DictReader((made / "tables" / "summary.csv").open(newline=""))
    found = {(row["method"], row["setting"], row["figure"]): row for row in table}
    assert len(found) == len(FIGURES) * len(data.FIGURES) - 1  # distinct_dropped of the last is not known of any seed
    for (method, setting, figure), row in found.items():
        values = [float(r[figure]) for r in rows if (r["method"], r["setting"]) == (method, setting) and r[figure]]
        assert int(row["seeds"]) == len(values) == (2 if (method, setting, figure) in (
            ("none", "", "time_ratio"), ("tau", "10", "seed_agreement")) else 3)  # fmt: skip
        assert float(row["mean"]) == pytest.approx(np.mean(values))
        if np.ptp(values):
            ends = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
            assert (float(row["low"]), float(row["high"])) == pytest.approx(ends)
        else:
            assert float(row["low"]) == float(row["high"]) == values[0]


def test_table_begins_with_what_memorizes_least_and_says_how_many_seeds_are_known(page):
    rows = [row for row in page.rows if len(row) == 3 + len(data.FIGURES)]
    assert len(rows) == 1 + len(FIGURES)
    means = [float(row[3].split("%")[0]) for row in rows[1:]]
    assert means == sorted(means) and means[0] == 0.0 and means[-1] == 69.0
    by_setting = {(row[0], row[1]): row for row in rows}
    half = stats.t.ppf(0.975, 2) * stats.sem([70, 65, 72])
    assert by_setting["none", ""][3] == f"69.0% ± {half:.1f}%"
    assert by_setting["none", ""][9].endswith("(n = 2)") and "n" not in by_setting["none", ""][8]
    assert rows[1][0] == "evidence" and by_setting["a method of $next$ year <b>", "x"][8] == "–"
    shaded = [e for e in page.all("tr") if "reference" in e["attrs"].get("class", "")]
    assert len(shaded) == 2


def test_of_one_seed_there_is_no_interval(tmp_path):
    sweep = write_results(tmp_path / "one", rows_of({("none", ""): ([0.5], [0.6]), ("tau", "4"): ([0.25], [0.5])}))
    write_sweep_report(sweep)
    rows = {row[0]: row for row in Page(sweep / "report.html").rows}
    assert rows["tau"][2:4] == ["1", "25.0%"] and "±" not in "".join(rows["none"])
    assert "nan" not in "".join(cell for row in rows.values() for cell in row)
    assert next(csv.DictReader((sweep / "tables" / "summary.csv").open()))["low"] == ""


def test_settings_go_by_their_numbers():
    results = pd.DataFrame([("rta", s) for s in ("n=10", "n=1", "n=2", "n=0.5")] + [("oracle", ""), ("none", "")],
                           columns=["method", "setting"])  # fmt: skip
    assert data.settings_of(results) == {"none": [""], "rta": ["n=0.5", "n=1", "n=2", "n=10"], "oracle": [""]}


def test_setting_that_stands_for_a_method_memorizes_least_of_those_that_agree_nearly_as_none_does(made):
    chosen = data.representatives(read(made))
    # evidence: the second memorizes less, at an agreement 36% lower; of tau none agrees well enough, 10 drops least
    assert (chosen["evidence"], chosen["tau"]) == (HOSTILE[0], "10")
    assert "Agreement is not known" not in (made / "report.html").read_text(encoding="utf-8")


def test_several_settings_without_a_method_rule_nothing_out(tmp_path):
    points = {("none", "x=1"): ([0.5] * 2, [0.8] * 2), ("none", "x=2"): ([0.5] * 2, [0.6] * 2),
              ("tau", "3, x=2"): ([0.1] * 2, [0.6] * 2), ("tau", "9, x=1"): ([0.4] * 2, [0.8] * 2)}  # fmt: skip
    results = read(write_results(tmp_path / "some", rows_of(points)))
    assert data.representatives(results)["tau"] == "3, x=2"


def test_setting_that_drops_more_than_a_fifth_stands_for_its_method_only_where_there_is_no_other(tmp_path):
    points = {("none", ""): ([0.5] * 2, [0.6] * 2), ("tau", "3"): ([0.1] * 2, [0.61] * 2), ("tau", "5"): ([0.3] * 2, [0.6] * 2)}
    results = read(write_results(tmp_path / "some", rows_of(points)))
    results.loc[results["setting"] == "3", "distinct_dropped"] = 0.6
    results.loc[results["setting"] == "5", "distinct_dropped"] = 0.1
    assert data.representatives(results)["tau"] == "5"
    results.loc[results["setting"] == "5", "distinct_dropped"] = 0.7
    assert data.representatives(results)["tau"] == "3"


def test_setting_is_chosen_without_agreement_where_none_is_known_and_the_page_says_so(tmp_path):
    points = {("none", ""): ([0.5] * 2, [""] * 2), ("tau", "3"): ([0.1] * 2, [""] * 2), ("tau", "5"): ([0.3] * 2, [""] * 2)}
    rows = rows_of(points)
    for row in rows:
        row["distinct_dropped"] = {"3": 0.15, "5": 0.02}.get(row["setting"], 0.0)
    for row in rows:
        row["run"] = str(tmp_path / "runs" / f"{row['method']}{row['setting']}{row['seed']}")
        write_run(tmp_path / "runs" / row["run"], row["seed"], row["method"] == "tau", None)
    sweep = write_results(tmp_path / "some", rows)
    assert data.representatives(read(sweep)) == {"none": "", "tau": "3"}
    write_sweep_report(sweep)
    assert "Agreement is not known of every setting here" in (sweep / "report.html").read_text(encoding="utf-8")


def test_drops_that_nobody_knows_rule_no_setting_out_and_are_not_drawn(tmp_path):
    points = {("none", ""): ([0.5] * 2, [0.6] * 2), ("tau", "3"): ([0.1] * 2, [0.6] * 2), ("tau", "5"): ([0.3] * 2, [0.6] * 2)}
    rows = rows_of(points)
    for row in rows:
        row["distinct_dropped"] = ""
    sweep = write_results(tmp_path / "some", rows)
    results = read(sweep)
    assert data.representatives(results) == {"none": "", "tau": "3"}
    results["agreement_distinct"] = results["agreement_distinct"].mask(results["method"] == "tau", 0.1)
    assert data.representatives(results) == {"none": "", "tau": "3"}
    time, dropped = charts.cost(data.summarize(results), results).panels
    assert time.lines and not dropped.lines
    page = write_sweep_report(sweep).read_text(encoding="utf-8")
    assert "nan%" not in page and (sweep / "figures" / "cost.png").exists()


def test_tradeoff_holds_the_means_of_both_groups_side_by_side(made):
    results = read(made)
    chart = charts.tradeoff(data.summarize(results), results, "memorization_rate")
    assert [panel.title for panel in chart.panels] == ["duplicate prompts", "distinct prompts"]
    distinct = {line.method: line for line in chart.panels[1].lines}
    tau = distinct["tau"]
    assert tau.notes == ["2.5", "10", HOSTILE[2]]
    for x, y, x_error, note in zip(tau.x, tau.y, tau.x_error, tau.notes, strict=True):
        rates, agreements = FIGURES["tau", note]
        assert (x, y) == pytest.approx((np.mean(agreements), np.mean(rates)))
        assert x_error == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(agreements))
    (first, second), ((x_low, x_high), (y_low, y_high)) = (chart.ranges()[i] for i in (0, 1))
    assert (first, second) == ((x_low, x_high), (y_low, y_high))  # or panels could not be compared by eye
    assert x_low < 0.2 and x_high > 0.7 and y_low <= 0 and y_high > 0.7


def test_page_and_file_draw_the_same_points(made):
    results = read(made)
    chart = charts.tradeoff(data.summarize(results), results, "copy_similarity")
    styles = drawing.styles_of(list(data.settings_of(results)))
    axes = drawing.as_matplotlib(chart, styles).axes
    for panel, axis, element in zip(chart.panels, axes, drawing.as_plotly(chart, styles), strict=True):
        drawn = [set(zip(*c.lines[0].get_data(), strict=True)) for c in axis.containers]
        assert drawn == [set(zip(line.x, line.y, strict=True)) for line in panel.lines]
        traces = json.JSONDecoder().raw_decode(element, element.index("[", element.index("Plotly.newPlot")))[0]
        assert [(trace["x"], trace["y"]) for trace in traces] == [(line.x, line.y) for line in panel.lines]
        assert {t["text"][0] for t in traces if t.get("text")} == {"none", "oracle"}
    assert len({(style.colour, style.symbol) for style in styles.values()}) == len(styles)


def test_notes_in_files_cover_neither_points_nor_each_other():
    rng = np.random.default_rng(0)
    notes = [f"setting {i}" for i in range(12)]
    lines = [charts.Line(method, *rng.uniform(0, 1, (2, 12)).tolist(), notes, [0.01] * 12, [0.01] * 12)
             for method in ("tau", "rta")]  # fmt: skip
    axis_of = charts.Axis("x")
    chart = charts.Chart("c", axis_of, [charts.Panel("p", axis_of, lines)], labelled=True)
    figure = drawing.as_matplotlib(chart, drawing.styles_of(["tau", "rta"]))
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    points = [axis.transData.transform(p) for line in lines for p in zip(line.x, line.y, strict=True)]
    assert len(boxes) > 12
    assert not any(a.count_overlaps([b]) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_drop_rates_are_means_of_the_same_line_of_all_seeds(made):
    results = read(made)
    rates = data.read_drop_rates(data.runs_of(results, data.representatives(results)))
    assert set(rates["method"]) == {"tau", "evidence"}
    duplicates, distinct = charts.drop_rate_chart(rates).panels
    for line in duplicates.lines:
        assert line.x == pytest.approx([102, 202, 302]) and line.y == pytest.approx([0.02, 0.22, 0.42])
    assert [line.y for line in distinct.lines] == [pytest.approx([0, 0.01, 0.02])] * 2
    table = list(csv.DictReader((made / "tables" / "drop_rates.csv").open(newline="")))
    assert len(table) == 2 * 3 * 2 * 3 and {row["setting"] for row in table} == {"10", HOSTILE[0]}


def test_seed_that_drops_nothing_counts_in_the_mean_of_a_setting_that_does(tmp_path):
    runs = []
    for method, seed, rate in (("tau", 1, 0.3), ("tau", 2, 0.0), ("tau", 3, 0.0), ("none", 1, 0.0)):
        run = tmp_path / f"{method}{seed}"
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps({"samples": 100, "filter/drop_rate_duplicates": rate}) + "\n")
        runs.append((method, "4", seed, str(run)))
    runs = pd.DataFrame(runs, columns=["method", "setting", "seed", "run"])
    (line,) = charts.drop_rate_chart(data.read_drop_rates(runs)).panels[0].lines
    assert line.method == "tau" and line.y == pytest.approx([0.1])
    assert data.read_drop_rates(runs[runs["method"] == "none"]).empty


def write_runs(sweep, change) -> pd.DataFrame:
    """Three runs of none and three of tau; ``change`` gets the row of each and what its evaluation.json says."""
    rows = [row for row in rows_of() if (row["method"], row["setting"]) in (("none", ""), ("tau", "10"))]
    for i, row in enumerate(rows):
        row["run"] = str(sweep / "runs" / str(i))
        write_run(sweep / "runs" / str(i), row["seed"], row["method"] == "tau", None)
        path = sweep / "runs" / str(i) / "evaluation.json"
        evaluation = json.loads(path.read_text())
        change(row, evaluation)
        path.write_text(json.dumps(evaluation))
    return read(write_results(sweep, rows))


def test_precision_and_recall_of_what_was_dropped_are_in_a_table_and_a_file(tmp_path):
    precision, auc = {1: 0.5, 2: 0.7, 3: None}, {1: 0.6, 2: 0.7, 3: 0.5}

    def judge(row, evaluation):
        drops = row["method"] == "tau"
        decisions = {"precision": precision[row["seed"]] if drops else None, "recall": 0.25 * drops, "auc": auc[row["seed"]]}
        evaluation["filter"] = {"whole": {"decisions": decisions}} if row["seed"] != 2 or drops else None

    write_runs(tmp_path / "sweep", judge)
    write_sweep_report(tmp_path / "sweep")
    table = {(row["method"], row["figure"]): row for row in csv.DictReader((tmp_path / "sweep/tables/decisions.csv").open())}
    assert set(table) == {("tau", name) for name in data.DECISIONS}  # none drops nothing
    ends = stats.t.interval(0.95, 2, loc=0.6, scale=stats.sem(list(auc.values())))
    found = table["tau", "auc"]
    assert (float(found["mean"]), float(found["low"]), float(found["high"])) == pytest.approx((0.6, *ends))
    (row,) = [row for row in Page(tmp_path / "sweep" / "report.html").rows if len(row) == 5 and row[0] == "tau"]
    half = 100 * stats.t.ppf(0.975, 1) * stats.sem([0.5, 0.7])
    assert row[1:4] == ["10", f"60.0% ± {half:.1f}% (n = 2)", "25.0% ± 0.0%"] and row[4].startswith("0.600 ±")


def test_agreement_and_the_limit_are_explained_by_what_the_evaluations_say(page, tmp_path):
    def text(page: Page) -> str:
        return " ".join(" ".join(element["text"] for element in page.all(tag)) for tag in ("p", "dd")).replace("\n", " ")

    assert "exceeds the limit of 0.900. Pictures" in text(page)
    assert "small scorer" not in text(page) and "CLIP" not in text(page)  # of which nothing is said there
    said = {"distinct": {"clip_score": 30.0}, "clip": "<script>alert(1)", "memorized_above_is": "the quantile over pairs of <b>"}
    write_runs(tmp_path, lambda row, evaluation: evaluation.update(said))
    write_sweep_report(tmp_path)
    found = text(Page(tmp_path / "report.html"))
    assert "by the CLIP <script>alert(1)." in found and "small scorer" not in found
    assert "0.900, the quantile over pairs of <b>." in found
    figure = data.explained({"agreement": "agreement", "clip": "some/clip"})["agreement_duplicates"]
    assert "by a small scorer of this project" in figure.meaning and "some/clip" not in figure.meaning


def test_agreement_by_the_scorer_and_by_clip_are_not_averaged(tmp_path):
    names = {1: "agreement", 2: "clip_score", 3: "agreement"}
    results = write_runs(tmp_path, lambda row, evaluation: evaluation.update(distinct={names[row["seed"]]: 0.5}))
    with pytest.raises(ReportError, match="agreement must be the same in all runs, found 'agreement' in .* 'clip_score'"):
        data.common_evaluation(results)


@pytest.mark.parametrize("basis", [OWN_LIMIT, "the usual one of the measure"])
def test_limit_may_differ_between_seeds_only_where_it_is_of_their_own_data(tmp_path, basis):
    limits = {1: 0.25, 2: 0.5, 3: 0.75}
    results = write_runs(tmp_path, lambda row, e: e.update(memorized_above=limits[row["seed"]], memorized_above_is=basis))
    if basis != OWN_LIMIT:
        with pytest.raises(ReportError, match=r"memorized_above must be the same in all runs, found 0.25 in .* and 0.5 in"):
            data.common_evaluation(results)
        return
    write_sweep_report(tmp_path)
    page = Page(tmp_path / "report.html")
    told = " ".join(element["text"] for element in page.all("p")).replace("\n", " ")
    assert f"exceeds its run's limit of 0.250 to 0.750, {OWN_LIMIT}. " in told
    asked = json.loads((tmp_path / "runs" / "0" / "evaluation.json").read_text())["prompts"]  # of seed 1, which is shown
    duplicates = [prompt for prompt in asked if prompt["duplicate"]][:PROMPTS]
    copies = sum(similarity > 0.25 for prompt in duplicates for similarity in prompt["similarity"][:SHOTS])
    framed = [e for e in page.all("div") if "copy" in e["attrs"].get("class", "").split()]
    assert len(framed) == 2 * copies  # of none and tau
    path = tmp_path / "runs" / "3" / "evaluation.json"
    path.write_text(path.read_text().replace('"memorized_above": 0.25', '"memorized_above": 0.26'))
    with pytest.raises(ReportError, match=r"in all runs of a seed, found 0.25 in .*runs/0 and 0.26 in .*runs/3"):
        data.common_evaluation(results)


def test_duplicate_whose_training_picture_could_not_be_read_is_not_in_the_gallery(tmp_path):
    write_runs(tmp_path, lambda row, evaluation: evaluation["prompts"][0].update(similarity=[None] * 5))
    write_sweep_report(tmp_path)
    shown = [element["text"] for element in Page(tmp_path / "report.html").all("bdi")]
    assert HOSTILE[1] in shown and HOSTILE[0] not in shown


@pytest.mark.parametrize("keys", ["none", "some"])
def test_sweep_over_prompts_of_a_file_is_reported(tmp_path, keys):
    def forget(row, evaluation):
        for i, prompt in enumerate(evaluation["prompts"]):
            if keys == "none":
                prompt.update(key=None, duplicate=None)
                del prompt["similarity"]
                evaluation.update(memorized_above=None, memorized_above_is=None)
            elif i == 0:
                prompt.update(key=None, duplicate=None, similarity=[None] * 5)

    write_runs(tmp_path, forget)
    write_sweep_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert ("Memorized" in {element["text"] for element in page.all("strong")}) == (keys == "some")
    assert len(page.all("article")) == (PROMPTS if keys == "some" else 0)
    assert "Pictures were made in 20 sampling steps" in " ".join(element["text"] for element in page.all("p"))


def test_many_methods_look_different():
    known = ["base", "none", "oracle", "tau", "timestep", "evidence", "agc", "rta", "dedup", "sightings"]
    styles = drawing.styles_of([*known, *(f"agc+{i}" for i in range(35))])
    assert len({(style.colour, style.symbol) for style in styles.values()}) == len(styles)
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(styles)
    assert styles["base"] == drawing.styles_of(["agc+rta", "base"])["base"] and all(s.svg_path() for s in styles.values())


def auc_by_hand(duplicates: list[float], distinct: list[float]) -> float:
    """The share of pairs in which the duplicate scores higher; ties are half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in duplicates for b in distinct]
    return sum(pairs) / len(pairs)


def one_run(tmp_path, audit: dict) -> pd.DataFrame:
    pq.write_table(pa.table(audit), tmp_path / "audit.parquet")
    return pd.DataFrame([("m", "s", 1, str(tmp_path))], columns=["method", "setting", "seed", "run"])


def test_auc_of_the_norm_is_that_of_pairs_within_each_bin_of_the_last_half(tmp_path):
    rng = np.random.default_rng(3)
    audit = {"position": np.arange(600), "key": [str(i) for i in range(600)], "duplicate": rng.random(600) < 0.3,
             "timestep": rng.integers(0, 300, 600), "text_norm": rng.integers(0, 6, 600).astype(np.float32)}  # fmt: skip
    audit["text_norm"][:300] = np.where(audit["duplicate"][:300], 100, 0)
    audit["timestep"][audit["duplicate"] & (audit["timestep"] >= 200)] = 50  # the last bin has distinct samples only
    found = data.read_classifiers(one_run(tmp_path, audit))
    assert found["timestep"].tolist() == [0, 100] and set(found["score"]) == {"norm"}
    for start, auc in zip(found["timestep"], found["auc"], strict=True):
        inside = [i for i in range(300, 600) if start <= audit["timestep"][i] < start + 100]
        sides = [[audit["text_norm"][i] for i in inside if audit["duplicate"][i] == kind] for kind in (True, False)]
        assert auc == pytest.approx(auc_by_hand(*sides))


def test_sample_that_was_passed_over_counts_with_the_last_evidence_of_its_key(tmp_path):
    # a duplicate d, and distinct ones of evidence 1 and 3; d's evidence is 2, and is looked at once only
    audit = {"position": [0, 1, 2, 3, 4, 5], "key": ["d", "u", "d", "a", "b", "d"], "timestep": [5] * 6,
             "duplicate": [True, False, True, False, False, True], "text_norm": [None, None, None, 9.0, 9.0, None],
             "evidence": [2.0, None, None, 1.0, 3.0, None]}  # fmt: skip
    found = data.read_classifiers(one_run(tmp_path, audit))
    assert found[["score", "timestep"]].values.tolist() == [["evidence", 0]]
    assert found["auc"].item() == auc_by_hand([2.0], [1.0, 3.0]) == 0.5


def test_classifier_is_drawn_for_what_judges_only(made):
    results = read(made)
    chart = charts.classifier_chart(data.read_classifiers(data.runs_of(results, data.representatives(results))))
    lines = {line.method: line for line in chart.panels[0].lines}
    assert list(lines) == ["tau", "evidence"] and lines["tau"].notes[0] == "10, norm"
    assert all(0 <= y <= 1 for line in lines.values() for y in line.y)
    assert lines["tau"].x[0] == 50


def test_captions_settings_and_names_are_text(made, page):
    text = [element["text"] for element in page.all("bdi")]
    for shown in (*HOSTILE[:3], "\\ud800 half \\u202e a character", "<i>study", "0\" onload='alert(3)'"):
        assert shown in text, shown
    scripts = [element["text"] for element in page.all("script")]
    assert not any("alert(" in script and "<script" in script for script in scripts)
    assert not any(name.startswith("on") for element in page.elements for name in element["attrs"])
    assert not page.all("i") and not page.all("b")
    links = [link for element in page.elements for name, link in element["attrs"].items() if name in ("src", "href")]
    assert links and all(link.startswith("data:") for link in links)


def test_gallery_shows_the_same_duplicates_for_every_method(made, page):
    methods = len({method for method, _ in FIGURES})
    assert len(page.all("article")) == PROMPTS
    assert len(page.all("img")) == PROMPTS * (1 + methods * SHOTS)
    asked = json.loads((made / "runs" / "0" / "evaluation.json").read_text())["prompts"]
    duplicates = [prompt for prompt in asked if prompt["duplicate"]][:PROMPTS]
    shown = [e["text"].split("\n")[0] for e in page.all("bdi") if e["text"] in {p["key"] for p in duplicates}]
    assert shown == [p["key"] for p in duplicates]
    copies = sum(similarity > 0.9 for p in duplicates for similarity in p["similarity"][:SHOTS])
    framed = [e for e in page.all("div") if "copy" in e["attrs"].get("class", "").split()]
    assert copies and len(framed) == copies * methods


def test_gallery_takes_the_seed_with_the_most_methods_and_the_prompts_that_all_have(tmp_path):
    runs = []
    for method, seed in (("none", 1), ("none", 2), ("tau", 2)):
        write_run(tmp_path / f"{method}{seed}", seed, False, None)
        runs.append((method, "", seed, str(tmp_path / f"{method}{seed}")))
    path = tmp_path / "tau2" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["prompts"][1]["caption"] = "another"
    path.write_text(json.dumps(evaluation))
    seed, prompts = data.read_gallery(pd.DataFrame(runs, columns=["method", "setting", "seed", "run"]), 3)
    assert seed == 2 and [prompt.caption for prompt in prompts] == [HOSTILE[0], HOSTILE[2], HOSTILE[3]]
    with np.load(tmp_path / "tau2" / "evaluation.npz") as pictures:
        for i, prompt in zip((0, 2, 3), prompts, strict=True):
            generations, similarity = prompt.generations["tau"]
            np.testing.assert_array_equal(prompt.training, pictures["training"][i])
            np.testing.assert_array_equal(generations, pictures["generations"][i])
            assert similarity == evaluation["prompts"][i]["similarity"]


def test_large_pictures_are_made_small(made):
    run = data.runs_of(read(made), {"none": ""}).iloc[:1]
    _, prompts = data.read_gallery(run, PROMPTS)
    for prompt in prompts:
        prompt.training = prompt.training.repeat(32, 0).repeat(32, 1)  # 512 px
    shown = gallery(prompts, {"none": ""})
    sizes = [Image.open(BytesIO(b64decode(row["training"].split(",")[1]))).size for row in shown]
    assert sizes == [(4 * SIDE, 4 * SIDE)] * PROMPTS


def test_figures_are_pictures(made):
    for name in CHARTS:
        with Image.open(made / "figures" / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 500 and 0.01 < (pixels < 200).any(-1).mean() < 0.5


def test_runs_that_have_gone_are_named_and_the_table_stays(made, tmp_path, caplog):
    rows = list(csv.DictReader((made / "results.csv").open(newline="", encoding="utf-8")))
    rows = [row for row in rows if row["method"] in ("none", "tau")]
    moved = [row | {"run": str(tmp_path / "gone")} if row["method"] == "tau" else row for row in rows]
    sweep = write_results(tmp_path / "sweep", moved)
    write_sweep_report(sweep, tmp_path / "elsewhere" / "page.html")
    page = Page(tmp_path / "elsewhere" / "page.html")
    assert "9 of 12 runs" in caplog.text and not (sweep / "report.html").exists()
    assert any("9 of 12 runs are no longer" in element["text"] for element in page.all("strong"))
    assert any(row[:2] == ["tau", "2.5"] for row in page.rows)
    assert len(page.all("img")) == PROMPTS * (1 + SHOTS)  # tau is not in the gallery


def test_table_without_runs_and_costs_is_reported_and_figures_of_an_earlier_state_go(made, tmp_path, capsys):
    rows = [row | {"time_ratio": "", "distinct_dropped": ""} for row in rows_of()]
    sweep = write_results(tmp_path / "study", rows, [name for name in COLUMNS if name != "run"])
    shutil.copytree(made / "figures", sweep / "figures")
    assert main(["report", str(sweep), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "page.html")]
    assert {p.stem for p in (sweep / "figures").iterdir()} == {"tradeoff_copy_similarity", "tradeoff_memorization_rate"}
    page = Page(tmp_path / "page.html")
    assert page.all("img") == [] and "What that costs" not in {element["text"] for element in page.all("h3")}


def _break(sweep, what: str) -> None:
    rows, run = rows_of(), sweep / "runs" / "0"
    write_run(run, 1, True, "norm")
    for row in rows[:3]:
        row["run"] = str(run)
    columns = COLUMNS
    if what == "column":
        columns = [name for name in COLUMNS if name != "time_ratio"]
    elif what == "empty":
        rows = []
    elif what == "number":
        rows[1]["copy_similarity"] = "much"
    elif what == "twice":
        rows.append(rows[0])
    elif what == "seed":
        rows[0]["seed"] = ""
    elif what == "json":
        (run / "evaluation.json").write_text('{"measure": ')
    elif what == "key":
        (run / "evaluation.json").write_text("{}")
    elif what in ("prompt", "no prompt", "decisions"):
        evaluation = json.loads((run / "evaluation.json").read_text())
        prompts = {"prompt": [{"key": "a", "caption": "b"}], "no prompt": [1]}.get(what, evaluation["prompts"])
        changed = evaluation | {"prompts": prompts, "filter": {"thirds": []}}
        (run / "evaluation.json").write_text(json.dumps(changed))
    elif what == "npz":
        (run / "evaluation.npz").write_bytes((run / "evaluation.npz").read_bytes()[:500])
    elif what == "shape":
        blank = np.zeros((2, 1, 4, 4, 3), np.uint8)
        np.savez(run / "evaluation.npz", training=blank[:, 0], generations=blank)
    elif what == "audit":
        (run / "audit.parquet").write_bytes(b"PAR1")
    elif what == "metrics":
        (run / "metrics.jsonl").write_text('{"samples": 1, "filter/drop_rate_distinct": "all"}\n')
    elif what == "unlike":
        write_run(sweep / "runs" / "1", 1, True, "norm")
        rows[3]["run"] = str(sweep / "runs" / "1")
        path = sweep / "runs" / "1" / "evaluation.json"
        path.write_text(path.read_text().replace("0.9,", "0.8,", 1))
    write_results(sweep, rows, columns)
    if what == "bytes":
        (sweep / "results.csv").write_bytes(b"method,setting\n\xff\xfe,\n")
    elif what == "no table":
        (sweep / "results.csv").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no table", "is not a sweep: it has no results.csv"),
        ("bytes", "results.csv cannot be read"),
        ("column", "results.csv lacks the columns time_ratio"),
        ("empty", "results.csv has no rows"),
        ("number", "results.csv cannot be read: Unable to parse string 'much'"),
        ("twice", "two rows of method 'none', setting '', seed 1"),
        ("seed", "rows without a seed"),
        ("json", "evaluation.json cannot be read"),
        ("key", "evaluation.json lacks 'measure'"),
        ("prompt", "evaluation.json lacks 'duplicate'"),
        ("no prompt", "evaluation.json cannot be read"),
        ("decisions", "evaluation.json lacks 'whole'"),
        ("npz", "evaluation.npz cannot be read"),
        ("shape", "does not fit evaluation.json"),
        ("audit", "audit.parquet cannot be read"),
        ("metrics", "metrics.jsonl cannot be read"),
        ("unlike", "memorized_above must be the same in all runs, found 0.9"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_named_in_one_line_and_the_old_page_stays(tmp_path, capsys, what, message):
    _break(tmp_path, what)
    (tmp_path / "report.html").write_text("old")
    assert main(["report", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "of 24 runs are not where" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert (tmp_path / "report.html").read_text() == "old" and not list(tmp_path.glob(".report*"))


def test_command_still_takes_two_runs(tmp_path, capsys):
    assert main(["report", str(tmp_path / "off"), str(tmp_path / "on"), str(tmp_path / "page.html")]) == 1
    assert "off/metrics.jsonl is missing" in capsys.readouterr().err


@needs_chromium
def test_browser_shows_hostile_text_as_text_and_asks_nobody(made, tmp_path):
    # the label of a point appears when it is pointed at
    pointed = {"tradeoff_memorization_rate-1": (1, 2), "tradeoff_memorization_rate-0": (2, 0), "cost-1": (2, 1)}
    hover = "".join(f"<script>Plotly.Fx.hover('{name}', [{{curveNumber: {curve}, pointNumber: {point}}}]);"
                    f"document.body.append(document.querySelector('#{name} .hoverlayer').textContent)</script>"
                    for name, (curve, point) in pointed.items())  # fmt: skip
    page = (made / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</body>", hover + "</body>"), encoding="utf-8")
    dom, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert (console, asked) == ([], [])
    for name in ("tradeoff_copy_similarity-0", "tradeoff_memorization_rate-1", "cost-1", "drop_rates-0", "classifier-0"):
        drawn = dom.split(f'id="{name}"')[1].split("</figure>")[0]
        assert 'class="main-svg"' in drawn and "scatterlayer" in drawn
    body = dom.split("<body>")[1]
    end = body[body.rindex("</section>") :]
    for text in HOSTILE[:3]:
        assert html.escape(text, quote=False) in body
        assert html.escape(text, quote=False) in end, f"not in a label: {text}"
    assert "<img src=\"x\"" not in body and "alert(2)>" not in body
