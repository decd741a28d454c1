"""The report of a benchmark: figures worked out, tables, picture.

Rows come from benchmark.py as they were timed; `summarize` adds what follows
from several of them: ratios, shares of the device's peak.
"""

import contextlib
import json
import statistics
import textwrap
from itertools import groupby
from pathlib import Path

from nfnets.files import unfinished

TEXTS = {
  "ours": "ours",
  "folded": "ours, folded",
  "xla": "plain XLA",
  "scanned": "ours, scanned",
  "remat_blocks": "ours, blocks recomputed",
  "remat_stages": "ours, stages recomputed",
  "timm_nchw": "timm, NCHW",
  "timm_channels_last": "timm, channels_last",
  "timm_nchw_compiled": "timm, NCHW, compiled",
  "timm_channels_last_compiled": "timm, channels_last, compiled",
}
TITLES = {
  "train": "Training",
  "infer": "Inference",
  "compile": "Compilation",
  "optimizer": "Optimiser",
}
TASKS = {
  "gradient": "gradient",
  "step": "whole step",
  "forward": "forward",
  "update": "update",
}
_COLORS = {"ours": "#2a5a8c", "xla": "#9aa3ab"}
_VARIANT_COLOR = "#6f9fce"  # Of ours.
_TIMM_COLOR = "#e08a3c"

# Multiply-accumulates of a task, in those of a forward pass.
_PASSES = {"forward": 1, "gradient": 3, "step": 3}


def save(data: dict, folder: Path) -> dict:
  """Writes benchmark.json, .md and .png; returns the data with summaries."""
  data = summarize(data)
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in (
    ("benchmark.json", json.dumps(data, indent=2) + "\n"),
    ("benchmark.md", to_markdown(data)),
  ):
    with unfinished(folder / name) as partial:
      partial.write_text(text)
  figure = folder / "benchmark.png"
  figure.unlink(missing_ok=True)
  if any("images_per_second" in row for row in data["rows"]):
    with contextlib.suppress(ImportError):  # There is no picture then.
      save_figure(data, figure)
  return data


def summarize(data: dict) -> dict:
  """Adds medians, rates, ratios and shares of the peak to the rows."""
  rows = [dict(row) for row in data["rows"]]
  peaks = {}
  for row in rows:
    if row["task"] == "matmul" and row["seconds"]:
      framework = "PyTorch" if row["contestant"].startswith("timm") else "JAX"
      peaks[framework] = row["flops"] / min(row["seconds"])
  for _, group in groupby(rows, group_of):
    group = [row for row in group if row["seconds"]]
    baseline = _baseline(group)
    for row in group:
      row["median_seconds"] = statistics.median(row["seconds"])
      if baseline is not None and row["task"] != "matmul":
        row["baseline"] = baseline["contestant"]
        row["ratio"] = _ratios(baseline["seconds"], row["seconds"])
      if "pass_seconds" in row:
        row["passes"] = _ratios(row["seconds"], row["pass_seconds"])
      if row["what"] in ("train", "infer"):
        row["images_per_second"] = _spread(
          [row["batch"] / seconds for seconds in row["seconds"]]
        )
        if peaks:
          work = 2 * row["macs"] * _PASSES[row["task"]] * row["batch"]
          row["mfu"] = work / row["median_seconds"] / max(peaks.values())
  return data | {"rows": rows, "peak_flops_per_second": peaks}


def name_of(contestant: str) -> str:
  """A contestant in tables, figure and progress."""
  return TEXTS.get(contestant) or f"ours, {contestant}"


def group_of(row: dict) -> tuple:
  """What a row is compared within."""
  return *_section(row), row["task"]


def _section(row: dict) -> tuple:
  """Where a row stands in the report."""
  return row["what"], row["model"], row["batch"]


