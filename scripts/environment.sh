#!/usr/bin/env bash
# Makes or updates a virtual environment from the project's files; quiet when it is up to date.
# usage: environment.sh VENV CONSTRAINTS
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 constraints=$2 python=${PYTHON:-python3}
mkdir -p build
log=build/environment.log
stamp=$venv/.qwt-fx-stamp
wanted=$("$python" -c 'import sys; print(sys.version)'; cat setup.cfg pyproject.toml "$constraints"; pwd)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

step() {
  echo "== $1"
  shift
  "$@" > "$log" 2>&1 || { tail -n 30 "$log"; echo "failed: $* (log: $log)"; exit 1; }
}
rm -rf "$venv"
step "virtual environment in $venv" "$python" -m venv "$venv"
step "build tools" "$venv/bin/python" -m pip install -q --upgrade pip "setuptools>=77" wheel
step "qwt-fx and what it needs (torch is large: some minutes)" \
  "$venv/bin/python" -m pip install -q --no-build-isolation -c "$constraints" -e '.[test]'
printf '%s' "$wanted" > "$stamp"
