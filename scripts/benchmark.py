"""Speed of our networks beside timm's, on the device at hand.

Started by benchmark.sh. Each contestant runs in a process of its own that is
built, compiled and warm before the first round; then they are timed in turn,
A B C C B A, while the others wait, so that what changes on the machine changes
for all, and none always follows the same one. Ratios are taken round by round
against timm's fastest setting.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_options as options
import benchmark_report as report
from benchmark_machine import Load, describe_machine
from benchmark_process import FailedError, Worker
from benchmark_worker import Job

SCRIPTS = Path(__file__).resolve().parent

MOST_COMPILATIONS = 3  # Of each program, in fresh processes.
QUIET = 0.05  # Share of the processors that others may use.


def main() -> None:
  """Measures what was asked for and writes the report."""
  args = options.parse(sys.argv[1:])
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  benchmark = None
  try:
    benchmark = Benchmark(args)
    benchmark.run()
  except FailedError as error:
    sys.exit(str(error))
  except KeyboardInterrupt:
    if benchmark and benchmark.is_saved:
      say(f"stopped; what was finished is in {args.out}")
    else:
      say("stopped before anything was measured")
    sys.exit(130)


def say(text: str) -> None:
  """A line of progress."""
  print(text, file=sys.stderr, flush=True)


class Place(NamedTuple):
  """Of one contestant in what is measured."""

  model: Any  # None: it is no network's.
  what: str
  task: str
  contestant: str


class Entry(NamedTuple):
  """A contestant that is ready."""

  worker: Worker
  row: dict  # What was measured of it.
  calls: int  # In each round.


class Benchmark:
  """One run: what takes part, and the rows that were measured."""

  def __init__(self, args: argparse.Namespace):
    from nfnets import models
    from nfnets.errors import InputError

    self.args = args
    self.is_saved = False
    columns = {"depth": tuple(args.depth)} if args.depth else {}
    try:
      self.models = [models.make(name, **columns) for name in args.model]
    except InputError as error:
      raise FailedError(str(error)) from None
    try:
      args.out.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
      raise FailedError(f"--out={args.out}: {error.strerror}") from None
    self.commands = {
      "ours": [sys.executable, str(SCRIPTS / "benchmark_jax.py")]
    }
    ours = Worker.describe(self.commands["ours"])
    self.device = {"cpu": "cpu", "tpu": "tpu"}.get(ours["backend"], "gpu")
    self.machine = describe_machine() | ours
    if self.device == "cpu" and shutil.which("nvidia-smi"):
      say(
        "JAX sees no GPU here and the processor is measured: for the GPU, "
        "start it with NFNETS_EXTRAS=[test,cuda], or without JAX_PLATFORMS"
      )
    self.has_timed = {*args.what} != {"input"}
    if self.has_timed and "timm" not in args.skip:
      self._find_timm()
    args.batch = args.batch or [options.BATCH[self.device]]
    if len(args.batch) == 1:
      args.batch *= len(args.model)
    args.precision = args.precision or (
      "float32" if self.device == "cpu" else "bfloat16"
    )
    self.rows: list[dict] = []
    self.tables: dict[str, str] = {}  # Of other scripts.

  def _find_timm(self) -> None:
    """Finds a Python with timm for this device, or says why there is none."""
    if self.device == "tpu":
      say("timm is left out: PyTorch here has no TPU")
      return
    pythons = [[sys.executable]]
    if not self.args.as_found:
      own = [str(SCRIPTS / "timm.sh")]
      # Builds the environment, aloud.
      if not subprocess.run([*own, "-c", "pass"], check=False).returncode:
        pythons.insert(0, own)
    reasons = []
    for python in pythons:
      command = [*python, str(SCRIPTS / "benchmark_timm.py")]
      try:
        found = Worker.describe(command)
      except FailedError as error:
        reasons.append(str(error))
        continue
      if self.device == "gpu" and not found["has_cuda"]:
        reasons.append(f"torch {found['versions']['torch']} sees no GPU")
        continue
      self.commands["timm"] = command
      self.machine["versions"] |= found["versions"]
      self.machine["torch_threads"] = found["num_threads"]
      return
    say(f"timm is left out: {'; '.join(reasons)}")

  def contestants(self, task: str) -> list[str]:
    """Who takes part in a task, of those that can."""
    args = self.args
    names = options.contestants(
      task,
      device=self.device,
      also=args.also,
      xla_flags=args.xla_flags,
      timm_compile=args.timm_compile,
      skip=args.skip,
    )
    has_timm = "timm" in self.commands
    return [name for name in names if has_timm or not name.startswith("timm")]

  def run(self) -> None:
    """Measures and writes everything; the report grows with every group."""
    start = time.perf_counter()
    versions = ", ".join(
      f"{k} {v}" for k, v in self.machine["versions"].items()
    )
    say(f"{self.machine['text']}; {self.machine['device']}; {versions}")
    if self.has_timed:
      frameworks = {"ours": "ours", "timm": "timm_nchw"}
      names = [frameworks[name] for name in self.commands]
      self.measure([Place(None, "peak", "matmul", name) for name in names])
    self._measure_tasks()
    if "compile" in self.args.what:
      for model, task in itertools.product(
        self.models, options.WHAT["compile"]
      ):
        self.compile(
          [
            Place(model, "compile", task, name)
            for name in self.contestants(task)
          ]
        )
        self.save()
    if "input" in self.args.what:
      self.input()
    data = self.save()
    if (load := report.load_of_others(data)) and load[0] > QUIET:
      say(
        f"other processes used {load[0]:.0%} of the processors: measure again "
        "when the machine is quiet"
      )
    print(report.to_markdown(data))
    minutes = (time.perf_counter() - start) / 60
    say(f"{minutes:.1f} minutes; the report is in {self.args.out}")

  def save(self) -> dict:
    """Writes the report of what there is."""
    settings = {k: v for k, v in vars(self.args).items() if k != "out"}
    is_over = lambda row: row["seconds"] or "error" in row
    data = {
      "settings": settings,
      "machine": self.machine,
      "rows": list(filter(is_over, self.rows)),
      "tables": self.tables,
    }
    data = report.save(data, self.args.out)
    self.is_saved = True
    return data

  def _row(self, place: Place) -> dict:
    """Where the figures of a contestant go, beginning with its job."""
    model, args = place.model, self.args
    size = args.size or (model.variant.train_size if model else 0)
    batch = args.batch[self.models.index(model)] if model else 0
    job = Job(
      place.task, place.contestant, model.name if model else "", batch, size,
      args.precision, self.device, args.depth,
    )  # fmt: skip
    row = {"what": place.what} | job._asdict() | {"seconds": []}
    if model:
      row["macs"] = model.count_macs(size)
    self.rows.append(row)
    return row

  def _start(self, row: dict) -> Worker:
    job = Job(**{field: row[field] for field in Job._fields})
    kind = "timm" if job.contestant.startswith("timm") else "ours"
    variables = {}
    if job.contestant in self.args.xla_flags:
      given = os.environ.get("XLA_FLAGS", "")
      variables["XLA_FLAGS"] = f"{given} {job.contestant}".strip()
    return Worker(self.commands[kind], job, **variables)

  def _measure_tasks(self):
    """All but compilation: a task after the other, or all of them at once.

    On a TPU, which one process owns, a contestant after the other.
    """
    wanted = {
      task: "train" if task in options.WHAT["train"] else what
      for what in options.WHAT
      if what in self.args.what and what != "compile"
      for task in options.WHAT[what]
    }
    tasks = [
      [Place(model, what, task, name) for name in self.contestants(task)]
      for model in self.models
      for task, what in wanted.items()
    ]
    places = list(itertools.chain.from_iterable(tasks))
    if self.args.at_once:
      tasks = [places]
    if self.device == "tpu":
      tasks = [[place] for place in places]
    for group in tasks:
      self.measure(group)

  def measure(self, places: list[Place]):
    """Makes contestants ready, then times those of each task in turn."""
    rows = [self._row(place) for place in places]
    with contextlib.ExitStack() as stack:
      start = lambda row: stack.enter_context(
        contextlib.closing(self._start(row))
      )
      if self.args.at_once:
        workers = [start(row) for row in rows]
        self._prepare_at_once(rows, workers)
        ready = list(map(self._warm_up, rows, workers))
      else:
        ready = []
        for row in rows:
          worker = start(row)
          self._prepare(row, worker)
          ready.append(self._warm_up(row, worker))
      entries = [entry for entry in ready if entry]
      task_of = lambda entry: report.group_of(entry.row)
      for (what, *_), group in itertools.groupby(entries, task_of):
        self._time_in_turn(list(group))
        if what != "peak":  # The report of before stays until there is more.
          self.save()

  def _prepare_at_once(self, rows: list[dict], workers: list[Worker]) -> None:
    """All of them at the same time; those that take too long are left out."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(rows))) as pool:
      futures = [
        pool.submit(self._prepare, row, worker)
        for row, worker in zip(rows, workers, strict=True)
      ]
      try:
        _, late = concurrent.futures.wait(futures, self.args.ready_in)
      except BaseException:  # Else the pool would wait for all of them.
        for worker in workers:
          worker.stop("stopped")
        raise
      for worker, future in zip(workers, futures, strict=True):
        if future in late:
          worker.stop(f"not ready in {self.args.ready_in:g} s")
      for future in futures:
        future.result()

  def _time_in_turn(self, entries: list[Entry]):
    for i in range(self.args.rounds):
      for entry in reversed(entries) if i % 2 else entries:
        if "error" not in entry.row:
          self._time(entry, i)
    for entry in entries:
      if "error" not in entry.row:
        self._finish(entry)

  def _prepare(self, row: dict, worker: Worker) -> None:
    """Has a contestant compile."""
    try:
      row |= worker.ask("prepare")
    except FailedError as error:
      self._fail(row, worker, error)
      return
    if compiled := row.get("compile_seconds"):
      say(f"{_name(row)} compiled in {compiled:.1f} s")

  def _warm_up(self, row: dict, worker: Worker) -> Entry | None:
    """Has a contestant that compiled run until it is warm."""
    if "error" in row:
      return None
    try:
      seconds = worker.ask("warm_up")["seconds"]
    except FailedError as error:
      self._fail(row, worker, error)
      return None
    say(f"{_name(row)} ready: {report.seconds(seconds)} a call")
    calls = max(1, round(self.args.seconds / max(seconds, 1e-9)))
    return Entry(worker, row, calls)

  def _time(self, entry: Entry, index: int) -> None:
    """One round of one contestant."""
    row, load = entry.row, Load(entry.worker.pid)
    try:
      figures = entry.worker.ask("round", calls=entry.calls)
    except FailedError as error:
      self._fail(row, entry.worker, error)
      return
    figures["others_load"] = load.of_others()
    for key, value in figures.items():
      row.setdefault(key, []).append(value)
    say(
      f"{_name(row)} round {index + 1}/{self.args.rounds}: "
      f"{report.seconds(figures['seconds'])}"
    )

  def _finish(self, entry: Entry) -> None:
    """What is asked once, after the rounds."""
    row, worker = entry.row, entry.worker
    is_ours = (row["task"], row["contestant"]) == ("step", "ours")
    try:
      row |= worker.ask("memory")
      if self.args.profile and is_ours:
        row |= worker.ask("profile")
    except FailedError as error:
      say(f"{_name(row)} {error}")

  def compile(self, places: list[Place]):
    """Times compilations, each in a fresh process without any cache."""
    rows = []
    for place in places:
      name = place.contestant
      is_eager = name.startswith("timm") and name not in options.COMPILED
      if not is_eager and name != "folded":
        rows.append(self._row(place))
    rounds = min(self.args.rounds, MOST_COMPILATIONS)
    for i, row in itertools.product(range(rounds), rows):
      if "error" in row:
        continue
      worker = self._start(row)
      try:
        facts = worker.ask("prepare")
      except FailedError as error:
        self._fail(row, worker, error)
        continue
      finally:
        worker.close()
      for key, value in facts.items():
        row.setdefault(key, []).append(value)
      row["seconds"].append(sum(facts.values()))
      say(
        f"{_name(row)} compilation {i + 1}/{rounds}: {row['seconds'][-1]:.1f} s"
      )

  def _fail(self, row: dict, worker: Worker, error: FailedError) -> None:
    """Ends a contestant, whose memory the others may need."""
    row["error"] = str(error)
    worker.stop(str(error))
    say(f"{_name(row)} failed: {error}")

  def input(self) -> None:
    """The pipelines that feed the device, by the script that compares them."""
    command = [str(SCRIPTS / "benchmark_input.sh")]
    if self.args.as_found:
      command = [sys.executable, str(SCRIPTS / "benchmark_input.py")]
    process = subprocess.Popen(
      [*command, f"--rounds={self.args.rounds}"],
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    try:
      table, _ = process.communicate()
    except BaseException:  # With all that it started.
      os.killpg(process.pid, signal.SIGTERM)
      raise
    if process.returncode:
      say(f"input failed: benchmark_input.py ended with {process.returncode}")
    else:
      self.tables["input"] = table.strip()


def _name(row: dict) -> str:
  """A row in the lines of progress."""
  model = f"{row['model']} " if row["model"] else ""
  return f"{model}{row['task']:8} {report.name_of(row['contestant']):24}"


if __name__ == "__main__":
  main()
