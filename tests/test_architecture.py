"""The floors: a module imports only from the floors below its own."""

import ast
import pathlib
import subprocess
import sys

import pytest

import nfnets

ROOT = pathlib.Path(nfnets.__file__).parent

# From the ground up; a package counts as one entry.
FLOORS = (
  ("errors",),
  (
    "agc",
    "convolution",
    "devices",
    "downloads",
    "files",
    "hosts",
    "initial",
    "layers",
    "losses",
    "mixing",
    "pickles",
    "randaugment",
    "rowwise",
    "sam",
    "space_to_depth",
    "winograd",
  ),
  ("augment", "data", "models", "optim"),
  (
    "card",
    "checkpoint",
    "metrics",
    "model_card",
    "onnx_graph",
    "patience",
    "plots",
    "pretrained",
    "progress",
    "runs",
    "steps",
    "stops",
    "timm",
  ),
  (
    "evaluate",
    "export",
    "info",
    "predict",
    "recipe",
    "rounds",
    "show_batch",
    "train",
  ),
  ("main",),
)
# Within a floor: who may import a neighbour (no cycles: left to right only).
NEIGHBOURS = {
  "augment": {"data"},
  "checkpoint": {"steps"},
  "convolution": {"rowwise", "space_to_depth", "winograd"},
  "layers": {"convolution", "initial"},
  "model_card": {"card"},
  "onnx_graph": {"card"},
  "optim": {"models"},
  "patience": {"card", "metrics", "pretrained"},
  "plots": {"metrics"},
  "pretrained": {"card", "checkpoint", "runs", "timm"},
  "runs": {"card"},
  "evaluate": {"recipe"},
  "show_batch": {"recipe"},
  "rounds": {"recipe", "evaluate"},
  "train": {"recipe", "evaluate", "rounds"},
}


def _noun(path):
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path):
  """Modules of this package that a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.ImportFrom) or node.module is None:
      continue
    if node.module == "nfnets":
      yield from (alias.name for alias in node.names)
    elif node.module.startswith("nfnets."):
      yield node.module.split(".")[1]


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
  floor_of = {name: i for i, names in enumerate(FLOORS) for name in names}
  noun = _noun(path)
  assert noun in floor_of, f"{path}: give it a floor in FLOORS"
  for other in set(_imports(path)) - {noun}:
    is_below = floor_of[other] < floor_of[noun]
    assert is_below or other in NEIGHBOURS.get(noun, ()), f"imports {other}"


def _modules_after(statement):
  code = f"import sys; {statement}; print(*sys.modules)"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return set(result.stdout.split())


def test_models_need_no_data_library():
  loaded = _modules_after("from nfnets import models")
  assert "haiku" in loaded
  assert not loaded & {"PIL", "sklearn", "tensorflow", "grain", "orbax"}


def test_the_command_line_starts_without_anything_heavy():
  loaded = _modules_after("from nfnets import main; main._make_parser()")
  assert not loaded & {"jax", "numpy", "matplotlib", "absl", "ml_collections"}
