"""Convolutions of squares of pixels against those of the pixels."""

from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies

from nfnets import convolution, space_to_depth


class Case(NamedTuple):
  """Squares of the images, rows in one, and a convolution of their pixels."""

  num: int
  height: int
  width: int
  square: int
  stride: int
  padding: str
  kernel: int
  inputs: int
  outputs: int


CASES = strategies.sampled_from(
  [(2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4)]
).flatmap(
  lambda square_and_stride: strategies.builds(
    Case,
    num=strategies.integers(1, 3),
    height=strategies.integers(1, 4),
    width=strategies.integers(1, 4),
    square=strategies.just(square_and_stride[0]),
    stride=strategies.just(square_and_stride[1]),
    padding=strategies.sampled_from(("same", "symmetric")),
    kernel=strategies.sampled_from((1, 3, 5, 7)),
    inputs=strategies.integers(1, 5),
    outputs=strategies.integers(1, 5),
  )
)


def test_squares_keep_their_pixels_side_by_side():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  squares = space_to_depth.squares(jnp.asarray(x), 2)
  assert squares.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(squares[1, 1, 2], x[1, 2:4, 4:6].ravel())


def _check_next_to_pixels(case, dtype, rounding):
  """Value and gradients, each number to a share of its summands' magnitude."""
  square, stride, kernel = case.square, case.stride, case.kernel
  height, width = case.height * square, case.width * square
  rng = np.random.default_rng(0)
  draw = lambda dtype, *shape: jnp.asarray(
    rng.standard_normal(shape, dtype=np.float32), dtype
  )
  x = draw(dtype, case.num, height, width, case.inputs)
  # Of a precision that bfloat16 has too, as all that is multiplied.
  w = draw(jnp.bfloat16, kernel, kernel, case.inputs, case.outputs)
  w = w.astype(jnp.float32)
  outputs = (case.num, height // stride, width // stride, case.outputs)
  seen = draw(dtype, *outputs)
  options = {"stride": stride, "padding": case.padding}

  def of_pixels(x, w):
    out = convolution.conv2d(x, w, form="xla", **options)
    return space_to_depth.squares(out, square // stride)

  def of_squares(x, w):
    x = space_to_depth.squares(x, square)
    return convolution.conv2d(x, w, square=square, **options)

  def value_and_gradients(convolve, x, w, seen):
    out, back = jax.vjp(convolve, x, w)
    return out, *back(space_to_depth.squares(seen, square // stride))

  run = jax.jit(value_and_gradients, static_argnums=0)
  ours = jax.device_get(run(of_squares, x, w, seen))
  assert [a.dtype for a in ours] == [dtype, dtype, jnp.float32]
  given = [np.asarray(a, np.float32) for a in (x, w, seen)]
  exact = jax.device_get(run(of_pixels, *given))
  magnitudes = jax.device_get(run(of_pixels, *map(np.abs, given)))
  for a, b, magnitude in zip(ours, exact, magnitudes, strict=True):
    assert a.shape == b.shape
    assert (abs(a.astype(np.float32) - b) <= rounding * magnitude).all()


@hypothesis.given(CASES)
@hypothesis.example(Case(2, 3, 2, 4, 2, "same", 3, 3, 4))  # As the stem has it.
@hypothesis.example(Case(2, 3, 2, 2, 1, "same", 3, 4, 5))
@hypothesis.example(Case(2, 3, 2, 2, 2, "symmetric", 7, 3, 4))
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
def test_equals_the_convolution_of_pixels(case):
  # The same products in another order; as if each of 64 sums were rounded up.
  _check_next_to_pixels(case, jnp.float32, 64 * 2**-24)


@hypothesis.given(CASES)
@hypothesis.example(Case(2, 3, 2, 4, 2, "same", 3, 3, 4))
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
def test_in_bfloat16_it_is_equal_to_its_rounding(case):
  # Results have 8 bits. A kernel's gradient is the sum of those of its places.
  _check_next_to_pixels(case, jnp.bfloat16, 2**-8)
