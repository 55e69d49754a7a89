"""The page is read with html.parser and, where there is one, with Chromium; the runs are made up here."""

import html
import json
from base64 import b64decode
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Page, browse, needs_chromium
from PIL import Image

from memfilter.eval.charts import by_timestep, norm_chart
from memfilter.eval import report
from memfilter.eval.report import SIDE, ReportError, Run, write_report

SEEDS, SAMPLES = 4, 400
PROMPTS = [
    {"key": "000000003", "caption": "a cat on a red background", "duplicate": False},
    {"key": "000000001", "caption": "<script>alert(1)</script>", "duplicate": True},
    {"key": "000000002\" onload='alert(3)'", "caption": "<img src=x onerror=alert(2)>", "duplicate": True},
]
SIMILARITY = {"off": [[0.1] * 4, [0.95, 0.96, 0.5, 0.97], [0.91, 0.2, 0.2, 0.2]],
              "on": [[0.1] * 4, [0.3, 0.96, 0.5, 0.2], [0.899, 0.2, 0.2, 0.2]]}  # fmt: skip
# by hand from SIMILARITY and the limit of 0.9: 4 of 8 duplicates' generations, then 1 of 8
FIGURES = {"off": (0.5, 0.6111, 0.7222, 0.8333), "on": (0.125, 0.4111, 0.8222, 0.5333)}
DROP_RATE = {"off": 0.0, "on": 0.4321}


