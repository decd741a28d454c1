"""Convolution: one function, and the forms that it picks from.

Every form computes the same sums. Which one is fast depends on the platform
that the program is compiled for, so the choice was measured, and the numbers
are in `experiments/speed.md`.

Shapes: N batch, H height, W width, C channels; activations are [N, H, W, C],
kernels [height, width, C_in / groups, C_out] ("HWIO").
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nfnets import rowwise, space_to_depth, winograd
from nfnets.errors import InputError, unknown

# Of `products`: from so many pixels of all images and channels of the input on
# kernel gradients are products rather than XLA's convolution. Images come in
# parts of no more pixels than this, as what is made of more no longer fits the
# processor's cache.
_PIXELS_FOR_PRODUCTS = 1600
_CHANNELS_FOR_PRODUCTS = 16
_PIXELS_OF_A_PART = 2304

# Where `products` takes Winograd's algorithm: from this height on, and from so
# many channels on; where there are pixels enough for products, fewer.
_HEIGHT_FOR_WINOGRAD = 12
_HEIGHT_FOR_WINOGRADS_GRADIENTS = 8
_CHANNELS_FOR_WINOGRAD = 64
_CHANNELS_OF_MANY_PIXELS = 16

# Of `cudnn`: of so many channels, and fewer, each 2 x 2 pixels become one.
_FEW_CHANNELS = 4


def conv2d(
  x: jax.Array,
  w: jax.Array,
  *,
  stride: int = 1,
  groups: int = 1,
  padding: str = "same",
  square: int = 1,
  form: str | None = None,
) -> jax.Array:
  """2-D convolution.

  Args:
    x: [N, H, W, C_in].
    w: [height, width, C_in / groups, C_out], dtype of x or float32. The
      gradient of a float32 kernel is not rounded by `products`; other forms
      round it to the dtype of x.
    padding: "same" as TensorFlow pads, or "symmetric" as PyTorch does.
    square: Rows and columns that are one pixel in x, of as many channels more,
      and `square / stride` in the result (`space_to_depth`). Where it is not 1
      there are no groups, and form does not count.
    form: Of FORMS; None: the one that is fast on JAX's default backend.

  Returns:
    [N, ceil(H / stride), ceil(W / stride), C_out], dtype of x.

  Raises:
    InputError: for an unknown form, and channels that groups do not divide.
  """
  if square > 1:
    num, height, width, _ = x.shape
    pixels = (num, height * square, width * square, w.shape[2])
    pads = _pads(pixels, w.shape, stride, padding)
    return space_to_depth.convolve(
      x, w, square=square, stride=stride, pads=pads
    )
  if form is None:
    form = _OF_BACKENDS.get(jax.default_backend(), "xla")
  if form not in FORMS:
    raise unknown("form of convolution", form, FORMS)
  if x.shape[-1] != groups * w.shape[2] or w.shape[3] % groups:
    raise InputError(
      f"convolution of {x.shape[-1]} channels in {groups} groups with a kernel "
      f"{w.shape}: it must be [height, width, channels / groups, a multiple of "
      "groups]"
    )
  return FORMS[form](x, w, stride=stride, groups=groups, padding=padding)


def xla(x, w, *, stride, groups, padding):
  """As XLA has it: one operation, grouped if need be."""
  return jax.lax.conv_general_dilated(
    x,
    w.astype(x.dtype),
    window_strides=(stride, stride),
    padding=_pads(x.shape, w.shape, stride, padding),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def cudnn(x, w, *, stride, groups, padding):
  """As XLA has it, but for images of few channels at stride two.

  cuDNN takes channels by eights, and is slow to make three into eight. So each
  2 x 2 pixels become one of four times as many channels, and channels of zeros
  make these a multiple; the kernel, enlarged to 4 x 4 by zeros, likewise, and
  moves over them at stride one. (So a pixel that is not finite makes NaN of
  neighbours that it does not belong to.)
  """
  channels = x.shape[-1]
  pads = _pads(x.shape, w.shape, stride, padding)
  is_halved = pads == [(0, 1), (0, 1)] and w.shape[:2] == (3, 3) and stride == 2
  if channels > _FEW_CHANNELS or groups > 1 or not is_halved:
    return xla(x, w, stride=stride, groups=groups, padding=padding)
  more = -4 * channels % 8
  x = space_to_depth.squares(x, 2)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
  w, _ = space_to_depth.kernel(w, square=2, stride=2, pads=pads)
  w = jnp.pad(w, ((0, 0), (0, 0), (0, more), (0, 0)))
  return xla(x, w, stride=1, groups=1, padding="same")


def split(x, w, *, stride, groups, padding):
  """One dense convolution per group."""
  dense = functools.partial(xla, stride=stride, groups=1, padding=padding)
  outs = map(dense, jnp.split(x, groups, -1), jnp.split(w, groups, -1))
  return jnp.concatenate(list(outs), -1)


def products(x, w, *, stride, groups, padding):
  """1x1 as a product, others group by group, with fast ways to gradients.

  bfloat16 is multiplied as float32 where that is faster.
  """
  options = {"stride": stride, "groups": groups, "padding": padding}
  if isinstance(x.shape[0], int) and x.shape[0] == 0:  # No images, no parts.
    return xla(x, w, **options)
  is_bfloat16 = x.dtype == jnp.bfloat16
  if is_bfloat16 and not rowwise.is_fast():
    x, w = (a.astype(jnp.float32) for a in (x, w))
    return products(x, w, **options).astype(jnp.bfloat16)
  if w.shape[:2] == (1, 1) and groups == 1 and not is_bfloat16:
    x = x[:, ::stride, ::stride]
    out = _as_matrix(x) @ w[0, 0].astype(x.dtype)
    return out.reshape(*x.shape[:3], w.shape[-1])
  return _by_group(x, varying_with(x, w), **options)


def portable(x, w, *, stride, groups, padding):
  """For each platform its own, in a program for several."""
  options = {"stride": stride, "groups": groups, "padding": padding}
  return jax.lax.platform_dependent(
    x,
    w,
    cpu=functools.partial(products, **options),
    cuda=functools.partial(cudnn, **options),
    default=functools.partial(xla, **options),
  )


# Name -> function of (x, w, stride, groups, padding).
FORMS: dict[str, Callable[..., jax.Array]] = {
  "xla": xla,
  "cudnn": cudnn,
  "split": split,
  "products": products,
  "portable": portable,
}
# Elsewhere XLA's own.
_OF_BACKENDS = {"cpu": "products", "gpu": "cudnn"}


@functools.partial(jax.jit, static_argnames=("stride", "groups", "padding"))
def _by_group(x, w, *, stride, groups, padding):
  """A dense convolution for each group, one after the other."""
  kernel = (*w.shape[:3], w.shape[3] // groups)
  run = functools.partial(xla, stride=stride, groups=1, padding=padding)
  pads = _pads(x.shape, kernel, stride, padding)
  gradients = functools.partial(_gradients, stride=stride, pads=pads)
  prepare, dtype = lambda w: w, w.dtype
  if x.dtype == jnp.bfloat16:
    options = {"stride": stride, "pads": pads}
    run = functools.partial(rowwise.convolve, **options)
    gradients = functools.partial(rowwise.gradients, **options)
  elif _is_for_winograd(x, kernel, stride):
    height = x.shape[1]
    if height >= _HEIGHT_FOR_WINOGRAD:
      run, prepare = _in_parts(winograd.convolve), winograd.kernel_positions
    if height >= _HEIGHT_FOR_WINOGRADS_GRADIENTS:
      gradients = _gradients_in_parts(winograd.gradients)

  @jax.custom_vjp
  def convolve(x, w):
    w = prepare(w.astype(x.dtype))
    return _each_group(groups, run, x, w).astype(x.dtype)

  def forward(x, w):
    return convolve(x, w), (x, w.astype(x.dtype))

  def backward(residuals, dy):
    dx, dw = _each_group(groups, gradients, *residuals, dy)
    return dx.astype(dy.dtype), dw.astype(dtype)

  convolve.defvjp(forward, backward)
  return convolve(x, w)


def _is_for_winograd(x, kernel: tuple[int, ...], stride: int) -> bool:
  """Whether it is faster where images are high enough."""
  are_many = _num_pixels(x) >= _PIXELS_FOR_PRODUCTS
  channels = _CHANNELS_OF_MANY_PIXELS if are_many else _CHANNELS_FOR_WINOGRAD
  return (
    x.dtype == jnp.float32  # Of fewer bits it would lose digits.
    and kernel[:2] == (3, 3)
    and stride == 1
    and min(kernel[2:]) >= channels
  )


def _each_group(
  groups: int, function: Callable[..., Any], *arrays: jax.Array
) -> Any:
  """A function of each group of the last axis, in a loop: compiled once.

  What it returns, one array or several, is put together along the last axis;
  one that is like the first array takes its memory.
  """
  if groups == 1:
    return function(*arrays)

  cut = lambda array, i: _cut(array, i, array.shape[-1] // groups, axis=-1)
  parts = [cut(array, 0) for array in arrays]
  results = jax.eval_shape(function, *parts)
  is_in_place = _is_like(results, parts[0])

  def step(i, wholes):
    operands = (wholes, *arrays[1:]) if is_in_place else arrays
    results = function(*(cut(array, i) for array in operands))
    put = lambda whole, result: _put(whole, result, i, axis=-1)
    return jax.tree.map(put, wholes, results)

  make = lambda s: _to_overwrite(
    (*s.shape[:-1], s.shape[-1] * groups), s.dtype, arrays[-1]
  )
  wholes = arrays[0] if is_in_place else jax.tree.map(make, results)
  return jax.lax.fori_loop(0, groups, step, wholes)


def _is_like(result: Any, part: jax.Array) -> bool:
  """Whether it is one array that a loop can write over what it is made of."""
  like = jax.ShapeDtypeStruct(part.shape, part.dtype)
  return isinstance(result, jax.ShapeDtypeStruct) and result == like


def _cut(x: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
  """The ith part of that size."""
  return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put(x: jax.Array, part: jax.Array, i: jax.Array, axis: int) -> jax.Array:
  """With its ith part replaced."""
  start = i * part.shape[axis]
  return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)


def _to_overwrite(
  shape: tuple[Any, ...], dtype: Any, source: jax.Array
) -> jax.Array:
  """An array that a loop overwrites, filled with a number of `source`.

  All zeros of a shape XLA would make one constant, and copy it for each loop
  when the program starts: held in memory until the loop begins.
  """
  number = jax.lax.slice(source, (0,) * source.ndim, (1,) * source.ndim)
  return jnp.broadcast_to(number.reshape(()).astype(dtype), shape)


def varying_with(x: jax.Array, w: jax.Array) -> jax.Array:
  """A parameter, as varying between devices as images are in a `shard_map`.

  Loops and hand-written gradients want that; its gradient is then summed.
  """
  of_x, of_w = (jax.typeof(a).manual_axis_type.varying for a in (x, w))
  axes = of_x - of_w
  return jax.lax.pcast(w, tuple(axes), to="varying") if axes else w


def _num_pixels(x: jax.Array) -> int:
  """Of [N, H, W, C]; of one image, where N is any number, as in an export."""
  num, height, width = x.shape[:3]
  return height * width * (num if isinstance(num, int) else 1)


def _images_of_a_part(x: jax.Array) -> int:
  """How many of [N, H, W, C] are computed at once: a divisor of N."""
  num, height, width = x.shape[:3]
  most = max(1, _PIXELS_OF_A_PART // (height * width))
  if not isinstance(num, int):  # Any number.
    return num if most > 1 else 1
  return max(n for n in range(1, most + 1) if num % n == 0)


def _in_parts(run):
  """The same function of images and a kernel, some images at a time.

  What is like the images takes their memory.
  """

  def in_parts(x, w):
    size = _images_of_a_part(x)
    if size == x.shape[0]:
      return run(x, w)

    part = _cut(x, 0, size, axis=0)
    result = jax.eval_shape(run, part, w)
    is_in_place = _is_like(result, part)

    def step(i, out):
      images = _cut(out if is_in_place else x, i, size, axis=0)
      return _put(out, run(images, w), i, axis=0)

    shape = (x.shape[0], *result.shape[1:])
    out = x if is_in_place else _to_overwrite(shape, result.dtype, x)
    return jax.lax.fori_loop(0, x.shape[0] // size, step, out)

  return in_parts


def _gradients_in_parts(gradients):
  """The same function of images, a kernel and dy, some images at a time."""

  def in_parts(x, w, dy):
    size = _images_of_a_part(dy)
    if size == x.shape[0]:
      return gradients(x, w, dy)

    def step(i, carry):
      dx, dw = carry
      part, of_part = (_cut(a, i, size, axis=0) for a in (x, dy))
      dx_of_part, dw_of_part = gradients(part, w, of_part)
      return _put(dx, dx_of_part, i, axis=0), dw + dw_of_part

    dx = _to_overwrite(x.shape, dy.dtype, dy)
    dw = varying_with(dy, jnp.zeros(w.shape, _dtype_of_sums(dy)))
    return jax.lax.fori_loop(0, x.shape[0] // size, step, (dx, dw))

  return in_parts


def _gradients(x, w, dy, *, stride, pads):
  """Of a dense convolution's operands, for that of its output."""
  options = {"stride": stride, "pads": pads}
  are_many = _num_pixels(dy) >= _PIXELS_FOR_PRODUCTS
  are_products = are_many and x.shape[-1] >= _CHANNELS_FOR_PRODUCTS
  of_kernel = (
    _kernel_gradient if are_products else _kernel_gradient_as_convolution
  )

  def gradients(x, w, dy):
    dx = _input_gradient(dy, w, shape=x.shape, **options)
    return dx, of_kernel(x, dy, size=w.shape[:2], **options)

  if are_products:
    gradients = _gradients_in_parts(gradients)
  return gradients(x, w, dy)


