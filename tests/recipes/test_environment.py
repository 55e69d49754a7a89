"""The scripts that make environments, with an interpreter that stands in for one and installs nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import launching
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
# python -m venv --clear [--prompt NAME] DIR makes one with this very file as its python; -m pip fails where it is told to
case "$*" in
"-c "*) echo "${VERSION:-3 11}" ;;
"-m venv "*)
    for place; do :; done
    rm -rf "$place"/* "$place"/.[!.]*
    mkdir -p "$place/bin"
    printf 'prompt = '"'memfilter'"'\\n' > "$place/pyvenv.cfg"
    cp "$0" "$place/bin/python" ;;
"-m pip "*) echo "$*" >> "$LOG"; exit "${PIP:-0}" ;;
*) exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """What scripts of launch/ need, in a directory with a space in its name."""
    shutil.copytree(ROOT / "launch", (root := tmp_path / "the project") / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    (python := tmp_path / "python").write_text(PYTHON)
    python.chmod(0o755)
    return root


def bash(command: str, cwd: Path, python: Path, **more) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MEMFILTER_VENV", "EXTRA")}
    variables |= {"PYTHON": str(python), "LOG": str(python.with_suffix(".log")), **more}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=launching.PATIENCE)


def installs(python: Path) -> int:
    log = python.with_suffix(".log")
    return len(log.read_text().splitlines()) if log.exists() else 0


SOURCE = 'source "{}/launch/environment.sh" && command -v python'


def test_environment_is_made_once_in_the_project_wherever_it_is_sourced(checkout, tmp_path):
    python = tmp_path / "python"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for where in (checkout, elsewhere):
        found = bash(SOURCE.format(checkout), where, python, CDPATH=f".:{tmp_path}")
        assert (found.returncode, found.stdout.splitlines()[-1]) == (0, str(checkout / ".venv" / "bin" / "python"))
    assert installs(python) == 1 and not list(elsewhere.iterdir())
    assert f"--editable {checkout}[dev]" in python.with_suffix(".log").read_text()


@pytest.mark.parametrize("place", [".venv", "other"])
def test_directory_that_is_not_the_projects_is_left_alone(checkout, tmp_path, place):
    (precious := checkout / place / "precious").parent.mkdir()
    precious.touch()
    found = bash(SOURCE.format(checkout), checkout, tmp_path / "python", **({"MEMFILTER_VENV": place} if place == "other" else {}))
    assert found.returncode and f"{place} was not made by memfilter" in found.stderr
    assert precious.exists() and installs(tmp_path / "python") == 0


def test_environment_that_could_not_be_made_is_not_taken_for_one(checkout, tmp_path):
    python = tmp_path / "python"
    failed = bash(SOURCE.format(checkout), checkout, python, PIP="1")
    assert failed.returncode and "could not be made" in failed.stderr and not (checkout / ".venv" / ".installed").exists()
    assert bash(SOURCE.format(checkout), checkout, python).returncode == 0 and installs(python) == 2


def test_environment_of_another_interpreter_is_made_anew_and_kept_where_there_is_none(checkout, tmp_path):
    python = tmp_path / "python"
    assert bash(SOURCE.format(checkout), checkout, python).returncode == 0
    assert bash(SOURCE.format(checkout), checkout, tmp_path / "nowhere").returncode
    assert (checkout / ".venv" / ".installed").exists()
    (other := tmp_path / "other python").write_text(re.sub(r"3 11", "3 12", PYTHON))
    other.chmod(0o755)
    assert bash(SOURCE.format(checkout), checkout, other, LOG=str(python.with_suffix(".log"))).returncode == 0
    assert installs(python) == 2


def test_what_was_added_to_img2dataset_stays(checkout, tmp_path):
    python = tmp_path / "python"
    for extra, expected in (({"EXTRA": "ray"}, 1), ({}, 1), ({"EXTRA": ""}, 2), ({}, 2)):
        assert bash("bash launch/img2dataset.sh", checkout, python, **extra).returncode == 0
        assert installs(python) == expected
    lines = python.with_suffix(".log").read_text().splitlines()
    assert [line.endswith(" ray") for line in lines] == [True, False]


def test_study_makes_as_many_runs_at_a_time_as_there_are_cores(checkout, tmp_path):
    (bin := checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "pyvenv.cfg").write_text("prompt = memfilter\n")
    for name in ("memfilter", "python"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $*" >> "$LOG"\n')
        (tmp_path / name).chmod(0o755)
    (checkout / "launch" / "environment.sh").write_text(f'PATH="{tmp_path}:$PATH"\n')
    assert bash("bash launch/study.sh", checkout, tmp_path / "python").returncode == 0
    (line,) = (line for line in (tmp_path / "python.log").read_text().splitlines() if " sweep " in line)
    assert f"--processes={len(os.sched_getaffinity(0))}" in line.split() and bin.is_dir()


def test_quickstart_that_is_stopped_waits_for_its_runs_and_leaves_its_caller_alone(checkout, tmp_path):
    stand_in = f"""#!/bin/bash
case "$*" in *train_filtered.py*) ;; *) exit 0 ;; esac
trap 'sleep 1; echo saved >> "{tmp_path}/saved"; exit 75' TERM
echo begun >> "{tmp_path}/begun"
while true; do sleep 0.1; done
"""
    for name in ("memfilter", "python"):
        (tmp_path / name).write_text(stand_in)
        (tmp_path / name).chmod(0o755)
    (checkout / "launch" / "environment.sh").write_text(f'PATH="{tmp_path}:$PATH"\n')
    (checkout / "runs" / "quickstart").mkdir(parents=True)
    command = f"""bash launch/quickstart.sh & job=$!
until [ "$(cat "{tmp_path}/begun" 2>/dev/null | wc -l)" = 2 ]; do sleep 0.05; done
kill -TERM $job; wait $job; echo "code $? saved $(wc -l < "{tmp_path}/saved")"
"""
    found = bash(command, checkout, tmp_path / "python")
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "code 143 saved 2"), found