def _audit(rng: np.random.Generator) -> pa.Table:
    """Norms of 100 in the first half of the run; in the second, duplicates 5 .. 7 and distinct ones 1 .. 3."""
    position = np.arange(SAMPLES)
    duplicate = position % 2 == 0
    norm = np.where(position < SAMPLES // 2, 100, rng.uniform(1, 3, SAMPLES) + 4 * duplicate)
    return pa.table({
        "position": position, "key": [f"{p:09d}" for p in position], "duplicate": duplicate,
        "timestep": rng.integers(0, 1000, SAMPLES).astype(np.int32), "text_norm": norm.astype(np.float32),
        "keep": norm < 4,
    })  # fmt: skip


def _write_run(directory, side: str, tau: float | None):
    rng = np.random.default_rng(1)
    directory.mkdir(parents=True)
    rates = {"filter/drop_rate_duplicates": DROP_RATE[side], "filter/drop_rate_distinct": 0.0432}
    lines = [{"samples": 200, "loss": 0.1}, {"samples": 400, "loss": 0.1, **rates}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(_audit(rng), directory / "audit.parquet")
    config = {"model": {"path": "scenes"}, "data": {"workers": len(side)}, "train": {"samples": SAMPLES, "seed": 0},
              "filter": {"tau": tau, "unit": "l2"}}  # fmt: skip
    summary = {"samples": SAMPLES, "seconds": 1234.4, **rates, "config": config}
    (directory / "summary.json").write_text(json.dumps(summary))
    names = ("memorization_rate", "copy_similarity", "agreement", "seed_agreement")
    evaluation = {"measure": "pixel correlation", "memorized_above": 0.9, "steps": 20, "guidance_scale": 4.0}
    evaluation["prompts"] = [{**prompt, "similarity": similarity, "agreement": [0.9] * SEEDS, "seed_agreement": 0.5}
                             for prompt, similarity in zip(PROMPTS, SIMILARITY[side], strict=True)]  # fmt: skip
    evaluation["duplicates"] = dict(zip(names, FIGURES[side], strict=True))
    evaluation["distinct"] = dict(zip(names, (0.0, 0.1, float("nan"), 0.5), strict=True))
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    training = rng.integers(0, 256, (len(PROMPTS), 32, 32, 3), dtype=np.uint8)
    generations = rng.integers(0, 256, (len(PROMPTS), SEEDS, 32, 32, 3), dtype=np.uint8)
    np.savez(directory / "evaluation.npz", generations=generations, training=training)
    return directory


def _edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    return _write_run(tmp_path / "off", "off", float("inf")), _write_run(tmp_path / "on", "on", 4.0)


def lines_of(page: Page, label: str) -> list[list[str]]:
    """The lines (group, off, on) of a headline figure."""
    start = next(i for i, row in enumerate(page.rows) if row and row[0].startswith(label))
    return [page.rows[start][1:], page.rows[start + 1]]


@pytest.fixture
def page(runs, tmp_path):
    write_report(*runs, tmp_path / "new" / "report.html")
    return Page(tmp_path / "new" / "report.html")


def test_headline_figures_stand_in_the_table(page):
    assert lines_of(page, "Memorization rate") == [["duplicates", "50.0%", "12.5%"], ["distinct", "0.0%", "0.0%"]]
    assert lines_of(page, "Copy similarity")[0] == ["duplicates", "0.61", "0.41"]
    assert lines_of(page, "Agreement") == [["duplicates", "0.72", "0.82"], ["distinct", "–", "–"]]
    assert lines_of(page, "Seed agreement")[0] == ["duplicates", "0.83", "0.53"]
    assert lines_of(page, "Drop rate") == [["duplicates", "0.0%", "43.2%"], ["distinct", "4.3%", "4.3%"]]
    assert lines_of(page, "Training seconds")[0] == ["whole run", "1,234", "1,234"]


def test_captions_and_keys_are_text(page):
    text = [element["text"] for element in page.all("bdi")]
    for prompt in PROMPTS:
        assert prompt["caption"] in text and prompt["key"] in text
    assert not any("alert(" in element["text"] for element in page.all("script"))
    assert not any(name.startswith("on") for element in page.elements for name in element["attrs"])


def test_every_picture_is_there_and_nothing_comes_from_elsewhere(page):
    images = page.all("img")
    assert len(images) == len(PROMPTS) * (1 + 2 * SEEDS)
    assert all(image["attrs"]["src"].startswith("data:image/png;base64,") and image["attrs"]["alt"] for image in images)
    links = [link for element in page.elements for name, link in element["attrs"].items() if name in ("src", "href")]
    assert all(link.startswith("data:") for link in links)


def test_gallery_shows_duplicates_first_and_marks_copies_with_words(page):
    rows = {row[0]: row for row in page.rows if len(row) == 2 + 2 * SEEDS}
    captions = [prompt["caption"] + prompt["key"] for prompt in PROMPTS]
    assert list(rows) == [captions[1], captions[2], captions[0]]
    assert rows[captions[1]][2:] == ["0.95 copy", "0.96 copy", "0.50", "0.97 copy", "0.30", "0.96 copy", "0.50", "0.20"]
    marked = [element for element in page.all("div") if "copy" in element["attrs"].get("class", "").split()]
    assert len(marked) == 5  # 4 without the filter, 1 with it
    assert sum("a copy" in image["attrs"]["alt"] for image in page.all("img")) == 5


def test_gallery_shows_the_first_prompts_of_each_kind_no_larger_than_a_screen_does(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PROMPTS", 1)
    for run in runs:
        with np.load(run / "evaluation.npz") as pictures:
            larger = {name: pictures[name].repeat(16, -3).repeat(16, -2) for name in pictures}  # 512 px
        np.savez(run / "evaluation.npz", **larger)
    write_report(*runs, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [row[0] for row in page.rows if len(row) == 1] == ["Duplicates: the first 1 of 2", "Distinct"]
    shown = [row[0] for row in page.rows if len(row) == 2 + 2 * SEEDS]
    assert shown == [PROMPTS[i]["caption"] + PROMPTS[i]["key"] for i in (1, 0)]
    for image in page.all("img"):
        picture = Image.open(BytesIO(b64decode(image["attrs"]["src"].split(",")[1])))
        assert picture.size == (2 * SIDE, 2 * SIDE) and image["attrs"]["width"] == str(SIDE)


def test_prompt_whose_training_picture_could_not_be_read_is_shown_without(runs, tmp_path):
    ask(runs, lambda i, prompt: i == 1 and prompt.update(similarity=[None] * SEEDS))
    write_report(*runs, tmp_path / "report.html")
    (row,) = [r for r in Page(tmp_path / "report.html").rows if r and r[0] == PROMPTS[1]["caption"] + PROMPTS[1]["key"]]
    assert row[1:] == ["–"] * (1 + 2 * SEEDS)


def test_limit_and_agreement_are_explained_by_what_the_evaluations_say(runs, tmp_path):
    def text() -> str:
        write_report(*runs, tmp_path / "report.html")
        page = Page(tmp_path / "report.html")
        return " ".join(" ".join(element["text"] for element in page.all(tag)) for tag in ("p", "small")).replace("\n", " ")

    assert "exceeds the limit of 0.900. " in text()
    for run in runs:
        _edit(run / "evaluation.json", lambda e: e.update(memorized_above_is="the usual one of <b>"))
    assert "exceeds the limit of 0.900, the usual one of <b>. " in text()
    assert "by a small scorer of this project" in text() and "by the CLIP" not in text()
    for run in runs:
        _edit(run / "evaluation.json", lambda e: e.update(clip="<b>{x}\u202e"))
        _edit(run / "evaluation.json", lambda e: [e[kind].update(clip_score=25.5) for kind in ("duplicates", "distinct")])
        _edit(run / "evaluation.json", lambda e: [e[kind].pop("agreement") for kind in ("duplicates", "distinct")])
    assert "by the CLIP <b>{x}\\u202e." in text() and "small scorer" not in text()
    assert lines_of(Page(tmp_path / "report.html"), "CLIP score")[0] == ["duplicates", "25.50", "25.50"]
    for name, value in (("sha256", "ab"), ("near_copies", 10)):
        _edit(runs[0] / "evaluation.json", lambda e, name=name, value=value: e.update({name: value}))
        with pytest.raises(ReportError, match=f"{name} must be the same"):
            text()
        _edit(runs[0] / "evaluation.json", lambda e, name=name: e.pop(name))
    _edit(runs[0] / "evaluation.json", lambda e: e.update(clip="another"))
    with pytest.raises(ReportError, match="clip must be the same"):
        text()


def ask(runs, change) -> None:
    """As if prompts of a file had been evaluated: ``change`` gets each with its number."""
    for run in runs:
        _edit(run / "evaluation.json", lambda e: [change(i, prompt) for i, prompt in enumerate(e["prompts"])])


def test_prompts_of_which_nothing_is_known_are_shown_as_such(runs, tmp_path):
    ask(runs, lambda i, prompt: (prompt.update(key=None, duplicate=None), prompt.pop("similarity")))
    for run in runs:
        _edit(run / "evaluation.json", lambda e: e.update(memorized_above=None, memorized_above_is=None, duplicates={},
                                                          distinct={}, unknown={"seed_agreement": 0.25}))  # fmt: skip
        _edit(run / "summary.json", lambda s: [s.pop(f"filter/drop_rate_{group}") for group in ("duplicates", "distinct")])
        _edit(run / "summary.json", lambda s: s.update({"filter/drop_rate": 0.125}))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [{"samples": row["samples"], "filter/drop_rate": 0.125} for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        audit = pq.read_table(run / "audit.parquet")
        unknown = pa.nulls(len(audit), pa.bool_())
        pq.write_table(audit.set_column(audit.column_names.index("duplicate"), "duplicate", unknown), run / "audit.parquet")
    write_report(*runs, tmp_path / "report.html")
    text, page = (tmp_path / "report.html").read_text(), Page(tmp_path / "report.html")
    assert "3 prompts\n(3 unknown)" in text and "Memorized</strong>" not in text
    assert lines_of(page, "Seed agreement")[0] == ["unknown", "0.25", "0.25"]
    assert lines_of(page, "Drop rate")[0] == ["all samples", "12.5%", "12.5%"]
    assert not any(row and row[0].startswith("Memorization rate") for row in page.rows)
    assert [row for row in page.rows if len(row) == 1] == [["Unknown"]]
    assert len(page.all("img")) == len(PROMPTS) * 2 * SEEDS  # none has a training picture
    assert "No norm was measured" not in text and '"y":[0.125,0.125]' in text


def test_prompts_with_and_without_keys_have_groups_of_their_own(runs, tmp_path):
    ask(runs, lambda i, prompt: i == 1 and prompt.update(key=None, duplicate=None, similarity=[None] * SEEDS))
    write_report(*runs, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [row[0] for row in page.rows if len(row) == 1] == ["Duplicates", "Distinct", "Unknown"]
    (unknown,) = [row for row in page.rows if len(row) == 2 + 2 * SEEDS and row[0] == PROMPTS[1]["caption"]]
    assert unknown[1:] == ["–"] * (1 + 2 * SEEDS)
    assert lines_of(page, "Memorization rate")[1] == ["distinct", "0.0%", "0.0%"]


def test_pictures_that_do_not_fit_their_evaluation_are_told(runs, tmp_path):
    ask(runs, lambda i, prompt: prompt.update(similarity=[0.5] * (SEEDS - 1)))
    with pytest.raises(ReportError, match=r"off/evaluation.npz does not fit evaluation.json: 3 prompts, found .*\(3, 4\)"):
        write_report(*runs, tmp_path / "report.html")


def test_norms_are_those_of_the_last_half_of_the_run(runs):
    run = Run.read(runs[0])
    panel = by_timestep(run.audit, run.summary["samples"])
    table = pq.read_table(runs[0] / "audit.parquet").to_pydict()
    late = [i for i in range(SAMPLES // 2, SAMPLES)]
    for group, duplicate in (("duplicates", True), ("distinct", False)):
        assert sum(row[-1] for row in panel[group]) == SAMPLES // 4
        for number, low, median, high, count in panel[group]:
            norms = sorted(table["text_norm"][i] for i in late
                           if table["duplicate"][i] == duplicate and table["timestep"][i] // 100 == number)  # fmt: skip
            assert count == len(norms) and norms[0] <= low <= median <= high <= norms[-1]
            middle = (norms[(count - 1) // 2] + norms[count // 2]) / 2
            assert median == pytest.approx(middle)


def test_tau_is_a_horizontal_line_in_both_norm_charts(runs):
    for directory in runs:
        run = Run.read(directory)
        (line,) = norm_chart(by_timestep(run.audit, run.summary["samples"]), 4.0, 8.0, "l2").layout.shapes
        assert (line.y0, line.y1, line.yref, line.line.dash) == (4.0, 4.0, "y", "dash")


def test_run_that_measured_nothing_still_gets_a_page(runs, tmp_path):
    off, on = runs
    _edit(off / "summary.json", lambda s: s["config"]["filter"].update(tau=None))
    _edit(off / "summary.json", lambda s: s.pop("filter/drop_rate_duplicates"))
    pq.write_table(_audit(np.random.default_rng(1))[:0], off / "audit.parquet")
    write_report(off, on, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "No norm was measured" in text and 'id="norms-on"' in text and 'id="norms-off"' not in text
    assert lines_of(Page(tmp_path / "report.html"), "Drop rate")[0] == ["duplicates", "–", "43.2%"]


def test_what_cannot_be_compared_is_named_all_at_once_and_the_old_page_stays(runs, tmp_path):
    off, on = runs
    out = tmp_path / "report.html"
    out.write_text("old")
    _edit(on / "summary.json", lambda s: s["config"]["train"].update(seed=7))
    _edit(on / "evaluation.json", lambda e: e.update(steps=50) or e["prompts"][0].update(caption="another"))
    with pytest.raises(ReportError) as raised:
        write_report(off, on, out)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert "train.seed" in lines[0] and "0 and 7" in lines[0] and "steps" in lines[1] and "prompts" in lines[2]
    assert out.read_text() == "old" and not list(tmp_path.glob(".report*"))


def test_runs_under_different_mitigations_are_refused(runs, tmp_path):
    _edit(runs[1] / "summary.json", lambda s: s["config"].update(mitigation={"random_tokens": 4}))
    with pytest.raises(ReportError, match="mitigation.random_tokens must be the same in .*, found None and 4"):
        write_report(*runs, tmp_path / "report.html")


def test_runs_in_the_wrong_order_are_refused(runs, tmp_path):
    with pytest.raises(ReportError, match=r"(?s)without filter.*found 4\.0.*with the filter.*found inf"):
        write_report(*reversed(runs), tmp_path / "report.html")


def test_missing_files_are_named(runs, tmp_path):
    (runs[1] / "evaluation.npz").unlink()
    with pytest.raises(ReportError, match=r"on/evaluation\.npz is missing"):
        write_report(*runs, tmp_path / "report.html")


@needs_chromium
def test_browser_notices_errors_and_requests(tmp_path):
    (tmp_path / "page.html").write_text('<img src="http://127.0.0.1:9/x.png"><script>nothing()</script>')
    _, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert "nothing is not defined" in console[0] and asked == ["http://127.0.0.1:9/x.png"]


@needs_chromium
def test_browser_draws_the_charts_without_an_error(runs, tmp_path):
    write_report(*runs, tmp_path / "report.html")
    dom, console, asked = browse(tmp_path / "report.html", tmp_path)
    assert (console, asked) == ([], [])
    for chart in ("drop-rates", "norms-off", "norms-on"):
        drawn = dom.split(f'id="{chart}"')[1].split("</figure>")[0]
        assert 'class="main-svg"' in drawn and "scatterlayer" in drawn
    assert dom.count("tau = 4<") >= 2
    assert html.escape(PROMPTS[2]["caption"], quote=False) in dom
