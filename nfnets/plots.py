"""Pictures: curves of a run, confusions, images and what is said of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from nfnets import metrics
from nfnets.files import unfinished

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
      if len(points) == 1:  # A line has no length then.
        style.setdefault("marker", "o")
      axis.plot(*zip(*points, strict=True), **style)

  marker = {"marker": "o", "markersize": 3}
  (loss, accuracy), (rate, clipped) = axes
  trained_on = "training batch, augmented"
  draw(loss, train, "loss", color=_TRAIN, lw=1, label=trained_on)
  draw(loss, evals, "raw_loss", color=_RAW, label="test, raw", **marker)
  draw(loss, evals, "ema_loss", color=_EMA, label="test, EMA", **marker)
  highest = _without_spikes([row["loss"] for row in train if "loss" in row])
  loss.set(title="Loss", ylabel="cross-entropy (nats)", ylim=(0, highest))

  percent = {"scale": 100.0}
  draw(
    accuracy, train, "accuracy", color=_TRAIN, lw=1, label=trained_on,
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
  _save(figure, path, dpi=150)


def _save(figure: Any, path: Path, *, dpi: int = 120) -> None:
  with unfinished(path) as partial:  # The one before stays until then.
    figure.savefig(partial, dpi=dpi)


def shortened(name: str, length: int) -> str:
  """A class's name for a picture, cut to so many characters."""
  if len(name) > length:
    name = f"{name[: length - 3]}..."
  return name.replace("$", r"\$")  # Else Matplotlib takes it for mathematics.


def _without_spikes(values: list[float]) -> float | None:
  """Where an axis ends so that few high values do not flatten the others."""
  if not values:
    return None
  usual = 1.5 * np.percentile(values, 98)
  return usual if max(values) > 3 * usual else None


# Of so many classes names and numbers still fit into a table.
_MOST_IN_TABLE = 30


def save_confusion(
  confusion: np.ndarray, class_names: tuple[str, ...], path: Path
) -> None:
  """Draws which classes (rows) were taken for which.

  A table of all classes, or where these are many the commonest mistakes.
  """
  from matplotlib.figure import Figure

  names = [shortened(name, 30) for name in class_names]
  shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  if len(names) > _MOST_IN_TABLE:
    figure = Figure(figsize=(8, 8), layout="constrained")
    _draw_mistakes(figure.subplots(), confusion, shares, names)
  else:
    side = max(4.0, 0.45 * len(names))
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    _draw_table(figure, confusion, shares, names)
  _save(figure, path)


def save_grid(
  pictures: list[np.ndarray],
  captions: list[str],
  path: Path,
  *,
  interpolation: str | None = None,
) -> None:
  """Draws uint8 images [H, W, 3], each with its caption above it."""
  from matplotlib.figure import Figure

  columns = math.ceil(math.sqrt(len(pictures)))
  rows = math.ceil(len(pictures) / columns)
  figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axis in axes:
    axis.axis("off")
  for axis, picture, caption in zip(axes, pictures, captions, strict=False):
    axis.imshow(picture, interpolation=interpolation)
    axis.set_title(caption, fontsize=8)
  _save(figure, path)


def _draw_table(
  figure: Any, confusion: np.ndarray, shares: np.ndarray, names: list[str]
) -> None:
  axis = figure.subplots()
  image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
  figure.colorbar(image, label="share of the class", shrink=0.8)
  axis.set(xlabel="taken for", ylabel="class")
  axis.set_xticks(range(len(names)), names, rotation=90)
  axis.set_yticks(range(len(names)), names)
  for i, j in np.argwhere(confusion):
    color = "white" if shares[i, j] > 0.5 else "black"
    text = f"{confusion[i, j]}"
    axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)


def _draw_mistakes(
  axis: Any, confusion: np.ndarray, shares: np.ndarray, names: list[str]
) -> None:
  wrong = confusion.copy()
  np.fill_diagonal(wrong, 0)
  order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_IN_TABLE]
  pairs = [divmod(int(i), len(names)) for i in order if wrong.flat[i]]
  places = range(len(pairs))
  axis.barh(places, [100 * shares[pair] for pair in pairs], color=_TRAIN)
  texts = [f"{names[i]} \N{RIGHTWARDS ARROW} {names[j]}" for i, j in pairs]
  axis.set_yticks(places, texts, fontsize=8)
  for place, pair in zip(places, pairs, strict=True):
    axis.text(100 * shares[pair], place, f" {wrong[pair]}", va="center")
  axis.invert_yaxis()
  axis.set(
    title="Commonest mistakes: class \N{RIGHTWARDS ARROW} taken for, times",
    xlabel="share of the class (%)",
  )
  axis.margins(x=0.1, y=0.02)
  axis.spines[["top", "right"]].set_visible(False)
