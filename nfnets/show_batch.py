"""The story of looking before training: a picture of an augmented batch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nfnets import plots, recipe
from nfnets.augment import Augmented
from nfnets.data import batches


def show_batch(config: ConfigDict, path: Path, *, num_images: int = 16) -> None:
  """Draws the first images that a run would train on, with their labels.

  Partners of `roll` are those of a batch of these images alone.

  Args:
    config: Of the run.
    path: Of the picture, `.png` or whatever Matplotlib writes.
    num_images: How many to draw.

  Raises:
    InputError: see `recipe.resolve`.
  """
  r = recipe.resolve(config)
  stream = batches.TrainBatches(
    r.source.train,
    batch_size=num_images,
    seed=config.seed,
    with_partners=r.needs_partners,
  )
  # The keys of the step itself: see `steps.make_train_step`.
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  augment_key, _ = jax.random.split(key)
  augment = jax.jit(r.make_augment())
  drawn = jax.device_get(
    augment(augment_key, jnp.arange(num_images), next(stream))
  )
  names = r.source.class_names
  plots.save_grid(
    list(np.clip(np.round(drawn.images), 0, 255).astype(np.uint8)),
    [_caption(drawn, i, names) for i in range(num_images)],
    path,
    interpolation="nearest",  # Single pixels are seen.
  )


def _caption(drawn: Augmented, i: int, names: tuple[str, ...]) -> str:
  labels = drawn.labels[i], drawn.partner_labels[i]
  own, partner = (plots.shortened(names[label], 26) for label in labels)
  share = float(drawn.share[i])
  if labels[0] == labels[1] or share > 0.995:
    return own
  return f"{share:.0%} {own}\n{1 - share:.0%} {partner}"
