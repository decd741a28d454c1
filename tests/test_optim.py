"""The optimiser: its groups, its schedule, its average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_json, param_shapes

from nfnets import models, optim
from nfnets.errors import InputError


def test_groups_of_f0_are_the_published_ones():
  params = param_shapes(models.make("nfnet_f0"))
  found = {group.name: [] for group in optim.GROUPS}
  for module, values in params.items():
    for name in values:
      found[optim.group_of(module, name).name].append((module, name))
  assert found["classifier weight"] == [("NFNet/~/linear", "w")]
  weights = found["other weights"]
  assert all(name == "w" for _, name in weights)
  # 57 convolutions (4 stem, 12 x 4 + 4 shortcuts, 1 final), 24 squeeze-excite.
  assert len([m for m, _ in weights if "squeeze_excite" in m]) == 24
  assert len(weights) == 24 + 57
  names = {name for _, name in found["gains and biases"]}
  assert names == {"gain", "bias", "skip_gain", "b"}
  assert ("NFNet/~/linear", "b") in found["gains and biases"]


def test_groups_are_treated_as_the_table_says():
  table = {g.name: (g.clipped, g.decayed) for g in optim.GROUPS}
  assert table == {
    "gains and biases": (True, False),
    "classifier weight": (False, True),
    "other weights": (True, True),
  }


def test_optimizer_clips_and_decays_by_group():
  names = [("net/conv", "w"), ("net/conv", "gain"), ("net/linear", "w")]
  params = {"net/conv": {"w": jnp.ones((4, 4)), "gain": jnp.ones(4)}}
  params["net/linear"] = {"w": jnp.ones((4, 4))}
  grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
  tx = optim.make_optimizer(1.0, momentum=0.0, weight_decay=0.5, clipping=0.01)
  updates, _ = tx.update(grads, tx.init(params), params)
  got = [float(updates[module][name].ravel()[0]) for module, name in names]
  # Clipped units have gradient 0.01 per entry; decay adds 0.5 to weights.
  np.testing.assert_allclose(got, [-(0.01 + 0.5), -0.01, -(100 + 0.5)], 1e-5)


def test_the_floor_of_clipping_is_the_given_one():
  params = {"net/conv": {"w": jnp.ones((4, 4))}}
  grads = jax.tree.map(lambda x: 100 * x, params)
  tx = optim.make_optimizer(
    1.0, momentum=0.0, weight_decay=0.0, clipping=0.01, clipping_eps=10.0
  )
  updates, _ = tx.update(grads, tx.init(params), params)
  # A unit's norm is 2, its gradient's is clipped to 0.01 x 10.
  np.testing.assert_allclose(updates["net/conv"]["w"], -0.05, rtol=1e-5)


def test_decay_and_momentum_are_those_of_optax():
  """Operation by operation to the last bit; compiled, to its rounding."""
  rng = np.random.default_rng(0)
  draw = lambda: {
    name: rng.standard_normal((3, 4), np.float32)
    for name in ("kept", "decayed")
  }
  mask = lambda params: {name: name == "decayed" for name in params}
  theirs = optax.chain(
    optax.add_decayed_weights(0.1, mask=mask), optax.trace(0.9, nesterov=True)
  )
  ours = optim.decayed_nesterov(0.9, 0.1, mask)
  params = draw()
  state, compiled_state = ours.init(params), ours.init(params)
  their_state = theirs.init(params)
  for _ in range(4):
    grads = draw()
    expected, their_state = theirs.update(grads, their_state, params)
    updates, state = ours.update(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    compiled, compiled_state = jax.jit(ours.update)(
      grads, compiled_state, params
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      compiled,
      expected,
    )
    params = optax.apply_updates(params, updates)


def test_state_is_laid_out_as_that_of_optax():
  """Checkpoints of runs that decayed and accumulated with optax are resumed."""
  params = {"net/conv": {"w": jnp.ones((4, 4)), "gain": jnp.ones(4)}}
  by_optax = optax.chain(
    optax.add_decayed_weights(0.1, mask=True),
    optax.trace(0.9, nesterov=True),
    optax.scale_by_learning_rate(lambda step: 0.1),
  )
  state = optim.make_optimizer(lambda step: 0.1, clipping=None).init(params)
  assert jax.tree.structure(state) == jax.tree.structure(by_optax.init(params))


def test_schedule_is_the_published_one():
  schedule = optim.make_schedule(peak=0.2, warmup_steps=2, total_steps=20)
  expected = load_json("train_tiny.json")["lrs"]
  np.testing.assert_allclose(
    [schedule(i) for i in range(6)], expected, rtol=1e-6
  )
  # Falls from the peak to zero, half of it in the middle.
  np.testing.assert_allclose(schedule(11), 0.1, rtol=1e-6)
  np.testing.assert_allclose(schedule(20), 0, atol=1e-8)


def test_schedule_without_warmup_starts_at_the_peak():
  schedule = optim.make_schedule(peak=0.3, warmup_steps=0, total_steps=10)
  np.testing.assert_allclose(schedule(0), 0.3, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 5, 1_000, 10_000_000])
def test_average_warms_up(step):
  average = optim.update_ema(
    {"m": {"w": jnp.zeros(())}},
    {"m": {"w": jnp.ones(())}},
    decay=0.99999,
    step=jnp.int32(step),
  )
  decay = min(0.99999, (1 + step) / (10 + step))
  np.testing.assert_allclose(average["m"]["w"], 1 - decay, rtol=1e-2)


@pytest.mark.parametrize("clipping", [0.01, None])
def test_missing_parameters_are_an_error(clipping):
  params = {"conv": {"w": jnp.ones((3, 3, 4, 8))}}
  tx = optim.make_optimizer(0.1, clipping=clipping)
  with pytest.raises(InputError, match=r"pass the parameters, `update\(grads"):
    tx.update(params, tx.init(params))


def test_an_average_keeps_its_dtype():
  average = {"w": jnp.ones(3, jnp.bfloat16)}
  found = optim.update_ema(average, average, decay=0.9, step=3)
  assert found["w"].dtype == jnp.bfloat16
