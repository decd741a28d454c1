"""The story of an evaluation: every example exactly once."""

import contextlib
import csv
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfnets import (
  checkpoint,
  devices,
  files,
  hosts,
  plots,
  pretrained,
  recipe,
  steps,
)
from nfnets.card import Card
from nfnets.data import batches
from nfnets.data.source import Split
from nfnets.errors import InputError, UsageError


class Result(NamedTuple):
  """Means over a split."""

  loss: float  # Cross-entropy, nats.
  top1: float  # Shares, 0 to 1.
  top5: float
  num_examples: int
  # [K, K] int: examples of each class (row) taken for each (column), if asked.
  confusion: np.ndarray | None = None

  def __str__(self) -> str:
    return (
      f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  loss {self.loss:.4f}  "
      f"({self.num_examples:,} images)"
    )


def over_split(
  eval_step: Any,
  weights: dict[str, tuple[Any, Any]],
  split: Split,
  *,
  batch_size: int,
  image_size: int,
  mesh: Mesh,
  tell: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Result]:
  """Evaluates weights that are on the devices already, each batch read once.

  Args:
    eval_step: From `steps.make_eval_step`.
    weights: By kind, the network's parameters and state.
    split: What to evaluate on.
    batch_size: Over all devices, at most; rounded up to a multiple of their
      number. On a CPU `devices.images_at_once` are, if they are fewer.
    image_size: Pixels, side of an image.
    mesh: The devices.
    tell: Is given after each batch how many examples are done, and how many
      there are.

  Returns:
    Results by kind.

  Raises:
    InputError: when no image could be read.
  """
  most = devices.images_at_once(image_size)
  if most is not None:
    batch_size = min(batch_size, most * mesh.size)
  batch_size = min(batch_size, split.num_examples)
  batch_size = -(-batch_size // mesh.size) * mesh.size
  totals: dict[str, dict[str, Any]] = {kind: {} for kind in weights}
  pending = None
  stream = batches.eval_batches(
    split,
    batch_size=batch_size,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
  )
  with batches.ReadAhead(stream, depth=1) as ahead:
    for batch in ahead:
      batch = devices.shard_batch(batch, mesh)
      sums = {
        kind: eval_step(params, state, batch)
        for kind, (params, state) in weights.items()
      }
      if pending is not None:  # One batch ahead of the one that is read.
        tell(_add(totals, pending), split.num_examples)
      pending = sums
  _add(totals, pending)
  if not all(total["count"] for total in totals.values()):
    raise InputError(
      f"none of the {split.num_examples:,} images to test with could be read"
    )
  return {kind: _as_means(total) for kind, total in totals.items()}


def _add(totals: dict[str, dict[str, Any]], sums: Any) -> int:
  """Adds the sums of a batch, by kind; returns how many examples are done."""
  for kind, values in jax.device_get(sums).items():
    total = totals[kind]
    for name, value in values.items():
      total[name] = total.get(name, 0.0) + np.float64(value)
  return round(float(total["count"]))


def _as_means(total: dict[str, Any]) -> Result:
  count, confusion = total.pop("count"), total.pop("confusion", None)
  return Result(
    **{name: float(value / count) for name, value in total.items()},
    num_examples=round(float(count)),
    confusion=None if confusion is None else np.rint(confusion).astype(int),
  )


def evaluate(
  config: ConfigDict,
  *,
  workdir: Path | None,
  weights: str | Path | None,
  given: Collection[str] = (),
  details: Path | None = None,
  tell: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Result]:
  """Evaluates a run's newest checkpoint, or a weights file, on the test split.

  Args:
    config: Of the run, or one that knows the data.
    workdir: A run; its raw and averaged weights are evaluated.
    weights: Or what `pretrained.load` takes.
      Network and preparation of images are its card's, if it has one; the size
      of images is the config's, if that has one.
    given: Of `data.eval_crop` and `data.eval_margin` those in which the config
      goes before the card.
    details: Folder for `save_details` (of the averaged weights).
    tell: Is given after each batch how many examples are done, and how many
      there are.

  Returns:
    Results by kind of weights: `raw` and `ema`, with early stopping also
    `best`; or `weights`.

  Raises:
    InputError: see `recipe.resolve`, `checkpoint` and `pretrained`.
  """
  if (workdir is None) == (weights is None):
    raise UsageError("give either a workdir or weights to evaluate")
  load = lambda: (
    (None, None) if weights is None else pretrained.load_with_card(weights)
  )
  params, card = hosts.on_all_hosts(load)
  if card is not None:
    config = _with_card(config, card, given)
  r = hosts.on_all_hosts(lambda: recipe.resolve(config))
  if workdir is not None:
    # Raises for another model or data set.
    recipe.changes_since(r, workdir, may_change=_MAY_CHANGE)
  if card is not None and card.class_names != r.card.class_names:
    raise InputError(
      f"{weights} tells {len(card.class_names)} classes apart "
      f"({', '.join(card.class_names[:3])}, ...), the data set has "
      f"{len(r.card.class_names)} ({', '.join(r.card.class_names[:3])}, ...): "
      "give the config of the data that the weights were trained on"
    )
  mesh = devices.make_mesh(config.train.num_devices)
  is_first_host = hosts.is_first_host()
  details_here = details if is_first_host else None
  # Now, rather than when all is computed.
  hosts.on_all_hosts(
    lambda: details_here and files.make_writable(details_here, "--details")
  )
  eval_step = steps.make_eval_step(
    r.model,
    mesh,
    normalization=r.normalization,
    with_confusion=details is not None,
  )

  if weights is not None:
    pretrained.check(params, r.model, str(weights))
    by_kind = {"weights": (devices.replicate(params, mesh), {})}
  else:
    found = checkpoint.load_weights(workdir, r.model, mesh)
    by_kind = {
      "raw": (found["params"], found["state"]),
      "ema": (found["ema_params"], found["ema_state"]),
    }
    best = workdir / "weights.safetensors"
    if config.train.patience is not None and best.is_file():
      params, _ = pretrained.load_file(best)
      by_kind["best"] = (devices.replicate(params, mesh), {})
  hosts.check_agreement(
    r.identity()
    | {
      "--weights": str(weights),
      "--details": details is not None,
      "kinds of weights": list(by_kind),
    }
  )
  results = over_split(
    eval_step,
    by_kind,
    r.source.test,
    batch_size=config.eval.batch_size,
    image_size=r.card.image_size,
    mesh=mesh,
    tell=tell if is_first_host else lambda *_: None,
  )
  if details_here is not None:
    *_, last = results.values()
    save_details(details_here, last, r.card.class_names)
  return results


# What an evaluation may do otherwise than the training of its run did.
_MAY_CHANGE = ("data.eval_crop", "data.eval_margin", "data.test_size")


def _with_card(
  config: ConfigDict, card: Card, given: Collection[str]
) -> ConfigDict:
  """A config with the network of a card, images prepared as it says."""
  config = config.copy_and_resolve_references()
  recipe.check_columns(card)
  for column in config.model:
    config.model[column] = card.overrides.get(column)
  config.model.name = card.model
  config.data.mean, config.data.std = card.mean, card.std
  if "data.eval_crop" not in given:
    config.data.eval_crop = card.crop
  if "data.eval_margin" not in given:
    config.data.eval_margin = card.margin
  if config.data.test_size is None:
    config.data.test_size = card.image_size
  return config


def save_details(
  folder: Path, result: Result, class_names: tuple[str, ...]
) -> None:
  """Writes what a single number hides, from a result with its confusion.

  `per_class.csv`: of each class how many images, the share that was right, and
  what it was most often mistaken for; `confusion.csv` and `confusion.png`: how
  many images of each class (row) were taken for each (column).
  """
  folder.mkdir(parents=True, exist_ok=True)
  confusion = result.confusion
  with _table(folder / "per_class.csv") as writer:
    writer.writerow(["class", "images", "top1", "mistaken_for", "times"])
    for i, (name, row) in enumerate(zip(class_names, confusion, strict=True)):
      num, wrong = row.sum(), np.where(np.arange(len(row)) == i, 0, row)
      worst = wrong.argmax()
      mistaken = (class_names[worst], wrong[worst]) if wrong.any() else ("", 0)
      top1 = f"{row[i] / num:.4f}" if num else ""
      writer.writerow([name, num, top1, *mistaken])
  with _table(folder / "confusion.csv") as writer:
    writer.writerow(["class", *class_names])
    for name, row in zip(class_names, confusion, strict=True):
      writer.writerow([name, *row])
  plots.save_confusion(confusion, class_names, folder / "confusion.png")


@contextlib.contextmanager
def _table(path: Path) -> Iterator[Any]:
  with files.unfinished(path) as partial, partial.open("w", newline="") as file:
    yield csv.writer(file)
