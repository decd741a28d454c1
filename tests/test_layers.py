"""Layers: properties of standardisation, equality of convolution forms."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets import layers


def _normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (1, 1, 32, 4), (3, 3, 1, 6)])
def test_standardized_kernels_have_zero_mean_and_squares_of_gain(shape):
  gain = 1 + 0.3 * _normal(shape[-1], seed=1)
  w = layers.standardize(5 + 3 * _normal(*shape), gain)
  np.testing.assert_allclose(jnp.mean(w, (0, 1, 2)), 0, atol=1e-6)
  np.testing.assert_allclose(jnp.sum(w**2, (0, 1, 2)), gain**2, rtol=1e-4)


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


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 4)])
def test_convolution_forms_are_equal(size, stride, padding, kernel, groups):
  x = _normal(2, size, size, 8)
  w = _normal(kernel, kernel, 8 // groups, 12, seed=1)
  options = {"stride": stride, "groups": groups, "padding": padding}

  def value_and_gradients(convolve):
    def total(x, w):
      out = convolve(x, w, **options)
      return jnp.sum(jnp.sin(out)), out

    return jax.grad(total, argnums=(0, 1), has_aux=True)(x, w)

  ours = value_and_gradients(layers.convolve_on_cpu)
  assert ours[1].shape == (2, -(-size // stride), -(-size // stride), 12)
  for other in (layers.convolve, layers.conv2d):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      ours,
      value_and_gradients(other),
    )


def test_convolutions_take_the_form_of_the_platform_they_are_compiled_for():
  x, w = _normal(2, 8, 8, 8), _normal(3, 3, 2, 12, seed=1)
  convolve = jax.jit(lambda x, w: layers.conv2d(x, w, groups=4))
  grouped = "feature_group_count = 4"
  for platform, is_grouped in (("cpu", False), ("cuda", True), ("tpu", True)):
    exported = jax.export.export(convolve, platforms=[platform])(x, w)
    assert (grouped in exported.mlir_module()) == is_grouped, platform


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations_preserve_variance(name):
  x = jnp.linspace(-12, 12, 200_001)
  density = jnp.exp(-(x**2) / 2)
  density /= density.sum()
  y = layers.ACTIVATIONS[name](x)
  mean = jnp.sum(y * density)
  variance = jnp.sum((y - mean) ** 2 * density)
  # The released gains are estimates, up to 0.1 % off (sigmoid's kind).
  np.testing.assert_allclose(variance, 1, rtol=3e-3)


def _apply(function, *args, rng=None):
  network = hk.transform(function)
  params = network.init(jax.random.key(0), *args)
  return network.apply(params, rng, *args)


def test_stochastic_depth_drops_whole_images_and_keeps_the_rest_unscaled():
  x = 1 + jnp.abs(_normal(400, 2, 2, 3))
  drop = lambda x: layers.stochastic_depth(x, 0.25, is_training=True)
  kept = _apply(drop, x, rng=jax.random.key(1)) / x
  per_image = np.asarray(kept).reshape(400, -1)
  assert set(np.unique(per_image)) == {0.0, 1.0}
  assert (per_image == per_image[:, :1]).all()
  assert 0.18 < 1 - per_image[:, 0].mean() < 0.32


def test_stochastic_depth_is_the_identity_in_evaluation():
  x = _normal(4, 2, 2, 3)
  keep = lambda x: layers.stochastic_depth(x, 0.9, is_training=False)
  assert (_apply(keep, x) == x).all()


def test_average_pool_at_odd_edges_is_the_mean_of_what_is_there():
  x = jnp.arange(9.0).reshape(1, 3, 3, 1)
  pooled = layers.average_pool(x)[0, :, :, 0]
  np.testing.assert_allclose(pooled, [[2, 3.5], [6.5, 8]])


def test_squeeze_excite_gates_each_channel_of_each_image():
  x = _normal(2, 4, 4, 8)
  gate = _apply(lambda x: layers.SqueezeExcite(8, 4)(x), x)
  assert gate.shape == (2, 1, 1, 8)
  assert ((gate > 0) & (gate < 1)).all()
