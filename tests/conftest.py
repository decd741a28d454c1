"""Eight fake CPU devices, no silent broadcasting between ranks, and fixtures.

The environment is set before JAX is imported. Commands started by the stories
compile fast, and see one device, unless a test asks for something else.
"""

import os

_DEVICES = "--xla_force_host_platform_device_count"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# More threads than cores: fake devices wait for each other inside a step.
os.environ["NPROC"] = "16"
# These tests compile much and compute little.
_FAST_COMPILATION = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), f"{_DEVICES}=8", _FAST_COMPILATION]
)

import json  # noqa: E402
import pathlib  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
import zlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from nfnets import downloads, main  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", "")  # Nothing is kept.

# Commands inherit it: a shell's background jobs do not listen to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds until what has not ended is taken for hanging; some machines are slow.
PATIENCE = 600

REFERENCE = pathlib.Path(__file__).parent / "reference"

# A network that compiles in seconds and still has every kind of layer: groups,
# a projection without stride and one with.
SMALL = {
  "depth": (1, 1),
  "width": (16, 32),
  "group_width": (8, 8),
  "bottleneck_ratio": (0.5, 0.5),
  "stem_width": (4, 8),
}

# The same without its second stage.
ONE_BLOCK_ROW = {column: values[:1] for column, values in SMALL.items()}


# Files that take minutes, the longest first.
_LONG = ("stories", "notebooks", "fine_tuning", "steps", "models", "tfds")


def pytest_collection_modifyitems(items):
  """Long files first, so that all processes end at about the same time."""

  def place(item):
    name = item.path.stem.removeprefix("test_")
    return _LONG.index(name) if name in _LONG else len(_LONG)

  items.sort(key=place)


def pytest_addoption(parser):
  parser.addoption(
    "--keep_notebooks",
    action="store_true",
    help="write the outputs of executed notebooks into them",
  )


def draw_params(shapes):
  """Parameters drawn by the rule that the reference fixtures were made with."""

  def draw(module, name, shape):
    seed = zlib.crc32(f"{module}/{name}".encode())
    z = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if name == "w":
      return (z / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
    offset, scale = {"gain": (1, 0.1), "skip_gain": (0.75, 0.1)}.get(
      name, (0, 0.1)
    )
    return np.asarray(offset + scale * z, np.float32)

  return {
    module: {name: draw(module, name, x.shape) for name, x in values.items()}
    for module, values in shapes.items()
  }


def param_shapes(model):
  """Shapes of a model's parameters, without computing them."""
  return model.shapes()[0]


def load_json(name):
  """A reference file."""
  return json.loads((REFERENCE / name).read_text())


def read_rows(workdir, kind="train"):
  """Rows of one kind in a run's record."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == kind]


def kill_when(
  is_time, command, environment, number=signal.SIGKILL, errors=None
):
  """Starts a command and sends it a signal at a moment; whether in time.

  Returns when it has ended; `errors` is a file for what it says of them.
  """
  process = subprocess.Popen(
    command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
  )
  try:
    deadline = time.monotonic() + PATIENCE
    while not is_time() and process.poll() is None:
      assert time.monotonic() < deadline, "the moment never came"
      time.sleep(0.001)
    was_running = process.poll() is None
    process.send_signal(number)
    process.wait(PATIENCE)
  finally:
    process.kill()
    process.wait()
  return was_running


def run_pod(
  environment, *options, command="train", second=(), is_stop_due=None
):
  """Runs a command as a pod: see `run_processes`.

  The second process has more options.
  """
  command = [sys.executable, "-m", "nfnets.main", command, "--pod", *options]
  return run_processes(environment, command, [*command, *second], is_stop_due)


def run_processes(environment, first, second, is_stop_due=None):
  """Runs two as a job of JAX's; of each exit code, output and errors.

  The second one may be asked to stop at a moment.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  variables = environment | {
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_COORDINATOR_BIND_ADDRESS": address,
    "JAX_NUM_PROCESSES": "2",
  }
  hosts = [
    subprocess.Popen(
      command,
      env=variables | {"JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, command in enumerate((first, second))
  ]
  try:
    while is_stop_due and hosts[1].poll() is None:
      if is_stop_due():
        hosts[1].terminate()
        break
      time.sleep(0.01)
    outputs = [host.communicate(timeout=PATIENCE) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  return [
    (host.returncode, *output)
    for host, output in zip(hosts, outputs, strict=True)
  ]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  """Environment of started commands: one device, compilations shared."""
  cache = tmp_path_factory.getbasetemp() / "compiled"
  variables = {k: v for k, v in os.environ.items() if k != "NPROC"}
  return variables | {
    "XLA_FLAGS": _FAST_COMPILATION,
    "NFNETS_RUNS": "runs",  # In the folder that the command is started in.
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  }


@pytest.fixture(scope="session")
def nfnets(environment):
  """Runs the command line in a process of its own."""

  def run(*arguments, cwd=None, timeout=2 * PATIENCE, **variables):
    return subprocess.run(
      [sys.executable, "-m", "nfnets.main", *map(str, arguments)],
      env=environment | variables,
      cwd=cwd,
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
    )

  return run


@pytest.fixture
def nfnets_here(monkeypatch, capsys):
  """The same within this process: for what ends before much is compiled."""
  # These hold for all that comes after.
  monkeypatch.setattr(downloads, "keep_compiled", lambda: None)
  monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
  monkeypatch.setenv("NFNETS_RUNS", "runs")

  def run(*arguments, cwd=None):
    if cwd is not None:
      monkeypatch.chdir(cwd)
    code = main.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, code, out, err)

  return run
