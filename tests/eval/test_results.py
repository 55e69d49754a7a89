"""Figures of a run."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from memfilter.eval.results import read_figures, write_results


@pytest.mark.parametrize(("summary", "dropped"), [
    ({}, 0.0),
    ({"filter/drop_rate_distinct": 0.2}, 0.2),
    ({"data/distinct_left_out": 0.1}, 0.1),
    ({"samples": 0}, 1.0),  # the model as it was has learnt from none
    ({"data/distinct_left_out": 0.1, "filter/drop_rate_distinct": 0.2}, 0.28),  # of what is left a fifth
    # half of the captions were dropped, so half of the appearances have no verdict
    ({"filter/seen_distinct": 100, "filter/dropped_distinct": 25, "filter/drop_rate_distinct": 0.5}, 0.25),
    ({"filter/seen_distinct": 0, "filter/dropped_distinct": 0}, 0.0),
    ({"filter/seen": 100, "filter/seen_duplicates": 100, "filter/seen_distinct": 0, "filter/dropped_distinct": 0}, 0.0),
    # roles are not known: whatever was dropped, nobody knows of which
    ({"filter/seen": 100, "filter/dropped": 50, "filter/seen_duplicates": 0, "filter/seen_distinct": 0}, None),
])  # fmt: skip
def test_distinct_samples_that_were_left_out_before_count_as_dropped(tmp_path, summary, dropped):
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"cpu_seconds": 1.0}))
    (tmp_path / "evaluation.json").write_text("{}")
    assert read_figures(tmp_path)["distinct_dropped"] == (dropped if dropped is None else pytest.approx(dropped))


def test_agreement_is_by_the_scorer_or_else_by_clip(tmp_path):
    (tmp_path / "summary.json").write_text('{"cpu_seconds": 1.0}')
    for figures, expected in (({"agreement": 0.5, "clip_score": 30.0}, 0.5), ({"clip_score": 30.0}, 30.0), ({}, None)):
        (tmp_path / "evaluation.json").write_text(json.dumps({"duplicates": figures, "distinct": figures}))
        found = read_figures(tmp_path)
        assert found["agreement_duplicates"] == found["agreement_distinct"] == expected


def test_columns_of_parquet_have_one_type_and_nothing_stays_nothing(tmp_path):
    swept = [
        {"filter.tau": 3.0, "train.batch_size": 8, "data.path": "a", "mixed": True},
        {"filter.tau": None, "train.batch_size": 2.5, "data.path": None, "mixed": 1},
    ]
    write_results([{"method": "tau", "setting": "", "seed": 1} | row for row in swept], tmp_path)
    table = pq.read_table(tmp_path / "results.parquet").to_pydict()
    assert table["filter.tau"] == [3.0, None] and table["train.batch_size"] == [8.0, 2.5]
    assert table["data.path"] == ["a", None] and table["mixed"] == ["True", "1"]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["filter.tau"] for row in csv.DictReader(file)] == ["3.0", ""]


def test_run_that_is_not_finished_is_told(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    for content in ("", "{}"):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(ValueError, match="is no run that was evaluated"):
            read_figures(tmp_path)
