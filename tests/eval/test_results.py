"""Figures of a run."""

import json

import pytest

from memfilter.eval.results import read_figures


@pytest.mark.parametrize(("summary", "dropped"), [
    ({}, 0.0),
    ({"filter/drop_rate_distinct": 0.2}, 0.2),
    ({"data/distinct_left_out": 0.1}, 0.1),
    ({"data/distinct_left_out": 0.1, "filter/drop_rate_distinct": 0.2}, 0.28),  # of what is left a fifth
])  # fmt: skip
def test_distinct_samples_that_were_left_out_before_count_as_dropped(tmp_path, summary, dropped):
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"cpu_seconds": 1.0}))
    (tmp_path / "evaluation.json").write_text("{}")
    assert read_figures(tmp_path)["distinct_dropped"] == pytest.approx(dropped)
