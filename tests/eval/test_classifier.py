import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import precision_score, recall_score, roc_auc_score, roc_curve

from memfilter.eval.classifier import ROC_POINTS, decision_quality, judge, quality, roc, tpr_at_fpr
from memfilter.train.tracking import AUDIT_SCHEMA


def test_auc_and_rates_are_scikit_learns():
    rng = np.random.default_rng(0)
    duplicate = rng.random(3000) < 0.2
    score = (rng.normal(size=3000) + 1.5 * duplicate).round(1)  # rounded, that many tie
    found = quality(duplicate, score)
    assert found["auc"] == pytest.approx(roc_auc_score(duplicate, score))
    fpr, tpr, _ = roc_curve(duplicate, score)
    assert np.interp(fpr, *roc(duplicate, score)) == pytest.approx(np.interp(fpr, fpr, tpr))
    # every threshold tried by hand
    rates = [((score >= t)[~duplicate].mean(), (score >= t)[duplicate].mean()) for t in np.unique(score)]
    assert found["tpr_at_1pct_fpr"] == pytest.approx(max(tpr for fpr, tpr in rates if fpr < 0.01))
    assert found["duplicates"] == duplicate.sum() and found["distinct"] == (~duplicate).sum()


def test_ties_by_hand():
    # scores 3, 2 (tie), 1 (tie): the curve is (0, 1/4), (1/4, 3/4), (1, 1)
    duplicate = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    score = np.array([3, 2, 2, 1, 2, 1, 1, 1], float)
    fpr, tpr = roc(duplicate, score)
    assert list(zip(fpr, tpr, strict=True)) == [(0, 0), (0, 0.25), (0.25, 0.75), (1, 1)]
    assert quality(duplicate, score)["auc"] == 0.25 * (0.25 + 0.75) / 2 + 0.75 * (0.75 + 1) / 2
    assert tpr_at_fpr(fpr, tpr) == 0.25  # the tie at 2 would let a quarter through
    assert tpr_at_fpr(fpr, tpr, 0.25) == 0.25 and tpr_at_fpr(fpr, tpr, 0.26) == 0.75


def test_rate_of_exactly_one_percent_is_not_below_it():
    distinct = np.arange(100, dtype=float)
    score = np.concatenate([distinct, [99.5, 98.5, 97.5]])  # above none, one and two of the distinct ones
    duplicate = np.arange(103) >= 100
    assert quality(duplicate, score)["tpr_at_1pct_fpr"] == pytest.approx(1 / 3)


def test_threshold_inside_a_straight_stretch_of_the_curve_counts():
    # a duplicate ties with a distinct sample at every score: the curve is one straight line, of which scikit-learn
    # keeps the ends unless it is told not to
    score = np.repeat(np.arange(500.0), 2)
    assert quality(np.arange(1000) % 2 == 0, score)["tpr_at_1pct_fpr"] == pytest.approx(4 / 500)


def test_decisions_have_the_precision_and_recall_of_scikit_learn():
    rng = np.random.default_rng(1)
    duplicate, dropped = rng.random(500) < 0.3, rng.random(500) < 0.4
    found = decision_quality(duplicate, dropped)
    assert found["precision"] == pytest.approx(precision_score(duplicate, dropped))
    assert found["recall"] == pytest.approx(recall_score(duplicate, dropped))
    assert found["auc"] == pytest.approx((found["recall"] + 1 - found["false_positive_rate"]) / 2)
    assert decision_quality(duplicate, np.zeros(500, bool))["precision"] is None
    assert decision_quality(np.ones(5, bool), dropped[:5]) is None


def write(path, **columns):
    count = len(columns["position"])
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type, from_pandas=True) for field in AUDIT_SCHEMA]
    pq.write_table(pa.table(arrays, schema=AUDIT_SCHEMA), path)
    return path


def test_audit_is_judged_as_a_whole_by_thirds_and_by_timestep(tmp_path):
    rng, count = np.random.default_rng(2), 900
    position, timestep = np.arange(count), rng.integers(0, 1000, count)
    duplicate = rng.random(count) < 0.3
    norm = (rng.normal(size=count) + duplicate * (position > 300)).astype(np.float32)
    evidence = np.where(rng.random(count) < 0.5, norm + 1, np.nan).astype(np.float32)
    p_value = (1 / (1 + np.exp(norm))).astype(np.float32)
    keep = norm < 0.8
    audit = write(tmp_path / "audit.parquet", position=position, key=["k"] * count, duplicate=duplicate,
                  timestep=timestep, text_norm=norm, keep=keep, evidence=evidence, p_value=p_value)  # fmt: skip
    found = judge(audit, count)
    there = ~np.isnan(evidence)
    assert found["whole"]["norm"]["auc"] == pytest.approx(roc_auc_score(duplicate, norm))
    assert found["whole"]["evidence"]["auc"] == pytest.approx(roc_auc_score(duplicate[there], norm[there]))
    assert found["whole"]["1 - p"]["auc"] == pytest.approx(roc_auc_score(duplicate, norm), abs=1e-6)
    assert found["whole"]["decisions"]["recall"] == pytest.approx(recall_score(duplicate, ~keep))
    for third, (low, high) in zip(found["thirds"], ((0, 300), (300, 600), (600, 900)), strict=True):
        assert (third["from"], third["to"]) == (low, high)
        assert third["norm"]["auc"] == pytest.approx(roc_auc_score(duplicate[low:high], norm[low:high]))
        assert third["decisions"]["precision"] == pytest.approx(precision_score(duplicate[low:high], ~keep[low:high]))
    for number, part in enumerate(found["timesteps"]):
        rows = timestep // 100 == number
        assert (part["from"], part["to"]) == (100 * number, 100 * number + 100)
        assert part["norm"]["auc"] == pytest.approx(roc_auc_score(duplicate[rows], norm[rows]))
    for name, curve in found["whole"]["roc"].items():
        assert len(curve["fpr"]) <= ROC_POINTS + 2
        area = np.trapezoid(curve["tpr"], curve["fpr"])
        assert area == pytest.approx(found["whole"][name]["auc"], abs=0.01)


def test_passed_over_samples_count_as_dropped_and_unreadable_ones_not_at_all(tmp_path):
    audit = write(
        tmp_path / "audit.parquet",
        position=[0, 1, 2, 3, 4],
        key=list("abcde"),
        duplicate=[True, True, False, False, True],
        timestep=[5] * 5,
        text_norm=[None, 3.0, 1.0, 2.0, None],
        keep=[False, False, True, True, False],
        skipped=["flagged", None, None, None, "excluded"],
    )
    whole = judge(audit, 5)["whole"]
    assert whole["decisions"] == {"precision": 1, "recall": 1, "false_positive_rate": 0, "auc": 1,
                                  "tpr_at_1pct_fpr": 1, "duplicates": 2, "distinct": 2}  # fmt: skip
    assert whole["norm"]["duplicates"] == 1
    assert whole["evidence"] is None and whole["1 - p"] is None


@pytest.mark.parametrize("duplicate", [[None, None], [True, True], [False, False]])
def test_where_one_kind_is_unknown_nothing_is_judged(tmp_path, duplicate):
    audit = write(tmp_path / "a.parquet", position=[0, 1], key=["a", "b"], duplicate=duplicate, timestep=[1, 2],
                  text_norm=[1.0, 2.0], keep=[True, False])  # fmt: skip
    assert judge(audit, 2) is None
