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

from nfnets.errors import unknown

# An activation, or the parts of it that each group of channels is.
Parts = jax.Array | list[jax.Array]

# Kernel gradients of `products`, by the pixels of the output: from the first
# number on they are products rather than XLA's convolution; from the second on
# image by image, as what a kernel position sees of a whole batch no longer fits
# the processor's cache.
_PIXELS_FOR_PRODUCTS = 400
_PIXELS_FOR_IMAGES = 1024


def conv2d(
  x: Parts,
  w: jax.Array,
  *,
  stride: int = 1,
  groups: int = 1,
  padding: str = "same",
  form: str | None = None,
) -> Parts:
  """2-D convolution.

  Args:
    x: [N, H, W, C_in], or its parts as this returned them.
    w: [height, width, C_in / groups, C_out], dtype of x.
    padding: "same" as TensorFlow pads, or "symmetric" as PyTorch does.
    form: Of FORMS; None: the one that is fast on JAX's default backend.

  Returns:
    [N, ceil(H / stride), ceil(W / stride), C_out]. With groups, `products`
    leaves it in the parts that it computes, [..., C_out / groups] each: what is
    grouped again needs no copies, and `join` puts the others together.

  Raises:
    InputError: for an unknown form.
  """
  if form is None:
    form = "products" if jax.default_backend() == "cpu" else "xla"
  if form not in FORMS:
    raise unknown("form of convolution", form, FORMS)
  return FORMS[form](x, w, stride=stride, groups=groups, padding=padding)


def join(x: Parts) -> jax.Array:
  """The whole activation."""
  return jnp.concatenate(x, axis=-1) if isinstance(x, list) else x


def xla(x, w, *, stride, groups, padding):
  """As XLA has it: one operation, grouped if need be."""
  x = join(x)
  return jax.lax.conv_general_dilated(
    x,
    w,
    window_strides=(stride, stride),
    padding=_pads(x.shape, w.shape, stride, padding),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def split(x, w, *, stride, groups, padding):
  """One dense convolution per group."""
  dense = functools.partial(xla, stride=stride, groups=1, padding=padding)
  return join(_by_group(dense, x, w, groups))


def products(x, w, *, stride, groups, padding):
  """1x1 as a matrix product, others per group, kernel gradients as products."""
  if w.shape[:2] == (1, 1) and groups == 1:
    x = join(x)[:, ::stride, ::stride]
    return (_as_matrix(x) @ w[0, 0]).reshape(*x.shape[:3], w.shape[-1])
  dense = functools.partial(_dense, stride=stride, padding=padding)
  return _by_group(dense, x, w, groups)


def portable(x, w, *, stride, groups, padding):
  """For each platform its own, in a program for several."""
  options = {"stride": stride, "groups": groups, "padding": padding}
  return jax.lax.platform_dependent(
    x,
    w,
    cpu=lambda x, w: join(products(x, w, **options)),
    default=functools.partial(xla, **options),
  )


# Name -> function of (x, w, stride, groups, padding).
FORMS: dict[str, Callable[..., Parts]] = {
  "xla": xla,
  "split": split,
  "products": products,
  "portable": portable,
}


def _by_group(dense: Callable[..., jax.Array], x, w, groups) -> Parts:
  if groups == 1:
    return dense(join(x), w)
  parts = x if isinstance(x, list) else jnp.split(x, groups, axis=-1)
  kernels = jnp.split(w, groups, axis=-1)
  return [dense(a, b) for a, b in zip(parts, kernels, strict=True)]


def _dense(x, w, *, stride, padding):
  """`xla` without groups; its kernel gradient is a sum of products.

  The gradient of the kernel at one of its positions ("tap") is the product of
  what that position sees of the image with the gradient of the output.
  """
  dense = functools.partial(xla, stride=stride, groups=1, padding=padding)

  @jax.custom_vjp
  def convolve(x, w):
    return dense(x, w)

  def forward(x, w):
    return dense(x, w), (x, w)

  def backward(residuals, dy):
    x, w = residuals
    options = {
      "stride": stride,
      "pads": _pads(x.shape, w.shape, stride, padding),
    }
    dx = _input_gradient(dy, w, shape=x.shape, **options)
    by_taps = functools.partial(_kernel_gradient, size=w.shape[:2], **options)
    pixels = dy.shape[1] * dy.shape[2]
    if pixels < _PIXELS_FOR_PRODUCTS:
      dw = _kernel_gradient_as_convolution(x, dy, size=w.shape[:2], **options)
    elif pixels < _PIXELS_FOR_IMAGES:
      dw = by_taps(x, dy)
    else:
      dw = jax.lax.scan(
        lambda dw, one: (dw + by_taps(one[0][None], one[1][None]), None),
        jnp.zeros(w.shape, jnp.float32),
        (x, dy),
      )[0]
    return dx, dw.astype(w.dtype)

  convolve.defvjp(forward, backward)
  return convolve(x, w)


# The two gradients below are those that JAX derives, with operands transposed
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
  """[N, H, W, C_in], [N, H', W', C_out] -> kernel, float32."""
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
    jnp.matmul(dy, _as_matrix(tap), preferred_element_type=jnp.float32)
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
