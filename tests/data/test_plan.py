import json
from dataclasses import replace

import pytest

from memfilter.data.plan import Plan, lines


def test_default_is_the_papers_experiment():
    plan = Plan()
    plan.check()
    assert (*plan.sizes, plan.distinct) == (200, 200, 120_000) and plan.listed() is None
    assert 200 * 200 + plan.distinct == 160_000


def test_weighted_variant_shows_a_twentieth_of_all_five_times():
    assert Plan(variant="weighted").sizes == (6316, 5)
    assert 6316 / (6316 + 120_000) == pytest.approx(0.05, abs=1e-5)
    assert Plan(variant="weighted", duplicates=7, repeats=3).sizes == (7, 3)
    assert Plan(duplicates=0).sizes == (0, 200)


def test_everything_that_makes_no_sense_is_told_at_once():
    plan = Plan(seed=-1, duplicates=-2, repeats=0, distinct=-3, max_bits=32, min_cosine=0, keys="a", prompts="b",
                other_captions="c")  # fmt: skip
    with pytest.raises(ValueError) as caught:
        plan.check()
    said = str(caught.value).splitlines()
    for name in ("seed", "duplicates", "repeats", "distinct", "max_bits", "min_cosine", "keys and prompts",
                 "other_captions has no effect"):  # fmt: skip
        assert sum(line.startswith(name) for line in said) == 1, name
    with pytest.raises(ValueError, match="both 0"):
        Plan(duplicates=0, distinct=0).check()
    for good in ({"max_bits": 0}, {"max_bits": None}, {"max_bits": 31}, {"min_cosine": 1.0}, {"seed": 2**63 - 1},
                 {"duplicates": 0}, {"distinct": 0}):  # fmt: skip
        replace(Plan(), **good).check()
    with pytest.raises(ValueError, match="seed must be at least 0 and at most"):
        Plan(seed=2**63).check()


def test_lines_are_read_without_blanks_and_each_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf first \r\n\r\nsecond\x0bpart\nfirst\n\xff\n  \n")
    assert lines(path) == ["first", "second\x0bpart", "\ufffd"]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"a\.txt lists nothing"):
        lines(path)


def test_lists_say_what_may_become_a_duplicate(tmp_path):
    path = tmp_path / "list"
    path.write_text("a\nb c\n")
    assert Plan(keys=str(path)).listed() == [{"key": "a"}, {"key": "b c"}]
    assert Plan(captions=str(path)).listed() == [{"caption": "a"}, {"caption": "b c"}]
    entries = [{"caption": "a", "url": "http://x", "index": 3}, {"caption": "b", "url": None}, {"caption": "c"}]
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    assert Plan(prompts=str(path)).listed() == [{"caption": "a", "url": "http://x"}, {"caption": "b"}, {"caption": "c"}]


def test_lines_that_are_no_prompts_are_refused_and_counted(tmp_path):
    path = tmp_path / "list.jsonl"
    bad = ["{", "3", "[]", '{"url": "x"}', '{"caption": 3}', "[" * 100_000, "x"]
    path.write_text("\n".join(['{"caption": "good"}', *bad]))
    with pytest.raises(ValueError) as caught:
        Plan(prompts=str(path)).listed()
    said = str(caught.value).splitlines()
    assert len(said) == 6 and all("no JSON object with a caption" in line for line in said[:5])
    assert said[5] == "and 2 more" and max(map(len, said)) < 300


def test_file_that_does_not_exist_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Plan(keys=str(tmp_path / "nowhere")).listed()
