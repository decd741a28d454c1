"""AGC: equal to optax bit for bit, its bound, its identity, its statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets import agc
from nfnets.errors import InputError

SHAPES = {
  "conv": (3, 3, 8, 16),
  "grouped": (3, 3, 2, 16),
  "depthwise": (3, 3, 1, 16),
  "pointwise": (1, 1, 8, 16),
  "gain_4d": (1, 1, 1, 16),
  "squeeze_4d": (1, 1, 16, 1),
  "linear": (8, 16),
  "one_output": (8, 1),
  "one_input": (1, 16),
  "rank3": (4, 8, 16),
  "rank5": (2, 3, 3, 8, 16),
  "vector": (16,),
  "scalar": (),
}


def _tree(seed, scale):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
    for name, shape in SHAPES.items()
  }


@pytest.mark.parametrize("grad_scale", [1.0, 1e-2, 1e-4, 1e-9, 0.0])
@pytest.mark.parametrize("param_scale", [1.0, 0.0])
def test_updates_are_those_of_optax(grad_scale, param_scale):
  params, grads = _tree(0, param_scale), _tree(1, grad_scale)

  def clip(make, transform):
    tx = make(0.01, eps=1e-3)
    return transform(tx.update)(grads, tx.init(params), params)[0]

  plain = lambda function: function
  ours = clip(agc.adaptive_grad_clip, plain)
  theirs = clip(optax.adaptive_grad_clip, plain)
  compiled = clip(agc.adaptive_grad_clip, jax.jit)
  for name in SHAPES:
    assert ours[name].shape == SHAPES[name]
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    # XLA reassociates by what it fuses, in optax's form too: a few roundings.
    np.testing.assert_allclose(
      compiled[name], theirs[name], rtol=1e-6, err_msg=name
    )


def test_parameters_may_be_in_any_tree():
  class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array

  tree = lambda seed, scale: [
    Layer(_tree(seed, scale)["linear"], _tree(seed, scale)["vector"])
  ]
  params, grads = tree(0, 1.0), tree(1, 1.0)
  ours, theirs = (
    tx.update(grads, tx.init(params), params)[0]
    for tx in (agc.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01))
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_stacked_parameters_are_clipped_one_by_one():
  pairs = [(_tree(i, 0.5), _tree(i + 10, 0.05)) for i in range(3)]
  shapes = {k: v.shape for k, v in pairs[0][0].items()}
  stack = lambda *leaves: jnp.stack(leaves)
  params, grads = (
    jax.tree.map(stack, *trees) for trees in zip(*pairs, strict=True)
  )

  def axes_of(name, value):
    if value.ndim == len(shapes[name]):
      return None
    return tuple(axis + 1 for axis in agc.unit_axes(shapes[name]))

  unit_axes = lambda tree: {k: axes_of(k, value) for k, value in tree.items()}
  tx = agc.adaptive_grad_clip(0.1, unit_axes=unit_axes)
  found, state = tx.update(grads, tx.init(params), params)
  singly = [tx.update(g, tx.init(p), p) for p, g in pairs]
  jax.tree.map(
    lambda a, *b: np.testing.assert_allclose(a, jnp.stack(b), rtol=1e-6),
    found,
    *[updates for updates, _ in singly],
  )
  shares = [one.statistics["all"].clipped for _, one in singly]
  clipped = state.statistics["all"].clipped
  assert 0 < clipped < 1
  np.testing.assert_allclose(clipped, np.mean(shares), rtol=1e-6)


def test_complex_updates_are_those_of_optax():
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(
    rng.standard_normal((8, 4)) + 1j * rng.standard_normal((8, 4)),
    jnp.complex64,
  )
  params, grads = draw(), draw()
  ours = agc.adaptive_grad_clip(0.01)
  theirs = optax.adaptive_grad_clip(0.01)
  np.testing.assert_array_equal(
    ours.update(grads, ours.init({}), params)[0],
    theirs.update(grads, theirs.init(params), params)[0],
  )


@pytest.mark.parametrize("clipping", [0.01, 0.16])
def test_no_unit_exceeds_its_bound(clipping):
  params, grads = _tree(0, 0.5), _tree(1, 2.0)
  tx = agc.adaptive_grad_clip(clipping, eps=1e-3)
  clipped, _ = tx.update(grads, tx.init(params), params)
  for name in SHAPES:
    bound = clipping * jnp.maximum(agc.unitwise_norm(params[name]), 1e-3)
    excess = agc.unitwise_norm(clipped[name]) / bound
    assert float(jnp.max(excess)) <= 1 + 1e-5, name
    # The direction stays: a unit is multiplied by one number of (0, 1].
    factor = clipped[name] / grads[name]
    by_norm = agc.unitwise_norm(clipped[name]) / agc.unitwise_norm(grads[name])
    np.testing.assert_allclose(
      factor, jnp.broadcast_to(by_norm, factor.shape), rtol=1e-5
    )
    assert 0 < float(jnp.min(factor)) <= float(jnp.max(factor)) <= 1


def test_gradients_below_the_bound_pass_unchanged():
  params, grads = _tree(0, 1.0), _tree(1, 1e-6)
  tx = agc.adaptive_grad_clip(0.01)
  clipped, state = tx.update(grads, tx.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, clipped, grads)
  assert float(state.statistics["all"].clipped) == 0


def test_statistics_count_units_by_part():
  # Four units of norm 1 with gradients of norm 0.5, 0.05, 0.005, 0.0005, and a
  # vector at zero (one unit) whose norm counts as eps.
  params = {"a/w": {"w": jnp.eye(4)}, "b": {"bias": jnp.zeros(3)}}
  grads = {
    "a/w": {"w": jnp.diag(jnp.array([0.5, 0.05, 0.005, 0.0005]))},
    "b": {"bias": jnp.array([0.0, 0.0, 2e-6])},
  }
  tx = agc.adaptive_grad_clip(0.01, 1e-3, part_of=lambda path: path[0])
  state = tx.init(params)
  assert set(state.statistics) == {"a", "b", "all"}
  _, state = tx.update(grads, state, params)
  a, b, everything = (state.statistics[k] for k in ("a", "b", "all"))
  np.testing.assert_allclose(a.clipped, 2 / 4)
  np.testing.assert_allclose(a.max_ratio, 0.5)
  np.testing.assert_allclose(b.clipped, 0)
  np.testing.assert_allclose(b.max_ratio, 2e-3, rtol=1e-6)
  np.testing.assert_allclose(everything.clipped, 2 / 5)
  np.testing.assert_allclose(everything.max_ratio, 0.5)


def test_masked_leaves_are_left_out_of_updates_and_statistics():
  params = {"a": {"w": jnp.eye(4)}, "b": {"w": jnp.eye(4)}}
  grads = jax.tree.map(jnp.ones_like, params)
  mask = {"a": {"w": True}, "b": {"w": False}}
  tx = optax.masked(agc.adaptive_grad_clip(0.01), mask)
  updates, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(updates["b"]["w"], grads["b"]["w"])
  assert float(jnp.max(updates["a"]["w"])) < 0.01
  assert float(agc.find_state(state).statistics["all"].clipped) == 1


def test_missing_parameters_are_an_error():
  tx = agc.adaptive_grad_clip()
  with pytest.raises(InputError, match=r"pass the parameters, `update\(grads"):
    tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))


def test_rank_six_is_an_error():
  with pytest.raises(InputError, match=r"shape \(2, 2, 2, 2, 2, 2\)"):
    agc.unitwise_norm(jnp.ones((2,) * 6))


def test_the_state_can_be_donated():
  params = _tree(0, 1.0)
  tx = optax.apply_if_finite(agc.adaptive_grad_clip(), 3)
  update = jax.jit(tx.update, donate_argnums=1)
  updates, _ = update(params, tx.init(params), params)
  assert updates["conv"].shape == params["conv"].shape


def test_arrays_of_no_size_are_left_alone():
  params = {"none": jnp.zeros((3, 0)), "bias": jnp.ones(4)}
  tx = agc.adaptive_grad_clip(part_of=lambda path: path)
  updates, state = tx.update(params, tx.init(params), params)
  assert updates["none"].shape == (3, 0)
  assert state.statistics["none"] == (0, 0)
  assert state.statistics["all"].clipped == 1
