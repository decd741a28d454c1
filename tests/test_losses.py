"""Losses: smoothing sums to one, top-k breaks ties by class."""

import jax
import jax.numpy as jnp
import numpy as np

from nfnets import losses


def test_smoothed_targets_sum_to_one_and_spread_over_all_classes():
  targets = losses.smooth(jax.nn.one_hot(jnp.array([1, 3]), 4), 0.1)
  np.testing.assert_allclose(jnp.sum(targets, -1), 1, rtol=1e-6)
  np.testing.assert_allclose(targets[0], [0.025, 0.925, 0.025, 0.025], 1e-6)


def test_cross_entropy_of_uniform_logits_is_log_of_classes():
  loss = losses.cross_entropy(jnp.zeros((2, 10)), jnp.full((2, 10), 0.1))
  np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)


def test_top_k():
  logits = jnp.array([[0.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
  labels = jnp.array([2, 1])
  assert losses.is_in_top(logits, labels, 1).tolist() == [0, 0]
  assert losses.is_in_top(logits, labels, 2).tolist() == [1, 1]
  assert losses.is_in_top(logits, labels, 9).tolist() == [1, 1]
