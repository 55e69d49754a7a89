"""Figures of a run."""

import json

import pytest

from memfilter.eval.results import read_figures


@pytest.mark.parametrize(("summary", "dropped"), [
    ({}, 0.0),
    ({"filter/drop_rate_distinct": 0.2}, 0.2),
    ({"data/distinct_left_out": 0.1}, 0.1),
    ({"samples": 0}, 1.0),  # the model as it was has learnt from none
    ({"data/distinct_left_out": 0.1, "filter/drop_rate_distinct": 0.2}, 0.28),  # of what is left a fifth
])  # fmt: skip
def test_distinct_samples_that_were_left_out_before_count_as_dropped(tmp_path, summary, dropped):
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"cpu_seconds": 1.0}))
    (tmp_path / "evaluation.json").write_text("{}")
    assert read_figures(tmp_path)["distinct_dropped"] == pytest.approx(dropped)


def test_agreement_is_by_the_scorer_or_else_by_clip(tmp_path):
    (tmp_path / "summary.json").write_text('{"cpu_seconds": 1.0}')
    for figures, expected in (({"agreement": 0.5, "clip_score": 30.0}, 0.5), ({"clip_score": 30.0}, 30.0), ({}, None)):
        (tmp_path / "evaluation.json").write_text(json.dumps({"duplicates": figures, "distinct": figures}))
        found = read_figures(tmp_path)
        assert found["agreement_duplicates"] == found["agreement_distinct"] == expected


def test_run_that_is_not_finished_is_told(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    for content in ("", "{}"):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(ValueError, match="is no run that was evaluated"):
            read_figures(tmp_path)
