"""Parameters of equal blocks as one array, for networks that loop over them.

A loop would put them together at every step, and cut their gradients apart.
Stacked, those of a run of equal blocks are one array with a new first axis,
under the name of the run's first block: of NFNet-F7's 1,661 arrays 165 remain.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nfnets.models import plan as plans
from nfnets.models.plan import Plan

Params = dict[str, dict[str, Any]]  # Module -> name -> array.


def stack(plan: Plan, params: Params) -> Params:
  """Parameters of NumPy arrays, with the published names -> stacked.

  What is stacked already comes back as it is.
  """
  params = dict(params)
  for module, others in _in_runs(plan, list(params)):
    if others[0] not in params:
      continue
    blocks = [params[module], *(params.pop(other) for other in others)]
    params[module] = {
      name: np.stack([block[name] for block in blocks]) for name in blocks[0]
    }
  return params


def unstack(plan: Plan, params: Params) -> Params:
  """Back to what `stack` was given; the arrays are views."""
  params = dict(params)
  for module, others in _in_runs(plan, list(params)):
    if others[0] in params:
      continue
    stacked = params[module]
    for i, block in enumerate((module, *others)):
      params[block] = {name: np.asarray(a[i]) for name, a in stacked.items()}
  return params


def _in_runs(plan: Plan, modules: list[str]) -> Iterator[tuple[str, list[str]]]:
  """Modules of a run's first block, each with the same of the other blocks."""
  for indices in plans.stages(plan):
    for run in plans.runs(plan, indices):
      first, *others = (f"{plan.name}/~/{plan.blocks[i].name}" for i in run)
      for module in modules if others else ():
        if module == first or module.startswith(f"{first}/"):
          rest = module.removeprefix(first)
          yield module, [block + rest for block in others]
