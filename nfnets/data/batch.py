"""A batch of images, the one form in which data enters a step."""

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
  """N images with their labels; on a device or, as NumPy, on the host."""

  images: Array  # [N, H, W, 3] uint8 (or float32), grey levels 0 to 255.
  labels: Array  # [N] int32, 0 to num_classes - 1.
  mask: Array  # [N] float32: 1 for an example, 0 for padding.
  # A second example for each to be mixed with, where the recipe decodes them.
  partner_images: Array | None = None  # As images.
  partner_labels: Array | None = None  # As labels.
