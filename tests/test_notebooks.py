"""The notebooks: executed from a clean kernel, and as they are kept.

To execute them again and keep the outputs:

    scripts/test.sh -m "" tests/test_notebooks.py --keep_notebooks
"""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest
from conftest import PATIENCE
from jupyter_client import AsyncKernelManager

FOLDER = pathlib.Path(__file__).parent.parent / "experiments/notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

# How many pictures each promises.
NUM_FIGURES = {
  "agc_by_hand": 2,
  "classify_an_image": 1,
  "fine_tune_on_a_folder": 3,
  "look_inside": 3,
}


def _outputs(notebook):
  return [o for c in notebook.cells for o in c.get("outputs", ())]


def _text(notebook):
  """What was printed, and what was displayed instead, as a run's lines are."""
  texts = []
  for output in _outputs(notebook):
    data = output.get("data", {})
    texts.append(output.get("text", ""))
    texts += [data[kind] for kind in data if kind.startswith("text/")]
  return "\n".join(texts)


def _num_figures(notebook):
  return sum("image/png" in o.get("data", {}) for o in _outputs(notebook))


def test_every_notebook_is_known():
  assert sorted(NUM_FIGURES) == NAMES


@pytest.fixture(scope="module")
def executed(environment, tmp_path_factory, request):
  """Executes a notebook in a kernel of this Python, in an empty folder."""
  done = {}

  def execute(name):
    if name in done:
      return done[name]
    folder = tmp_path_factory.mktemp(name)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    manager = AsyncKernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    variables = environment | {
      # Hundreds of steps, which level 0 makes slow.
      "XLA_FLAGS": "--xla_backend_optimization_level=1",
      "NFNETS_CACHE": str(folder / "cache"),
      "TMPDIR": str(folder),  # Where they work.
      "IPYTHONDIR": str(folder / "ipython"),
      "PYTHONPATH": str(FOLDER.parent.parent),
      "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    client = nbclient.NotebookClient(
      notebook,
      km=manager,
      timeout=PATIENCE,
      resources={"metadata": {"path": folder}},
    )
    client.execute(env=variables)
    for cell in notebook.cells:
      cell.metadata.pop("execution", None)  # When it was, which changes always.
    if request.config.getoption("keep_notebooks"):
      nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    done[name] = notebook
    return notebook

  return execute


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_from_a_clean_kernel(executed, name):
  assert _num_figures(executed(name)) == NUM_FIGURES[name]


@pytest.mark.slow
def test_the_classified_scans_are_right(executed):
  found = re.search(r"([\d.]+)% of 360", _text(executed("classify_an_image")))
  assert float(found[1]) > 90


@pytest.mark.slow
def test_fine_tuning_learns_what_arrived(executed):
  text = _text(executed("fine_tune_on_a_folder"))
  known, new = (
    re.search(rf"{group} +\d+ +([\d.]+)% +([\d.]+)%", text).groups()
    for group in ("known classes", "new classes")
  )
  assert float(known[0]) > 80 and float(known[1]) > 85
  assert float(new[0]) == 0 and float(new[1]) > 80


@pytest.mark.slow
def test_agc_by_hand_is_agc(executed):
  assert "gives the same for all" in _text(executed("agc_by_hand"))


@pytest.mark.parametrize("name", NAMES)
def test_kept_outputs_are_complete_and_of_no_machine(name):
  path = FOLDER / f"{name}.ipynb"
  notebook = nbformat.read(path, as_version=4)
  counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
  assert counts == list(range(1, len(counts) + 1))
  outputs = _outputs(notebook)
  assert _num_figures(notebook) == NUM_FIGURES[name]
  assert all(o.output_type != "error" for o in outputs)
  assert all(o.get("name") != "stderr" for o in outputs)
  assert not re.search(r"/(tmp|home|work|root|Users)/", _text(notebook))
  assert os.path.getsize(path) < 600_000
