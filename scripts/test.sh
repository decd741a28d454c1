#!/usr/bin/env bash
# Builds the environment if need be, then checks format and lint and runs the
# tests. Arguments go to pytest: `scripts/test.sh -k agc`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
build_environment
cd "$root"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
# Two processes, a file at a time, in the order that tests/conftest.py gives.
exec "$venv/bin/python" -m pytest --numprocesses=2 --dist=loadfile \
  --no-loadscope-reorder --basetemp="$venv/cache/pytest" "$@"
