# Sourced by the other scripts: makes .venv with everything that is pinned, once, and puts it on PATH.
# PYTHON=python3.11 chooses the interpreter; MEMFILTER_VENV=dir another place.
venv="${MEMFILTER_VENV:-.venv}"
wanted="$(cat pyproject.toml launch/constraints.txt | cksum)"
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $venv"
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --constraint launch/constraints.txt --editable ".[dev]"
    echo "$wanted" > "$venv/.installed"
fi
PATH="$(cd "$venv" && pwd)/bin:$PATH"
export PATH
