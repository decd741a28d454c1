"""The scripts on a machine that lacks something."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
  """A checkout without an environment, in a path with a space."""
  root = tmp_path / "a checkout"
  root.mkdir()
  shutil.copytree(ROOT / "scripts", root / "scripts")
  shutil.copy(ROOT / "setup.py", root)
  return root


@pytest.mark.parametrize("script", ["train.sh", "test.sh"])
@pytest.mark.parametrize("old", ["Python 3.9.1", None])
def test_python_that_is_too_old_or_missing(checkout, tmp_path, script, old):
  tools = tmp_path / "bin"
  tools.mkdir()
  for name in ("bash", "cat", "dirname"):
    (tools / name).symlink_to(shutil.which(name))
  if old:
    stub = tools / "python3"
    # It says what it is, and fails the project's own check.
    stub.write_text(
      f'#!/bin/sh\n[ "$1" = --version ] && echo "{old}" && exit\nexit 1\n'
    )
    stub.chmod(0o755)
  result = subprocess.run(
    [tools / "bash", checkout / "scripts" / script],
    env={"PATH": str(tools)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert "Python 3.11 or newer with its venv module is needed" in result.stderr
  assert f"found: {old or 'no python3'}" in result.stderr
  assert "PYTHON=/path/to/python3.12" in result.stderr
  assert set(os.listdir(checkout)) == {"scripts", "setup.py"}


def test_a_python_that_was_named_is_the_one_that_is_judged(checkout):
  result = subprocess.run(
    [checkout / "scripts" / "train.sh"],
    env=os.environ | {"PYTHON": "/no/such/python"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert "PYTHON=/no/such/python is" in result.stderr
  assert "Python 3.11 or newer" in result.stderr
