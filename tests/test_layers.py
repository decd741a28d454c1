"""Layers: properties of standardisation, activations and gates."""

import functools
import re

import haiku as hk
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nfnets import layers, models
from nfnets.errors import InputError


def _normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (1, 1, 32, 4), (3, 3, 1, 6)])
def test_standardized_kernels_have_zero_mean_and_squares_of_gain(shape):
  gain = 1 + 0.3 * _normal(shape[-1], seed=1)
  w = layers.standardize(5 + 3 * _normal(*shape), gain)
  np.testing.assert_allclose(jnp.mean(w, (0, 1, 2)), 0, atol=1e-6)
  np.testing.assert_allclose(jnp.sum(w**2, (0, 1, 2)), gain**2, rtol=1e-4)


@pytest.mark.parametrize(
  ("mean", "error"), [(0, 5e-7), (1, 1e-6), (3, 4e-6), (10, 1e-4)]
)
def test_standardization_next_to_double_precision(mean, error):
  w = np.asarray(mean + _normal(3, 3, 128, 32)) / 36
  exact = layers.folded_kernel(w.astype(np.float64), np.ones(32))
  evaluated = layers.standardize(jnp.asarray(w), jnp.ones(32))
  trained, _ = jax.vjp(layers.standardize, jnp.asarray(w), jnp.ones(32))
  for ours in (evaluated, trained):
    assert abs(ours - exact).max() <= error * abs(exact).max()


def test_folding_in_double_precision_is_as_exact():
  w = 3 + np.random.default_rng(0).standard_normal((3, 3, 8, 16))
  folded = layers.folded_kernel(w, np.ones(16))
  assert folded.dtype == np.float64
  np.testing.assert_allclose(folded.mean((0, 1, 2)), 0, atol=1e-15)
  np.testing.assert_allclose(np.sum(folded**2, (0, 1, 2)), 1, rtol=1e-14)


