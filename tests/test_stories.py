"""Stories through the command line: train, kill, resume, evaluate, predict.

Each command is a process of its own, as a user starts it.
"""

import csv
import errno
import fcntl
import json
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PATIENCE, SMALL, kill_when, read_rows, run_pod
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from nfnets import (
  checkpoint,
  evaluate,
  hosts,
  main,
  pretrained,
  stops,
)
from nfnets.errors import InputError

# 45 steps of a network that compiles in seconds, with a row for each step.
TINY_RUN = [
  *(f"--config.model.{k}={v}" for k, v in SMALL.items()),
  "--config.model.drop_rate=0.1",
  "--config.model.stochdepth_rate=0.1",
  "--config.train.epochs=2.0",
  "--config.log_every_steps=1",
  "--config.checkpoint_every_steps=7",
]


def _last_line(result):
  assert result.returncode == 0, result.stderr
  return result.stdout.strip().splitlines()[-1]


def _fails(result, exit_code, pattern):
  """The command failed with one clear line (and, for 2, where to look)."""
  assert result.returncode == exit_code, (result.stdout, result.stderr)
  assert "Traceback" not in result.stderr
  lines = result.stderr.strip().splitlines()
  if exit_code == 2:
    assert re.match(r"see `nfnets [\w-]+ --help`", lines.pop())
  assert len(lines) == 1, lines
  assert re.search(pattern, lines[0]), lines[0]


@pytest.fixture(scope="module")
def finished(nfnets, tmp_path_factory):
  """The workdir of a run that was never interrupted."""
  workdir = tmp_path_factory.mktemp("stories") / "finished"
  _last_line(nfnets("train", f"--workdir={workdir}", *TINY_RUN))
  return workdir


@pytest.fixture
def copy(finished, tmp_path):
  """A copy of that workdir, to be harmed."""
  return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
  """Ten scans, one of each digit, as PNG files."""
  folder = tmp_path_factory.mktemp("digits")
  data = load_digits()
  for digit in range(10):
    scan = data.images[list(data.target).index(digit)]
    image = Image.fromarray((scan / 16 * 255).astype(np.uint8))
    image.save(folder / f"{digit}.png")
  return folder


def test_a_run_leaves_what_the_readme_says(finished):
  names = {p.name for p in finished.iterdir() if not p.name.startswith(".")}
  assert names == {
    "checkpoints",
    "config.json",
    "curves.png",
    "metrics.jsonl",
    "tensorboard",
    "weights.safetensors",
  }
  assert [row["step"] for row in read_rows(finished)] == list(range(1, 45))
  rates = [row["learning_rate"] for row in read_rows(finished)]
  assert rates[0] == 0
  assert rates[22] == pytest.approx(0.5)  # After 22 steps of warm-up.
  row = read_rows(finished)[10]
  expected = {"loss", "accuracy", "grad_norm", "learning_rate", "clipped/all"}
  assert expected < row.keys()
  resolved = json.loads((finished / "config.json").read_text())
  assert resolved["derived"]["total_steps"] == 44
  assert resolved["derived"]["peak_learning_rate"] == 0.5
  weights = load_file(finished / "weights.safetensors").values()
  num_params = sum(values.size for values in weights)
  assert resolved["derived"]["num_params"] == num_params
  assert resolved["config"]["model"]["depth"] == [1, 1]
  steps = {path.name for path in (finished / "checkpoints").iterdir()}
  assert steps == {"35", "42", "44"}


def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(
  finished, environment, tmp_path, nfnets
):
  """Before, while and after it saves; each time the same command goes on."""
  workdir = tmp_path / "killed"
  command = [sys.executable, "-m", "nfnets.main", "train"]
  command += [f"--workdir={workdir}", *TINY_RUN]
  checkpoints = workdir / "checkpoints"

  def at_step(step):
    record = workdir / "metrics.jsonl"
    return lambda: record.exists() and f'"step": {step},' in record.read_text()

  def while_saving():
    return any("tmp" in p.name for p in checkpoints.glob("*"))

  def has_saved(step):
    return (checkpoints / str(step)).is_dir

  for is_time, number in (
    (at_step(3), signal.SIGKILL),
    (while_saving, signal.SIGKILL),
    (has_saved(7), signal.SIGKILL),
    (has_saved(14), signal.SIGINT),
    (has_saved(28), signal.SIGKILL),
  ):
    with (tmp_path / "errors").open("w") as errors:
      assert kill_when(is_time, command, environment, number, errors)
    if number == signal.SIGINT:
      text = (tmp_path / "errors").read_text()
      found = re.search(r"stopped by SIGINT after step (\d+) of 44", text)
      assert has_saved(int(found[1]))()
  assert not (workdir / "weights.safetensors").exists()

  result = nfnets("train", f"--workdir={workdir}", *TINY_RUN)
  _last_line(result)
  assert int(re.search(r"from step (\d+)", result.stdout)[1]) >= 28
  # Every number of every step, to the last bit, and the weights.
  assert read_rows(workdir) == read_rows(finished)
  assert read_rows(workdir, "eval") == read_rows(finished, "eval")
  weights = "weights.safetensors"
  assert (workdir / weights).read_bytes() == (finished / weights).read_bytes()


def test_two_processes_train_as_one(finished, environment, tmp_path):
  """A pod of two CPU hosts with a workdir that both see."""
  workdir = tmp_path / "pod"
  options = [f"--workdir={workdir}", *TINY_RUN, "--config.train.epochs=0.5"]
  results = run_pod(environment, *options)
  assert [code for code, *_ in results] == [0, 0], results
  first, second = (output for _, output, _ in results)
  assert "on 2 x cpu" in first
  assert re.search(r"warm-up of 22 steps is not over .* rises to 0.22\d", first)
  assert "done" in first
  assert "done" not in second
  assert "  test: raw" in first
  assert "  test: raw" not in second
  # Dropout draws per device, so the losses are near, not equal.
  ours, alone = read_rows(workdir), read_rows(finished)
  assert [row["step"] for row in ours] == list(range(1, 12))
  for row, expected in zip(ours, alone, strict=False):
    np.testing.assert_allclose(row["loss"], expected["loss"], rtol=0.02)
    # Tells, unlike the first losses, one batch from another.
    np.testing.assert_allclose(
      row["grad_norm"], expected["grad_norm"], rtol=0.01
    )
  assert read_rows(workdir, "eval")[-1]["step"] == 11


@pytest.mark.slow
def test_two_processes_evaluate_as_one(finished, environment):
  """The first alone tells the result, which is that of one process."""
  results = run_pod(
    environment, f"--workdir={finished}", "--json", command="evaluate"
  )
  assert [code for code, *_ in results] == [0, 0], results
  first, second = (output for _, output, _ in results)
  assert "num_examples" not in second
  found = json.loads(first.splitlines()[-1])
  recorded = read_rows(finished, "eval")[-1]
  for kind in ("raw", "ema"):
    assert found[kind]["num_examples"] == 360
    for name in ("top1", "top5"):
      assert found[kind][name] == recorded[f"{kind}_{name}"]
    np.testing.assert_allclose(
      found[kind]["loss"], recorded[f"{kind}_loss"], rtol=1e-5
    )


