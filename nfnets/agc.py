"""Adaptive gradient clipping (arXiv:2102.06171, section 4.1, equation 3).

A unit is one output channel or feature: the part of a parameter that produces
one number per position. Its gradient G is rescaled when it is large against
its weights W; where |G| / max(|W|, eps) > clipping,

    G <- G * clipping * max(|W|, eps) / |G|
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfnets.errors import InputError

# Guards the division alone, as in the released code.
_DIVISION_EPS = 1e-6


class Statistics(NamedTuple):
  """What AGC did to one set of parameters in one step; float32 scalars."""

  clipped: jax.Array  # Fraction of units whose gradient was scaled down.
  max_ratio: jax.Array  # Largest |G| / max(|W|, eps) before clipping.


class AGCState(NamedTuple):
  """Statistics of the last update, by part of the network and for `all`."""

  statistics: dict[str, Statistics]


Axes = tuple[int, ...]


def unit_axes(shape: tuple[int, ...]) -> Axes:
  """The axes that one unit of a parameter of that shape extends over.

  | shape | unit |
  | --- | --- |
  | scalar, vector, and anything that squeezes to one | the whole array |
  | [C_in, C_out] and rank 3 | a column: axis 0 |
  | [..., C_in, C_out] of rank 4 (HWIO) and 5 | all but the last axis |

  Raises:
    InputError: for rank 6 and above, where the units are not defined.
  """
  rank = len(shape)
  if sum(size != 1 for size in shape) <= 1:
    return tuple(range(rank))
  if rank in (2, 3):
    return (0,)
  if rank in (4, 5):
    return tuple(range(rank - 1))
  raise InputError(
    f"a parameter of shape {shape} has no known units: unit-wise norms are "
    "defined up to rank 5"
  )


def unitwise_norm(x: jax.Array, axes: Axes | None = None) -> jax.Array:
  """Euclidean norm of each unit, with the reduced axes kept as 1.

  Args:
    x: A parameter or its gradient.
    axes: That a unit extends over; None: those of `unit_axes`.
  """
  axes = unit_axes(x.shape) if axes is None else axes
  return jnp.sqrt(jnp.sum(_squared_magnitude(x), axis=axes, keepdims=True))


def unitwise_norms(tree: Any, axes: Any) -> list[jax.Array]:
  """`unitwise_norm` of each array in a tree, with axes as in a tree beside."""
  leaves, treedef = jax.tree.flatten(tree)
  return list(map(unitwise_norm, leaves, treedef.flatten_up_to(axes)))


def _squared_magnitude(x: jax.Array) -> jax.Array:
  if jnp.iscomplexobj(x):
    return (x.conj() * x).real
  return x**2


class Clipped(NamedTuple):
  """One parameter's gradient after clipping, and what it depended on."""

  grad: jax.Array
  grad_norm: jax.Array  # Of each unit, before clipping.
  param_norm: jax.Array  # Of each unit, at least eps.

  @property
  def ratio(self) -> jax.Array:
    return self.grad_norm / self.param_norm


def clip(
  grad: jax.Array,
  param: jax.Array,
  axes: Axes | None = None,
  *,
  clipping: float,
  eps: float,
) -> Clipped:
  """Clips one parameter's gradient; `axes` as in `unitwise_norm`."""
  grad_norm = unitwise_norm(grad, axes)
  param_norm = jnp.maximum(unitwise_norm(param, axes), eps)
  max_norm = clipping * param_norm
  factor = max_norm / jnp.maximum(grad_norm, _DIVISION_EPS)
  factor = jnp.where(grad_norm < max_norm, 1, factor)
  return Clipped(grad * factor, grad_norm, param_norm)


