"""Files of prompts, in every form that people keep them in."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfilter.data.prompts import read_prompts

PROMPTS = ["a cat, on a mat", 'say "hello"\nagain', "<script>alert(1)</script>", "ein Kätzchen"]


def test_tables_of_every_form_say_the_same(tmp_path):
    rows = [{"prompt": prompt, "key": str(number)} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    quoted = ['"' + prompt.replace('"', '""') + f'",{number}' for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,key", *quoted]), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert [row for _, row in read_prompts(tmp_path / name)] == rows


def test_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n a cat \n\na dog\r\n", newline="")
    assert read_prompts(tmp_path / "a.txt") == [
        (f"prompts: {tmp_path / 'a.txt'}, line 2", {"prompt": "a cat"}),
        (f"prompts: {tmp_path / 'a.txt'}, line 4", {"prompt": "a dog"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\na cat\n", "has no column prompt, it has text"),
        ("a.csv", b"", "has no column prompt, it has none"),
        ("a.csv", b"key,prompt\n1\n", "line 2: no prompt"),
        ("a.csv", b"prompt\n" + b"x" * 200_000, "cannot be read"),
        ("a.csv", b"prompt,key\na,1\nb,2,3\n", "line 3: more fields than the 2 columns"),
        ("a.jsonl", b'{"prompt": "a \\ud83d"}', "line 1: a prompt with half of a character"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.txt", b"\n \n", "holds none"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)
