"""3x3 convolution of stride one with half of its multiplications.

Winograd's minimal filtering F(4, 3) (Lavin and Gray, arXiv:1509.09308) along
the height alone: four rows of the output take six products in the place of
twelve. Six combinations of rows of the input ("positions") are convolved along
the width, each with a combination of rows of the kernel; combinations of the
six results are the four rows. In one dimension the constants are small, so
results are within 10^-6 of the plain sums (root mean square, float32). Two
dimensions would leave fewer products, but more to combine, and to round.

Shapes: N batch, H height, W width, C channels, T = ceil(H / 4) tiles of four
rows; activations are [N, H, W, C], kernels [3, 3, C_in, C_out], positions
[N, T, W, C].
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


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
  """Padded by one: [N, H, W, C_in], kernel -> [N, H, W, C_out]."""
  num, height, width, channels = x.shape
  # All rows as one, for XLA on CPU to share between threads. Two columns of
  # zeros keep a row from the next; what they become is cut off.
  x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
  positions = []
  for v, u in zip(
    _input_positions(x), _combine(_FROM_KERNEL, list(w)), strict=True
  ):
    out = jax.lax.conv_general_dilated(
      v.reshape(1, -1, channels),
      u,
      window_strides=(1,),
      padding=((0, 2),),
      dimension_numbers=("NWC", "WIO", "NWC"),
    )
    positions.append(out.reshape(*v.shape[:3], -1)[:, :, :width])
  tiles = jnp.stack(_combine(_TO_OUTPUT, positions), 2)  # [N, T, 4, W, C_out]
  return tiles.reshape(num, -1, *tiles.shape[3:])[:, :height]


def gradients(
  x: jax.Array, w: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The gradients of both operands, for that of the output.

  The transposed algorithm: of each position two products, with what the
  gradient of the output is at three neighbours.
  """
  kernels = _combine(_FROM_KERNEL, list(w.transpose(0, 2, 1, 3)))
  of_input, of_kernel = [], []
  dy = jnp.pad(dy, ((0, 0), (0, 0), (1, 1), (0, 0)))
  for v, u, d in zip(
    _input_positions(x), kernels, _output_positions(dy), strict=True
  ):
    d = _neighbours(d)  # [N T W, 3 C_out]
    dv = jnp.tensordot(d, u.reshape(len(u), -1), (1, 1))  # [N T W, C_in]
    of_input.append(dv.reshape(v.shape))
    du = jnp.tensordot(v.reshape(-1, v.shape[-1]), d, (0, 0))
    of_kernel.append(du.reshape(u.shape))  # [C_in, 3, C_out]
  dw = jnp.stack(_combine(_FROM_KERNEL.T, of_kernel)).transpose(0, 2, 1, 3)

  # A tile's last two rows belong to the next tile too.
  rows = _combine(_FROM_INPUT.T, of_input)  # Six of [N, T, W, C_in].
  after = lambda row: jnp.pad(row, ((0, 0), (0, 1), (0, 0), (0, 0)))
  before = lambda row: jnp.pad(row, ((0, 0), (1, 0), (0, 0), (0, 0)))
  tiles = [after(row) for row in rows[:_ROWS]]
  for i, row in enumerate(rows[_ROWS:]):
    tiles[i] += before(row)
  dx = jnp.stack(tiles, 2).reshape(x.shape[0], -1, *x.shape[2:])
  return dx[:, 1 : 1 + x.shape[1]], dw


def _neighbours(d: jax.Array) -> jax.Array:
  """[N, T, W, C] -> [N T W, 3 C]: right neighbour, itself, left neighbour."""
  width = d.shape[2] - 2
  columns = [d[:, :, i : i + width] for i in (2, 1, 0)]
  return jnp.stack(columns, 3).reshape(-1, 3 * d.shape[3])


def _input_positions(x: jax.Array) -> list[jax.Array]:
  """[N, H, W, C] -> six of [N, T, W, C]."""
  x = _tiles(x, _num_tiles(x) + 1, above=1)
  rows = [x[:, :-1, i] for i in range(_ROWS)] + [x[:, 1:, i] for i in range(2)]
  return _combine(_FROM_INPUT, rows)


def _output_positions(dy: jax.Array) -> list[jax.Array]:
  """[N, H, W, C] -> six of [N, T, W, C]: from outputs back to positions."""
  dy = _tiles(dy, _num_tiles(dy), above=0)
  return _combine(_TO_OUTPUT.T, [dy[:, :, i] for i in range(_ROWS)])


def _num_tiles(x: jax.Array) -> int:
  return -(-x.shape[1] // _ROWS)


def _tiles(x: jax.Array, num_tiles: int, *, above: int) -> jax.Array:
  """[N, H, W, C] -> [N, num_tiles, 4, W, C], with zeros above and below."""
  below = num_tiles * _ROWS - above - x.shape[1]
  x = jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))
  return x.reshape(x.shape[0], num_tiles, _ROWS, *x.shape[2:])


def _combine(matrix: np.ndarray, arrays: list[jax.Array]) -> list[jax.Array]:
  """The sums of the arrays with each row of the matrix as their factors."""
  return [
    sum(factor * a for factor, a in zip(row, arrays, strict=True) if factor)
    for row in matrix
  ]