@hypothesis.given(
  size=strategies.sampled_from((1, 3)),
  inputs=strategies.sampled_from((5, 16, 32, 48)),  # 5: no slices of sums.
  outputs=strategies.sampled_from((1, 5)),
  seed=strategies.integers(0, 99),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_kernels_of_evaluation_are_those_of_training(
  size, inputs, outputs, seed
):
  w = _normal(size, size, inputs, outputs, seed=seed)
  gain = _normal(outputs, seed=seed + 1)
  trained, _ = jax.vjp(layers.standardize, w, gain)
  # Sums in another order.
  np.testing.assert_allclose(
    layers.standardize(w, gain), trained, rtol=1e-5, atol=1e-6
  )


def test_outside_of_a_program_each_shape_is_compiled_once(caplog):
  def is_compiled(outputs):
    caplog.clear()
    with jax.log_compiles():
      layers.standardize(_normal(3, 3, 16, outputs), jnp.ones(outputs))
    return "Compiling" in caplog.text

  assert is_compiled(5)
  assert not is_compiled(5)


def test_kernels_that_are_constants_are_not_summed_by_the_compiler():
  """Which takes it minutes; they are where parameters are closed over."""
  w = np.random.default_rng(0).standard_normal((3, 3, 16, 8), np.float32)
  standardize = jax.jit(lambda gain: layers.standardize(w, gain))
  text = standardize.lower(jnp.ones(8)).compile().as_text()
  assert re.search(r"= \(f32\[\d+\]\S*, f32\[\d+\]\S*\) reduce", text)


def test_standardization_has_a_floor_instead_of_a_summand():
  w = _normal(3, 3, 8, 4)
  ones = jnp.ones(4)
  # Above the floor the scale of the kernel does not matter at all ...
  np.testing.assert_allclose(
    layers.standardize(w, ones), layers.standardize(0.1 * w, ones), rtol=1e-4
  )
  # ... below it the kernel is multiplied by 1 / sqrt(eps) = 100.
  tiny = 1e-4 * w
  centred = tiny - jnp.mean(tiny, (0, 1, 2), keepdims=True)
  np.testing.assert_allclose(
    layers.standardize(tiny, ones), 100 * centred, rtol=1e-3, atol=1e-8
  )


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # Above and below the floor.
def test_gradients_of_standardization_are_the_derived_ones(scale):
  w, gain = scale * _normal(3, 3, 8, 16), 1 + 0.3 * _normal(16, seed=1)
  seen = _normal(3, 3, 8, 16, seed=2)

  def plain(w, gain):
    mean = jnp.mean(w, (0, 1, 2), keepdims=True)
    squares = jnp.var(w, (0, 1, 2), keepdims=True) * 72
    inverse = jax.lax.rsqrt(jnp.maximum(squares, layers.STANDARDIZE_EPS))
    return (w - mean) * inverse * gain[None, None, None]

  ours, derived = (
    jax.grad(lambda *args, f=f: jnp.sum(f(*args) * seen), (0, 1))(w, gain)
    for f in (layers.standardize, plain)
  )
  for a, b in zip(ours, derived, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max())


@pytest.mark.parametrize("first", [0.5, np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_leaves_the_others_alone(first):
  x = _normal(2, 4, 4, 8).at[0, 0, 0, 0].set(first)
  outs = _apply(lambda x: layers.WSConv2D(8, 1)(x), x)
  assert np.isfinite(outs[1]).all()
  assert np.isfinite(outs[0, 0, 0]).all() == np.isfinite(first)


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="elsewhere kernels wait for nothing"
)
def test_kernels_are_standardized_once_for_all_images_of_a_vmap():
  x = _normal(5, 2, 4, 4, 8)
  net = hk.without_apply_rng(hk.transform(lambda x: layers.WSConv2D(6, 3)(x)))
  apply = functools.partial(net.apply, net.init(jax.random.key(0), x[0]))
  text = str(jax.make_jaxpr(jax.vmap(apply))(x))
  assert "f32[3,3,8,6]" in text
  assert "f32[5,3,3,8,6]" not in text
  np.testing.assert_allclose(
    jax.vmap(apply)(x),
    apply(x.reshape(10, 4, 4, 8)).reshape(5, 2, 4, 4, 6),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("inputs, outputs", [(7, 8), (8, 7), (1, 2)])
def test_groups_that_do_not_divide_channels_are_told(inputs, outputs):
  convolve = lambda x: layers.WSConv2D(outputs, 3, groups=2, name="conv")(x)
  given = f"conv: a convolution of {inputs} to {outputs} channels in 2 groups"
  with pytest.raises(InputError, match=given):
    _apply(convolve, jnp.zeros((1, 4, 4, inputs)))


def test_evaluation_does_not_hold_all_standardized_kernels_at_once():
  model = models.make("nfnet_f0", depth=(1, 1, 2, 1))
  params, _ = model.shapes()
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  apply = lambda *args: model.apply(args[0], {}, None, args[1])[0]["logits"]
  program = jax.jit(apply).lower(params, images).compile()
  weights = 4 * model.count_params()
  assert program.memory_analysis().temp_size_in_bytes < weights / 4


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations_preserve_variance(name):
  x = jnp.linspace(-12, 12, 200_001)
  density = jnp.exp(-(x**2) / 2)
  density /= density.sum()
  y = layers.ACTIVATIONS[name](x)
  mean = jnp.sum(y * density)
  variance = jnp.sum((y - mean) ** 2 * density)
  # The released gains are estimates, up to 0.09 % off (tanh's).
  np.testing.assert_allclose(variance, 1, rtol=3e-3)


@pytest.mark.parametrize(
  # In bfloat16 half of the last bit of numbers between 1 and 2.
  ("dtype", "error"),
  [(jnp.float32, 4e-6), (jnp.bfloat16, 0.004)],
)
def test_derivatives_of_gelu_next_to_double_precision(dtype, error):
  x = np.concatenate([np.linspace(-9, 9, 20_001), [-1e4, 1e4]])
  x = jnp.asarray(x, dtype)
  slope = jax.vmap(jax.grad(layers.gelu))(x)
  curvature = jax.vmap(jax.grad(jax.grad(layers.gelu)))(x)
  assert slope.dtype == curvature.dtype == dtype

  x = np.asarray(x, np.float64)
  a, c = np.sqrt(2 / np.pi), 0.044715
  u, du, ddu = a * (x + c * x**3), a * (1 + 3 * c * x**2), 6 * a * c * x
  t = np.tanh(u)
  dt = (1 - t**2) * du
  ddt = (1 - t**2) * ddu - 2 * t * dt * du
  exact = 0.5 * (1 + t) + 0.5 * x * dt
  np.testing.assert_allclose(slope.astype(float), exact, atol=error)
  exact = dt + 0.5 * x * ddt
  np.testing.assert_allclose(curvature.astype(float), exact, atol=5 * error)


def test_gelu_in_bfloat16_is_rounded_once():
  gelu = layers.ACTIVATIONS["gelu"]  # With its gain.
  x = jnp.linspace(-9, 9, 20_001, dtype=jnp.bfloat16)
  exact = gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(gelu(x), exact)


@pytest.mark.parametrize(
  "name", ["celu", "elu", "leaky_relu", "relu", "silu", "softplus"]
)
def test_gains_in_bfloat16_are_not_rounded(name):
  """Results are, up or down: on the average nothing is gained or lost."""
  activation = layers.ACTIVATIONS[name]
  x = jnp.linspace(0.5, 3, 20_001, dtype=jnp.bfloat16)
  assert activation(x).dtype == jnp.bfloat16
  exact = np.asarray(activation(x.astype(jnp.float32)), np.float64)
  errors = np.asarray(activation(x), np.float64) / exact - 1
  assert abs(errors).max() < 0.011
  assert abs(errors.mean()) < 4e-4


@pytest.mark.parametrize(
  # Of bfloat16 the last bit: 2^-8 of numbers below 2, each way.
  ("dtype", "error"),
  [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)],
)
@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (2, 7, 8, 3)])
def test_average_pooling_is_haikus(shape, dtype, error):
  x = _normal(*shape).astype(dtype)
  haikus = lambda x: hk.avg_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
  out, back = jax.vjp(haikus, x.astype(jnp.float32))
  ours, our_back = jax.vjp(layers.average_pool, x)
  np.testing.assert_allclose(ours.astype(out.dtype), out, atol=error)
  (dx,), (our_dx,) = back(jnp.cos(out)), our_back(jnp.cos(ours))
  np.testing.assert_allclose(our_dx.astype(dx.dtype), dx, atol=error)


