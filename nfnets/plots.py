"""Figures of a run, made from its `metrics.jsonl`."""

from pathlib import Path

import numpy as np

from nfnets import metrics

_TRAIN = "#4c78a8"
_RAW = "#f58518"
_EMA = "#54a24b"
_PARTS = ("#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac")


def save_curves(workdir: Path, path: Path, *, title: str) -> None:
  """Draws loss, accuracy, learning rate and clipped share over the steps."""
  from matplotlib.figure import Figure

  rows = metrics.read(workdir)
  train = [row for row in rows if row["kind"] == "train"]
  evals = [row for row in rows if row["kind"] == "eval"]

  figure = Figure(figsize=(10, 7), layout="constrained")
  figure.suptitle(title)
  axes = figure.subplots(2, 2, sharex=True)

  def draw(axis, rows, name, scale=1.0, **style):
    points = [(row["step"], row[name] * scale) for row in rows if name in row]
    if points:
      axis.plot(*zip(*points, strict=True), **style)

  marker = {"marker": "o", "markersize": 3}
  (loss, accuracy), (rate, clipped) = axes
  draw(loss, train, "loss", color=_TRAIN, lw=1, label="training batch")
  draw(loss, evals, "raw_loss", color=_RAW, label="test, raw", **marker)
  draw(loss, evals, "ema_loss", color=_EMA, label="test, EMA", **marker)
  loss.set(title="Loss", ylabel="cross-entropy (nats)", ylim=(0, None))

  percent = {"scale": 100.0}
  draw(
    accuracy, train, "accuracy", color=_TRAIN, lw=1, label="training batch",
    **percent,
  )  # fmt: skip
  for kind, color, label in (
    ("raw_top1", _RAW, "test, raw"),
    ("ema_top1", _EMA, "test, EMA"),
  ):
    draw(accuracy, evals, kind, color=color, label=label, **marker, **percent)
  accuracy.set(title="Accuracy", ylabel="top-1 (%)", ylim=(None, 100.5))

  draw(rate, train, "learning_rate", color=_TRAIN)
  rate.set(title="Learning rate", xlabel="step", ylim=(0, None))

  prefix = "clipped/"
  names = sorted({k for row in train for k in row if k.startswith(prefix)})
  parts = [name for name in names if name != prefix + "all"]
  parts.sort(
    key=lambda name: (name != prefix + "stem", name == prefix + "head")
  )
  for i, name in enumerate(parts):
    color = _PARTS[i % len(_PARTS)]
    label = name.removeprefix(prefix)
    draw(clipped, train, name, color=color, lw=0.8, label=label, **percent)
  draw(
    clipped, train, prefix + "all", color="black", lw=1.5, label="all",
    **percent,
  )  # fmt: skip
  clipped.set(
    title="Units clipped by AGC",
    xlabel="step",
    ylabel="share of units (%)",
    ylim=(0, None),
  )

  for axis in axes.flat:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(frameon=False, fontsize=8, ncols=2 if axis is clipped else 1)
  figure.savefig(path, dpi=150)


def save_confusion(
  confusion: np.ndarray, class_names: tuple[str, ...], path: Path
) -> None:
  """Draws which classes (rows) were taken for which, in shares of a row."""
  from matplotlib.figure import Figure

  num = len(class_names)
  is_small = num <= 30  # Names and numbers still fit.
  shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  side = max(4.0, 0.45 * num) if is_small else 10.0
  figure = Figure(figsize=(side + 1.5, side), layout="constrained")
  axis = figure.subplots()
  image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
  figure.colorbar(image, label="share of the class", shrink=0.8)
  axis.set(xlabel="taken for", ylabel="class")
  if is_small:
    axis.set_xticks(range(num), class_names, rotation=90)
    axis.set_yticks(range(num), class_names)
    for i, j in np.argwhere(confusion):
      color = "white" if shares[i, j] > 0.5 else "black"
      text = f"{confusion[i, j]}"
      axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
  figure.savefig(path, dpi=120)
