"""Initial weights: how one is drawn, and how all of a network are at once.

A random generator compiles slowly, and a network has dozens of random arrays.
Drawn together, its initialisation compiles in a quarter of the time
(`experiments/speed.md`).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

# Name -> draws an array of a shape. "truncated" is cut at two deviations and,
# as is usual, not rescaled for it.
DISTRIBUTIONS: dict[str, Callable[..., jax.Array]] = {
  "normal": jax.random.normal,
  "truncated": lambda key, shape: jax.random.truncated_normal(
    key, -2.0, 2.0, shape
  ),
  "uniform": lambda key, shape: jax.random.uniform(
    key, shape, minval=-1.0, maxval=1.0
  ),
}


class Draw(NamedTuple):
  """A Haiku initializer: independent entries of one distribution, float32."""

  distribution: str  # Of DISTRIBUTIONS.
  scale: float

  def __call__(self, shape: Any, dtype: Any) -> jax.Array:
    draw = DISTRIBUTIONS[self.distribution]
    return (self.scale * draw(hk.next_rng_key(), shape)).astype(dtype)


def drawn_together(
  function: Callable[..., Any],
) -> Callable[..., tuple[hk.Params, hk.State]]:
  """The `init` of a network, with one draw per distribution.

  Args:
    function: As given to `hk.transform_with_state`.

  Returns:
    `(rng, *args) -> (params, state)`: distributed as what Haiku's own `init`
    returns, but other numbers.
  """

  def init(rng: jax.Array, *args: Any) -> tuple[hk.Params, hk.State]:
    draws: dict[str, dict[tuple[str, str], float]] = {}

    def postpone(next_creator, shape, dtype, initializer, context):
      if isinstance(initializer, Draw):
        scales = draws.setdefault(initializer.distribution, {})
        module, _, name = context.full_name.rpartition("/")
        scales[module, name] = initializer.scale
        initializer = jnp.zeros
      return next_creator(shape, dtype, initializer)

    def run(*args):
      with hk.custom_creator(postpone):
        return function(*args)

    rng, key = jax.random.split(rng)
    params, state = hk.transform_with_state(run).init(rng, *args)
    for i, name in enumerate(DISTRIBUTIONS):
      scales = draws.get(name, {})
      arrays = [params[module][leaf] for module, leaf in scales]
      ends = [0, *itertools.accumulate(array.size for array in arrays)]
      drawn = DISTRIBUTIONS[name](jax.random.fold_in(key, i), (ends[-1],))
      for (module, leaf), array, start in zip(
        scales, arrays, ends[:-1], strict=True
      ):
        part = jax.lax.slice(drawn, (start,), (start + array.size,))
        part = part.reshape(array.shape).astype(array.dtype)
        params[module][leaf] = scales[module, leaf] * part
    return params, state

  return init
