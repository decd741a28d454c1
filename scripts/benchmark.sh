#!/usr/bin/env bash
# Measures our networks beside timm's on the device at hand:
# `scripts/benchmark.sh --help`. Builds the environments if need be; where that
# fails (without a network, say), or with --as_found, it runs in what is there:
# PYTHON=..., or the python3 that can import jax and haiku.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

can_run() {
  "$1" -c 'import haiku, jax, optax' >/dev/null 2>&1
}

find_installed() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python; do
    if can_run "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python here can import jax, haiku and optax; name one that can: PYTHON=/path/to/python $0 --as_found"
}

for argument in "$@"; do
  [ "$argument" = --as_found ] && as_found=1
done
if [ -z "${as_found-}" ] && python=$(find_python 2>/dev/null); then
  # --help and what is misspelt need no environment.
  PYTHONPATH=$root/scripts "$python" -B -c "
import sys, benchmark_options
benchmark_options.parse(sys.argv[1:])" "$@" || exit
  ! asks_for_help "$@" || exit 0
fi
if [ -z "${as_found-}" ] && (build_environment); then
  python=$venv/bin/python
else
  python=$(find_installed) || exit 1
  echo "Measuring with the packages of $python" >&2
  set -- "$@" --as_found
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" "$root/scripts/benchmark.py" "$@"
