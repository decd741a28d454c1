"""The papers' optimiser: AGC, weight decay, Nesterov momentum, warm-up cosine.

Every piece is an optax transformation; this file chooses and orders them, and
holds the table of which parameter gets what.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from nfnets import agc
from nfnets.errors import InputError
from nfnets.models.plan import is_classifier


def _is_gain_or_bias(module: str, name: str) -> bool:
  del module
  return name in ("scale", "offset", "b") or "gain" in name or "bias" in name


def _is_in_classifier(module: str, name: str) -> bool:
  del name
  return is_classifier(module)


def _is_any(module: str, name: str) -> bool:
  del module, name
  return True


class Group(NamedTuple):
  """Parameters that the optimiser treats alike."""

  name: str
  matches: Callable[[str, str], bool]  # (module, name of the parameter)
  clipped: bool
  decayed: bool


# The first match counts. As released: the classifier's bias, the
# squeeze-excite layers, all gains and biases are clipped too (2102.06171
# section 4.1 and appendix A; the classifier's weight is better left alone).
GROUPS = (
  Group("gains and biases", _is_gain_or_bias, clipped=True, decayed=False),
  Group("classifier weight", _is_in_classifier, clipped=False, decayed=True),
  Group("other weights", _is_any, clipped=True, decayed=True),
)


def group_of(module: str, name: str) -> Group:
  """The group that a parameter belongs to."""
  return next(group for group in GROUPS if group.matches(module, name))


def make_schedule(
  *, peak: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then a half cosine to 0.

  Step 0 has learning rate 0, as in the released code.
  """
  end = max(total_steps, warmup_steps + 1)
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, end)


def make_optimizer(
  schedule: optax.Schedule | float,
  *,
  momentum: float = 0.9,
  weight_decay: float = 2e-5,
  clipping: float | None = 0.01,
  clipping_eps: float = 1e-3,
  stage_of: Callable[[str], str] | None = None,
  unit_axes: Callable[[hk.Params], Any] | None = None,
  is_frozen: Callable[[str], bool] | None = None,
) -> optax.GradientTransformation:
  """Clip, then decay, then Nesterov momentum, then learning rate.

  Args:
    schedule: Learning rate by step.
    momentum: Nesterov's.
    weight_decay: Coupled: added to the clipped gradient, before momentum.
    clipping: AGC's lambda; None turns AGC off.
    clipping_eps: AGC's floor for weight norms.
    stage_of: Part of the network a module is in, for AGC's statistics.
    unit_axes: Tells which axes of arrays AGC's units extend over.
    is_frozen: Whether a module keeps its weights.
  """

  def in_groups(wanted: Callable[[Group], bool]):
    return lambda params: hk.data_structures.map(
      lambda module, name, _: wanted(group_of(module, name)), params
    )

  chain = []
  if clipping is not None:
    part_of = None
    if stage_of is not None:
      part_of = lambda path: stage_of(path.rpartition("/")[0])
    clip = agc.adaptive_grad_clip(
      clipping, clipping_eps, part_of=part_of, unit_axes=unit_axes
    )
    chain.append(optax.masked(clip, in_groups(lambda group: group.clipped)))
  chain += [
    # Nothing but the place of optax's decay in the state, for checkpoints.
    optax.masked(optax.identity(), True),
    decayed_nesterov(
      momentum, weight_decay, in_groups(lambda group: group.decayed)
    ),
    optax.scale_by_learning_rate(schedule),
  ]
  if is_frozen is not None:
    frozen = lambda params: hk.data_structures.map(
      lambda module, name, _: is_frozen(module), params
    )
    chain.append(optax.masked(optax.set_to_zero(), frozen))
  return optax.chain(*chain)


def decayed_nesterov(
  momentum: float,
  weight_decay: float,
  is_decayed: Callable[[hk.Params], Any],
) -> optax.GradientTransformation:
  """Coupled weight decay, then Nesterov momentum.

  For a gradient g and weights w, d = g + weight_decay * w (d = g where not
  decayed), m <- d + momentum * m, and the update is d + momentum * m. The same
  as `optax.add_decayed_weights` and `optax.trace`, but a pass over memory less
  on CPU: XLA there writes out what two results are computed from, as d is, but
  not what it takes for two things (experiments/speed.md).

  Args:
    momentum: Share of m that is kept.
    weight_decay: Share of w that is added.
    is_decayed: Tells which parameters are decayed, as a tree of bools.

  Returns:
    A transformation whose state is an `optax.TraceState`.
  """

  def update(updates, state, params=None):
    if params is None:
      raise InputError(
        "weight decay needs the weights: pass the parameters, `update(grads, "
        "state, params)`"
      )

    def accumulate(g, w, m, decays):
      d = g + weight_decay * w if decays else g
      return d + momentum * m

    def look_ahead(g, w, m, decays):
      d = g - (-weight_decay) * w if decays else g  # Rounds as above.
      return d + momentum * m

    decays = is_decayed(params)
    m = jax.tree.map(accumulate, updates, params, state.trace, decays)
    updates = jax.tree.map(look_ahead, updates, params, m, decays)
    return updates, optax.TraceState(m)

  return optax.GradientTransformation(optax.trace(momentum).init, update)


def update_ema(
  average: hk.Params, new: hk.Params, *, decay: float, step: jax.Array
) -> hk.Params:
  """Exponential moving average whose decay warms up: (1 + t) / (10 + t).

  `step` counts the updates before this one, from 0.
  """
  step = jnp.asarray(step, jnp.float32)
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  mean = lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype)
  return jax.tree.map(mean, average, new)
