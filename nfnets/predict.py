"""The story of a prediction: image files in, class names out."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nfnets import devices, evaluate, pretrained, recipe
from nfnets.data import images
from nfnets.errors import InputError, UsageError
from nfnets.steps import Normalization


class Prediction(NamedTuple):
  """The likeliest classes of one image, best first."""

  path: Path
  classes: tuple[tuple[str, float], ...]  # (name, probability)


class Failure(NamedTuple):
  """An image that could not be read."""

  path: Path
  reason: str


def predict(
  paths: Iterable[str | Path],
  *,
  workdir: Path | None = None,
  weights: Path | None = None,
  top: int = 5,
  batch_size: int = 32,
) -> Iterator[Prediction | Failure]:
  """Classifies image files with a run's averaged weights or a weights file.

  Args:
    paths: Image files and folders of them.
    workdir: A run of `nfnets train`.
    weights: Or a weights file that has a card (`weights.safetensors`).
    top: How many classes of each image to give.
    batch_size: Images in memory at once.

  Yields:
    In the order of the files, a prediction for each or why there is none.

  Raises:
    InputError: for missing files, weights or workdirs.
  """
  if (workdir is None) == (weights is None):
    raise UsageError("give either --workdir or --weights to predict with")
  found = images.find(paths)
  params, state, card = _load(workdir, weights)
  model = card.make_model()
  top = min(top, model.num_classes)

  @jax.jit
  def classify(params, state, batch):
    batch = Normalization(card.mean, card.std)(batch, np.float32)
    outputs, _ = model.apply(params, state, None, batch)
    return jax.lax.top_k(jax.nn.softmax(outputs["logits"]), top)

  batch_size = min(batch_size, len(found))
  size, crop = card.image_size, images.EVAL_CROPS[card.crop]
  for start in range(0, len(found), batch_size):
    batch = np.zeros((batch_size, size, size, 3), np.float32)
    failures = {}
    chunk = found[start : start + batch_size]
    for i, path in enumerate(chunk):
      try:
        batch[i] = crop(images.read(path), size, card.margin)
      except InputError as error:
        failures[path] = str(error)
    values, classes = jax.device_get(classify(params, state, batch))
    for path, value, index in zip(chunk, values, classes, strict=False):
      if path in failures:
        yield Failure(path, failures[path])
      else:
        named = (
          (card.class_names[i], float(v))
          for i, v in zip(index, value, strict=True)
        )
        yield Prediction(path, tuple(named))


def _load(workdir: Path | None, weights: Path | None):
  """(params, state, card) from whichever is given."""
  if workdir is not None:
    card = recipe.load_card(workdir)
    model = card.make_model()
    found = evaluate.load_workdir(workdir, model, devices.make_mesh(1))
    return found["ema_params"], found["ema_state"], card
  params, card = pretrained.load_with_card(weights)
  if card is None:
    raise InputError(
      f"{weights} has no card that names its model and classes: use the "
      "weights.safetensors that `nfnets train` writes"
    )
  pretrained.check(params, card.make_model(), str(weights))
  return params, {}, card
