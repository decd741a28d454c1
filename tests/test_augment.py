"""Augmentation: order, keys, partners, and the labels that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets import augment, mixing, randaugment
from nfnets.data.batch import Batch

KEY = jax.random.key(0)


def _batch(num, size=16, seed=0, with_partners=False):
  rng = np.random.default_rng(seed)
  draw = lambda: rng.integers(0, 256, (num, size, size, 3)).astype(np.uint8)
  labels = np.arange(num, dtype=np.int32)
  batch = Batch(draw(), labels, np.ones(num, np.float32))
  if with_partners:
    batch = batch._replace(partner_images=draw(), partner_labels=labels + 100)
  return batch


def _points(num, size=16):
  """Black images with one white point in the middle."""
  batch = _batch(num, size)
  batch.images[:] = 0
  batch.images[:, size // 2, size // 2] = 255
  return batch


def test_nothing_to_do_changes_nothing():
  batch = _batch(4)
  out = augment.make_augment()(KEY, jnp.arange(4), batch)
  np.testing.assert_array_equal(out.images, batch.images)
  np.testing.assert_array_equal(out.labels, batch.labels)
  np.testing.assert_array_equal(out.share, np.ones(4))


def test_compiled_or_not_it_is_the_same():
  """Up to the last bit of mixing; RandAugment's own tests compare it."""
  batch = _batch(6, with_partners=True)
  mix = augment.make_augment(flip=True, shift=0.1, mixup_alpha=0.2, cutmix=True)
  plain = mix(KEY, jnp.arange(6), batch)
  compiled = jax.jit(mix)(KEY, jnp.arange(6), batch)
  for ours, theirs in zip(compiled, plain, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("shift", [0.125, 0.1])  # Rounded to two pixels.
def test_shift_moves_each_image_within_its_reach(shift):
  batch = _points(300)
  out = augment.make_augment(shift=shift)(KEY, jnp.arange(300), batch)
  assert out.images.dtype == np.uint8
  _, rows, columns, _ = np.nonzero(np.asarray(out.images))
  assert len(rows) == 300 * 3  # No point is lost or doubled.
  for places in (rows, columns):
    assert set(places) == {6, 7, 8, 9, 10}
  assert len({*zip(rows, columns, strict=True)}) == 25  # Each by itself.


def test_flip_mirrors_half_of_the_images():
  batch = _batch(400)
  out = augment.make_augment(flip=True)(KEY, jnp.arange(400), batch)
  mirrored = (np.asarray(out.images) == batch.images[:, :, ::-1]).all((1, 2, 3))
  same = (np.asarray(out.images) == batch.images).all((1, 2, 3))
  assert (mirrored ^ same).all()
  assert 0.4 < mirrored.mean() < 0.6


RECIPE = {
  "flip": True,
  "mixup_alpha": 0.2,
  "cutmix": True,
  "randaugment_layers": 2,
  "randaugment_magnitude": 5,
}


def test_an_image_depends_on_its_place_and_not_on_its_device():
  """Two devices with half of the batch each do what one does."""
  apply = jax.jit(augment.make_augment(**RECIPE))
  batch = _batch(8, with_partners=True)
  whole = apply(KEY, jnp.arange(8), batch)
  for start in (0, 4):
    part = jax.tree.map(lambda x, i=start: x[i : i + 4], batch)
    out = apply(KEY, start + jnp.arange(4), part)
    for ours, expected in zip(out, whole, strict=True):
      np.testing.assert_allclose(
        np.float32(ours), np.float32(expected[start : start + 4]), atol=1e-6
      )
  other = apply(jax.random.key(1), jnp.arange(8), batch)
  assert (np.asarray(other.images) != np.asarray(whole.images)).any()


def test_even_places_get_mixup_and_odd_ones_cutmix():
  batch = _batch(64, with_partners=True)
  batch.images[:] = 255
  batch.partner_images[:] = 0
  mix = augment.make_augment(mixup_alpha=1.0, cutmix=True)
  out = mix(KEY, jnp.arange(64), batch)
  images = np.asarray(out.images)
  for place in range(64):
    # White and black mix to one grey level, or stay themselves.
    levels = set(np.unique(images[place]))
    assert len(levels) == 1 if place % 2 == 0 else levels <= {0.0, 255.0}
    np.testing.assert_allclose(
      out.share[place], images[place].mean() / 255, rtol=1e-5
    )
  np.testing.assert_array_equal(out.partner_labels, batch.partner_labels)


@pytest.mark.parametrize("kind", [{"mixup_alpha": 0.2}, {"cutmix": True}])
def test_without_partners_the_next_image_is_rolled_in(kind):
  batch = _batch(8)
  out = augment.make_augment(**kind)(KEY, jnp.arange(8), batch)
  np.testing.assert_array_equal(out.partner_labels, np.roll(batch.labels, 1))
  partner = np.roll(batch.images, 1, axis=0).astype(np.float32)
  own = batch.images.astype(np.float32)
  share = np.asarray(out.share)[:, None, None, None]
  assert (share < 0.95).any()
  if "cutmix" in kind:
    is_own = (out.images == own).all(-1, keepdims=True)
    assert (is_own | (out.images == partner).all(-1, keepdims=True)).all()
    found = is_own.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found, share, atol=1e-6)
  else:
    expected = share * own + (1 - share) * partner
    np.testing.assert_allclose(out.images, expected, atol=1e-3)


def test_randaugment_comes_after_mixing_and_gives_grey_levels():
  batch, places = _batch(8), jnp.arange(8)
  out = jax.jit(augment.make_augment(**RECIPE))(KEY, places, batch)
  assert out.images.dtype == np.uint8
  plain = {k: v for k, v in RECIPE.items() if "randaugment" not in k}
  transform = randaugment.make_randaugment(
    RECIPE["randaugment_layers"], RECIPE["randaugment_magnitude"]
  )

  @jax.jit
  def mixed_then_transformed(batch):
    keys = jax.vmap(lambda place: jax.random.fold_in(KEY, place))(places)
    *_, last = augment._split(keys, 4)
    mixed = augment.make_augment(**plain)(KEY, places, batch).images
    return transform(last, jnp.clip(mixed, 0, 255).astype(jnp.uint8))

  expected = mixed_then_transformed(batch)
  np.testing.assert_array_equal(out.images, expected)
  assert (out.images != batch.images).mean() > 0.5
  assert ((out.share >= 0) & (out.share <= 1)).all()


def test_partners_are_flipped_by_themselves(monkeypatch):
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(0, 256, (400, 4, 4, 3)).astype(np.uint8)
  labels = np.arange(400, dtype=np.int32)
  batch = Batch(draw(), labels, np.ones(400, np.float32), draw(), labels)
  mix = augment.make_augment(flip=True, mixup_alpha=1.0)
  mirrored = []
  for i, before in enumerate((batch.images, batch.partner_images)):
    one_of = lambda weights, *both, i=i: both[i]
    monkeypatch.setattr(mixing, "blend", one_of)
    after = np.asarray(mix(KEY, jnp.arange(400), batch).images)
    mirrored.append((after == before[:, :, ::-1]).all((1, 2, 3)))
    assert (mirrored[i] ^ (after == before).all((1, 2, 3))).all()
    assert 0.4 < mirrored[i].mean() < 0.6
  assert 0.4 < (mirrored[0] == mirrored[1]).mean() < 0.6
