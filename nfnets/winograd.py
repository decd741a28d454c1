"""3x3 convolution of stride one with half of its multiplications.

Winograd's minimal filtering F(4, 3) (Lavin and Gray, arXiv:1509.09308) along
the height alone: four rows of the output take six products in the place of
twelve. Six combinations of rows of the input ("positions") are convolved along
the width, each with a combination of rows of the kernel; combinations of the
six results are the four rows. In one dimension the constants are small, so
results are some 10^-6 off (root mean square, float32; plain sums: 3 10^-7). Two
dimensions would leave fewer products, but more to combine, and to round.

The six positions are one array, made by one operation and multiplied by one:
XLA compiles each operation apart.

Shapes: N batch, H height, W width, C channels, T = ceil(H / 4) tiles of four
rows; activations are [N, H, W, C], kernels [3, 3, C_in, C_out], positions
[6, N, T, W, C].
"""

import jax
import jax.numpy as jnp
import numpy as np

_ROWS = 4  # Of the output, in a tile.

# What is combined into each of the six positions: six rows of the input (the
# last two are the next tile's first), and three of the kernel. The points of
# the interpolation are 0, 1, -1, 2, -2 and infinity.
_FROM_INPUT = np.array(
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ],
  np.float32,
)
_FROM_KERNEL = np.array(
  [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
  ],
  np.float32,
)
# What each of the four rows of the output is, of the six positions.
_TO_OUTPUT = np.array(
  [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
  ],
  np.float32,
)


def kernel_positions(w: jax.Array) -> jax.Array:
  """Kernel -> [6, 3, C_in, C_out], what `convolve` takes.

  Of all groups and for all images at once: in a loop over them XLA on CPU
  combines what it also cuts, several times as slowly.
  """
  return _combine(_FROM_KERNEL, list(w))


def convolve(x: jax.Array, kernels: jax.Array) -> jax.Array:
  """Padded by one: [N, H, W, C_in], `kernel_positions` -> [N, H, W, C_out]."""
  num, height, width, _ = x.shape
  inputs = _input_positions(_pad_width(x))
  outputs = jnp.einsum(
    "pmk,pkc->pmc", _neighbours(inputs), _as_matrices(kernels)
  ).reshape(*inputs.shape[:3], width, -1)
  tiles = _combine(_TO_OUTPUT, list(outputs), axis=2)  # [N, T, 4, W, C_out]
  return tiles.reshape(num, -1, width, tiles.shape[-1])[:, :height]


def gradients(
  x: jax.Array, w: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The gradients of both operands, for that of the output.

  The transposed algorithm: both are products with what the gradient of the
  output is at three neighbours.
  """
  num, height, width, channels = x.shape
  inputs = _input_positions(x)
  # The right neighbour of an output has the left column of the kernel.
  mirrored = list(w[:, ::-1].transpose(0, 2, 1, 3))
  kernels = _combine(_FROM_KERNEL, mirrored)  # [6, C_in, 3, C_out]
  outputs = _neighbours(_output_positions(_pad_width(dy)))

  of_kernels = jnp.einsum("pmc,pmk->pck", _as_matrices(inputs), outputs)
  dw = _combine(_FROM_KERNEL.T, list(of_kernels.reshape(kernels.shape)))
  dw = dw.transpose(0, 2, 1, 3)[:, ::-1]

  of_inputs = jnp.einsum(
    "pmk,pck->pmc", outputs, kernels.reshape(len(kernels), channels, -1)
  ).reshape(inputs.shape)
  rows = _combine(_FROM_INPUT.T, list(of_inputs), axis=2)  # [N, T, 6, W, C]
  # A tile's last two rows are the next one's first two as well.
  after = ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0))
  before = ((0, 0), (1, 0), (0, 2), (0, 0), (0, 0))
  tiles = jnp.pad(rows[:, :, :_ROWS], after)
  tiles += jnp.pad(rows[:, :, _ROWS:], before)
  dx = tiles.reshape(num, -1, width, channels)
  return dx[:, 1 : 1 + height], dw


def _input_positions(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> positions."""
  x = _tiles(x, _num_tiles(x) + 1, above=1)
  rows = [x[:, :-1, i] for i in range(_ROWS)] + [x[:, 1:, i] for i in range(2)]
  return _combine(_FROM_INPUT, rows)


def _output_positions(dy: jax.Array) -> jax.Array:
  """[N, H, W, C] -> positions: back from what four rows are made of."""
  dy = _tiles(dy, _num_tiles(dy), above=0)
  return _combine(_TO_OUTPUT.T, [dy[:, :, i] for i in range(_ROWS)])


def _num_tiles(x: jax.Array) -> int:
  return -(-x.shape[1] // _ROWS)


def _tiles(x: jax.Array, num_tiles: int, *, above: int) -> jax.Array:
  """[N, H, W, C] -> [N, num_tiles, 4, W, C], with zeros above and below."""
  below = num_tiles * _ROWS - above - x.shape[1]
  x = jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))
  return x.reshape(x.shape[0], num_tiles, _ROWS, *x.shape[2:])


def _pad_width(x: jax.Array) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))


def _neighbours(x: jax.Array) -> jax.Array:
  """[6, N, T, W + 2, C] -> [6, N T W, 3 C]: left one, itself, right one."""
  width = x.shape[3] - 2
  columns = [x[:, :, :, i : i + width] for i in range(3)]
  return jnp.stack(columns, 4).reshape(len(x), -1, 3 * x.shape[4])


def _as_matrices(x: jax.Array) -> jax.Array:
  """[6, ..., C] -> [6, the product of the rest, C]."""
  return x.reshape(len(x), -1, x.shape[-1])


def _combine(
  matrix: np.ndarray, arrays: list[jax.Array], axis: int = 0
) -> jax.Array:
  """The sums of arrays with each row of the matrix, along a new axis."""
  shape = [1] * (arrays[0].ndim + 1)
  shape[axis] = len(matrix)
  factors = [column.reshape(shape) for column in matrix.T]
  terms = zip(factors, arrays, strict=True)
  return sum(factor * jnp.expand_dims(a, axis) for factor, a in terms)
