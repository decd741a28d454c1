"""The story of looking before training: a picture of an augmented batch."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nfnets import plots, recipe
from nfnets.augment import Augmented
from nfnets.data import batches


def show_batch(
  config: ConfigDict, path: Path, *, num_images: int = 16, step: int = 0
) -> None:
  """Draws the first images that a step would train on, with their labels.

  Partners of `roll` are those of a step with these images alone.

  Args:
    config: Of the run.
    path: Of the picture, `.png` or whatever Matplotlib writes.
    num_images: How many to draw.
    step: Which step's random choices to make.

  Raises:
    InputError: see `recipe.resolve`.
  """
  r = recipe.resolve(config)
  stream = batches.TrainBatches(
    r.source.train,
    batch_size=num_images,
    seed=config.seed,
    position=step * config.train.batch_size,
    with_partners=r.needs_partners,
  )
  # The keys of the step itself: see `steps.make_train_step`.
  key = jax.random.fold_in(jax.random.key(config.seed), step)
  augment_key, _ = jax.random.split(key)
  augment = jax.jit(r.make_augment())
  drawn = jax.device_get(
    augment(augment_key, jnp.arange(num_images), next(stream))
  )
  _save(drawn, r.source.class_names, path)


def _save(drawn: Augmented, names: tuple[str, ...], path: Path) -> None:
  from matplotlib.figure import Figure

  num = len(drawn.labels)
  columns = math.ceil(math.sqrt(num))
  rows = math.ceil(num / columns)
  figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axis in axes:
    axis.axis("off")
  for i, axis in zip(range(num), axes, strict=False):
    image = np.clip(np.round(drawn.images[i]), 0, 255).astype(np.uint8)
    axis.imshow(image, interpolation="nearest")
    axis.set_title(_caption(drawn, i, names), fontsize=8)
  figure.savefig(path, dpi=120)


def _caption(drawn: Augmented, i: int, names: tuple[str, ...]) -> str:
  labels = drawn.labels[i], drawn.partner_labels[i]
  own, partner = (plots.shortened(names[label], 26) for label in labels)
  share = float(drawn.share[i])
  if labels[0] == labels[1] or share > 0.995:
    return own
  return f"{share:.0%} {own}\n{1 - share:.0%} {partner}"
