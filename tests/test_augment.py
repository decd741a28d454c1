"""Augmentation: each image is moved by itself, as a whole, within reach."""

import jax
import numpy as np

from nfnets import augment


def test_shift_moves_each_image_within_its_reach():
  images = np.zeros((300, 16, 16, 3), np.uint8)
  images[:, 8, 8] = 255
  shifted = augment.make_shift(0.125)(jax.random.key(0), images)
  assert shifted.dtype == np.uint8
  _, rows, columns, _ = np.nonzero(np.asarray(shifted))
  assert len(rows) == 300 * 3  # No point is lost or doubled.
  for places in (rows, columns):
    assert set(places) == {6, 7, 8, 9, 10}


def test_no_shift_is_no_function():
  assert augment.make_shift(0.0) is None
