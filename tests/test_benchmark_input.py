"""The benchmark of input pipelines runs and gives a figure for each row."""

import json
import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.tensorflow

SCRIPT = pathlib.Path(__file__).parent.parent / "scripts" / "benchmark_input.sh"


def test_every_row_has_a_figure(tmp_path):
  out = tmp_path / "rates.json"
  result = subprocess.run(
    [SCRIPT, "--rounds=1", "--seconds=1", "--images=64", f"--out={out}"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  rates = json.loads(out.read_text())
  assert len(rates) == 7
  assert all(len(values) == 1 and values[0] > 0 for values in rates.values())
  table = [x for x in result.stdout.splitlines() if x.startswith("| ")]
  assert len(table) == 2 + len(rates)
