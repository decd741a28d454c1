"""Convolution in bfloat16 as one product for each row of the kernel.

What a row of the kernel sees lies side by side in memory: neighbours along the
width, so that a 3x3 kernel is three products. Processors with AMX multiply
bfloat16 several times as fast as float32, but XLA on CPU has them do so in
products alone, of operands that lie as they are multiplied, into float32; all
else it computes in float32. So sums are float32, rounded once by who takes
them.

Shapes: N batch, H height, W width, C channels; activations are [N, H, W, C],
kernels [height, width, C_in, C_out]; `pads` are the rows and columns of zeros
before and after.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

Pads = list[tuple[int, int]]


@functools.cache
def is_fast() -> bool:
  """Whether this machine multiplies bfloat16 faster than float32.

  That is where its processor has AMX, as far as Linux tells; by AVX-512's
  instructions alone it was slower.
  """
  try:
    return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
  except OSError:
    return False


def convolve(
  x: jax.Array, w: jax.Array, *, stride: int, pads: Pads
) -> jax.Array:
  """[N, H, W, C_in], kernel -> [N, H', W', C_out] float32."""
  seen = _seen(x, w.shape[:2], stride, pads)
  out = sum(_product(rows, row) for rows, row in zip(seen, w, strict=True))
  return out.reshape(*seen[0].shape[:3], -1)


def gradients(
  x: jax.Array, w: jax.Array, dy: jax.Array, *, stride: int, pads: Pads
) -> tuple[jax.Array, jax.Array]:
  """Of both operands, for that of the output; float32."""
  if stride == 1:
    dx = _input_gradient(dy, w, shape=x.shape, pads=pads)
  else:
    dx = _input_gradient_of_strides(
      dy, w, shape=x.shape, stride=stride, pads=pads
    )
  return dx, _kernel_gradient(x, dy, w.shape, stride=stride, pads=pads)


def _input_gradient(dy, w, *, shape, pads):
  """[N, H', W', C_out], kernel -> [N, H, W, C_in] of that shape; stride one."""
  pads = [
    (kernel - 1 - low, length + low - out)
    for (low, _), kernel, length, out in zip(
      pads, w.shape[:2], shape[1:3], dy.shape[1:3], strict=True
    )
  ]
  w = w[::-1, ::-1].transpose(0, 1, 3, 2)
  return convolve(dy, w, stride=1, pads=pads)


def _input_gradient_of_strides(dy, w, *, shape, stride, pads):
  """The same for other strides.

  (And for one, but of a 1x1 kernel XLA transposes six axes slowly.)

  A convolution of stride one that gives all `stride` x `stride` pixels which an
  output begins with at once. Row i of the kernel is what output r multiplies
  row u = stride r + i - low of the input with. Of zeros before the kernel there
  are so many that stride divides low + zeros; then, with u = stride q + phase,
  row `stride h + phase` of the kernel belongs to output
  q + (low + zeros) / stride - h.
  """
  sizes, zeros, padding = [], [], []
  for (low, _), kernel, length, out in zip(
    pads, w.shape[:2], shape[1:3], dy.shape[1:3], strict=True
  ):
    before = -low % stride
    shift, size = (low + before) // stride, -(-(kernel + before) // stride)
    sizes.append(size)
    zeros.append((before, size * stride - kernel - before))
    padding.append((size - 1 - shift, -(-length // stride) + shift - out))
  w = jnp.pad(w, (*zeros, (0, 0), (0, 0)))
  w = w.reshape(sizes[0], stride, sizes[1], stride, *w.shape[2:])
  w = w[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4)
  w = w.reshape(*sizes, dy.shape[-1], -1)
  dx = convolve(dy, w, stride=1, pads=padding)
  num, height, width, _ = dx.shape
  dx = dx.reshape(num, height, width, stride, stride, -1)
  dx = dx.transpose(0, 1, 3, 2, 4, 5)
  dx = dx.reshape(num, height * stride, width * stride, -1)
  return dx[:, : shape[1], : shape[2]]


def _kernel_gradient(x, dy, shape, *, stride, pads):
  """[N, H, W, C_in], [N, H', W', C_out] -> a kernel of that shape."""
  height, width, inputs, outputs = shape
  seen = _seen(x, (height, width), stride, pads)
  if height == width == 1:  # Then no product is to be transposed.
    return _product(_transposed(seen[0]), dy).reshape(shape)
  dy = _transposed(dy)
  products = [_product(dy, rows) for rows in seen]
  dw = jnp.stack(products).reshape(height, outputs, width, inputs)
  return dw.transpose(0, 2, 3, 1)


def _seen(x, size, stride, pads):
  """What each row of the kernel sees, each [N, H', W', width C_in]."""
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  ends = [
    length - kernel + 1
    for length, kernel in zip(x.shape[1:3], size, strict=True)
  ]
  # Not concatenated, which of bfloat16 takes twice as long.
  x = jnp.stack([x[:, :, j : j + ends[1] : stride] for j in range(size[1])], 3)
  x = x.reshape(*x.shape[:3], -1)
  return [x[:, i : i + ends[0] : stride] for i in range(size[0])]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """As matrices, whose columns are the last axes: float32."""
  a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _transposed(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> [C, N H W], in memory.

  XLA would have a product read a transposed matrix as it lies, and compute that
  in float32. Reshaped it is none.
  """
  return x.transpose(3, 0, 1, 2).reshape(x.shape[-1], -1)
