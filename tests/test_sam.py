"""The climb of sharpness-aware minimisation; optax as a second opinion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnets import sam


def _tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {"w": (3, 3, 4, 8), "gain": (8,), "skip_gain": ()}
  return {
    name: np.asarray(rng.standard_normal(shape), np.float32)
    for name, shape in shapes.items()
  }


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_the_climb_is_rho_long_and_along_the_gradient(seed, rho):
  params, gradient = _tree(seed), _tree(seed + 1)
  there = sam.ascend(params, gradient, rho=rho)
  way = jax.tree.map(jnp.subtract, there, params)
  np.testing.assert_allclose(optax.tree.norm(way), rho, rtol=1e-4)
  along = optax.tree.vdot(way, gradient)
  expected = rho * optax.tree.norm(gradient)
  np.testing.assert_allclose(along, expected, rtol=1e-4)


def test_without_a_gradient_it_stays():
  params = _tree(0)
  there = sam.ascend(params, jax.tree.map(jnp.zeros_like, params), rho=0.05)
  jax.tree.map(np.testing.assert_array_equal, there, params)


@pytest.mark.parametrize(
  ("num", "share", "expected"),
  [(32, 0.2, 6), (5, 0.2, 1), (2, 0.2, 1), (8, 1.0, 8)],
)
def test_part_of_a_batch(num, share, expected):
  batch = {"images": np.arange(num * 2).reshape(num, 2), "y": np.arange(num)}
  part = sam.part_of(batch, share)
  np.testing.assert_array_equal(part["images"], batch["images"][:expected])
  np.testing.assert_array_equal(part["y"], np.arange(expected))


def test_descent_from_there_equals_optaxs():
  """Three steps of plain descent on a quadratic with a known gradient."""
  curvature = _tree(5)
  grad_fn = jax.grad(
    lambda params: sum(
      jnp.sum(c**2 * params[name] ** 2) for name, c in curvature.items()
    )
  )
  theirs = optax.contrib.sam(
    optax.sgd(0.01),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    sync_period=2,
    opaque_mode=True,
    reset_state=False,
  )
  params, state = _tree(6), theirs.init(_tree(6))
  ours = params
  for _ in range(3):
    updates, state = theirs.update(
      grad_fn(params), state, params, grad_fn=lambda p, _: grad_fn(p)
    )
    params = optax.apply_updates(params, updates)
    gradient = grad_fn(sam.ascend(ours, grad_fn(ours), rho=0.05))
    ours = jax.tree.map(lambda w, g: w - 0.01 * g, ours, gradient)
  for name in ours:
    np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6)