def _apply(function, *args):
  network = hk.transform(function)
  params = network.init(jax.random.key(0), *args)
  return network.apply(params, None, *args)


def test_stochastic_depth_keeps_as_many_branches_as_its_rates_say():
  keep = layers.stochastic_depth(jax.random.key(1), (1.0, 0.75, 0.5), 400)
  assert keep.shape == (3, 400)
  assert set(np.unique(keep)) == {0.0, 1.0}
  np.testing.assert_allclose(keep.mean(1), (1, 0.75, 0.5), atol=0.07)
  assert keep[0].all()


def test_average_pool_at_odd_edges_is_the_mean_of_what_is_there():
  x = jnp.arange(9.0).reshape(1, 3, 3, 1)
  pooled = layers.average_pool(x)[0, :, :, 0]
  np.testing.assert_allclose(pooled, [[2, 3.5], [6.5, 8]])


def test_squeeze_excite_gates_each_channel_of_each_image():
  x = _normal(2, 4, 4, 8)
  gate = _apply(lambda x: layers.SqueezeExcite(8, 4)(x), x)
  assert gate.shape == (2, 1, 1, 8)
  assert ((gate > 0) & (gate < 1)).all()


@pytest.mark.parametrize(
  "make",
  [
    lambda: layers.SqueezeExcite(8, 4),
    lambda: layers.EfficientAttention(3),
  ],
  ids=["se", "eca"],
)
def test_gates_of_bfloat16_are_not_rounded(make):
  x = _normal(2, 4, 4, 8).astype(jnp.bfloat16)
  gate, exact = (
    _apply(lambda x: make()(x), x) for x in (x, x.astype(jnp.float32))
  )
  assert gate.dtype == jnp.float32
  np.testing.assert_array_equal(gate, exact)
