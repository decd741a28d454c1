#!/usr/bin/env bash
# Compiles the train step for accelerators that are not at hand and says what the
# compiler plans; with an environment of its own, built if need be. --help tells.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if ! asks_for_help "$@"; then
  venv=$root/.venv-compilers NFNETS_EXTRAS=[compilers]
fi
build_environment
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export ALLOW_MULTIPLE_LIBTPU_LOAD=1
exec "$venv/bin/python" "$root/scripts/compile_for.py" "$@"
