# Sourced by the other scripts: leaves $root (this checkout) and $venv (its
# virtual environment, built once and again only when the requirements change).
# Everything that is written, caches included, stays inside the checkout.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
export PIP_CACHE_DIR=$venv/cache/pip XDG_CACHE_HOME=$venv/cache
export MPLCONFIGDIR=$venv/cache/matplotlib NFNETS_RUNS=${NFNETS_RUNS-$root/runs}
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
  echo "$1" >&2
  exit 1
}

# Whether arguments ask for help, which the package alone can print.
asks_for_help() {
  [[ " $* " =~ " "(--help|-h)" " ]]
}

# Whether a command is a Python that can run this project and build an
# environment; some are stubs that only print an error.
is_usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
    >/dev/null 2>&1
}

find_python() {
  local name
  if [ -n "${PYTHON-}" ]; then
    is_usable "$PYTHON" && echo "$PYTHON" && return
    fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || echo "not there"); \
Python 3.11 or newer with its venv module is needed"
  fi
  for name in python3 python3.12 python3.13 python3.11; do
    if is_usable "$name"; then
      echo "$name"
      return
    fi
  done
  local found
  found=$(python3 --version 2>&1) || found="no python3"
  fail "Python 3.11 or newer with its venv module is needed, found: $found.
Install it (on Debian and Ubuntu: apt-get install python3 python3-venv), or
name one: PYTHON=/path/to/python3.12 $0"
}

# The package is installed with the extras in NFNETS_EXTRAS, such as
# [test,cuda], or with those of last time.
build_environment() {
  local python wanted stamp extras=${NFNETS_EXTRAS-}
  stamp=$venv/requirements
  if [ -z "$extras" ]; then
    extras=[test]
    [ -f "$venv/extras" ] && extras=$(cat "$venv/extras")
  fi
  wanted=$(cat "$root/setup.py" "$root/scripts/constraints.txt" &&
    echo "$root $extras") || exit 1
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] &&
    is_usable "$venv/bin/python"; then
    return
  fi
  python=$(find_python) || exit 1
  echo "Building the environment in $venv with $("$python" --version 2>&1)" >&2
  if [ -d "$venv" ]; then  # Weights and compiled programs stay.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name cache -exec rm -rf {} +
  fi
  "$python" -m venv "$venv" || fail "could not create $venv"
  "$venv/bin/python" -m pip install --quiet \
    --constraint "$root/scripts/constraints.txt" --editable "$root$extras" ||
    fail "could not install the requirements (see above); run $0 again"
  echo "$extras" >"$venv/extras"
  echo "$wanted" >"$stamp"
}
