"""Parameters in few arrays, which lie as they are used, for training on GPUs.

A network has more vectors than kernels, and a GPU starts some programs for
each, which compute next to nothing. So gains, biases and skip gains of one
length in one part of the network are one array, in a module of that part.
Kernels are [C_out, height, width, C_in], as cuDNN takes them: stored otherwise,
XLA puts them in that order, and back, at every step, in float32
(experiments/accelerators.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnets import agc
from nfnets.models import plan as plans
from nfnets.models.plan import Plan

Params = dict[str, dict[str, Any]]  # Module -> name -> array.
Place = tuple[str, str]  # Module and name.

_MODULE = "packed_"  # And the part of the network.
_TOGETHER = ("gain", "bias", "b", "skip_gain")
_FIRST, _LAST = (3, 0, 1, 2), (1, 2, 3, 0)  # Where a kernel's outputs go.


def part_of(module: str) -> str | None:
  """The part of the network that a module of vectors is of."""
  name = module.rpartition("/")[2]
  return name.removeprefix(_MODULE) if name.startswith(_MODULE) else None


def is_packed(params: Params) -> bool:
  """Whether parameters (or gradients of them) are as `pack` returns them."""
  return any(part_of(module) for module in params)


def pack(plan: Plan, params: Params) -> Params:
  """Parameters of NumPy arrays, with the published names -> packed."""
  params = {
    module: {
      name: value.transpose(_FIRST) if value.ndim == 4 else value
      for name, value in values.items()
    }
    for module, values in params.items()
  }
  shapes = {
    module: {name: value.shape for name, value in values.items()}
    for module, values in params.items()
  }
  for (module, name), places in _groups(plan, shapes).items():
    vectors = [params[old].pop(old_name) for old, old_name in places]
    params.setdefault(module, {})[name] = np.stack(vectors)
  return {module: values for module, values in params.items() if values}


def unpack(plan: Plan, num_classes: int, params: Params) -> Params:
  """Back, with the published names.

  In a program cuts have a gradient that is one operation for each group.
  """
  shapes = plans.shapes(plan, num_classes)
  found: Params = {module: {} for module in shapes}
  groups = _groups(plan, shapes)
  for (module, name), places in groups.items():
    rows = _rows(params[module][name])
    for (old, old_name), row in zip(places, rows, strict=True):
      found[old][old_name] = row
  for module, values in params.items():
    if part_of(module) is None:
      for name, value in values.items():
        found[module][name] = (
          value.transpose(_LAST) if value.ndim == 4 else value
        )
  return {
    module: {name: found[module][name] for name in names}
    for module, names in shapes.items()
  }


def unit_axes(module: str, value: Any) -> tuple[int, ...] | None:
  """Axes that a unit of a packed array extends over; None: as unpacked."""
  if part_of(module):
    return tuple(range(1, value.ndim))
  if value.ndim != 4:
    return None
  published = agc.unit_axes(tuple(value.shape[i] for i in _LAST))
  return tuple(i for i, axis in enumerate(_FIRST) if axis in published)


def _groups(
  plan: Plan, shapes: dict[str, dict[str, Any]]
) -> dict[Place, list[Place]]:
  """Where vectors are put together, and which in turn; never one alone."""
  found: dict[Place, list[Place]] = {}
  for module, names in shapes.items():
    part = plans.stage_of(plan, module)
    for name, shape in names.items():
      if name in _TOGETHER:
        # Named so that the optimiser takes them for what they are.
        together = "_".join(["gains_and_biases", *map(str, shape)])
        place = f"{plan.name}/~/{_MODULE}{part}", together
        found.setdefault(place, []).append((module, name))
  return {place: sorted(old) for place, old in found.items() if len(old) > 1}


def _rows(array: Any) -> list[Any]:
  if isinstance(array, np.ndarray):
    return list(array)
  return _traced_rows(array)


@jax.custom_vjp
def _traced_rows(array: jax.Array) -> list[jax.Array]:
  """Rows, whose gradients are put together at once, not padded and added."""
  return [array[i] for i in range(len(array))]


_traced_rows.defvjp(
  lambda array: (_traced_rows(array), None),
  lambda _, rows: (jnp.stack(rows),),
)
