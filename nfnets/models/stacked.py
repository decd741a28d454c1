"""Parameters of equal blocks as one array, for networks that loop over them.

A loop would put them together at every step, and cut their gradients apart.
Stacked, those of a run of equal blocks are one array with a new first axis,
under the name of the run's first block: of NFNet-F7's 1,661 arrays 165 remain.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nfnets.models import plan as plans
from nfnets.models.plan import Plan

Params = dict[str, dict[str, Any]]  # Module -> name -> array.


def stack(plan: Plan, tree: Any) -> Any:
  """All parameters in a tree stacked; on the host, as NumPy arrays.

  Args:
    plan: Of the network.
    tree: Of NumPy arrays: parameters, or anything that has dictionaries with
      the modules of the network in it, such as the state of a training run.
  """

  def of_params(params: Params) -> Params:
    params = dict(params)
    for module, others in _in_runs(plan, list(params)):
      blocks = [params[module], *(params.pop(other) for other in others)]
      params[module] = {
        name: np.stack([block[name] for block in blocks]) for name in blocks[0]
      }
    return params

  return _map_params(plan, of_params, tree)


def unstack(plan: Plan, tree: Any) -> Any:
  """Back to what `stack` was given; the arrays are views."""

  def of_params(params: Params) -> Params:
    params = dict(params)
    for module, others in _in_runs(plan, list(params)):
      stacked = params[module]
      for i, block in enumerate((module, *others)):
        params[block] = {name: np.asarray(a[i]) for name, a in stacked.items()}
    return params

  return _map_params(plan, of_params, tree)


def _map_params(
  plan: Plan, function: Callable[[Params], Params], tree: Any
) -> Any:
  first_block = f"{plan.name}/~/{plan.blocks[0].name}"
  is_params = lambda node: isinstance(node, dict) and first_block in node
  return jax.tree.map(
    lambda node: function(node) if is_params(node) else node,
    tree,
    is_leaf=is_params,
  )


def _in_runs(plan: Plan, modules: list[str]) -> Iterator[tuple[str, list[str]]]:
  """Modules of a run's first block, each with the same of the other blocks."""
  for indices in plans.stages(plan):
    for run in plans.runs(plan, indices):
      first, *others = (f"{plan.name}/~/{plan.blocks[i].name}" for i in run)
      for module in modules if others else ():
        if module == first or module.startswith(f"{first}/"):
          rest = module.removeprefix(first)
          yield module, [block + rest for block in others]
