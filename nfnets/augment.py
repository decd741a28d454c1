"""Augmentation on the device: pure functions of a key and a batch of images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def make_shift(
  max_share: float,
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
  """Random translation by up to a share of the side, filled with black.

  Returns:
    `(key, images [N, H, W, C]) -> images`, or None when the share is 0.
  """
  if max_share == 0:
    return None

  def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    num, height, width, _ = images.shape
    reach = [round(side * max_share) for side in (height, width)]
    padded = jnp.pad(images, ((0, 0), *((r, r) for r in reach), (0, 0)))
    tops, lefts = (
      jax.random.randint(k, (num,), 0, 2 * r + 1)  # [N]
      for k, r in zip(jax.random.split(key), reach, strict=True)
    )

    def cut(image, top, left):
      return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(cut)(padded, tops, lefts)

  return shift
