#!/usr/bin/env bash
# Builds the environment if need be, then trains: `scripts/train.sh --help`.
# Without arguments, a small NFNet on handwritten digits; the run is in runs/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
build_environment
exec "$venv/bin/nfnets" train "$@"
