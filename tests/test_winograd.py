"""Winograd's algorithm against the plain sums, in float64."""

import hypothesis
import jax
import numpy as np
from hypothesis import strategies

from nfnets import winograd


def _taps(x):
  """What each position of a 3x3 kernel sees: [3, 3, N, H, W, C]."""
  height, width = x.shape[1:3]
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return np.stack(
    [[x[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
  )


def _relative_error(ours, exact):
  assert ours.shape == exact.shape
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  return rms(ours - exact) / rms(exact)


@hypothesis.given(
  num=strategies.integers(1, 3),
  height=strategies.integers(1, 13),
  width=strategies.integers(1, 13),
  inputs=strategies.integers(1, 9),
  outputs=strategies.integers(1, 9),
)
@hypothesis.example(2, 12, 12, 64, 96)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
def test_equals_the_plain_sums(num, height, width, inputs, outputs):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
  x, w = draw(num, height, width, inputs), draw(3, 3, inputs, outputs)
  dy = draw(num, height, width, outputs)

  convolve = lambda x, w: winograd.convolve(x, winograd.kernel_positions(w))
  out = jax.jit(convolve)(x, w)
  dx, dw = jax.jit(winograd.gradients)(x, w, dy)
  exact = {
    "out": np.einsum("ijnhwc,ijcd->nhwd", _taps(x), w, dtype=np.float64),
    "dx": np.einsum(
      "ijnhwd,ijcd->nhwc", _taps(dy), w[::-1, ::-1], dtype=np.float64
    ),
    "dw": np.einsum("ijnhwc,nhwd->ijcd", _taps(x), dy, dtype=np.float64),
  }
  # Plain sums in float32 are 3e-7 off; combining positions makes it 1e-6.
  assert _relative_error(out, exact["out"]) < 2e-6
  assert _relative_error(dx, exact["dx"]) < 2e-6
  assert _relative_error(dw, exact["dw"]) < 2e-6
