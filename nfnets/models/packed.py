"""Parameters in few arrays, which lie as they are used, for training on GPUs.

A GPU starts some programs for each array of a network, and most arrays are so
small that these compute next to nothing. So in each part of the network
kernels of one shape are one array, gains, biases and skip gains of one length
another, in a module of that part. Kernels are [C_out, height, width, C_in], as
cuDNN takes them: stored otherwise, XLA puts them in that order, and back, at
every step, in float32 (experiments/accelerators.md). For evaluation alone, with
weights that were standardised before, arrays stay apart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nfnets import agc, layers
from nfnets.models import plan as plans
from nfnets.models.plan import Plan

Params = dict[str, dict[str, Any]]  # Module -> name -> array.
Place = tuple[str, str]  # Module and name.

_MODULE = "packed_"  # And the part of the network.
_VECTORS = ("gain", "bias", "b", "skip_gain")
_FIRST, _LAST = (3, 0, 1, 2), (1, 2, 3, 0)  # Where a kernel's outputs go.


def part_of(module: str) -> str | None:
  """The part of the network that a packed module is of."""
  name = module.rpartition("/")[2]
  return name.removeprefix(_MODULE) if name.startswith(_MODULE) else None


def is_packed(params: Params) -> bool:
  """Whether parameters (or gradients of them) are as `pack` returns them."""
  return any(part_of(module) for module in params)


def pack(plan: Plan, params: Params) -> Params:
  """Parameters of NumPy arrays, with the published names -> packed.

  What is packed already comes back as it is.
  """
  if is_packed(params):
    return params
  shapes = {
    module: {name: value.shape for name, value in values.items()}
    for module, values in params.items()
  }
  params = {
    module: {
      name: value.transpose(_FIRST) if value.ndim == 4 else value
      for name, value in values.items()
    }
    for module, values in params.items()
  }
  for (module, name), places in _groups(plan, shapes).items():
    arrays = [params[old].pop(old_name) for old, old_name in places]
    params.setdefault(module, {})[name] = np.stack(arrays)
  return {module: values for module, values in params.items() if values}


def unpack(plan: Plan, num_classes: int, params: Params) -> Params:
  """Back, with the published names."""
  found: Params = {module: {} for module in plans.shapes(plan, num_classes)}
  for array, places in _arrays(plan, num_classes, params):
    _take_apart(array, places, found)
  return found


def standardize(
  plan: Plan, num_classes: int, params: Params, dtype: Any = jnp.float32
) -> Params:
  """Packed parameters -> those of a folded network, with published names.

  Kernels are standardised, and cast to the dtype, before they are cut apart.
  """
  found: Params = {module: {} for module in plans.shapes(plan, num_classes)}
  arrays = _arrays(plan, num_classes, params)
  for array, places in sorted(arrays, key=lambda pair: pair[0].ndim):
    if array.ndim == 5:  # Kernels; their gains have been found before.
      gains = jnp.stack([found[module].pop("gain") for module, _ in places])
      array = jax.vmap(_standardized)(array, gains).astype(dtype)
    _take_apart(array, places, found)
  return found


def _take_apart(array: Any, places: list[Place], found: Params) -> None:
  """Puts the rows of an array, as they are published, in their places."""
  for (module, name), row in zip(places, _rows(array), strict=True):
    found[module][name] = row.transpose(_LAST) if row.ndim == 4 else row


def _standardized(kernel: jax.Array, gain: jax.Array) -> jax.Array:
  return layers.standardize(kernel.transpose(_LAST), gain).transpose(_FIRST)


class Turned(NamedTuple):
  """Weights of a folded network whose kernels are as cuDNN takes them."""

  params: Params


def turn(params: Params, dtype: Any) -> Turned:
  """Folded weights of NumPy arrays, with the published names; kernels cast."""
  turned = lambda x: x.transpose(_FIRST).astype(dtype) if x.ndim == 4 else x
  return Turned(jax.tree.map(turned, params))


def turn_back(turned: Turned) -> Params:
  """With kernels as they are published; nothing is moved in a program."""
  return jax.tree.map(
    lambda x: x.transpose(_LAST) if x.ndim == 4 else x, turned.params
  )


def unit_axes(module: str, value: Any) -> tuple[int, ...]:
  """Axes that a unit of a packed array extends over."""
  is_several = part_of(module) is not None
  shape = value.shape[is_several:]
  if len(shape) == 4:
    published = agc.unit_axes(tuple(shape[axis] for axis in _LAST))
    axes = [i for i, axis in enumerate(_FIRST) if axis in published]
  else:
    axes = agc.unit_axes(shape)
  return tuple(axis + is_several for axis in axes)


def _groups(
  plan: Plan, shapes: dict[str, dict[str, Any]]
) -> dict[Place, list[Place]]:
  """Which arrays are put together, and where; never one alone."""
  found: dict[Place, list[Place]] = {}
  for module, names in shapes.items():
    part = plans.stage_of(plan, module)
    for name, shape in names.items():
      # Named so that the optimiser takes them for what they are.
      kind = "gains_and_biases" if name in _VECTORS else "weights"
      together = "_".join([kind, *map(str, shape)])
      place = f"{plan.name}/~/{_MODULE}{part}", together
      found.setdefault(place, []).append((module, name))
  return {place: sorted(old) for place, old in found.items() if len(old) > 1}


def _arrays(
  plan: Plan, num_classes: int, params: Params
) -> list[tuple[Any, list[Place]]]:
  """Each array, with a first axis, and the published places of its rows."""
  groups = _groups(plan, plans.shapes(plan, num_classes))
  return [
    (array, groups[module, name])
    if part_of(module)
    else (array[None], [(module, name)])
    for module, values in params.items()
    for name, array in values.items()
  ]


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
