import pytest

from memfilter.cli import main


@pytest.mark.parametrize(("arguments", "message"), [(["--seeds=1"], "seeds must be at least 2"), ([], "not finished")])
def test_what_cannot_be_evaluated_is_named_in_one_line(tmp_path, capsys, arguments, message):
    assert main(["evaluate", str(tmp_path), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
