#!/usr/bin/env bash
# Compares ways to feed the F0 recipe on this machine's cores:
# `scripts/benchmark_input.sh --help`. TensorFlow, for the published pipeline,
# gets an environment of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if ! asks_for_help "$@"; then
  venv=$root/.venv-tensorflow extras=${NFNETS_EXTRAS:+,${NFNETS_EXTRAS#[}}
  NFNETS_EXTRAS=[tensorflow${extras:-]}  # Also those given, such as [cuda].
fi
build_environment
export TF_CPP_MIN_LOG_LEVEL=3
exec "$venv/bin/python" "$root/scripts/benchmark_input.py" "$@"