def _baseline(group: list[dict]) -> dict | None:
  """timm's fastest setting, first of those that finished; or plain XLA."""
  theirs = [row for row in group if row["contestant"].startswith("timm")]
  theirs = theirs or [row for row in group if row["contestant"] == "xla"]
  order = lambda row: ("error" in row, statistics.median(row["seconds"]))
  return min(theirs, key=order, default=None)


def _spread(values: list[float]) -> dict:
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
    "rounds": values,
  }


def _ratios(above: list[float], below: list[float]) -> dict:
  """Round by round, as far as both came."""
  return _spread([a / b for a, b in zip(above, below, strict=False)])


def to_markdown(data: dict) -> str:
  """The report in words and tables."""
  rows = [row for row in data["rows"] if row["task"] != "matmul"]
  parts = ["# Benchmark", _conditions(data)]
  parts += [
    _failure(row)
    for row in data["rows"]
    if row["task"] == "matmul" and "error" in row
  ]
  for (what, model, _), group in groupby(rows, _section):
    group = list(group)
    row = group[0]
    title = f"## {TITLES[what]}: {model}{_depth(row)}"
    if what in ("train", "infer"):
      title += (
        f", {row['batch']} images of {row['size']} px, {row['precision']}"
      )
    parts.append(title)
    if any(row["seconds"] for row in group):
      tables = {"compile": _compile_table, "optimizer": _update_table}
      parts.append(tables.get(what, _speed_table)(group))
    parts += [_failure(row) for row in group if "error" in row]
    for row in group:
      if row.get("kernels"):
        parts += ["### Costliest kernels of our step", _kernel_table(row)]
  if "input" in data["tables"]:
    parts += ["## Input pipelines", data["tables"]["input"]]
  return "\n\n".join(parts) + "\n"


def _failure(row: dict) -> str:
  num = len(row["seconds"])
  how = "not measured" if not num else f"stopped in round {num + 1}"
  return f"{name_of(row['contestant'])}, {row['task']}: {how}, {row['error']}"


def _depth(row: dict) -> str:
  return f" with depth {tuple(row['depth'])}" if row["depth"] else ""


def _conditions(data: dict) -> str:
  """Machine, versions, peak and how it was measured, a line each."""
  machine = data["machine"]
  versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
  lines = [f"* {machine['text']}"]
  if machine["backend"] != "cpu":
    lines.append(f"* {machine['device']}")
  if "torch_threads" in machine:
    versions += f" (PyTorch in {machine['torch_threads']} threads)"
  lines.append(f"* Python {machine['python']}, {versions}")
  if peaks := data["peak_flops_per_second"]:
    rates = ", ".join(f"{k} {flops(v)}" for k, v in peaks.items())
    lines.append(
      f"* Peak, of a large matrix product in {data['settings']['precision']}: "
      f"{rates}; MFU is the share of the larger"
    )
  num = data["settings"]["rounds"]
  # Of a TPU, which is for one process at a time.
  order = "one after the other" if machine["backend"] == "tpu" else "in turn"
  lines.append(
    f"* {num} round{'s' if num > 1 else ''}, contestants {order}; medians, and "
    "from the lowest to the highest round"
  )
  if load := load_of_others(data):
    lines.append(
      f"* Other processes used {load[0]:.0%} of the processors (median of "
      f"rounds; at most {load[1]:.0%})"
    )
  return "\n".join(lines)


def load_of_others(data: dict) -> tuple[float, float] | None:
  """Median and largest share of the processors that others used in a round."""
  loads = [x for row in data["rows"] for x in row.get("others_load", [])]
  loads = [load for load in loads if load is not None]
  return (statistics.median(loads), max(loads)) if loads else None


def _speed_table(group: list[dict]) -> str:
  ratio = _ratio_title(group)
  head = ["", "", "per call", "range", "images/s", ratio, "range", "MFU"]
  lines = [[*head, "memory", "compiled in"]]
  for row in filter(lambda row: row["seconds"], group):
    rate = row["images_per_second"]["median"]
    lines.append([
      TASKS[row["task"]],
      name_of(row["contestant"]),
      seconds(row["median_seconds"]),
      _range(row["seconds"]),
      _rate(rate),
      *_ratio(row, ratio),
      f"{row['mfu']:.1%}" if "mfu" in row else "",
      f"{row['bytes'] / 2**30:.2f} GiB" if "bytes" in row else "",
      _compile_time(row),
    ])  # fmt: skip
  return _table(lines)


