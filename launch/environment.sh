# Sourced by the other scripts: makes .venv with everything that is pinned, once, and puts it on PATH.
# PYTHON=python3.11 chooses the interpreter; MEMFILTER_VENV=dir another place.
_memfilter_root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." && pwd)" || return 1

_memfilter_environment() {
    local root="$_memfilter_root" wanted version='import sys; print(*sys.version_info[:2])'
    local venv="${MEMFILTER_VENV:-$root/.venv}"
    wanted="$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum) $root" || return 1
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ] ||
        { [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -c "$version")" != "$("$venv/bin/python" -c "$version")" ]; }; then
        if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/.installed" ] &&
            ! grep -qs "^prompt = '\{0,1\}memfilter" "$venv/pyvenv.cfg"; then
            echo "error: $venv was not made by memfilter: remove it, or name another place by MEMFILTER_VENV" >&2
            return 1
        fi
        echo "installing into $venv"
        "${PYTHON:-python3}" -m venv --clear --prompt memfilter "$venv" &&
            "$venv/bin/python" -m pip install --quiet --constraint "$root/launch/constraints.txt" --editable "$root[dev]" &&
            echo "$wanted" > "$venv/.installed" || {
            echo "error: the environment could not be made in $venv" >&2
            return 1
        }
    fi
    PATH="$(CDPATH='' cd -- "$venv" && pwd)/bin:$PATH"
    export PATH
}

_memfilter_environment || return 1
