"""The layers that Normalizer-Free Networks are made of.

Shapes: N batch, H height, W width, C channels; images and activations are
[N, H, W, C], kernels [height, width, C_in / groups, C_out] ("HWIO").

Parameters are float32 always. Activations have the dtype of the images that
enter the network (float32 or bfloat16): weights are standardised in float32
and cast afterwards.

Sources: "Characterizing signal propagation" (Brock, De, Smith 2021,
arXiv:2101.08692) for scaled weight standardisation and the gains; "High-
performance large-scale image recognition without normalization" (Brock, De,
Smith, Simonyan 2021, arXiv:2102.06171) for the rest. Where the released
networks differ from the text, the released behaviour is kept, because the
published weights were trained with it.
"""

import functools
import math
from collections.abc import Callable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nfnets import convolution
from nfnets.errors import InputError
from nfnets.initial import Draw

Activation = Callable[[jax.Array], jax.Array]


_GELU_LINEAR = math.sqrt(8 / math.pi)
_GELU_CUBIC = _GELU_LINEAR * 0.044715


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: jax.Array, gain: float = 1.0) -> jax.Array:
  """GELU in its tanh approximation times a gain: gain x s(u), s the sigmoid.

  u = sqrt(8 / pi) (x + 0.044715 x³). Its derivative, gain times
  s + x u' s (1 - s), is written by hand: a gradient keeps x alone, where that
  which JAX derives keeps the hyperbolic tangent too, as large as x. Both are
  computed in float32, and rounded once to the dtype of x.
  """
  y = _at_least_float32(x)
  if jax.default_backend() == "gpu":
    # Fewer instructions there than with a hyperbolic tangent.
    return (y * (gain * _gelu_gate(y))).astype(x.dtype)
  return (jax.nn.gelu(y) * gain).astype(x.dtype)


def _gelu_gate(x: jax.Array) -> jax.Array:
  return jax.nn.sigmoid(x * (_GELU_LINEAR + _GELU_CUBIC * x**2))


@gelu.defjvp
def _gelu_derivative(gain, primals, tangents):
  (x,), (tangent,) = primals, tangents
  y = _at_least_float32(x)
  s = _gelu_gate(y)
  slope = y * (_GELU_LINEAR + 3 * _GELU_CUBIC * y**2)  # x u'
  slope = gain * (s + slope * s * (1 - s))
  return gelu(x, gain), tangent * slope.astype(x.dtype)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Gain of each nonlinearity: the factor that restores unit variance to the
# output for inputs from N(0, 1). These are the released constants, estimated by
# sampling and up to 0.09 % above the exact integrals; the published weights
# expect them. GELU is the tanh approximation.
_GAINS: dict[str, tuple[Activation, float]] = {
  "identity": (lambda x: x, 1.0),
  "celu": (jax.nn.celu, 1.270926833152771),
  "elu": (jax.nn.elu, 1.2716004848480225),
  "gelu": (gelu, 1.7015043497085571),
  # The exact integral, for networks that were trained elsewhere.
  "gelu_exact": (
    functools.partial(jax.nn.gelu, approximate=False),
    1.7015043497085571,
  ),
  "leaky_relu": (jax.nn.leaky_relu, 1.70590341091156),
  "log_sigmoid": (jax.nn.log_sigmoid, 1.9193484783172607),
  "relu": (jax.nn.relu, 1.7139588594436646),
  "relu6": (jax.nn.relu6, 1.7131484746932983),
  "selu": (jax.nn.selu, 1.0008515119552612),
  "sigmoid": (jax.nn.sigmoid, 4.803835391998291),
  "silu": (jax.nn.silu, 1.7881293296813965),
  "soft_sign": (jax.nn.soft_sign, 2.338853120803833),
  "softplus": (jax.nn.softplus, 1.9203323125839233),
  "tanh": (jnp.tanh, 1.5939117670059204),
}


def _with_gain(function: Activation, gain: float) -> Activation:
  """With a gain that is not rounded to the dtype of x; the result is."""
  if function is gelu:  # Its own derivative has the gain inside.
    return lambda x: gelu(x, gain)
  # The function stays in the dtype of x: its gradient keeps half as much then.
  return lambda x: (_at_least_float32(function(x)) * gain).astype(x.dtype)


