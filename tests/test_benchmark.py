"""The benchmark runs, what it says is consistent, and it ends when it should.

Nothing here depends on how fast anything is.
"""

import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"

SMALL = ("--depth=1,1,1,1", "--batch=2", "--size=32", "--seconds=0.05")


@pytest.fixture
def scripts(monkeypatch):
  """Lets a test import the benchmark's modules."""
  monkeypatch.syspath_prepend(str(SCRIPTS))


def _run(command, environment, out, *options):
  """Runs it; what it printed and the data that it wrote."""
  result = subprocess.run(
    [*command, *SMALL, *options, f"--out={out}"],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  data = json.loads((out / "benchmark.json").read_text())
  assert result.stdout.strip() == (out / "benchmark.md").read_text().strip()
  assert (out / "benchmark.png").read_bytes().startswith(b"\x89PNG")
  return result, data


def _check(row, rounds):
  """What holds for every row that was measured."""
  assert "error" not in row, row["error"]
  assert len(row["seconds"]) == rounds
  assert all(seconds > 0 for seconds in row["seconds"])
  if row["task"] != "matmul":
    median = statistics.median(row["seconds"])
    assert row["median_seconds"] == pytest.approx(median)
  if row["what"] in ("train", "infer"):
    rate = row["images_per_second"]
    assert rate["min"] <= rate["median"] <= rate["max"]
    assert rate["max"] == pytest.approx(row["batch"] / min(row["seconds"]))
    assert 0 < row["mfu"] < 1.5
    assert row["bytes"] > 1e6


def _run_ours(environment, out, *options):
  """Runs it on a small network without timm; the output, and rows by name."""
  command = [sys.executable, SCRIPTS / "benchmark.py", "--model=nfnet_tiny"]
  options = ("--skip=timm,xla", "--rounds=2", *options)
  result, data = _run(command, environment, out, *options)
  assert data["peak_flops_per_second"]["JAX"] > 1e8
  rows = {(row["task"], row["contestant"]): row for row in data["rows"]}
  for row in rows.values():
    _check(row, rounds=2)
    assert row["compile_seconds"] > 0
  return result, rows


@pytest.mark.slow
def test_training(environment, tmp_path):
  result, rows = _run_ours(environment, tmp_path, "--what=train", "--profile")
  assert {name for name, _ in rows} == {"matmul", "gradient", "step"}
  assert {name for _, name in rows} == {"ours"}
  kernels = rows["step", "ours"]["kernels"]
  assert len(kernels) == 10
  assert 0 < sum(kernel["share"] for kernel in kernels) <= 1
  assert any("NFNet" in kernel["source"] for kernel in kernels)
  assert "nfnet_tiny step     ours" in result.stderr


def test_inference(environment, tmp_path):
  flags = f'--xla_dump_to="{tmp_path / "dump"}"'  # It may have a space.
  result, rows = _run_ours(
    environment,
    tmp_path,
    *("--what=infer", "--at_once", f"--xla_flags={flags}"),
  )
  assert set(rows) == {
    ("matmul", "ours"),
    ("forward", "ours"),
    ("forward", "folded"),
    ("forward", flags),
  }
  assert f"| ours, {flags} |" in result.stdout
  assert any((tmp_path / "dump").iterdir())  # XLA was given them.


@pytest.mark.slow
def test_two_networks_at_once(environment, tmp_path):
  """Each with its own number of images; the late one is left out."""
  command = [sys.executable, SCRIPTS / "benchmark.py", "--at_once", *SMALL]
  command += ["--model=nfnet_tiny,nf_resnet50", "--batch=2,1", "--rounds=1"]
  command += ["--what=infer", "--skip=timm,xla,ours", f"--out={tmp_path}"]

  def run(*options):
    subprocess.run([*command, *options], env=environment, check=True)
    data = json.loads((tmp_path / "benchmark.json").read_text())
    return [row for row in data["rows"] if row["model"]]

  rows = run()
  assert [(row["model"], row["batch"]) for row in rows] == [
    ("nfnet_tiny", 2),
    ("nf_resnet50", 1),
  ]
  for row in rows:
    _check(row, rounds=1)
  late = run("--ready_in=0.1")
  assert [row["error"] for row in late] == ["not ready in 0.1 s"] * 2
  report = (tmp_path / "benchmark.md").read_text()
  assert report.count("ours, folded, forward: not measured, not ready in") == 2


@pytest.mark.timm
def test_beside_timm(environment, tmp_path):
  """Ratios are taken round by round, to timm's fastest setting."""
  _, data = _run(
    [SCRIPTS / "benchmark.sh"],
    environment,
    tmp_path,
    *("--model=nfnet_f0", "--what=train,infer,optimizer"),
    *("--rounds=2", "--skip=xla"),
  )
  assert set(data["peak_flops_per_second"]) == {"JAX", "PyTorch"}
  assert {"torch", "timm", "jax"} <= set(data["machine"]["versions"])
  groups = {}
  for row in data["rows"]:
    _check(row, rounds=2)
    groups.setdefault(row["task"], []).append(row)
  sizes = {"matmul": 2, "gradient": 3, "step": 3, "forward": 4, "update": 2}
  assert {task: len(group) for task, group in groups.items()} == sizes
  del groups["matmul"]
  for group in groups.values():
    theirs = [x for x in group if x["contestant"].startswith("timm")]
    best = min(theirs, key=lambda x: x["median_seconds"])
    for row in group:
      assert row["baseline"] == best["contestant"]
      ratios = [
        b / a for a, b in zip(row["seconds"], best["seconds"], strict=True)
      ]
      assert row["ratio"]["rounds"] == pytest.approx(ratios)
      assert row["ratio"]["median"] == pytest.approx(statistics.median(ratios))


@pytest.mark.timm
def test_a_network_that_timm_lacks(environment, tmp_path):
  """One line about it, and the others go on; compilations too."""
  result, data = _run(
    [SCRIPTS / "benchmark.sh"],
    environment,
    tmp_path,
    *("--model=nfnet_tiny", "--what=infer,compile", "--rounds=1"),
    "--skip=folded,timm_channels_last",
  )
  line = "not measured, ValueError: timm has no network like nfnet_tiny"
  assert result.stdout.count(line) == 1
  rows = {
    (row["what"], row["task"], row["contestant"]): row
    for row in data["rows"]
    if row["model"]
  }
  assert "error" in rows.pop(("infer", "forward", "timm_nchw"))
  assert len(rows) == 6
  for (what, _, contestant), row in rows.items():
    _check(row, rounds=1)
    assert row["baseline"] == "xla"
    assert what == "infer" or row["compile_seconds"][0] > 0
    assert contestant in ("ours", "xla")


def _made_up(contestant, seconds, **others):
  row = {"what": "train", "task": "gradient", "model": "nfnet_f0"}
  row |= {"contestant": contestant, "seconds": seconds, "batch": 4, "size": 192}
  row |= {"precision": "float32", "depth": None, "macs": 7e9}
  return row | others


def test_the_report_of_made_up_rounds(scripts, tmp_path):
  import benchmark_report

  machine = {"text": "2 cores of X, 8 GiB", "backend": "cpu", "python": "3.11"}
  kernel = {"kernel": "k" * 50, "source": "x" * 80 + "y" * 80}
  kernel |= {"seconds": 5e-8, "share": 0.25}
  rows = [
    _made_up("ours", [9.0, 3.0], what="peak", task="matmul", flops=3e11),
    _made_up("timm_nchw", [1.0], what="peak", task="matmul", flops=2e11),
    _made_up(
      "ours", [1.0, 2.0, 1.0], others_load=[0.0, 0.5, 0.1], bytes=3 * 2**29
    ),
    _made_up("timm_nchw", [9.0, 9.0, 9.0]),
    _made_up("timm_channels_last", [2.0, 8.0, 3.0]),
    _made_up("timm_nchw_compiled", [1.0], error="RuntimeError: no"),
    _made_up("xla", [], error="RuntimeError: out of memory"),
    _made_up("ours", [1.0], task="step", kernels=[kernel]),
    _made_up("xla", [5.0], task="step"),
    _made_up("timm_nchw", [], task="step", error="ValueError: no"),
    _made_up(
      "ours", [6.0], what="optimizer", task="update", pass_seconds=[4.0]
    ),
    _made_up(
      "ours", [5.0], what="compile", trace_seconds=[1.0], compile_seconds=[4.0]
    ),
  ]
  data = {
    "settings": {"precision": "float32", "rounds": 3},
    "machine": machine | {"versions": {"jax": "1"}},
    "rows": rows,
    "tables": {"input": "| a table |"},
  }
  saved = benchmark_report.save(data, tmp_path)
  ours, nchw, channels_last = saved["rows"][2:5]
  assert ours["baseline"] == nchw["baseline"] == "timm_channels_last"
  assert ours["ratio"]["rounds"] == [2.0, 4.0, 3.0]
  assert ours["ratio"]["median"] == 3.0
  assert channels_last["ratio"]["median"] == 1.0
  # A setting that failed is no baseline, however fast it was before.
  assert saved["rows"][5]["ratio"]["rounds"] == [2.0]
  # Three passes of 2 x 7e9 for each of 4 images, in 1 s, of 2e11 per second.
  assert ours["mfu"] == pytest.approx(0.84)
  assert saved["rows"][7]["mfu"] == pytest.approx(0.84)
  assert saved["rows"][10]["passes"]["median"] == 1.5
  text = " ".join((tmp_path / "benchmark.md").read_text().split())
  for line in (
    "| gradient | ours | 1 s | 1 to 2 s | 4 | 3.00 | 2.00 to 4.00 | 84.0% |"
    " 1.50 GiB |",
    f"| `{'k' * 40}` | 0.05 µs | 25.0% | `{'y' * 80}` |",
    "* 3 rounds, contestants in turn; medians",
    "plain XLA, gradient: not measured, RuntimeError: out of memory",
    "NCHW, compiled, gradient: stopped in round 2, RuntimeError: no",
    "| whole step | ours | 1 s | 1 to 1 s | 4 | 5.00 x plain XLA | 5.00 to",
    "Other processes used 10% of the processors (median of rounds; at most 50%",
    "JAX 100 GFLOP/s, PyTorch 200 GFLOP/s",
    "| gradient | ours | 1 s | 4 s | 5 s | 5 to 5 s |",
    "| a table |",
  ):
    assert line in text
  assert "x timm's best" in text
  assert (tmp_path / "benchmark.png").exists()
  data["machine"] |= {"backend": "tpu", "device": "a TPU"}
  text = benchmark_report.to_markdown(benchmark_report.summarize(data))
  assert "* a TPU\n" in text
  assert "contestants one after the other" in text


def test_medians_are_compared_and_all_rounds_drawn(
  scripts, monkeypatch, tmp_path
):
  import benchmark_report
  from matplotlib.figure import Figure

  rows = [
    _made_up("timm_nchw", [1.0, 4.0, 4.0]),  # The quickest round, no more.
    _made_up("timm_channels_last", [2.0, 2.0, 2.0]),
    _made_up("ours", [1.0, 2.0, 4.0]),
  ]
  data = {
    "machine": {"text": "2 cores, 8 GiB", "backend": "cpu", "versions": {}},
    "rows": rows,
  }
  data = benchmark_report.summarize(data)
  assert {row["baseline"] for row in data["rows"]} == {"timm_channels_last"}
  figures = []
  monkeypatch.setattr(
    Figure, "savefig", lambda self, *_, **__: figures.append(self)
  )
  monkeypatch.setattr(benchmark_report, "unfinished", contextlib.nullcontext)
  benchmark_report.save_figure(data, tmp_path / "x.png")
  (axis,) = figures[0].axes
  assert [bar.get_width() for bar in axis.patches] == [1, 2, 2]
  (lines,) = axis.collections
  ends = [path.vertices[:, 0].tolist() for path in lines.get_paths()]
  assert ends == [[1, 4], [2, 2], [1, 4]]


@pytest.mark.parametrize(
  ("unit", "value", "text"),
  [
    ("seconds", 5e-8, "0.05 µs"),
    ("seconds", 0.0123, "12.3 ms"),
    ("seconds", 1234.5, "1234 s"),
    ("flops", 1.234e11, "123 GFLOP/s"),
    ("flops", 9.996e11, "1000 GFLOP/s"),
    ("flops", 1.6e15, "1600 TFLOP/s"),
  ],
)
def test_numbers_have_no_power_of_ten(scripts, unit, value, text):
  import benchmark_report

  assert getattr(benchmark_report, unit)(value) == text


def test_who_takes_part(scripts):
  import benchmark_options

  options = {"xla_flags": ["--xla_x=1"], "timm_compile": False, "skip": []}
  take_part = lambda task, device, also=(): benchmark_options.contestants(
    task, device=device, also=also, **options
  )
  both = ["timm_nchw", "timm_channels_last"]
  assert take_part("step", "cpu") == ["ours", "xla", *both, "--xla_x=1"]
  both.append("timm_channels_last_compiled")
  assert take_part("step", "gpu") == ["ours", "xla", *both, "--xla_x=1"]
  assert take_part("forward", "gpu")[1] == "folded"
  assert take_part("update", "cpu") == ["ours", "timm_nchw", "--xla_x=1"]
  assert "remat_stages" in take_part("gradient", "cpu", ["remat_stages"])
  args = benchmark_options.parse(["--what=step", "--profile"])
  assert args.profile


@pytest.mark.parametrize(
  ("code", "text"),
  [
    ("raise SystemExit('no torch here')", "no torch here"),
    ("import os; os.kill(os.getpid(), 9)", "was killed"),
    ('print(\'{"error": "ValueError: no"}\'); input()', "ValueError: no"),
  ],
)
def test_a_worker_that_fails_says_so_in_a_line(scripts, code, text):
  import benchmark_process
  from benchmark_worker import Job

  job = Job("step", "ours", "nfnet_tiny", 2, 32, "float32", "cpu")
  worker = benchmark_process.Worker([sys.executable, "-c", code], job)
  with pytest.raises(benchmark_process.FailedError, match=f"^.*{text}[^\n]*$"):
    worker.ask("prepare")
  worker.close()


def test_a_worker_that_was_stopped_says_why(scripts):
  import benchmark_process
  from benchmark_worker import Job

  job = Job("step", "ours", "nfnet_tiny", 2, 32, "float32", "cpu")
  code = "print('{}', flush=True); input(); input()"
  worker = benchmark_process.Worker([sys.executable, "-c", code], job)
  assert worker.ask("prepare") == {}
  worker.stop("not ready in time")
  with pytest.raises(benchmark_process.FailedError, match="not ready in time"):
    worker.ask("warm_up")
  worker.close()


def test_who_failed_is_ended(environment, scripts, tmp_path, monkeypatch):
  """Its memory may be what the others lack."""
  import benchmark
  import benchmark_options

  monkeypatch.setattr(os, "environ", os.environ | environment)
  args = ["--model=nfnet_tiny", "--skip=timm", *SMALL]
  args = benchmark_options.parse([*args, f"--out={tmp_path}"])
  measured = benchmark.Benchmark(args)
  place = benchmark.Place(measured.models[0], "train", "nothing", "ours")
  row = measured._row(place)
  worker = measured._start(row)
  measured._prepare(row, worker)
  assert row["error"] == "KeyError: 'nothing'"
  with pytest.raises(benchmark.FailedError, match="nothing"):
    worker.ask("memory")
  worker.close()


def test_the_driver_leaves_the_device_to_its_workers(environment, tmp_path):
  """A TPU is for one process at a time."""
  code = """
import sys
from jax._src import xla_bridge
import benchmark, benchmark_options
args = benchmark_options.parse(sys.argv[1:])
benchmark.Benchmark(args)
sys.exit(f"opened {list(xla_bridge._backends)}" if xla_bridge._backends else 0)
"""
  subprocess.run(
    [sys.executable, "-c", code, "--skip=timm", f"--out={tmp_path}"],
    env=environment | {"PYTHONPATH": str(SCRIPTS)},
    check=True,
  )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_leaves_no_process(environment, tmp_path, how):
  options = ("--what=infer", "--skip=timm,xla,folded", "--rounds=1000")
  num, rest = _stop(environment, tmp_path, how, "round 2/1000", *options)
  assert num == 2
  assert "Traceback" not in rest


def test_stopped_while_several_compile_it_waits_for_none(environment, tmp_path):
  options = ("--at_once", "--what=step", "--skip=timm,xla", "--rounds=1")
  _, rest = _stop(environment, tmp_path, signal.SIGINT, "round 1/1", *options)
  assert "Traceback" not in rest
  assert "compiled in" not in rest


def _stop(environment, out, how, after, *options):
  """Sends a signal after a line of progress.

  Returns how many processes there were, and what was printed from then on.
  """
  process = subprocess.Popen(
    [
      *(sys.executable, SCRIPTS / "benchmark.py", "--model=nfnet_tiny"),
      *(*SMALL, "--skip=timm", f"--out={out}", *options),
    ],
    env=environment | {"BENCHMARK_TEST": str(out)},
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if after in line:
      break
  num = len(_processes_with(str(out)))
  process.send_signal(how)
  rest = process.stderr.read()
  assert process.wait(timeout=60) == {signal.SIGINT: 130}.get(how, 143), rest
  deadline = time.monotonic() + 10
  while left := _processes_with(str(out)):
    assert time.monotonic() < deadline, left
    time.sleep(0.1)
  return num, rest


def _processes_with(value):
  """Processes whose environment has BENCHMARK_TEST=value."""
  found = []
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      variables = (folder / "environ").read_bytes()
    except OSError:
      continue
    if f"BENCHMARK_TEST={value}".encode() in variables.split(b"\0"):
      found.append(int(folder.name))
  assert os.getpid() not in found
  return found


@pytest.mark.parametrize(
  ("option", "text"),
  [
    ("--what=train,speed", "--what=speed: use some of train, gradient, step"),
    ("--skip=torch", "--skip=torch: use some of timm, ours, folded"),
    ("--rounds=0", "--rounds=0 is not positive"),
    ("--batch=a", "argument --batch: invalid numbers value: 'a'"),
    ("--batch=2,0", "--batch=0 is not positive"),
    ("--batch=2,1", "--batch has 2 numbers, --model 1 networks: give one"),
    ("--ready_in=9", "--ready_in is for --at_once"),
    ("--xla_flags=fast", "--xla_flags=fast: flags of XLA begin with --xla_"),
    ("--model=nfnet_f9", "nfnet_f9"),
    ("--seconds=inf", "--seconds=inf is not positive"),
    ("--as", "unrecognized arguments: --as"),
    ("--skip=timm,ours,folded,xla", "--skip leaves out all contestants"),
    ("--what=infer --also=scanned", "--also is of training: add train to"),
    ("--out=/dev/null/here", "--out=/dev/null/here: Not a directory"),
  ],
)
def test_wrong_options_are_named(environment, option, text):
  result = subprocess.run(
    [sys.executable, SCRIPTS / "benchmark.py", *option.split()],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode in (1, 2)
  assert text in result.stderr
  assert "Traceback" not in result.stderr