def adaptive_grad_clip(
  clipping: float = 0.01,
  eps: float = 1e-3,
  *,
  part_of: Callable[[str], str] | None = None,
  unit_axes: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """AGC as an optax transformation that says what it clipped.

  The updates are bit for bit those of `optax.adaptive_grad_clip`, operation by
  operation (once compiled, either may round differently in the last place,
  depending on what XLA fuses it with). Which parameters to clip is chosen
  outside, with `optax.masked` (the published recipe leaves out the classifier's
  weight: `nfnets.optim.GROUPS`).

  The best `clipping` depends on batch size, optimiser and learning rate: the
  paper uses 0.01 for SGD at batch 1024 to 4096 and larger values below; it is
  too tight for Adam and its kind.

  Args:
    clipping: Largest allowed ratio of gradient norm to weight norm (lambda).
    eps: Floor of the weight norm, so that units at zero can move.
    part_of: Names the part of the network that a parameter is in, from its
      path "module/name"; the state has statistics for each part. Without it
      the state has `all` alone.
    unit_axes: Tells of each array in a tree of parameters which axes one of
      its units extends over, as a tuple, where it is not as it is published
      (None: it is). Without it all are.

  Returns:
    A transformation whose state is an `AGCState`.

  Examples:
    >>> tx = adaptive_grad_clip(clipping=0.01)
    >>> state = tx.init(params)
    >>> grads, state = tx.update(grads, state, params)
    >>> state.statistics["all"].clipped
    Array(0.25, dtype=float32)
  """

  def parts(tree: Any) -> list[str]:
    """The part of each leaf, in the order of the leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    if part_of is None:
      return ["all"] * len(paths)
    as_text = functools.partial(
      jax.tree_util.keystr, simple=True, separator="/"
    )
    return [part_of(as_text(path)) for path, _ in paths]

  def init(params):
    # Arrays of their own, as who donates the state must have them.
    zero = lambda: jnp.zeros((), jnp.float32)
    names = sorted({"all", *parts(params)})
    return AGCState({name: Statistics(zero(), zero()) for name in names})

  def update(updates, state, params=None):
    if params is None:
      raise InputError(
        "adaptive_grad_clip compares gradients with weights: pass the "
        "parameters, `update(grads, state, params)`"
      )
    leaves, treedef = jax.tree.flatten(updates)
    axes = [None] * len(leaves)
    if unit_axes is not None:
      axes = treedef.flatten_up_to(unit_axes(params))
    clip_one = functools.partial(clip, clipping=clipping, eps=eps)
    results = list(map(clip_one, leaves, treedef.flatten_up_to(params), axes))
    of_parts: dict[str, list[Clipped]] = {}
    for part, result in zip(parts(updates), results, strict=True):
      of_parts.setdefault(part, []).append(result)
    statistics = _summarize(of_parts, clipping)
    clipped = treedef.unflatten([result.grad for result in results])
    return clipped, AGCState(statistics)

  return optax.GradientTransformation(init, update)


def _summarize(
  of_parts: dict[str, list[Clipped]], clipping: float
) -> dict[str, Statistics]:
  """Of each part, and from those of all.

  Ratios are taken after norms are put together, in one operation a part: one
  for each array would take longer to compile than all of the clipping.
  """
  num_units, num_clipped = 0, jnp.zeros((), jnp.float32)
  largest = jnp.zeros((), jnp.float32)
  found = {}
  for part, results in of_parts.items():
    norms = [(c.grad_norm.ravel(), c.param_norm.ravel()) for c in results]
    grad_norm, param_norm = map(jnp.concatenate, zip(*norms, strict=True))
    ratio = (grad_norm / param_norm).astype(jnp.float32)  # [units]
    count = jnp.sum(ratio > clipping, dtype=jnp.float32)
    found[part] = Statistics(
      count / max(ratio.size, 1), jnp.max(ratio, initial=0)
    )
    num_units, num_clipped = num_units + ratio.size, num_clipped + count
    largest = jnp.maximum(largest, found[part].max_ratio)
  found["all"] = Statistics(num_clipped / max(num_units, 1), largest)
  return found


def find_state(opt_state: Any) -> AGCState | None:
  """The `AGCState` inside the state of any optax chain, if there is one."""
  is_ours = lambda node: isinstance(node, AGCState)
  nodes = jax.tree.leaves(opt_state, is_leaf=is_ours)
  return next((node for node in nodes if is_ours(node)), None)
