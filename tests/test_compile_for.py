"""The train step compiles for accelerators that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "compile_for.sh"


def _plan(*arguments):
  """The cells of the one row that is printed."""
  command = [SCRIPT, "--model=nfnet_tiny", "--batch=8", *arguments]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  result = subprocess.run(
    command, capture_output=True, text=True, env=environment
  )
  assert result.returncode == 0, result.stderr
  row = result.stdout.splitlines()[-1]
  return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.compilers
def test_packed_parameters_are_fewer_kernels():
  *_, kernels, moved, _, _ = _plan("--device=h100")
  *_, unpacked, _, _, _ = _plan("--device=h100", "--no-packed")
  assert 100 < int(kernels) < 0.8 * int(unpacked)
  assert float(moved) > 0


@pytest.mark.compilers
def test_a_step_for_four_chips_of_a_tpu():
  device, *_, kernels, moved, cycles, _ = _plan(
    "--device=v5e", "--num_devices=4"
  )
  assert (device, kernels, moved) == ("v5e", "", "")
  assert float(cycles) > 0


@pytest.mark.compilers
def test_cycles_of_a_loop_are_not_given():
  *_, cycles, _ = _plan("--device=v5e", "--scan")
  assert cycles == ""


@pytest.mark.parametrize(
  ("options", "text"),
  [
    (["--batch=0"], "argument --batch: invalid positive value: '0'"),
    (["--batch=8", "--accumulate=3"], "--accumulate: 8 images do not divide"),
    (["--scan", "--packed"], "--packed: with --scan equal blocks'"),
  ],
)
def test_wrong_options_are_named(environment, options, text):
  result = subprocess.run(
    [sys.executable, SCRIPT.with_suffix(".py"), *options],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert result.returncode == 2
  assert text in result.stderr
