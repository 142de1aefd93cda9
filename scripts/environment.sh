#!/usr/bin/env bash
# Makes a virtual environment from the project's files, or does nothing when it is up to date.
# usage: environment.sh VENV CONSTRAINTS     (PYTHON: the interpreter, default python3)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 constraints=$2 python=${PYTHON:-python3}
log=build/environment.log
mkdir -p build

# An active environment, PYTHONPATH or a user's pip settings must not decide where things go.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

fail() {
  echo "$*" >&2
  exit 1
}
step() {
  echo "== $1"
  shift
  "$@" > "$log" 2>&1 || {
    tail -n 30 "$log" >&2
    fail "failed: $* (whole log: $log)"
  }
}

command -v "$python" > /dev/null || fail "no $python here: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old, 3.11 is needed: make PYTHON=python3.11"

# Another interpreter or folder needs a new environment (scripts name their folder); other project
# files, only another installation into it.
made_with=$("$python" --version; pwd)
made_from=$(cat setup.cfg pyproject.toml "$constraints")
is() { [ -f "$venv/$1" ] && [ "$(cat "$venv/$1")" = "$2" ]; }

if ! is made-with "$made_with" || [ ! -x "$venv/bin/python" ]; then
  rm -rf "$venv"
  step "virtual environment $venv" "$python" -m venv "$venv"
  printf '%s' "$made_with" > "$venv/made-with"
elif is made-from "$made_from"; then
  exit 0
fi

rm -f "$venv/made-from"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --constraint "$constraints")
step "build tools" "${pip[@]}" "setuptools>=77" # as pyproject.toml wants
step "qwt-fx and what it needs (torch is large: minutes)" \
  "${pip[@]}" --no-build-isolation --editable '.[test]'
printf '%s' "$made_from" > "$venv/made-from"