# Name -> variance-preserving nonlinearity (the gain is inside).
ACTIVATIONS: dict[str, Activation] = {
  name: _with_gain(function, gain) for name, (function, gain) in _GAINS.items()
}


# Name -> its gain alone.
GAINS: dict[str, float] = {name: gain for name, (_, gain) in _GAINS.items()}

# Floor of a kernel's variance times its fan-in.
STANDARDIZE_EPS = 1e-4


@jax.custom_vjp
def standardize(w: jax.Array, gain: jax.Array) -> jax.Array:
  """Scaled weight standardisation (2101.08692 eq. 2 and 3).

  `(w - mean) * gain / sqrt(max(var * fan_in, eps))` with mean and (biased)
  variance over the fan-in of each output channel. `eps`, STANDARDIZE_EPS, is a
  floor, not a summand.

  `var * fan_in` is computed as the sum of squares less that of the mean, which
  reads the kernel once and keeps no copy of it. That loses digits where the
  mean is many times the standard deviation, as it is in no trained kernel: at 3
  times, 10^-6 are lost.

  Args:
    w: kernel [height, width, C_in / groups, C_out], float32.
    gain: [C_out], float32.

  Returns:
    The kernel that is convolved, same shape; each output channel has mean 0 and
    sum of squares gain² (less below the floor). It has no forward-mode
    derivative, as its gradient is written by hand.
  """
  return _standardized(w, gain, *_sums_in_one_pass(w, gain))[0]


def _standardize_forward(w, gain):
  return _standardized(w, gain, *_sums(w))


def _standardized(w, gain, total, total_of_squares):
  """The kernel and what its gradient needs, from the fan-ins' sums [C_out]."""
  size = math.prod(w.shape[:3])
  mean = total / size  # [C_out], as all that follow from it.
  squares = total_of_squares - mean**2 * size
  scale = gain * jax.lax.rsqrt(jnp.maximum(squares, STANDARDIZE_EPS))
  out = (w - _along_channels(mean)) * _along_channels(scale)
  return out, (w, gain, mean, squares)


def _sums(w):
  """Of the fan-ins and of their squares, each [C_out]."""
  return jnp.sum(w, (0, 1, 2)), jnp.sum(w**2, (0, 1, 2))


