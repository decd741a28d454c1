#!/usr/bin/env bash
# Runs a Python file beside PyTorch Image Models, in an environment of their own
# that is built if need be: `scripts/timm.sh FILE.py ARGUMENTS`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
venv=$root/.venv-timm NFNETS_EXTRAS=[timm]
build_environment
if ! "$venv/bin/python" -m pip show --quiet timm 2>/dev/null; then
  # Without torchvision, which it names but its networks do not use.
  "$venv/bin/python" -m pip install --quiet --no-deps \
    --constraint "$root/scripts/constraints.txt" timm
fi
exec "$venv/bin/python" "$@"
