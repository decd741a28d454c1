"""MixUp and CutMix as one blend of two images, per pixel.

Both mix an image with a partner by weights in [0, 1], one per pixel: MixUp's
are one constant (arXiv:1710.09412), CutMix's are 1 inside a box and 0 outside
(arXiv:1905.04899). The label gets the mean weight as its share, so the same two
lines serve both.

Shapes: N batch, H height, W width, C channels; a key per image, so that what
happens to an image depends on nothing but its own key.
"""

import jax
import jax.numpy as jnp


def mixup_weights(
  keys: jax.Array, height: int, width: int, alpha: float
) -> jax.Array:
  """One weight per image, from Beta(alpha, alpha): float32 [N, H, W, 1]."""
  share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)
  shape = (len(keys), height, width, 1)
  return jnp.broadcast_to(share[:, None, None, None], shape)


def cutmix_weights(keys: jax.Array, height: int, width: int) -> jax.Array:
  """A random box of ones per image: float32 [N, H, W, 1].

  As released: the area to give up is uniform in [0, 1), the centre uniform over
  the image, half sides are rounded down, and what leaves the image is cut off.
  """

  def box(key):
    area_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.uniform(area_key))

    def inside(key, length):
      centre = jax.random.randint(key, (), 0, length)
      half = (side * length).astype(jnp.int32) // 2
      place = jnp.arange(length)
      return (place >= centre - half) & (place < centre + half)

    rows, columns = inside(row_key, height), inside(column_key, width)
    return rows[:, None, None] & columns[None, :, None]

  return jax.vmap(box)(keys).astype(jnp.float32)


def blend(weights: jax.Array, image: jax.Array, partner: jax.Array):
  """`weights * image + (1 - weights) * partner`, in float32 [N, H, W, C]."""
  image, partner = image.astype(jnp.float32), partner.astype(jnp.float32)
  return weights * image + (1 - weights) * partner


def label_share(weights: jax.Array) -> jax.Array:
  """What an image's own label gets, [N]; its partner's label gets the rest."""
  return jnp.mean(weights, axis=(1, 2, 3))