def test_processes_with_other_settings_are_refused(environment, tmp_path):
  workdir = tmp_path / "pod"
  options = [f"--workdir={workdir}", *TINY_RUN]
  results = run_pod(
    environment, *options, second=["--config.optim.lr_per_256=0.5"]
  )
  for (code, _, errors), value in zip(results, ("2.0", "0.5"), strict=True):
    assert code == 1
    assert re.search(
      rf"differ in optim.lr_per_256 \(here {value}\): start the same", errors
    )
  assert not workdir.exists()


@pytest.mark.slow
def test_a_process_that_cannot_start_is_told_to_the_other(
  environment, tmp_path
):
  options = [f"--workdir={tmp_path / 'pod'}", *TINY_RUN]
  first, second = run_pod(
    environment,
    *options,
    second=["--config.data.source=folder", f"--config.data.dir={tmp_path}/no"],
  )
  assert (first[0], second[0]) == (1, 1)
  assert first[2].endswith("process 1 cannot start: it says why\n")
  assert "no is no folder: give" in second[2]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_other_too(
  environment, tmp_path, failing
):
  """One whose images cannot be read; the other waits for what it computes."""
  for name in "ab":
    for folder in "whole", "broken":
      (tmp_path / folder / name).mkdir(parents=True)
    for i in range(10):
      Image.new("RGB", (32, 32)).save(tmp_path / "whole" / name / f"{i}.png")
      (tmp_path / "broken" / name / f"{i}.png").touch()
  first, second = [
    f"--config.data.dir={tmp_path / ('broken' if i == failing else 'whole')}"
    for i in range(2)
  ]
  options = [
    f"--workdir={tmp_path / 'pod'}",
    *TINY_RUN,
    "--config.data.source=folder",
    "--config.data.max_broken=2",
    "--config.train.batch_size=8",
  ]
  results = run_pod(environment, *options, first, second=[second])
  # JAX alone would abort both (134 in a shell) after minutes.
  assert [code for code, *_ in results] == [1, 1], results
  errors = [errors for *_, errors in results]
  assert re.search(
    r"nfnets train: \d images could not be read.*\n$", errors[failing]
  )
  assert errors[1 - failing].endswith(
    f"nfnets: process {failing} failed and says why: this one ends with it\n"
  )


@pytest.mark.slow
def test_one_of_two_processes_that_is_asked_to_stop_stops_both(
  environment, tmp_path
):
  workdir = tmp_path / "pod"
  options = [f"--workdir={workdir}", *TINY_RUN]
  longer = [
    *options,
    "--config.train.epochs=40",
    "--config.eval.every_epochs=9",
  ]
  longer.append("--config.checkpoint_every_steps=1000")
  record = workdir / "metrics.jsonl"
  is_due = lambda: record.exists() and '"step": 9,' in record.read_text()
  results = run_pod(environment, *longer, is_stop_due=is_due)
  # Slurm's job has the highest of them.
  assert [code for code, *_ in results] == [os.EX_TEMPFAIL] * 2, results
  steps = {
    re.search(r"stopped by preemption after step (\d+) of", errors)[1]
    for _, _, errors in results
  }
  assert len(steps) == 1, results
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == steps
  (step,) = map(int, steps)
  shorter = [*longer, f"--config.train.steps={step + 3}"]
  results = run_pod(environment, *shorter)
  assert [code for code, *_ in results] == [0, 0], results
  assert f"from step {step}" in results[0][1]
  assert [r["step"] for r in read_rows(workdir)] == list(range(1, step + 4))


@pytest.mark.slow
def test_processes_that_do_not_share_a_workdir_are_refused(
  environment, tmp_path
):
  ours, other = tmp_path / "1" / "pod", tmp_path / "2" / "pod"
  options = [f"--workdir={ours}", *TINY_RUN]
  for code, _, errors in run_pod(
    environment, *options, second=[f"--workdir={other}"]
  ):
    assert code == 1
    assert re.search(r"not the same folder .*process 1 does not see", errors)
  assert not list(ours.iterdir())
  assert not other.exists()


def test_a_run_that_is_asked_to_stop_saves_first(environment, tmp_path):
  workdir = tmp_path / "stopped"
  options = [*TINY_RUN, "--config.checkpoint_every_steps=1000"]
  command = [sys.executable, "-m", "nfnets.main", "train"]
  process = subprocess.Popen(
    [*command, f"--workdir={workdir}", *options],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  record = workdir / "metrics.jsonl"
  while not record.exists() or '"step": 4,' not in record.read_text():
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.005)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == os.EX_TEMPFAIL
  found = re.search(
    r"stopped by SIGTERM after step (\d+) of 44; the same", errors
  )
  assert found, errors
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == [found[1]]
  assert (workdir / "curves.png").exists()


@pytest.mark.slow
def test_a_run_whose_terminal_goes_away_saves_first(environment, tmp_path):
  """It hears SIGHUP, and nothing that it says arrives."""
  workdir = tmp_path / "stopped"
  command = [sys.executable, "-m", "nfnets.main", "train", *TINY_RUN]
  ours, its = os.openpty()
  process = subprocess.Popen(
    [
      *("setsid", "--ctty", *command, f"--workdir={workdir}"),
      "--config.checkpoint_every_steps=1000",
    ],
    env=environment,
    stdin=its,
    stdout=its,
    stderr=its,
  )
  os.close(its)
  record = workdir / "metrics.jsonl"
  while not record.exists() or '"step": 4,' not in record.read_text():
    assert process.poll() is None
    os.read(ours, 4096)
  os.close(ours)
  assert process.wait(PATIENCE) == os.EX_TEMPFAIL
  (saved,) = (workdir / "checkpoints").iterdir()
  assert int(saved.name) >= 4


