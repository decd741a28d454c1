"""What the benchmark's worker processes share: requests, timing, memory.

A worker is one contestant on one job. It gets the job as JSON on its command
line, then answers requests on its standard input, a JSON object a line:

    {"do": "prepare"}              build and compile; how long that took
    {"do": "warm_up"}              run until it is warm; seconds per call
    {"do": "round", "calls": n}    n calls of each program, after one that is
                                   not timed; seconds per call
    {"do": "memory"}               bytes at the highest since warm_up (of JAX on
                                   a device: since it started)
    {"do": "profile"}              the costliest kernels, where it can tell

Between requests it waits for input and does nothing. This module imports
neither JAX nor PyTorch: workers of both use it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
  """What one worker measures."""

  task: str  # matmul, forward, gradient, step or update.
  contestant: str
  model: str
  batch: int  # Images per call.
  size: int  # Pixels.
  precision: str  # float32 or bfloat16.
  device: str  # cpu, gpu or tpu.
  depth: list[int] | None = None  # Blocks per stage; None: the model's own.


class Prepared(NamedTuple):
  """A job that is ready to run.

  Attributes:
    programs: By name of its figure. A call runs the program once and may return
      before it has ended.
    wait: Returns once what a call returned has been computed.
    facts: Figures of the preparation, such as `compile_seconds`.
    device_memory: Bytes at the highest on the device; None: as the operating
      system counts this process.
    forget_peak: Lets the device count its memory anew, where it can.
    profile: The costliest kernels of a call.
    rest: Gives memory back that others may need in their rounds.
  """

  programs: dict[str, Callable[[], Any]]
  wait: Callable[[Any], Any]
  facts: dict[str, float]
  device_memory: Callable[[], int] | None = None
  forget_peak: Callable[[], None] | None = None
  profile: Callable[[], list[dict]] | None = None
  rest: Callable[[], None] | None = None


def main(
  describe: Callable[[], dict], tasks: dict[str, Callable[[Job], Prepared]]
) -> None:
  """A worker: `--describe` prints what it runs on, a job gets served."""
  if sys.argv[1:] == ["--describe"]:
    print(json.dumps(describe()))
  else:
    _serve(tasks)


def _serve(tasks: dict[str, Callable[[Job], Prepared]]) -> None:
  """Answers requests until there are no more."""
  job = Job(**json.loads(sys.argv[1]))
  # Whatever libraries print goes elsewhere.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  prepared: Prepared | None = None
  for line in sys.stdin:
    request = json.loads(line)
    try:
      if request["do"] == "prepare":
        prepared = tasks[job.task](job)
        answer = prepared.facts
      else:
        answer = _ANSWERS[request["do"]](prepared, request)
    except Exception as error:  # The others go on, whatever it is.
      answer = {"error": one_line(error)}
    print(json.dumps(answer), file=answers, flush=True)


def one_line(error: BaseException) -> str:
  """An error's name and the beginning of its first line that says something."""
  lines = [line.strip() for line in str(error).splitlines()]
  text = next(filter(None, lines), "")
  return f"{type(error).__name__}: {text[:200]}"


def seconds_per_call(prepared: Prepared, name: str, calls: int) -> float:
  """Time of `calls` calls, each started while the one before it may run."""
  program, before = prepared.programs[name], None
  start = time.perf_counter()
  for _ in range(calls):
    result = program()
    if before is not None:
      prepared.wait(before)
    before = result
  prepared.wait(before)
  return (time.perf_counter() - start) / calls


def _warm_up(prepared: Prepared, request: dict) -> dict:
  """Two calls and more within a second; the last is the estimate."""
  del request
  start, slowest = time.perf_counter(), 0.0
  for name in prepared.programs:
    for i in range(20):
      seconds = seconds_per_call(prepared, name, 1)
      if i and time.perf_counter() - start > 1:
        break
    slowest = max(slowest, seconds)
  (prepared.forget_peak or _forget_peak)()
  if prepared.rest:
    prepared.rest()
  return {"seconds": slowest}


def _round(prepared: Prepared, request: dict) -> dict:
  figures = {}
  for name in prepared.programs:
    # What the process has had to give up while others were measured.
    seconds_per_call(prepared, name, 1)
    figures[name] = seconds_per_call(prepared, name, request["calls"])
  if prepared.rest:
    prepared.rest()
  return figures


def _memory(prepared: Prepared, request: dict) -> dict:
  del request
  on_device = prepared.device_memory
  return {"bytes": on_device() if on_device else _peak_bytes()}


def _profile(prepared: Prepared, request: dict) -> dict:
  del request
  return {"kernels": prepared.profile() if prepared.profile else []}


_ANSWERS = {
  "warm_up": _warm_up,
  "round": _round,
  "memory": _memory,
  "profile": _profile,
}


def _forget_peak() -> None:
  """Lets the system count this process's memory anew (Linux alone can)."""
  try:
    Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    return


def _peak_bytes() -> int:
  """Resident memory at its highest, of this process."""
  try:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
  except (OSError, IndexError):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