def _update_table(group: list[dict]) -> str:
  ratio = _ratio_title(group)
  lines = [["", "per call", "range", ratio, "range", "x one pass", "range"]]
  for row in filter(lambda row: row["seconds"], group):
    passes = row.get("passes")
    lines.append([
      name_of(row["contestant"]),
      seconds(row["median_seconds"]),
      _range(row["seconds"]),
      *_ratio(row, ratio),
      f"{passes['median']:.2f}" if passes else "",
      f"{passes['min']:.2f} to {passes['max']:.2f}" if passes else "",
    ])  # fmt: skip
  text = (
    "One pass reads 14 and writes 14 bytes for each parameter in one "
    "operation: as much as an update must move at least."
  )
  return f"{_table(lines)}\n\n{text}"


def _compile_table(group: list[dict]) -> str:
  lines = [["", "", "traced in", "compiled in", "together", "range"]]
  for row in filter(lambda row: row["seconds"], group):
    halves = [
      seconds(statistics.median(row[key])) if key in row else ""
      for key in ("trace_seconds", "compile_seconds")
    ]
    lines.append([
      TASKS[row["task"]],
      name_of(row["contestant"]),
      *halves,
      seconds(row["median_seconds"]),
      _range(row["seconds"]),
    ])  # fmt: skip
  return _table(lines)


def _kernel_table(row: dict) -> str:
  lines = [["kernel", "per step", "share", "computes"]]
  for kernel in row["kernels"]:
    lines.append([
      f"`{kernel['kernel'][:40]}`",
      seconds(kernel["seconds"]),
      f"{kernel['share']:.1%}",
      f"`{kernel['source'][-80:]}`" if kernel["source"] else "",
    ])  # fmt: skip
  return _table(lines)


def _ratio_title(group: list[dict]) -> str:
  names = {row["baseline"] for row in group if "baseline" in row}
  return "x plain XLA" if names == {"xla"} else "x timm's best"


def _ratio_text(row: dict, title: str) -> str:
  """The median, and times what if the title says something else."""
  text = f"{row['ratio']['median']:.2f}"
  is_other = row["baseline"] == "xla" and title != "x plain XLA"
  return f"{text} x plain XLA" if is_other else text


def _ratio(row: dict, title: str) -> list[str]:
  if "ratio" not in row:
    return ["", ""]
  ratio, text = row["ratio"], _ratio_text(row, title)
  if row["baseline"] == row["contestant"]:
    return [text, ""]
  return [text, f"{ratio['min']:.2f} to {ratio['max']:.2f}"]


def _compile_time(row: dict) -> str:
  parts = [row.get("trace_seconds", 0), row.get("compile_seconds", 0)]
  return seconds(sum(parts)) if any(parts) else ""


def _range(values: list[float]) -> str:
  low, high = seconds(min(values)), seconds(max(values))
  if low.split()[1] == high.split()[1]:
    low = low.split()[0]
  return f"{low} to {high}"


