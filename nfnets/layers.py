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

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

Activation = Callable[[jax.Array], jax.Array]

# Gain of each nonlinearity: the factor that restores unit variance to the
# output for inputs from N(0, 1). These are the released constants, estimated by
# sampling and up to 0.06 % above the exact integrals; the published weights
# expect them. GELU is the tanh approximation.
_GAINS: dict[str, tuple[Activation, float]] = {
  "identity": (lambda x: x, 1.0),
  "celu": (jax.nn.celu, 1.270926833152771),
  "elu": (jax.nn.elu, 1.2716004848480225),
  "gelu": (jax.nn.gelu, 1.7015043497085571),
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
  return lambda x: function(x) * gain


# Name -> variance-preserving nonlinearity (the gain is inside).
ACTIVATIONS: dict[str, Activation] = {
  name: _with_gain(function, gain) for name, (function, gain) in _GAINS.items()
}


def standardize(w: jax.Array, gain: jax.Array, eps: float = 1e-4) -> jax.Array:
  """Scaled weight standardisation (2101.08692 eq. 2 and 3).

  `(w - mean) * gain / sqrt(max(var * fan_in, eps))` with mean and (biased)
  variance over the fan-in of each output channel. `eps` is a floor, not a
  summand.

  Args:
    w: kernel [height, width, C_in / groups, C_out], float32.
    gain: [C_out], float32.

  Returns:
    The kernel that is convolved, same shape; each output channel has mean 0 and
    sum of squares gain².
  """
  fan_in = np.prod(w.shape[:-1])
  mean = jnp.mean(w, axis=(0, 1, 2), keepdims=True)
  var = jnp.var(w, axis=(0, 1, 2), keepdims=True)
  scale = jax.lax.rsqrt(jnp.maximum(var * fan_in, eps)) * _along_channels(gain)
  return w * scale - mean * scale


def conv2d(
  x: jax.Array, w: jax.Array, *, stride: int = 1, groups: int = 1
) -> jax.Array:
  """2-D convolution with SAME padding, the only place that picks how.

  Every form computes the same sums; which one is fast depends on the backend.
  On CPU XLA's grouped convolution is slow, above all in the gradient, and a
  1x1 convolution is faster as a matrix product. The gradient of NFNet-F0
  (batch 4, 192 px, 2 cores, images/s): as XLA has it 0.70; one dense
  convolution per group 1.51; and 1x1 as a product besides 2.53.

  Args:
    x: [N, H, W, C_in].
    w: [height, width, C_in / groups, C_out], dtype of x.

  Returns:
    [N, ceil(H / stride), ceil(W / stride), C_out].
  """
  if jax.default_backend() != "cpu":
    return _convolve(x, w, stride, groups)
  if w.shape[:2] == (1, 1) and stride == 1 and groups == 1:
    return jnp.einsum("nhwi,io->nhwo", x, w[0, 0])
  if groups == 1:
    return _convolve(x, w, stride, 1)
  parts = zip(
    jnp.split(x, groups, axis=-1), jnp.split(w, groups, axis=-1), strict=True
  )
  return jnp.concatenate([_convolve(a, b, stride, 1) for a, b in parts], -1)


def _convolve(x, w, stride, groups):
  return jax.lax.conv_general_dilated(
    x,
    w,
    window_strides=(stride, stride),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


class WSConv2D(hk.Module):
  """Convolution with scaled weight standardisation, a gain and a bias.

  Parameters: `w` [kernel, kernel, C_in / groups, C_out], `gain` [C_out],
  `bias` [C_out].
  """

  def __init__(
    self,
    output_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C_in]
    size, channels = self.kernel_size, self.output_channels
    w = hk.get_parameter(
      "w",
      (size, size, x.shape[-1] // self.groups, channels),
      jnp.float32,
      # Standardisation makes the network insensitive to this choice.
      hk.initializers.VarianceScaling(1.0, "fan_in", "normal"),
    )
    gain = hk.get_parameter("gain", (channels,), jnp.float32, jnp.ones)
    bias = hk.get_parameter("bias", (channels,), jnp.float32, jnp.zeros)
    w = standardize(w, gain).astype(x.dtype)
    out = conv2d(x, w, stride=self.stride, groups=self.groups)
    return out + _along_channels(bias.astype(x.dtype))  # [N, H', W', C_out]


def _along_channels(vector: jax.Array) -> jax.Array:  # [C] -> [1, 1, 1, C]
  return vector[None, None, None]


class SqueezeExcite(hk.Module):
  """Squeeze-and-excitation: a gate in (0, 1) for each channel of an image.

  The hidden layer is a plain ReLU, as in the released networks (the paper's
  text names the scaled nonlinearity). Computed in float32: it is a few vectors.
  """

  def __init__(self, channels: int, ratio: float, name: str | None = None):
    super().__init__(name=name)
    self.squeeze = hk.Linear(squeeze_width(channels, ratio))
    self.excite = hk.Linear(channels)

  def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C]
    h = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [N, C]
    h = self.excite(jax.nn.relu(self.squeeze(h)))
    return jax.nn.sigmoid(h)[:, None, None].astype(x.dtype)  # [N, 1, 1, C]


def squeeze_width(channels: int, ratio: float) -> int:
  """Hidden width of squeeze-and-excitation."""
  return max(1, int(channels * ratio))


def stochastic_depth(
  x: jax.Array, drop_rate: float, *, is_training: bool
) -> jax.Array:
  """Drops whole residual branches, one draw per image.

  The survivors are not rescaled by the keep probability, as in the released
  training code.
  """
  if not is_training or drop_rate == 0:
    return x
  shape = (x.shape[0], 1, 1, 1)
  keep = jax.random.bernoulli(hk.next_rng_key(), 1 - drop_rate, shape)
  return x * keep.astype(x.dtype)


def average_pool(x: jax.Array) -> jax.Array:
  """2x2 mean with stride 2; at odd edges the mean of what is there (SAME)."""
  return hk.avg_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")


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
