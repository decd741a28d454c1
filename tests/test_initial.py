"""Initial weights: their distributions, drawn one by one and together."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

from nfnets import initial, models

SHAPE = (300, 200)
# Standard deviation and bound of each distribution at scale 1.
EXPECTED = {
  "normal": (1.0, np.inf),
  "truncated": (0.8796, 2.0),
  "uniform": (3**-0.5, 1.0),
}


def _draws(init):
  """A network's initial weights under two seeds."""
  images = jnp.zeros((1, 32, 32, 3))
  return [jax.jit(init)(jax.random.key(seed), images)[0] for seed in (0, 1)]


@pytest.mark.parametrize("name", initial.DISTRIBUTIONS)
def test_a_draw_has_its_distribution_alone_and_together(name):
  def function(x):
    draw = initial.Draw(name, 0.5)
    first = hk.get_parameter("first", SHAPE, jnp.float32, draw)
    second = hk.get_parameter("second", SHAPE, jnp.float32, draw)
    return x + jnp.mean(first) + jnp.mean(second)

  std, bound = EXPECTED[name]
  alone = hk.transform_with_state(function).init
  for init in (alone, initial.drawn_together(function)):
    params, state = init(jax.random.key(0), 0.0)
    assert state == {}
    first, second = (params["~"][leaf] for leaf in ("first", "second"))
    for leaf in (first, second):
      assert leaf.shape == SHAPE
      np.testing.assert_allclose(np.std(leaf), 0.5 * std, rtol=0.02)
      assert abs(np.mean(leaf)) < 0.01
      assert np.max(np.abs(leaf)) <= 0.5 * bound
    correlation = np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]
    assert abs(correlation) < 0.02


@pytest.mark.parametrize(
  "name", [pytest.param("nfnet_f0", marks=pytest.mark.slow), "eca_nfnet_l0"]
)
def test_a_network_is_drawn_as_by_haiku(name):
  """Every array: its shape, its deviation, constants to the bit."""
  overrides = {k: v for k, v in SMALL.items() if k != "stem_width"}
  model = models.make(name, num_classes=10, **overrides)
  plain = hk.transform_with_state(
    lambda x: models.Network(model.plan, model.num_classes, model.execution)(
      x, is_training=False
    )
  )
  ours, others = _draws(model.init)
  theirs, _ = _draws(plain.init)
  assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
  for module, values in ours.items():
    for leaf, value in values.items():
      expected = theirs[module][leaf]
      if not np.any(expected) or np.all(expected == 1):
        np.testing.assert_array_equal(value, expected)
        continue
      assert np.any(value != others[module][leaf])  # The seed matters.
      if value.size >= 64:
        spread = 4 / np.sqrt(value.size)  # Some four standard errors.
        np.testing.assert_allclose(np.std(value), np.std(expected), rtol=spread)


def test_first_weights_have_the_published_deviations():
  model = models.make("nfnet_tiny", 100, **SMALL)
  x = jnp.zeros((1, 32, 32, 3))
  params, _ = jax.jit(model.init)(jax.random.key(0), x)
  for module, fan_in in (
    ("final_conv", 32),
    ("nf_block_1/~/conv1", 72),
  ):
    w = params[f"NFNet/~/{module}"]["w"]
    np.testing.assert_allclose(np.std(w), fan_in**-0.5, rtol=0.1)
  np.testing.assert_allclose(
    np.std(params["NFNet/~/linear"]["w"]), 0.01, rtol=0.1
  )
  regnet = models.make("nf_regnet_b0", 10, depth=(1, 1), width=(16, 32))
  params, _ = jax.jit(regnet.init)(jax.random.key(0), x)
  assert not np.any(params["NF_RegNet/~/linear"]["w"])


def test_distributions_do_not_share_their_draws():
  def function(x):
    for name in initial.DISTRIBUTIONS:
      draw = initial.Draw(name, 1.0)
      x += jnp.mean(hk.get_parameter(name, SHAPE, jnp.float32, draw))
    return x

  params, _ = initial.drawn_together(function)(jax.random.key(0), 0.0)
  drawn = [np.ravel(value) for value in params["~"].values()]
  assert len(drawn) == 3
  np.testing.assert_allclose(np.corrcoef(drawn), np.eye(3), atol=0.02)