def _run_unread(command, environment):
  """Runs it with an output that nobody reads any more."""
  reading, writing = os.pipe()
  os.close(reading)
  try:
    return subprocess.run(
      command,
      env=environment,
      stdout=writing,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  finally:
    os.close(writing)


def test_a_stop_is_heard_when_nobody_reads_any_more(environment):
  """As `nfnets train | tee log`, where Ctrl-C ends `tee` first."""
  code = """
import signal, sys
from nfnets import stops
with stops.on_signal() as stop:
  signal.raise_signal(signal.SIGINT)
  print("said to nobody", flush=True)
sys.exit(stop.reason)"""
  result = _run_unread([sys.executable, "-c", code], environment)
  assert (result.returncode, result.stderr) == (1, "SIGINT\n")


def test_a_stop_is_heard_while_something_is_written(monkeypatch):
  """As by a slow terminal, or a pipe whose reader takes its time."""
  reading, writing = os.pipe()
  main_thread = threading.main_thread().ident

  def stop_then_read(stop):
    while not _is_full(writing):
      time.sleep(0.001)
    signal.pthread_kill(main_thread, signal.SIGTERM)
    while stop.reason is None:
      time.sleep(0.001)
    with os.fdopen(reading) as reader:
      return reader.read()

  said = "x" * 2**20
  with ThreadPoolExecutor(1) as pool, os.fdopen(writing, "w") as output:
    monkeypatch.setattr(sys, "stdout", output)
    with stops.on_signal() as stop:
      received = pool.submit(stop_then_read, stop)
      output.write(said)
      output.close()
    assert stop.reason == "SIGTERM"
    assert received.result().startswith(said)


def _is_full(pipe):
  return not select.select([], [pipe], [], 0)[1]


def test_a_second_ctrl_c_stops_at_once():
  with stops.on_signal() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.reason == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_a_run_in_a_thread_hears_no_signals():
  def reason():
    with stops.on_signal() as stop:
      return stop.reason

  with ThreadPoolExecutor(1) as pool:
    assert pool.submit(reason).result() is None


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_hangup_stops_a_run_unless_it_was_ignored(is_ignored):
  other = signal.SIG_IGN if is_ignored else lambda *_: None
  before = signal.signal(signal.SIGHUP, other)
  try:
    with stops.on_signal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert stop.reason == (None if is_ignored else "SIGHUP")
    assert signal.getsignal(signal.SIGHUP) == other
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_workdir_in_use_is_refused(copy, nfnets_here):
  before = _snapshot(copy)
  with (copy / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    result = nfnets_here("train", f"--workdir={copy}", *TINY_RUN)
  _fails(result, 1, r"another process is training in .*: wait for it, stop it")
  assert _snapshot(copy) == before


def test_processes_that_see_other_checkpoints_are_refused(
  copy, nfnets_here, monkeypatch
):
  """On a network a folder's list may be old."""
  asked = []

  def check_agreement(values):
    asked.append(values)
    if "newest checkpoint" in values:
      raise InputError("the hosts differ")

  monkeypatch.setattr(hosts, "check_agreement", check_agreement)
  before = _snapshot(copy)
  result = nfnets_here("train", f"--workdir={copy}", *TINY_RUN)
  _fails(result, 1, "the hosts differ")
  assert asked[-1] == {"newest checkpoint": 44}
  del before[copy / ".lock"]
  assert before.items() <= _snapshot(copy).items()


def test_a_complete_run_is_complete_on_other_devices_and_by_newer_versions(
  copy, nfnets_here
):
  """Older ones wrote that a step has one part; the others have eight here."""
  path = copy / "config.json"
  values = json.loads(path.read_text())
  values["config"]["train"]["accumulate"] = 1
  values["derived"]["micro_batches"] = 3
  path.write_text(json.dumps(values))
  command = ("train", "--config=configs/digits.py", f"--workdir={copy}")
  result = nfnets_here(*command, *TINY_RUN)
  assert result.returncode == 0, result.stderr
  assert "is complete" in result.stdout
  for change in (
    "train.accumulate: 1 -> None",
    "num_devices: 1 -> 8 (dropout and",
    "micro_batches: 3 -> 1 (dropout and",
  ):
    assert f"changed since the last start: {change}" in result.stdout
  derived = json.loads(path.read_text())["derived"]
  assert (derived["num_devices"], derived["micro_batches"]) == (8, 1)


@pytest.mark.parametrize("is_start", [True, False])
def test_weights_that_are_not_the_runs_are_left_alone(
  is_start, finished, nfnets_here, tmp_path
):
  path = tmp_path / "weights.safetensors"
  params, card = pretrained.load_file(finished / "weights.safetensors")
  if not is_start:
    card = card._replace(step=None)  # As of `nfnets convert`.
  pretrained.save(path, params, card)
  before = path.read_bytes()
  options = [f"--config.init_from={path}"] if is_start else []
  result = nfnets_here("train", f"--workdir={tmp_path}", *TINY_RUN, *options)
  _fails(result, 1, r"weights.safetensors is not of this run, which puts its ")
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_who_has_a_workdir_is_told(tmp_path):
  """Twice: the lock is free again, and names nobody."""
  path = tmp_path / ".lock"
  holder = f"host {socket.gethostname()}, process {os.getpid()}"
  message = rf"\({holder}\): wait for it, .* gone, remove {path}$"
  for _ in range(2):
    with (
      checkpoint.locked(tmp_path),
      pytest.raises(InputError, match=message),
      checkpoint.locked(tmp_path),
    ):
      pass
    assert path.read_text() == ""


def test_a_workdir_that_cannot_be_locked_is_told(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", refuse)  # As on some file systems.
  message = r"cannot be locked \(No locks available\): nothing keeps two runs"
  with pytest.warns(UserWarning, match=message), checkpoint.locked(tmp_path):
    pass


@pytest.mark.parametrize(
  ("variables", "seen"),
  [
    ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS tells of 4"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE tells of 2"),
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES tells of 2"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES tells of 2"),
    # The shell of a job; one process under each launcher.
    ({"SLURM_NTASKS": "4"}, None),
    (
      {
        "SLURM_STEP_NUM_TASKS": "1",
        "OMPI_COMM_WORLD_SIZE": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
      },
      None,
    ),
  ],
)
def test_a_pod_without_its_option_is_refused(
  variables, seen, nfnets_here, monkeypatch, tmp_path
):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  command = ("train", "--config.train.num_devices=99")
  result = nfnets_here(*command, cwd=tmp_path)
  if seen:
    _fails(
      result,
      2,
      rf"{seen} processes, .*: add --pod .* `env -u {seen.split()[0]}`",
    )
  else:
    _fails(result, 1, r"99 devices were asked for")


def test_a_run_starts_from_weights(finished, nfnets, tmp_path):
  """A learning rate of zero leaves them as they were."""
  weights = finished / "weights.safetensors"
  result = nfnets(
    "train",
    f"--workdir={tmp_path}",
    *TINY_RUN,
    f"--config.init_from={weights}",
    "--config.train.steps=2",
    "--config.optim.lr_per_256=0.0",
    "--config.optim.warmup_steps=1",
    "--config.optim.ema_decay=0.0",
  )
  _last_line(result)
  assert f"{tmp_path} from {weights}" in result.stdout
  assert "2 steps" in result.stdout
  (found,) = read_rows(tmp_path, "eval")
  expected = read_rows(finished, "eval")[-1]
  for name in ("loss", "top1", "top5"):
    assert found[f"ema_{name}"] == expected[f"ema_{name}"], name
    assert found[f"raw_{name}"] == expected[f"ema_{name}"], name


def test_a_finished_run_started_again_says_so(finished, nfnets):
  before = {p: p.read_bytes() for p in finished.glob("*.jsonl")}
  result = nfnets("train", f"--workdir={finished}", *TINY_RUN)
  assert "is complete" in result.stdout
  assert _last_line(result).startswith("done: test accuracy")
  assert before == {p: p.read_bytes() for p in finished.glob("*.jsonl")}


def test_other_settings_may_change_and_are_told(copy, nfnets):
  """Without --config a workdir's own config is the one that is changed."""
  changed = (f"--workdir={copy}", "--config.optim.lr_per_256=0.5")
  before = _snapshot(copy)
  complete = r"complete after 44 steps.*lr_per_256: 2.0 -> 0.5.*raise config.tr"
  _fails(nfnets("train", *changed), 1, complete)
  assert _snapshot(copy) == before

  result = nfnets("train", *changed, "--config.train.epochs=2.2")
  _last_line(result)
  assert "from step 44" in result.stdout
  assert "optim.lr_per_256: 2.0 -> 0.5" in result.stdout
  assert read_rows(copy)[-1]["step"] == 49


@pytest.mark.slow
@pytest.mark.parametrize("option", ["scan", "packed"])
def test_a_run_goes_on_with_other_arrays(option, nfnets, environment, tmp_path):
  """And back: what is saved does not depend on them."""
  options = [option for option in TINY_RUN if "model.depth" not in option]
  options += ["--config.model.depth=2,3", "--config.train.epochs=0.5"]
  options += ["--config.model.drop_rate=0", "--config.model.stochdepth_rate=0"]

  def arguments(name, value):
    workdir = f"--workdir={tmp_path / name}"
    return ["train", workdir, *options, f"--config.train.{option}={value}"]

  assert kill_when(
    (tmp_path / "with" / "checkpoints" / "7").is_dir,
    [sys.executable, "-m", "nfnets.main", *arguments("with", True)],
    environment,
  )
  shutil.copytree(tmp_path / "with", tmp_path / "without")
  for name, value in (("with", True), ("without", False)):
    result = nfnets(*arguments(name, value))
    _last_line(result)
    assert "from step 7" in result.stdout
  found, without = (
    load_file(tmp_path / name / "weights.safetensors")
    for name in ("with", "without")
  )
  assert found.keys() == without.keys()
  for name, expected in without.items():
    np.testing.assert_allclose(
      found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_a_first_start_that_failed_does_not_bind_its_workdir(nfnets, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  options = [*TINY_RUN, "--config=configs/digits.py"]
  _last_line(nfnets("train", f"--workdir={tmp_path}", *options))


def test_a_recipe_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").touch()  # The shell leaves ~ in --config=~/mine.py.
  assert main._find_config("~/mine.py") == tmp_path / "mine.py"


def test_a_recipe_of_the_current_folder_is_before_ours(tmp_path, monkeypatch):
  ours = main._find_config("configs/digits.py").resolve()
  monkeypatch.chdir(tmp_path)
  assert main._find_config("configs/digits.py").samefile(ours)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "digits.py").touch()
  found = main._find_config("configs/digits.py")
  assert found.samefile(tmp_path / "configs" / "digits.py")


def test_a_typo_in_a_recipe_file(nfnets, tmp_path):
  recipe = tmp_path / "mine.py"
  text = (
    "from configs import base\ndef get_config():\n  c = base.get_config()\n"
  )
  for lines, pattern in (
    ("  c.train.epoch = 10\n  return c\n", r"'epoch': did you mean 'epochs'"),
    ("  return {}\n", r"the recipe returns a dict: start it from configs.base"),
    ("  return c(\n", r"never closed"),
    ("  return open('absent')\n", r"No such file or directory: 'absent'"),
    (
      "  with c.data.unlocked():\n    del c.data.min_area\n  return c\n",
      r"the config lacks data.min_area: start a recipe from configs.base",
    ),
  ):
    recipe.write_text(text + lines)
    _fails(nfnets("train", f"--config={recipe}", cwd=tmp_path), 2, pattern)
  assert [p.name for p in tmp_path.iterdir() if p.is_dir()] in (
    [],
    ["__pycache__"],
  )


def test_evaluation_of_a_run_and_of_its_weights_agree(
  finished, nfnets, tmp_path
):
  of_run = nfnets("evaluate", f"--workdir={finished}", "--json")
  results = json.loads(_last_line(of_run))
  assert set(results) == {"raw", "ema"}
  assert results["ema"]["num_examples"] == 360
  recorded = read_rows(finished, "eval")[-1]
  assert recorded["raw_loss"] != pytest.approx(recorded["ema_loss"], rel=1e-4)
  for kind in ("raw", "ema"):
    assert results[kind]["top1"] == recorded[f"{kind}_top1"]
    loss = recorded[f"{kind}_loss"]
    assert results[kind]["loss"] == pytest.approx(loss, rel=1e-5)

  weights = finished / "weights.safetensors"
  of_weights = nfnets(
    "evaluate",
    f"--weights={weights}",
    "--config=configs/digits.py",
    # Of the recipe only the data counts: the weights say how to see it.
    "--config.data.mean=1.0,2.0,3.0",
    "--config.eval.batch_size=100",
    f"--details={tmp_path}",
  )
  top1 = results["ema"]["top1"]
  assert f"top-1 {top1:.2%}" in of_weights.stdout
  assert f"loss {recorded['ema_loss']:.4f}" in of_weights.stdout
  assert "(360 images)" in of_weights.stdout
  assert _last_line(of_weights) == f"per class: {tmp_path}"

  with (tmp_path / "confusion.csv").open() as file:
    header, *table = csv.reader(file)
  assert header[1:] == [row[0] for row in table] == list("0123456789")
  confusion = np.array([row[1:] for row in table], int)
  assert confusion.sum() == 360
  assert np.trace(confusion) == round(360 * top1)
  with (tmp_path / "per_class.csv").open() as file:
    for i, row in enumerate(csv.DictReader(file)):
      assert row["class"] == str(i)
      assert int(row["images"]) == confusion[i].sum()
      share = confusion[i, i] / confusion[i].sum()
      assert float(row["top1"]) == pytest.approx(share, abs=1e-4)
      if int(row["times"]):
        assert confusion[i, int(row["mistaken_for"])] == int(row["times"])
  with Image.open(tmp_path / "confusion.png") as picture:
    assert min(picture.size) > 300


def test_what_classes_are_mistaken_for(tmp_path):
  confusion = np.array([[5, 1, 3], [0, 9, 0], [2, 0, 0]])
  result = evaluate.Result(1.0, 0.7, 1.0, 20, confusion)
  evaluate.save_details(tmp_path, result, ("a", "b", "c"))
  with (tmp_path / "per_class.csv").open() as file:
    _, *rows = csv.reader(file)
  assert rows == [
    ["a", "9", "0.5556", "c", "3"],
    ["b", "9", "1.0000", "", "0"],
    ["c", "2", "0.0000", "a", "2"],
  ]


@pytest.mark.filterwarnings("ignore:skipped:UserWarning")
def test_an_evaluation_may_prepare_images_otherwise(
  finished, nfnets_here, tmp_path
):
  data = load_digits()
  for digit in range(10):
    for split, i in (("train", 0), ("test", 1)):
      folder = tmp_path / split / str(digit)
      folder.mkdir(parents=True)
      scan = data.images[np.flatnonzero(data.target == digit)[i]]
      wide = np.pad((scan / 16 * 255).astype(np.uint8), ((0, 0), (4, 4)))
      Image.fromarray(wide).resize((64, 32)).save(folder / "x.png")

  def loss(*options):
    result = nfnets_here("evaluate", "--json", *options)
    return next(iter(json.loads(_last_line(result)).values()))["loss"]

  of_weights = [
    f"--weights={finished / 'weights.safetensors'}",
    "--config=configs/digits.py",
    "--config.data.source=folder",
    f"--config.data.dir={tmp_path}",
    "--config.train.batch_size=2",
  ]
  losses = [
    loss(*of_weights, *options)
    for options in (
      [],
      ["--config.data.eval_crop=padded"],
      ["--config.data.eval_margin=8"],
      ["--config.data.test_size=40"],
    )
  ]
  assert len(set(losses)) == len(losses)

  of_run = f"--workdir={finished}"
  assert loss(of_run) != loss(of_run, "--config.data.test_size=40")

  for path in (tmp_path / "test").glob("*/x.png"):
    path.write_text("no image")
  result = nfnets_here("evaluate", *of_weights)
  _fails(result, 1, r"none of the 10 images to test with could be read")


def test_images_are_not_replaced_by_a_picture_of_them(
  finished, digit_files, nfnets_here
):
  path = digit_files / "3.png"
  before = path.read_bytes()
  result = nfnets_here(
    "predict", f"--workdir={finished}", f"--grid={path}", digit_files
  )
  _fails(result, 1, r"3.png is read, and would be overwritten: give another")
  assert path.read_bytes() == before


def test_details_that_cannot_be_written_are_told_first(
  finished, nfnets_here, tmp_path
):
  (tmp_path / "taken").touch()
  result = nfnets_here(
    *("evaluate", f"--workdir={finished}", "--config.train.num_devices=1"),
    f"--details={tmp_path / 'taken'}",
  )
  _fails(result, 1, r"--details=.*taken cannot be written to \(File exists\)")
  assert result.stdout == ""


def test_evaluation_of_other_weights_or_data_is_refused(
  finished, nfnets_here, tmp_path
):
  params, card = pretrained.load_file(finished / "weights.safetensors")
  path = tmp_path / "w.safetensors"
  names = card.class_names[::-1]
  pretrained.save(path, params, card._replace(class_names=names))
  one = "--config.train.num_devices=1"
  config = "--config=configs/digits.py"
  result = nfnets_here("evaluate", f"--weights={path}", config, one)
  _fails(result, 1, r"tells 10 classes apart \(9, 8, 7, ...\), the data set")
  other = "--config.data.mean=1,2,3"
  result = nfnets_here("evaluate", f"--workdir={finished}", other, one)
  _fails(result, 1, r"holds another run \(data.mean: ")


def test_details_are_those_of_the_averaged_weights(
  finished, nfnets_here, monkeypatch, tmp_path
):
  raw, ema = (evaluate.Result(1.0, top1, 0.9, 10) for top1 in (0.5, 0.6))
  given = []
  monkeypatch.setattr(
    evaluate, "over_split", lambda *_, **__: {"raw": raw, "ema": ema}
  )
  monkeypatch.setattr(
    evaluate, "save_details", lambda folder, result, _: given.append(result)
  )
  result = nfnets_here(
    *("evaluate", f"--workdir={finished}", "--config.train.num_devices=1"),
    f"--details={tmp_path / 'details'}",
  )
  assert result.returncode == 0, result.stderr
  assert given == [ema]


def test_evaluation_on_other_classes_is_refused(finished, nfnets, tmp_path):
  for name in ("cat", "dog"):
    folder = tmp_path / name
    folder.mkdir()
    for i in range(3):
      Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(folder / f"{i}.png")
  result = nfnets(
    "evaluate",
    f"--weights={finished / 'weights.safetensors'}",
    "--config=configs/digits.py",
    "--config.data.source=folder",
    f"--config.data.dir={tmp_path}",
    "--config.train.batch_size=2",
  )
  _fails(
    result, 1, r"tells 10 classes apart \(0, 1, 2, ...\), the data set has 2"
  )


def test_prediction_from_a_run_and_from_its_weights_agree(
  finished, digit_files, nfnets
):
  weights = f"--weights={finished}/weights.safetensors"
  outputs = []
  for arguments in (
    [f"--workdir={finished}"],
    [weights],
    [weights, "--precision=bfloat16"],
  ):
    result = nfnets("predict", *arguments, "--json", digit_files)
    assert result.returncode == 0, result.stderr
    outputs.append([json.loads(line) for line in result.stdout.splitlines()])
  *outputs, rough = outputs
  assert outputs[0] == outputs[1]
  assert rough != outputs[0]
  for near, exact in zip(rough, outputs[0], strict=True):
    expected = {c["name"]: c["probability"] for c in exact["classes"]}
    found = {c["name"]: c["probability"] for c in near["classes"]}
    shared = expected.keys() & found.keys()
    assert len(shared) >= 4  # Of five: the last may be nearly the sixth.
    for name in shared:
      assert found[name] == pytest.approx(expected[name], abs=0.02)
    best, second = list(expected.values())[:2]
    if best - second > 0.04:  # Else either may be the likeliest.
      assert near["classes"][0]["name"] == exact["classes"][0]["name"]
  assert [os.path.basename(x["path"]) for x in outputs[0]] == [
    f"{digit}.png" for digit in range(10)
  ]
  for output in outputs[0]:
    probabilities = [c["probability"] for c in output["classes"]]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1 + 1e-6


def test_prediction_goes_on_after_a_file_that_is_no_image(
  finished, digit_files, tmp_path, nfnets, nfnets_here
):
  (tmp_path / "0_bad.png").write_text("hello")
  for digit in (3, 5, 7):
    shutil.copy(digit_files / f"{digit}.png", tmp_path)
  outputs = []
  for size in (1, 3, 32):  # In several batches, the last of them not full.
    command = ["predict", f"--workdir={finished}", "--top=2", tmp_path]
    result = nfnets(*command, f"--batch_size={size}")
    assert result.returncode == 1
    reason, number = result.stderr.splitlines()
    assert "0_bad.png is not an image in a known format" in reason
    assert number == "nfnets predict: 1 of 4 files could not be classified"
    outputs.append(result.stdout)
  assert outputs == [outputs[0]] * 3
  lines = outputs[0].splitlines()
  assert [line[-5:] for line in lines[::3]] == ["3.png", "5.png", "7.png"]
  assert len(lines) == 9
  assert re.fullmatch(r" +\d+\.\d\d%  \d", lines[1])
  bad = tmp_path / "0_bad.png"
  result = nfnets_here("predict", f"--workdir={finished}", bad)
  assert result.returncode == 1
  assert len(result.stderr.splitlines()) == 1  # Of one file no count.


def test_results_are_seen_before_all_is_read(
  finished, digit_files, environment, tmp_path
):
  """Through a pipe too, so that nothing is lost when one stops it."""
  os.mkfifo(tmp_path / "last.png")
  files = [digit_files / "3.png", digit_files / "5.png", tmp_path / "last.png"]
  command = [sys.executable, "-m", "nfnets.main", "predict", *files]
  variables = {k: v for k, v in environment.items() if k != "PYTHONUNBUFFERED"}
  with subprocess.Popen(
    [*command, f"--workdir={finished}", "--json", "--batch_size=1"],
    env=variables,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      first = json.loads(process.stdout.readline())
      assert first["path"] == str(digit_files / "3.png")
      assert process.poll() is None
    finally:
      process.kill()


def test_paths_may_stand_on_both_sides_of_an_option(digit_files, nfnets_here):
  paths = digit_files / "3.png", "--top=1", digit_files / "absent.png"
  result = nfnets_here("predict", *paths, "--workdir=absent")
  _fails(result, 1, r"absent.png does not exist: give image files or folders")


def test_a_reader_that_has_enough_is_no_error(environment):
  """As in `nfnets predict ... | head`: nothing is said of it."""
  command = [sys.executable, "-m", "nfnets.main", "info"]
  result = _run_unread(command, environment)
  assert (result.returncode, result.stderr) == (1, "")


def test_a_device_that_is_too_small_is_told(monkeypatch, capsys):
  """With what to do about it; whatever else XLA raises is no user's error."""
  from nfnets import main

  def too_large(args, rest):
    jnp.zeros(2**50, jnp.uint8).block_until_ready()

  for command, advice in (
    ("predict x.png", "a smaller --batch_size, or --precision=bfloat16"),
    ("evaluate", "a smaller --config.eval.batch_size"),
    (
      "train",
      "--config.train.accumulate=4, which computes a batch in four parts, "
      "--config.train.remat=blocks, which keeps less for the gradient, or a "
      "smaller --config.train.batch_size",
    ),
  ):
    name, *rest = command.split()
    monkeypatch.setattr(main, f"_{name}", too_large)
    assert main.main([name, *rest]) == 1
    found = capsys.readouterr().err
    assert re.fullmatch(
      rf"nfnets {name}: does not fit into the device's memory \(RESOURCE_EXHAU"
      rf".*\); try {re.escape(advice)}\n",
      found,
    ), found

  def full(args, rest):
    raise MemoryError

  monkeypatch.setattr(main, "_predict", full)
  assert main.main(["predict", "x.png"]) == 1
  assert capsys.readouterr().err == "nfnets predict: memory: it is full\n"

  def broken(args, rest):
    raise RuntimeError("INTERNAL: something else")

  monkeypatch.setattr(main, "_predict", broken)
  with pytest.raises(RuntimeError, match="something else"):
    main.main(["predict", "x.png"])


def test_the_first_run_of_the_readme_learns(nfnets, tmp_path):
  """The embedded default, as it is: at least 98.5 % on held-out digits."""
  result = nfnets("train", cwd=tmp_path, XLA_FLAGS="")
  found = re.fullmatch(
    r"done: test accuracy (\d+\.\d\d)% \(EMA weights\); weights and curves "
    r"are in runs/digits",
    _last_line(result),
  )
  assert float(found[1]) >= 98.5
  progress = re.findall(
    r"loss \S+  acc \S+%  \S+ img/s  clipped \d+%", result.stdout
  )
  assert progress


def test_info(nfnets, nfnets_here):
  listed = nfnets("info")
  assert "nfnet_f6_plus" in listed.stdout
  row = r"nfnet_f3 +254.92M +320 +416 +67.94G +114.76G"
  assert re.search(row, listed.stdout)
  one = nfnets_here("info", "nfnet_f3").stdout
  for text in (
    "254,924,200",
    "416 px, 114.76G",
    "320 px, 67.94G",
    "magnitude 15",
    "972 MiB parameters",
    "2,917 MiB in all",
  ):
    assert text in one
  assert re.search(r"stem +4 convs +128 +104 x 104\n", one)
  assert re.search(r"stage 3 +24 +1536 +768 +6 x 128 +26 x 26\n", one)
  other = nfnets_here("info", "nf_resnet50").stdout
  assert re.search(r"stem +1 conv +64 +56 x 56\n", other)
  assert re.search(r"stage 4 +3 +2048 +512 +1 x 512 +7 x 7\n", other)
  columns = "group_width=192,128,128,128"
  paper = nfnets_here("info", "nfnet_f4_plus", columns).stdout
  assert "527,033,076" in paper
  assert "367.41G" in paper
  groups = nfnets_here("info", "--groups").stdout
  assert re.search(r"classifier weight +no +yes +1 +3,072,000", groups)
  groups = nfnets_here("info", "nfnet_f0", "--groups", "num_classes=10").stdout
  assert re.search(r"classifier weight +no +yes +1 +30,720", groups)


def _commands_of_the_readme():
  text = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
  return re.findall(r"^nfnets (.*?)(?: \.\.\.)?$", text, re.M)


@pytest.mark.parametrize("command", _commands_of_the_readme())
def test_the_commands_of_the_readme_are_understood(command):
  from nfnets import main

  args, rest = main._make_parser().parse_known_args(shlex.split(command))
  if hasattr(args, "config") and args.config:
    main._load_config(args.config, rest)  # Raises what is wrong.
  else:
    assert rest == []


def test_compiled_programs_are_kept_in_the_cache_folder(tmp_path):
  code = (
    "import jax; from nfnets import downloads; downloads.keep_compiled();"
    "jax.jit(lambda x: x + 1)(1.0)"
  )
  variables = {k: v for k, v in os.environ.items() if k[:4] != "JAX_"}
  variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  subprocess.run(
    [sys.executable, "-c", code],
    env=variables | {"NFNETS_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    check=True,
  )
  assert any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own setting")
@pytest.mark.parametrize("given", [None, "glibc.malloc.perturb=0"])
def test_a_command_starts_with_its_memory_settings_unless_told_otherwise(given):
  code = (
    "import os, sys; from nfnets import main;"
    "main.main = lambda: print(os.getpid(), os.environ['GLIBC_TUNABLES'],"
    " sys.argv[1:]); main.start()"
  )
  variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  if given:
    variables["GLIBC_TUNABLES"] = given
  with subprocess.Popen(
    [sys.executable, "-c", code, "a b", "--c=1"],
    env=variables,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    seen = process.stdout.read().strip()
  wanted = given or (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824"
    ":glibc.malloc.trim_threshold=4294967296"
  )
  assert seen == f"{process.pid} {wanted} ['a b', '--c=1']"


def test_interrupted_a_command_says_so_in_any_encoding():
  code = (
    "from nfnets import main\n"
    "def stopped():\n"
    "  print('\\u2192')\n"
    "  raise KeyboardInterrupt\n"
    "main.main = stopped\n"
    "main.start()"
  )
  result = subprocess.run(
    [sys.executable, "-u", "-c", code],
    env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert result.stdout == "\\u2192\n"
  assert result.stderr == "nfnets: interrupted\n"


def test_help_is_quick_and_complete(nfnets):
  start = time.monotonic()
  text = nfnets("--help").stdout
  assert time.monotonic() - start < 2
  for command in ("train", "evaluate", "predict", "info"):
    assert command in text
    assert f"usage: nfnets {command}" in nfnets(command, "--help").stdout


@pytest.mark.parametrize(
  ("arguments", "pattern"),
  [
    (["train", "--config.train.epoch=1"], r"'epoch': did you mean 'epochs'"),
    (["train", "--config.trian.epochs=1"], r"'trian': did you mean 'train'"),
    (["train", "--config.train.epochs=x"], r"epochs=x: could not convert"),
    (["train", "--config=configs/digit.py"], r"no file .*: configs/digits.py"),
    (["train", "--config=configs/digits.py:f0"], r"'f0': did you mean nfnet"),
    (["train", "--config.model.name=nfnet_f8"], r"unknown model 'nfnet_f8'"),
    (["train", "--config.model.width=(1,2)"], r"width=\(1, 2\) has 2 entries"),
    (["train", "--config.data.source=digit"], r"data source 'digit': did you"),
    (["train", "--config.train.batch_size=0"], r"batch_size=0: must be more"),
    (["train", "--config.optim.ema_decay=1"], r"ema_decay=1.0: must be"),
    (["train", "--config.optim.agc_eps=0"], r"agc_eps=0.0: must be more"),
    (["train", "--config.train.batch_size=None"], r"batch_size=None: invalid"),
    (
      [
        *("train", "--config=configs/finetune.py:imagenet"),
        "--config.train.epochs=2",
      ],
      r"epochs has no effect where config.train.steps=15000: give --config.t",
    ),
    (
      [
        *("train", "--config=configs/nfnet_pretrain.py"),
        "--config.optim.warmup_epochs=2",
      ],
      r"epochs has no effect where config.optim.warmup_steps=5000: give",
    ),
    (["train", "--config.train.epochs=inf"], r"epochs=inf: must be more"),
    (["train", "--config.data.mean=1,2"], r"mean=\(1, 2\): must be three"),
    (["train", "--config.data.std=0,0,0"], r"std=.*: must be three numbers"),
    (["train", "--config.data.test_size=-3"], r"test_size=-3: must be more"),
    (["train", "--config.data.num_threads=-1"], r"threads=-1: must be more"),
    (
      ["train", "--config.augment.randaugment_magnitude=31"],
      r"randaugment_magnitude=31: must be 0 to 30",
    ),
    (["train", "--config.train.precision=fp16"], r"precision 'fp16': .* bfl"),
    (
      ["train", "--config.augment.randaugment_layers=2"],
      r"layers=2: no magnitude was published for nfnet_tiny; give --config",
    ),
    (
      ["train", "--config.data.source=folder", "--config.data.dir="],
      r"source=folder needs --config.data.dir",
    ),
    (["train", "--config.seed=99999999999"], r"seed=99999999999: must be 0"),
    (["train", "--config.model.final_conv_ratio=0"], r"ratio=0.0 of .*: no c"),
    (["train", "--config.model.stem_width=0,8"], r"stem_width=\(0, 8\): wid"),
    (["train", "--config.train.epochs=0.01"], r"less than one step: raise"),
    (["train", "--epochs=3"], r"--epochs is .*mean --config.train.epochs\?"),
    (["train", "--init-from=x"], r"--init-from is .*mean --config.init_from"),
    (["train", "--wrokdir=x"], r"--wrokdir is no option .*mean --workdir"),
    (["train", "--config.optim.lr=1"], r"no such key: 'lr'; configs/base.py"),
    (["evaluate"], r"give either --workdir or --weights"),
    (["evaluate", "--weights=x.npz"], r"--weights also needs a --config"),
    (["predict", "x.png"], r"give either --workdir or --weights"),
    (["predict", "x.png", "--workdir=x", "--top=0"], r"--top=0: must be at"),
    (["predict", "x.png", "--weight=x"], r"--weight is .*mean --weights"),
    (["info", "nfnet_f8"], r"unknown model 'nfnet_f8': did you mean"),
    (["info", "nfnet_f0", "name=x"], r"unknown model column 'name'"),
    (["info", "nfnet_f0", "depth"], r"'depth': an override is written COLUMN"),
    (["info", "--depth"], r"--depth is no option of `nfnets info`"),
    (["train", "--config.train.remat=all"], r"config.train: unknown remat"),
    (["train", "--config.augment.partners=frsh"], r"'frsh': did you mean fre"),
    (["train", "--config.data.eval_crop=pad"], r"crop 'pad': did you mean pad"),
    (["train", "--config.optim.sam_share=0"], r"sam_share=0.0: must be above"),
    (["train", "--config.data.mean=1e999,2,3"], r"mean=.*: must be three numb"),
    (["show-batch", "--num_images=0"], r"--num_images=0: must be at least 1"),
  ],
)  # fmt: skip
def test_wrong_usage(arguments, pattern, nfnets_here, tmp_path):
  result = nfnets_here(*arguments, cwd=tmp_path)
  _fails(result, 2, pattern)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("arguments", "pattern"),
  [
    (
      [
        *("train", "--config.train.batch_size=9"),
        *("--config.train.accumulate=2", "--config.train.num_devices=1"),
      ],
      r"batch of 9 images does not divide .* such as 8 or 10",
    ),
    (["evaluate", "--workdir=absent"], r"absent does not exist \(no conf"),
    (["evaluate", "--workdir=~/absent"], r"^[^~]*/absent does not exist"),
    (["train", "--workdir=gs://x/y"], r"gs:/x/y is on the network: give a"),
    (
      ["train", "--workdir=/dev/null/no", "--config.train.num_devices=1"],
      r"--workdir=/dev/null/no cannot be written to \(Not a direct",
    ),
    (["train", "--config.data.dir=gs://x"], r"gs://x is on the network: give"),
    (
      ["evaluate", "--weights=~/x.npz", "--config=configs/digits.py"],
      r"[^~]/x.npz: there is no such",
    ),
    (["evaluate", "--workdir=."], r". is no workdir of a run"),
    (["predict", "absent", "--workdir=."], r"absent does not exist: give"),
    (["predict", ".", "--workdir=."], r"holds no image files"),
    (["predict", ".", "--workdir=.", "--grid=x.y"], r"x.y: its name must end"),
    (["show-batch", "--out=no/x.png"], r"no/x.png: there is no folder"),
    (["convert", "x.npz", "no/x.npz"], r"no/x.npz: there is no folder"),
  ],
)  # fmt: skip
def test_what_cannot_be_done(arguments, pattern, nfnets_here, tmp_path):
  _fails(nfnets_here(*arguments, cwd=tmp_path), 1, pattern)
  assert list(tmp_path.iterdir()) == []


def test_devices_that_are_not_there(nfnets, tmp_path):
  result = nfnets("train", "--config.train.num_devices=3", cwd=tmp_path)
  _fails(result, 1, r"3 devices .* there are 1")
  for platform in ("rocm", "none_such"):
    result = nfnets("train", cwd=tmp_path, JAX_PLATFORMS=platform)
    _fails(result, 1, rf"finds no device \(JAX_PLATFORMS is '{platform}'\)")
  assert list(tmp_path.iterdir()) == []


def _snapshot(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_evaluation_that_does_not_fit_beside_a_run_is_told(
  monkeypatch, nfnets_here, tmp_path
):
  def too_large(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(evaluate, "over_split", too_large)
  more = ["train.steps=1", "train.num_devices=1", "optim.sam_rho=0.05"]
  options = [*TINY_RUN, *(f"--config.{option}" for option in more)]
  result = nfnets_here("train", f"--workdir={tmp_path / 'run'}", *options)
  _fails(result, 1, r"smaller --config.eval.batch_size \(now 360\)")
  assert "climbs by 13 of its 64 images at a time" in result.stdout


@pytest.mark.parametrize(
  ("override", "pattern"),
  [
    ("--config.model.name=nfnet_f0", r"model.name: nfnet_tiny -> nfnet_f0"),
    ("--config.model.alpha=0.5", r"model.alpha: None -> 0.5"),
    ("--config.data.test_size=64", r"data.test_size: 32 -> 64"),
    ("--config.seed=1", r"seed: 0 -> 1"),
    ("--config.train.batch_size=32", r"train.batch_size: 64 -> 32"),
    ("--config.optim.agc_clipping=0", r"with AGC: True -> False"),
  ],
)
def test_workdir_of_another_run_is_left_alone(
  finished, override, pattern, nfnets_here
):
  before = _snapshot(finished)
  # The small network's columns would not fit F0.
  options = ["--config=configs/digits.py"] if "f0" in override else TINY_RUN
  result = nfnets_here("train", f"--workdir={finished}", *options, override)
  _fails(result, 1, rf"holds another run \(.*{pattern}.*\): choose another")
  assert _snapshot(finished) == before


@pytest.mark.parametrize(
  "item", ["weights", pytest.param("optimizer", marks=pytest.mark.slow)]
)
def test_checkpoint_cut_short(copy, item, nfnets):
  newest = copy / "checkpoints" / "44"
  largest = max(
    (p for p in (newest / item).rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  with largest.open("r+b") as file:
    file.truncate(largest.stat().st_size // 2)
  before = _snapshot(copy)
  pattern = r"44 is damaged .* move that folder away to go on from step 42$"
  _fails(nfnets("train", f"--workdir={copy}", *TINY_RUN), 1, pattern)
  assert _snapshot(copy) == before
  if item == "weights":
    _fails(nfnets("evaluate", f"--workdir={copy}"), 1, pattern)

  shutil.rmtree(newest)  # As told.
  result = nfnets("train", f"--workdir={copy}", *TINY_RUN)
  assert "from step 42" in result.stdout
  _last_line(result)


def test_a_checkpoint_that_cannot_be_read_now_is_no_damaged_one(
  copy, environment, nfnets
):
  """Nobody is told to move it away."""
  metadata = copy / "checkpoints" / "44" / "weights" / "_METADATA"
  metadata.chmod(0)
  command = [sys.executable, "-m", "nfnets.main", "evaluate"]
  if os.getuid() == 0:  # Who may read everything.
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
  result = subprocess.run(
    [*command, f"--workdir={copy}"],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  _fails(result, 1, r"44 cannot be read now \(.*\); it is left as it is")
  metadata.chmod(0o644)
  _last_line(nfnets("evaluate", f"--workdir={copy}"))


@pytest.mark.parametrize(
  ("error", "is_damage"),
  [
    (ValueError("DATA_LOSS: checksum"), True),
    (FileNotFoundError(errno.ENOENT, "No such file"), True),
    (ValueError("NOT_FOUND: x: gone [os_error_code='2']"), True),
    (ValueError("UNKNOWN: x: Stale handle [os_error_code='116']"), False),
    (ValueError("PERMISSION_DENIED: Error"), False),
    (OSError(errno.EIO, "Input/output error"), False),
    (MemoryError(), False),
  ],
  ids=str,
)
def test_only_what_the_files_hold_is_damage(error, is_damage):
  assert checkpoint._may_be_whole(error) != is_damage
  assert checkpoint._reason(error)


def test_a_disk_that_is_full_is_told_and_the_run_goes_on(
  copy, finished, environment, nfnets
):
  """Here some files of a checkpoint are larger than one may be."""
  shutil.rmtree(copy / "checkpoints" / "44")
  command = [sys.executable, "-m", "nfnets.main", "train", *TINY_RUN]
  limited = f"ulimit -f 28; exec {shlex.join([*command, f'--workdir={copy}'])}"
  result = subprocess.run(
    ["bash", "-c", limited],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  picture, last = result.stderr.splitlines()
  assert "curves.png could not be written: File too large" in picture
  assert re.search(
    r"a checkpoint could not be written to .* \(.*File too large.*\); step 42 "
    r"is the newest one that is complete: see that there is room",
    last,
  )
  result = nfnets("train", f"--workdir={copy}", *TINY_RUN)
  _last_line(result)
  assert "from step 42\n" in result.stdout
  assert read_rows(copy) == read_rows(finished)
  weights = "weights.safetensors"
  assert (copy / weights).read_bytes() == (finished / weights).read_bytes()


def test_config_of_a_workdir_that_is_damaged(copy, nfnets_here):
  (copy / "config.json").write_text("{")
  result = nfnets_here("evaluate", f"--workdir={copy}")
  _fails(result, 1, r"config.json is not JSON")


def test_a_run_that_diverges_says_what_to_try(nfnets, tmp_path):
  workdir = tmp_path / "diverged"
  result = nfnets(
    "train",
    f"--workdir={workdir}",
    *TINY_RUN,
    "--config.optim.agc_clipping=0",
    "--config.optim.lr_per_256=1e9",
    "--config.optim.warmup_epochs=1",
    "--config.checkpoint_every_steps=1",
  )
  _fails(result, 1, r"step \d+: loss .* not finite; the last good checkpoint")
  found = re.search(r"step (\d+): .* is step (\d+) \((.*?)\)", result.stderr)
  assert int(found[2]) == int(found[1]) - 1
  weights = nfnets("evaluate", f"--workdir={workdir}", "--json")
  assert weights.returncode == 0
  rows = read_rows(workdir)
  assert rows[-1]["step"] < int(found[1])
  assert all(np.isfinite(list(row.values())[2:]).all() for row in rows)
  assert "lower --config.optim.lr_per_256 (now 1e+09)" in result.stderr
  assert "some --config.optim.agc_clipping (now 0)" in result.stderr
  assert "more --config.optim.warmup_epochs (now 1)" in result.stderr
  assert (workdir / "curves.png").exists()