# The gradients below are those that JAX derives, with operands transposed
# beforehand. XLA on CPU does that to the derived ones too, but outside of loops
# alone: inside of one they took a path up to fifty times as slow.


def _input_gradient(dy, w, *, shape, stride, pads):
  """[N, H', W', C_out], kernel -> [N, H, W, C_in] of that shape."""
  pads = [
    (size - 1 - low, length + low - (out - 1) * stride - 1)
    for (low, _), size, out, length in zip(
      pads, w.shape[:2], dy.shape[1:3], shape[1:3], strict=True
    )
  ]
  return jax.lax.conv_general_dilated(
    dy,
    w[::-1, ::-1].transpose(0, 1, 3, 2),  # [height, width, C_out, C_in]
    window_strides=(1, 1),
    padding=pads,
    lhs_dilation=(stride, stride),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _kernel_gradient(x, dy, *, size, stride, pads):
  """[N, H, W, C_in], [N, H', W', C_out] -> kernel, float32 or wider.

  At one of the kernel's positions ("tap") it is the product of what that
  position sees of the images with the gradient of the output.
  """
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  num, height, width = dy.shape[:3]
  taps = [
    jax.lax.slice(
      x,
      (0, i, j, 0),
      (
        num,
        i + (height - 1) * stride + 1,
        j + (width - 1) * stride + 1,
        x.shape[-1],
      ),
      (1, stride, stride, 1),
    )
    for i in range(size[0])
    for j in range(size[1])
  ]
  # Transposed once, before the products: inside them it takes longer. Without
  # the barrier XLA would make it a part of them again.
  dy = jax.lax.optimization_barrier(_as_matrix(dy).T)  # [C_out, N H' W']
  products = [
    jnp.matmul(dy, _as_matrix(tap), preferred_element_type=_dtype_of_sums(dy))
    for tap in taps
  ]  # [C_out, C_in] each
  dw = jnp.stack(products).transpose(0, 2, 1)
  return dw.reshape(*size, *dw.shape[1:])


def _kernel_gradient_as_convolution(x, dy, *, size, stride, pads):
  """The same with images in the place of channels, as one convolution."""
  pads = [
    (low, kernel + (out - 1) * stride - length - low)
    for (low, _), kernel, out, length in zip(
      pads, size, dy.shape[1:3], x.shape[1:3], strict=True
    )
  ]
  dw = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),  # [C_in, H, W, N]
    dy.transpose(1, 2, 0, 3),  # [H', W', N, C_out]
    window_strides=(1, 1),
    padding=pads,
    rhs_dilation=(stride, stride),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return dw.transpose(1, 2, 0, 3)


def _dtype_of_sums(x: jax.Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def _as_matrix(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> [N H W, C].

  Products are written with two dimensions: for more XLA would transpose an
  operand first, in a slow loop of its own.
  """
  return x.reshape(-1, x.shape[-1])


def _pads(
  shape: tuple[Any, ...], kernel: tuple[int, ...], stride: int, padding: str
) -> list[tuple[int, int]]:
  """Rows and columns of zeros before and after."""
  if padding == "symmetric":
    return [(size // 2, size // 2) for size in kernel[:2]]
  return jax.lax.padtype_to_pads(
    shape[1:3], kernel[:2], (stride, stride), "SAME"
  )
