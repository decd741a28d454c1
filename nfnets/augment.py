"""What happens to images inside the compiled step, in its order.

Every random choice about an image comes from its own key, made of the run's
seed, the step and the image's place in the global batch: a resumed run repeats
it exactly, and (but for partners that are rolled in) on any number of devices.

Shapes: N images per device, H height, W width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nfnets import mixing, randaugment
from nfnets.data.batch import Batch


class Augmented(NamedTuple):
  """Images as the network is to see them, with the labels they have."""

  images: jax.Array  # [N, H, W, 3] uint8, or float32 when they were mixed.
  labels: jax.Array  # [N] int32.
  partner_labels: jax.Array  # [N] int32.
  share: jax.Array  # [N] float32: of `labels`; the partner's is the rest.


class Normalization(NamedTuple):
  """Mean and standard deviation of each colour, in grey levels 0 to 255."""

  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, images: jax.Array, dtype: Any) -> jax.Array:
    """uint8 [N, H, W, 3] -> zero mean, unit variance, in `dtype`."""
    mean, std = jnp.array([[[self.mean]]]), jnp.array([[[self.std]]])
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


# (key of the step, places in the global batch [N], batch) -> augmented.
Augment = Callable[[jax.Array, jax.Array, Batch], Augmented]


def make_augment(
  *,
  flip: bool = False,
  shift: float = 0.0,
  mixup_alpha: float = 0.0,
  cutmix: bool = False,
  randaugment_layers: int = 0,
  randaugment_magnitude: float = 0,
  randaugment_quirks: bool = True,
) -> Augment:
  """Flip, shift, mix, RandAugment: the paper's order (section 4.2).

  With both MixUp and CutMix, images at even places get the one and those at
  odd places the other. Partners are the batch's own `partner_images`, or
  without those the neighbour on the same device.

  Args:
    flip: Mirror half of the images, left to right.
    shift: Move each image by up to this share of its side, black beyond.
    mixup_alpha: Of MixUp's Beta distribution; 0: no MixUp.
    cutmix: Whether to apply CutMix.
    randaugment_layers: Operations per image, on mixed images if they are.
    randaugment_magnitude: Of them, 0 to 30 (`nfnets.randaugment`).
    randaugment_quirks: As released, or corrected.
  """
  transform = randaugment.make_randaugment(
    randaugment_layers, randaugment_magnitude, quirks=randaugment_quirks
  )

  def geometry(keys: jax.Array, images: jax.Array) -> jax.Array:
    flip_keys, shift_keys = _split(keys, 2)
    if flip:
      images = _flip(flip_keys, images)
    if shift:
      images = _shift(shift_keys, images, shift)
    return images

  def mix(keys: jax.Array, places: jax.Array, images, partners):
    height, width = images.shape[1:3]
    weights = jnp.ones((len(images), height, width, 1))
    mixup_keys, cutmix_keys = _split(keys, 2)
    if mixup_alpha:
      weights = mixing.mixup_weights(mixup_keys, height, width, mixup_alpha)
    if cutmix:
      boxes = mixing.cutmix_weights(cutmix_keys, height, width)
      is_even = (places % 2 == 0)[:, None, None, None]
      weights = jnp.where(is_even, weights, boxes) if mixup_alpha else boxes
    mixed = mixing.blend(weights, images, partners)
    return mixed, mixing.label_share(weights)

  def augment(key: jax.Array, places: jax.Array, batch: Batch) -> Augmented:
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
    own, theirs, mix_keys, transform_keys = _split(keys, 4)
    images = geometry(own, batch.images)
    partner_labels, share = batch.labels, jnp.ones(len(images))
    if mixup_alpha or cutmix:
      if batch.partner_images is not None:
        partners = geometry(theirs, batch.partner_images)
        partner_labels = batch.partner_labels
      else:
        partners = jnp.roll(images, 1, axis=0)
        partner_labels = jnp.roll(batch.labels, 1)
      images, share = mix(mix_keys, places, images, partners)
    if transform is not None:
      grey_levels = jnp.clip(images, 0, 255).astype(jnp.uint8)
      images = transform(transform_keys, grey_levels)
    return Augmented(images, batch.labels, partner_labels, share)

  return augment


def _split(keys: jax.Array, num: int) -> jax.Array:
  """[N] keys -> [num, N] keys."""
  return jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys)


def _flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  mirrored = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
  return jnp.where(mirrored, images[:, :, ::-1], images)


def _shift(keys: jax.Array, images: jax.Array, max_share: float) -> jax.Array:
  reach = [round(side * max_share) for side in images.shape[1:3]]
  padded = jnp.pad(images, ((0, 0), *((r, r) for r in reach), (0, 0)))

  def cut(key, image):
    corner = [
      jax.random.randint(k, (), 0, 2 * r + 1)
      for k, r in zip(jax.random.split(key), reach, strict=True)
    ]
    return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

  return jax.vmap(cut)(keys, padded)
