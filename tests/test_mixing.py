"""Mixing: shares equal pixel shares, boxes are boxes, distributions match."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets import mixing


def _keys(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 22)])
def test_cutmix_share_is_the_share_of_pixels(height, width):
  weights = mixing.cutmix_weights(_keys(200), height, width)
  assert weights.shape == (200, height, width, 1)
  image = jnp.ones((200, height, width, 3))
  mixed = mixing.blend(weights, image, jnp.zeros_like(image))
  pixels = np.asarray(mixed == 1).all(-1).sum((1, 2)) / (height * width)
  np.testing.assert_allclose(mixing.label_share(weights), pixels, rtol=1e-6)
  assert set(np.unique(weights)) == {0.0, 1.0}


def test_cutmix_pastes_one_box_per_image():
  for box in np.asarray(mixing.cutmix_weights(_keys(100), 16, 20)[..., 0]):
    rows, columns = np.nonzero(box)
    if len(rows):
      inside = box[
        rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
      ]
      assert inside.all()
      assert inside.sum() == box.sum()


def test_cutmix_area_has_the_published_distribution():
  """A box's side is sqrt(U) of the image's, before the border cuts it off."""
  size = 64
  weights = mixing.cutmix_weights(_keys(4000), size, size)
  # The same draw in NumPy, from the definition.
  rng = np.random.default_rng(0)
  half = (np.sqrt(1 - rng.random(4000)) * size).astype(int) // 2
  centre = rng.integers(0, size, (2, 4000))
  low, high = np.maximum(centre - half, 0), np.minimum(centre + half, size)
  expected = np.prod(high - low, axis=0) / size**2
  shares = np.asarray(mixing.label_share(weights))
  quantiles = np.linspace(0.05, 0.95, 10)
  np.testing.assert_allclose(
    np.quantile(shares, quantiles), np.quantile(expected, quantiles), atol=0.03
  )


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_share_has_the_moments_of_beta(alpha):
  weights = mixing.mixup_weights(_keys(4000), 2, 2, alpha)
  assert (weights == weights[:, :1, :1]).all()
  shares = np.asarray(mixing.label_share(weights))
  assert ((shares >= 0) & (shares <= 1)).all()
  np.testing.assert_allclose(shares.mean(), 0.5, atol=0.03)
  np.testing.assert_allclose(shares.var(), 0.25 / (2 * alpha + 1), atol=0.01)


def test_an_image_depends_on_its_own_key_alone():
  keys = _keys(8)
  for make in (
    lambda k: mixing.cutmix_weights(k, 8, 8),
    lambda k: mixing.mixup_weights(k, 8, 8, 0.2),
  ):
    make = jax.jit(make)
    whole = make(keys)
    np.testing.assert_array_equal(make(keys[3:5]), whole[3:5])


def test_blend_of_equal_images_is_the_image():
  image = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  weights = mixing.mixup_weights(_keys(4), 8, 8, 0.2)
  mixed = mixing.blend(weights, image, image)
  np.testing.assert_allclose(mixed, image, rtol=1e-6)


def test_boxes_inside_of_the_image_have_even_sides():
  """As half of a side is rounded down."""
  num = 0
  for box in np.asarray(mixing.cutmix_weights(_keys(300), 32, 40)[..., 0]):
    for side in (box.any(1), box.any(0)):
      if side.any() and not side[0] and not side[-1]:
        assert side.sum() % 2 == 0
        num += 1
  assert num > 100
