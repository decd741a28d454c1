#!/usr/bin/env bash
# Builds the environment if need be, then checks format and lint and runs all
# tests. Arguments go to pytest: `scripts/test.sh -k agc`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
build_environment "${NFNETS_EXTRAS-[test]}"
cd "$root"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
exec "$venv/bin/python" -m pytest --basetemp="$venv/cache/pytest" "$@"
