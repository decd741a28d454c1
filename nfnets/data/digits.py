"""The embedded data set: scikit-learn's 1,797 handwritten digits.

Real scans from the UCI collection of 1998, 8 x 8 pixels with 17 grey levels,
part of the package and so always at hand. A fifth is held out for testing.
"""

import math

import numpy as np

from nfnets.data import images

CLASS_NAMES = tuple("0123456789")

# The same fifth in every run, whatever the seed of the training.
_SPLIT_SEED = 0
_TEST_SHARE = 0.2

Arrays = tuple[np.ndarray, np.ndarray]


def load(image_size: int) -> tuple[Arrays, Arrays]:
  """Training and test set.

  Returns:
    For each, images uint8 [n, image_size, image_size, 3], resized as in
    evaluation, and labels int32 [n]; n is 1,437 and 360.
  """
  from sklearn.datasets import load_digits

  loaded = load_digits()
  grey = loaded.images / 16 * 255  # [1797, 8, 8]
  # All digits at once: the resize treats its last axis as channels.
  large = images.to_uint8(images.resize(np.moveaxis(grey, 0, -1), image_size))
  pixels = np.repeat(np.moveaxis(large, -1, 0)[..., None], 3, axis=-1)
  labels = loaded.target.astype(np.int32)

  num_test = math.ceil(len(labels) * _TEST_SHARE)
  order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
  test, train = order[:num_test], order[num_test:]
  return (pixels[train], labels[train]), (pixels[test], labels[test])
