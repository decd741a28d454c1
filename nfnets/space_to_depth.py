"""Convolutions that take squares of pixels as one pixel of more channels.

A TPU multiplies 128 channels by 128 at once, whatever a convolution has of
them; the stem has 3, 16, 32 and 64. With the 4 x 4 pixels that become one in it
side by side as channels it has 48, 64, 128 and 256, and kernels that are mostly
zeros: more products, of which far fewer are wasted
(experiments/accelerators.md).

Shapes: N batch, H height, W width, C channels, S rows (and columns) of a
square. Squares are [N, H / S, W / S, S S C], the channels of the first row's
first pixel first.
"""

import math

import jax
import jax.numpy as jnp

Pads = list[tuple[int, int]]


def squares(x: jax.Array, square: int) -> jax.Array:
  """[N, H, W, C] -> [N, H / S, W / S, S S C]; S must divide H and W."""
  num, height, width, channels = x.shape
  x = x.reshape(
    num, height // square, square, width // square, square, channels
  )
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(num, height // square, width // square, -1)


def convolve(
  x: jax.Array, w: jax.Array, *, square: int, stride: int, pads: Pads
) -> jax.Array:
  """Of squares, the convolution of their pixels, as squares again.

  (A pixel that is not finite makes NaN of neighbours that it does not belong
  to, as it is multiplied by zeros.)

  Args:
    x: Squares of S rows.
    w: [height, width, C_in, C_out], of a dense convolution; cast to x's dtype.
    square: S.
    stride: Which divides S.
    pads: Rows and columns of zeros before and after, of pixels.

  Returns:
    Squares of S / stride rows.
  """
  w, pads = kernel(w, square=square, stride=stride, pads=pads)
  return jax.lax.conv_general_dilated(
    x,
    w.astype(x.dtype),
    window_strides=(1, 1),
    padding=pads,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def kernel(
  w: jax.Array, *, square: int, stride: int, pads: Pads
) -> tuple[jax.Array, Pads]:
  """A kernel as one over squares, and how many of zeros that takes.

  [height, width, C_in, C_out] -> [height', width', S S C_in, T T C_out] with
  T = S / stride; it moves at stride one.
  """
  (above, _), (left, _) = pads
  w, rows = _along(w, 0, square, stride, above)
  w, columns = _along(w, 3, square, stride, left)
  # [height', S, T, width', S, T, C_in, C_out]
  w = w.transpose(0, 3, 1, 4, 6, 2, 5, 7)
  (height, width), inner = w.shape[:2], w.shape[2:5]
  return w.reshape(height, width, math.prod(inner), -1), [rows, columns]


def _along(
  w: jax.Array, axis: int, square: int, stride: int, before: int
) -> tuple[jax.Array, tuple[int, int]]:
  """The same along one axis, which becomes three: [height', S, T].

  For each pixel of the result's square the kernel lies elsewhere.
  """
  size, num = w.shape[axis], square // stride
  first = -before // square  # The square that it begins in.
  last = ((num - 1) * stride + size - 1 - before) // square
  length = (last - first + 1) * square
  placed = []
  for pixel in range(num):
    start = pixel * stride - before - first * square
    pads = [(0, 0)] * w.ndim
    pads[axis] = (start, length - start - size)
    placed.append(jnp.pad(w, pads))
  w = jnp.stack(placed, axis + 1)
  w = w.reshape(*w.shape[:axis], -1, square, *w.shape[axis + 1 :])
  return w, (-first, last)