def _sums_in_one_pass(w, gain):
  """The same for evaluation.

  XLA on CPU makes a pass over the kernel for each sum. One operation with two
  results is one pass, and fast for few summands; what it leaves is a sixteenth.
  It takes longer to compile, so training, where it gains little, does without.
  Of a kernel that is a constant of the program XLA would take it for one too,
  and compute it in minutes; so a zero is added that comes with the gain.
  """
  size, slices = math.prod(w.shape[:3]), 16
  if size % slices or jax.default_backend() != "cpu":
    return _sums(w)
  w = w.reshape(slices, -1) + jnp.where(jnp.isnan(gain[0]), 1.0, 0.0)
  zero = jnp.zeros((), w.dtype)
  sums = jax.lax.reduce((w, w**2), (zero, zero), _add_both, (0,))
  return [jnp.sum(part.reshape(size // slices, -1), 0) for part in sums]


def _add_both(a, b):  # Of the module: JAX compiles anew for a new function.
  return a[0] + b[0], a[1] + b[1]


def _standardize_backward(residuals, grad):
  """By hand: two passes over the kernel, where the derived one takes five.

  With c = w - mean, r = 1 / sqrt(sum c²), g the gradient of the result:
  dgain = r sum(g c), dw = gain r (g - mean(g) - c r² sum(g c)); the last term
  is absent below the floor, where r is constant.
  """
  w, gain, mean, squares = residuals
  sums = jnp.sum(grad, (0, 1, 2))  # [C_out], as all that follow from it.
  product = jnp.sum(grad * w, (0, 1, 2)) - mean * sums
  inverse = jax.lax.rsqrt(jnp.maximum(squares, STANDARDIZE_EPS))
  dgain = product * inverse
  pull = jnp.where(squares > STANDARDIZE_EPS, dgain * inverse, 0)
  shift = sums / math.prod(w.shape[:3]) - mean * pull
  shift, pull, scale = map(_along_channels, (shift, pull, gain * inverse))
  return scale * (grad - shift - w * pull), dgain


standardize.defvjp(_standardize_forward, _standardize_backward)


@jax.custom_batching.custom_vmap
def _where_there(array: jax.Array, x: jax.Array) -> jax.Array:
  first = x[0, 0, 0, 0]
  is_never = jnp.isnan(first) & jnp.isinf(first)
  return jnp.where(is_never, 0, array)


@_where_there.def_vmap
def _where_there_in_batches(_, is_batched, array, x):
  """Not an array for each x: one x is there when all are."""
  of_array, of_x = is_batched
  return _where_there(array, x[0] if of_x else x), of_array


@jax.custom_jvp
def _once_there(array: jax.Array, x: jax.Array) -> jax.Array:
  """The array, as soon as activations x [N, H, W, C] are there.

  XLA on CPU would standardise all kernels, and combine them for Winograd's
  algorithm, before the first convolution, into memory of their own, far from
  when they are used. That it waits for x it must be told by a condition, though
  one that is never met: barriers it removes.
  """
  return _where_there(array, x)


@_once_there.defjvp
def _once_there_derivative(primals, tangents):
  # For the gradient kernels are kept anyway.
  return primals[0], tangents[0]


def folded_kernel(w: np.ndarray, gain: np.ndarray) -> np.ndarray:
  """`standardize` in NumPy, for weights that do not change any more."""
  w, gain = np.asarray(w), np.asarray(gain)
  w = w - w.mean(axis=(0, 1, 2), dtype=np.float64).astype(w.dtype)
  squares = np.sum(np.square(w), axis=(0, 1, 2), dtype=np.float64)
  scale = gain / np.sqrt(np.maximum(squares, STANDARDIZE_EPS))
  return w * scale.astype(w.dtype)


class WSConv2D(hk.Module):
  """Convolution with scaled weight standardisation, a gain and a bias.

  Parameters: `w` [kernel, kernel, C_in / groups, C_out], `gain` [C_out],
  `bias` [C_out]. Folded, `w` is standardised already and there is no `gain`.
  """

  def __init__(
    self,
    output_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: str = "same",
    is_folded: bool = False,
    form: str | None = None,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups
    self.padding = padding
    self.is_folded = is_folded
    self.form = form

  def __call__(
    self, x: jax.Array, after: jax.Array | None = None, square: int = 1
  ) -> jax.Array:
    """[N, H, W, C_in] -> [N, H', W', C_out].

    With `square`, of so many rows and columns as one pixel, which the stride
    makes fewer (`convolution.conv2d`).

    `after`, a rank-4 array, is what a CPU waits for before it standardises the
    kernel in an evaluation, or combines a folded one; None: for x. Where x is
    quickly computed from a result that is in memory (the activation of a
    convolution), that is better: with x in use twice, XLA would compute its
    steps one by one.
    """
    size, channels = self.kernel_size, self.output_channels
    in_channels = x.shape[-1] // square**2
    if in_channels % self.groups or channels % self.groups:
      raise InputError(
        f"{self.name}: a convolution of {in_channels} to {channels} channels "
        f"in {self.groups} groups: groups must divide both numbers of channels"
      )
    shape = (size, size, in_channels // self.groups, channels)
    # Standardisation makes the network insensitive to the scale.
    init = Draw("normal", math.prod(shape[:-1]) ** -0.5)
    w = hk.get_parameter("w", shape, jnp.float32, init)
    awaited = x if after is None else after
    is_waiting = jax.default_backend() == "cpu"
    if not self.is_folded:
      gain = hk.get_parameter("gain", (channels,), jnp.float32, jnp.ones)
      w, gain = (convolution.varying_with(x, a) for a in (w, gain))
      w = standardize(w, _once_there(gain, awaited) if is_waiting else gain)
    elif is_waiting and size > 1 and self.form is None:
      w = _once_there(w, awaited)  # Not in exports, which have a form.
    bias = hk.get_parameter("bias", (channels,), jnp.float32, jnp.zeros)
    out = convolution.conv2d(
      x,
      w,
      stride=self.stride,
      groups=self.groups,
      padding=self.padding,
      square=square,
      form=self.form,
    )
    if square > self.stride:  # The result is squares too.
      bias = jnp.tile(bias, (square // self.stride) ** 2)
    return (out + _along_channels(bias)).astype(x.dtype)


def _along_channels(vector: jax.Array) -> jax.Array:  # [C] -> [1, 1, 1, C]
  return vector[None, None, None]


class SqueezeExcite(hk.Module):
  """Squeeze-and-excitation: a gate in (0, 1) for each channel of an image.

  The hidden layer is a plain ReLU, as in the released networks (the paper's
  text names the scaled nonlinearity). In float32: it is a few vectors.
  """

  def __init__(self, channels: int, hidden: int, name: str | None = None):
    super().__init__(name=name)
    make = lambda inputs, outputs: hk.Linear(
      outputs, w_init=Draw("truncated", inputs**-0.5)
    )
    self.squeeze = make(channels, hidden)
    self.excite = make(hidden, channels)

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C]
    h = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [N, C]
    h = self.excite(jax.nn.relu(self.squeeze(h)))
    return jax.nn.sigmoid(h)[:, None, None]  # [N, 1, 1, C]


class EfficientAttention(hk.Module):
  """ECA (arXiv:1910.03151): each gate sees the means of a few neighbours.

  Parameter: `w` [taps]. In float32.
  """

  def __init__(self, taps: int, name: str | None = None):
    super().__init__(name=name)
    self.taps = taps

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C]
    init = Draw("uniform", self.taps**-0.5)
    w = hk.get_parameter("w", (self.taps,), jnp.float32, init)
    h = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [N, C]
    channels, half = h.shape[-1], self.taps // 2
    h = jnp.pad(h, ((0, 0), (half, half)))
    h = sum(w[i] * h[:, i : i + channels] for i in range(self.taps))
    return jax.nn.sigmoid(h)[:, None, None]  # [N, 1, 1, C]


def stochastic_depth(
  key: jax.Array, keep_rates: Sequence[float], num: int
) -> jax.Array:
  """Which residual branches are kept (1) or dropped (0), one draw per image.

  The survivors are not rescaled by the keep probability, as in the released
  training code.

  Args:
    key: For all blocks together, as generators compile slowly.
    keep_rates: Probability of each block's branch.
    num: Number of images.

  Returns:
    [len(keep_rates), num] float32, to be multiplied with the branches.
  """
  rates = jnp.asarray(keep_rates, jnp.float32)[:, None]
  keep = jax.random.bernoulli(key, rates, (len(keep_rates), num))
  return keep.astype(jnp.float32)


def average_pool(x: jax.Array) -> jax.Array:
  """2x2 mean with stride 2; at odd edges the mean of what is there (SAME)."""
  is_even = x.shape[1] % 2 == x.shape[2] % 2 == 0
  if is_even and jax.default_backend() == "cpu":
    # XLA's own is a loop by itself there, and its gradient a slow one.
    y = _at_least_float32(x)
    rows = y[:, ::2] + y[:, 1::2]
    return ((rows[:, :, ::2] + rows[:, :, 1::2]) / 4).astype(x.dtype)
  if is_even and jax.default_backend() == "gpu":
    # Of what is in memory: XLA would compute it again, from two arrays.
    return _pool_of_even(jax.lax.optimization_barrier(x))
  return _pool(x)


def _pool(x: jax.Array) -> jax.Array:
  return hk.avg_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")


@jax.custom_vjp
def _pool_of_even(x: jax.Array) -> jax.Array:
  """Its gradient is a broadcast, which a GPU does faster than XLA's own."""
  return _pool(x)


def _quarter_to_each(_, dy: jax.Array) -> tuple[jax.Array]:
  num, height, width, channels = dy.shape
  shape = (num, height, 2, width, 2, channels)
  quarters = jnp.broadcast_to((dy / 4)[:, :, None, :, None], shape)
  return (quarters.reshape(num, 2 * height, 2 * width, channels),)


_pool_of_even.defvjp(lambda x: (_pool(x), None), _quarter_to_each)


def max_pool(x: jax.Array, padding: str) -> jax.Array:
  """3x3 maximum with stride 2; `padding` as in `conv2d`."""
  pads = "SAME"
  if padding == "symmetric":
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads
  )


def signal_metrics(x: jax.Array, index: int) -> dict[str, jax.Array]:
  """A signal propagation plot's point (2101.08692 section 3): two scalars.

  The mean over channels of the squared channel mean, and of the channel
  variance, both over batch and space.
  """
  x = x.astype(jnp.float32)
  return {
    f"avg_sq_mean_{index}": jnp.mean(jnp.mean(x, (0, 1, 2)) ** 2),
    f"avg_var_{index}": jnp.mean(jnp.var(x, (0, 1, 2))),
  }
