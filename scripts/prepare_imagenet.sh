#!/usr/bin/env bash
# Makes the ImageNet set that training reads: `scripts/prepare_imagenet.sh
# --help`. Only this needs TensorFlow, which gets an environment of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if ! asks_for_help "$@"; then
  venv=$root/.venv-tensorflow NFNETS_EXTRAS=[tensorflow]
fi
build_environment
export TF_CPP_MIN_LOG_LEVEL=2
exec "$venv/bin/python" "$root/scripts/prepare_imagenet.py" "$@"