def seconds(value: float) -> str:
  """A duration with three digits at least."""
  return _in_units(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def flops(value: float) -> str:
  """Operations per second with three digits at least."""
  units = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"))
  return _in_units(value, units)


def _in_units(value: float, units: tuple[tuple[float, str], ...]) -> str:
  """In the first unit that is no larger than the value, or the last."""
  unit, name = next((pair for pair in units if value >= pair[0]), units[-1])
  return f"{_rate(value / unit)} {name}"


def _rate(value: float) -> str:
  """Three digits at least, but no power of ten."""
  return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(lines: list[list[str]]) -> str:
  """Markdown whose columns also stand below each other; none is empty."""
  columns = zip(*lines, strict=True)
  lines = list(zip(*(c for c in columns if any(c[1:])), strict=True))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rule = ["-" * max(3, width) for width in widths]
  padded = [
    [
      cell.ljust(max(3, width))
      for cell, width in zip(line, widths, strict=True)
    ]
    for line in (lines[0], rule, *lines[1:])
  ]
  return "\n".join(f"| {' | '.join(line)} |".rstrip() for line in padded)


def save_figure(data: dict, path: Path) -> None:
  """Images per second of every contestant, with the range of the rounds."""
  from matplotlib.figure import Figure

  rows = [row for row in data["rows"] if "images_per_second" in row]
  panels = [list(group) for _, group in groupby(rows, group_of)]
  figure = Figure(
    figsize=(8, 0.9 + sum(0.75 + 0.34 * len(panel) for panel in panels)),
    layout="constrained",
  )
  axes = figure.subplots(
    len(panels), squeeze=False, height_ratios=[len(p) + 0.8 for p in panels]
  )[:, 0]
  title = _ratio_title(rows)
  for axis, panel in zip(axes, panels, strict=True):
    _draw(axis, panel, title)
  text = "images per second (bars: medians; lines: all rounds"
  if any("ratio" in row for row in rows):
    text += f"; x: {title[2:]}"
  axes[-1].set_xlabel(text + ")")
  machine = data["machine"]
  device = machine["text"].rpartition(", ")[0]
  if machine["backend"] != "cpu":
    device = machine["device"]
  versions = machine["versions"]
  names = [name for name in ("jax", "torch", "timm") if name in versions]
  device += "; " + ", ".join(f"{name} {versions[name]}" for name in names)
  figure.suptitle(device, x=0.01, ha="left", fontsize=10, color="#444444")
  with unfinished(path) as partial:
    figure.savefig(partial, dpi=150)


def _color(contestant: str) -> str:
  if contestant.startswith("timm"):
    return _TIMM_COLOR
  return _COLORS.get(contestant, _VARIANT_COLOR)


def _draw(axis, panel: list[dict], title: str) -> None:
  first = panel[0]
  places = range(len(panel))
  rates = [row["images_per_second"] for row in panel]
  medians = [rate["median"] for rate in rates]
  below = [rate["median"] - rate["min"] for rate in rates]
  above = [rate["max"] - rate["median"] for rate in rates]
  colors = [_color(row["contestant"]) for row in panel]
  axis.barh(places, medians, height=0.7, color=colors)
  axis.errorbar(
    medians, places, xerr=(below, above), fmt="none", color="#222222", lw=1.1,
    capsize=2.5,
  )  # fmt: skip
  longest = max(rate["max"] for rate in rates)
  for place, row, rate in zip(places, panel, rates, strict=True):
    text = _rate(rate["median"])
    if "ratio" in row and row["baseline"] != row["contestant"]:
      ratio = _ratio_text(row, title)
      text += f"   {ratio}" if "x" in ratio else f"   {ratio} x"
    axis.text(
      rate["max"] + 0.015 * longest, place, text, va="center", fontsize=9
    )
  lines = [name_of(row["contestant"]).split(" --") for row in panel]
  names = ["\n".join(textwrap.fill(x, 30) for x in parts) for parts in lines]
  axis.set_yticks(places, names, fontsize=9)
  axis.invert_yaxis()
  axis.set_xlim(0, 1.2 * longest)
  axis.set_title(
    f"{first['model']}{_depth(first)}, {TASKS[first['task']]}: "
    f"{first['batch']} images of {first['size']} px, {first['precision']}",
    loc="left",
    fontsize=10,
  )
  axis.grid(axis="x", alpha=0.25)
  axis.set_axisbelow(True)
  axis.tick_params(axis="y", length=0)
  axis.spines[["top", "right", "left"]].set_visible(False)
