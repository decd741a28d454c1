"""The one table of networks by name, and `make`.

model = models.make("nfnet_f0", num_classes=1000, stochdepth_rate=0.1)
params, state = model.init(rng, images)
outputs, state = model.apply(params, state, rng, images, is_training=False)
"""

import concurrent.futures
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nfnets import agc, layers
from nfnets.convolution import FORMS
from nfnets.errors import InputError, unknown
from nfnets.initial import drawn_together
from nfnets.models import nf_regnet, nf_resnet, nfnet, packed, stacked
from nfnets.models import plan as plans
from nfnets.models.network import REMATS, Execution, Network
from nfnets.models.plan import Plan

_FAMILIES = {f.Variant: f for f in (nfnet, nf_regnet, nf_resnet)}

Variant = nfnet.Variant | nf_regnet.Variant | nf_resnet.Variant

VARIANTS: dict[str, Variant] = {
  name: row for f in _FAMILIES.values() for name, row in f.VARIANTS.items()
}


class Model(NamedTuple):
  """A network as pure functions.

  Attributes:
    name: Key of the table.
    variant: Its row, with the overrides in place.
    plan: What the row works out to.
    num_classes: Width of the logits.
    execution: How it is computed.
    init: `(rng, images) -> (params, state)`. Parameters are a two-level dict
      `{module: {name: float32 array}}` with the published names.
    apply: `(params, state, rng, images, is_training=False,
      return_metrics=False, return_features=False) -> (outputs, state)`. Images
      [N, H, W, 3] float32 or bfloat16, normalised; `outputs["logits"]`
      [N, num_classes] float32, `outputs["pool"]` [N, features] float32. `rng`
      is needed in training only. It also takes the parameters that `stack`
      returns (if they are of a loop, not with `return_metrics`), and what
      `lay_out` does. It can be differentiated in reverse mode (`jax.grad`,
      also of a gradient), not in forward mode (`jax.jvp`). Images may be
      sharded over a mesh whose axes are of type Auto, as `Mesh` makes them
      (`jax.make_mesh` only if it is told), and within a `shard_map`.

  `init` and `apply` raise `InputError` for images of another shape or type.
  """

  name: str
  variant: Variant
  plan: Plan
  num_classes: int
  execution: Execution
  init: Callable[..., tuple[hk.Params, hk.State]]
  apply: Callable[..., tuple[dict[str, Any], hk.State]]

  def __reduce__(self) -> tuple[Any, ...]:  # For pickle, and other processes.
    return _make, (self.name, self.variant, self.num_classes, self.execution)

  def features(
    self, params: hk.Params, state: hk.State, images: jax.Array
  ) -> dict[str, jax.Array]:
    """What the network sees in images [N, H, W, 3], as in evaluation.

    Returns:
      `pool` [N, features], the averages that enter the classifier, and the
      outputs of each part, [N, H', W', C]: `stem`, `stage1` ..., and `final`,
      whose average `pool` is.
    """
    outputs, _ = self.apply(params, state, None, images, return_features=True)
    del outputs["logits"]
    return outputs

  def stage_of(self, module: str) -> str:
    """Part of the network a parameter's module is in: stem, stage1 .. head."""
    return packed.part_of(module) or plans.stage_of(self.plan, module)

  @property
  def has_own_arrays(self) -> bool:
    """Whether it trains with others than the published (`stack`)."""
    return self.execution.is_scanned or self.is_packed

  @property
  def is_packed(self) -> bool:
    """Whether `stack` packs; where that is open, this opens the device."""
    if self.execution.is_scanned:
      return False
    asked = self.execution.is_packed
    return jax.default_backend() == "gpu" if asked is None else asked

  def stack(self, tree: Any) -> Any:
    """Parameters in the arrays that the network trains fastest with.

    `models.stacked` if it is scanned, `models.packed` if it is packed.

    Args:
      tree: Of NumPy arrays: parameters, or anything that has dictionaries with
        the modules of the network in it, such as the state of a training run.
        It comes back as it is if the network is neither.
    """
    if not self.has_own_arrays:
      return tree
    stack = stacked.stack if self.execution.is_scanned else packed.pack
    return self._map_params(functools.partial(stack, self.plan), tree)

  def unstack(self, tree: Any) -> Any:
    """What `stack` was given; with the published names."""
    if self.execution.is_scanned:
      unstack = functools.partial(stacked.unstack, self.plan)
      return self._map_params(unstack, tree)
    unpack = functools.partial(packed.unpack, self.plan, self.num_classes)
    return self._map_params(
      lambda params: unpack(params) if packed.is_packed(params) else params,
      tree,
    )

  def lay_out(self, params: hk.Params, dtype: Any) -> Any:
    """Weights of a folded network as a GPU reads them; elsewhere as they are.

    Args:
      params: Of NumPy arrays, from `fold`.
      dtype: Of the images that they are for.

    Returns:
      What `apply` takes in place of parameters.
    """
    return packed.turn(params, dtype) if self.is_packed else params

  def _map_params(
    self, function: Callable[[hk.Params], hk.Params], tree: Any
  ) -> Any:
    classifier = f"{self.plan.name}/~/linear"
    is_params = lambda node: isinstance(node, dict) and classifier in node
    return jax.tree.map(
      lambda node: function(node) if is_params(node) else node,
      tree,
      is_leaf=is_params,
    )

  def unit_axes(self, params: hk.Params) -> Any:
    """For AGC: of each array, the axes that one unit extends over.

    Args:
      params: Parameters, or gradients of them, in whichever arrays.

    Returns:
      A tree of tuples; None where `agc.unitwise_norm` knows.
    """
    shapes = plans.shapes(self.plan, self.num_classes)
    is_packed = packed.is_packed(params)

    def axes_of(path, array) -> tuple[int, ...] | None:
      module, name = (key.key for key in path)
      if is_packed:
        return packed.unit_axes(module, array)
      is_ours = module in shapes  # Beside the network may be others.
      if not is_ours or array.ndim == len(shapes[module][name]):
        return None
      axes = agc.unit_axes(array.shape[1:])
      return tuple(axis + 1 for axis in axes)

    return jax.tree_util.tree_map_with_path(axes_of, params)

  def shapes(self) -> tuple[Any, Any]:
    """Shapes of parameters and state, without computing them."""
    shapes = plans.shapes(self.plan, self.num_classes)
    if self.execution.is_folded:
      for values in shapes.values():
        values.pop("gain", None)
    params = {
      module: {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in values.items()
      }
      for module, values in shapes.items()
    }
    return params, {}

  def count_params(self) -> int:
    """Number of trainable scalars."""
    return plans.count_params(self.plan, self.num_classes)

  def count_macs(self, size: int) -> float:
    """Multiply-accumulates of one size x size image (Table 3's "#FLOPs")."""
    return plans.count_macs(self.plan, self.num_classes, size)


def variant(name: str, **overrides: Any) -> Variant:
  """The row of the table called `name`, with columns replaced.

  Raises:
    InputError: for an unknown name or column, or a row that is no network.
  """
  if not isinstance(name, str) or name not in VARIANTS:
    raise unknown("model", name, VARIANTS)
  row = VARIANTS[name]
  for column, value in overrides.items():
    if column not in row._fields:
      raise unknown("model column", column, row._fields)
    overrides[column] = _as_type_of(column, getattr(row, column), value)
  row = row._replace(**overrides)
  _FAMILIES[type(row)].check(row)
  if "se_ratio" in overrides and getattr(row, "attention", "se") != "se":
    raise InputError(
      f"se_ratio={row.se_ratio}: {name} has no squeeze-excite, but another "
      f"attention ({row.attention})"
    )
  return row


def _as_type_of(column: str, old: Any, new: Any) -> Any:
  """`new` in the type of the value that it replaces."""
  if isinstance(new, np.generic | np.ndarray):
    new = new.tolist()
  if isinstance(old, tuple) and isinstance(new, tuple | list):
    return tuple(_as_type_of(column, old[0], item) for item in new)
  if isinstance(old, float) and type(new) is int:
    return float(new)
  if type(new) is not type(old):
    raise InputError(
      f"{column}={new!r} is a {type(new).__name__}, but the table holds "
      f"{type(old).__name__} there, such as {old!r}"
    )
  if isinstance(new, float) and not math.isfinite(new):
    raise InputError(f"{column}={new} is not finite")
  return new


def make(
  name: str,
  num_classes: int = 1000,
  *,
  is_folded: bool = False,
  convolution: str | None = None,
  remat: str = "none",
  is_scanned: bool = False,
  is_packed: bool | None = None,
  **overrides,
) -> Model:
  """Builds a network.

  Args:
    name: Of the table: `nfnet_f0` ... `nfnet_f7`, `nf_regnet_b0`,
      `nf_resnet50`, `eca_nfnet_l0` ...; `nfnets info` lists them.
    num_classes: Width of the logits.
    is_folded: For weights that went through `fold`: the same function, without
      weight standardisation. For inference.
    convolution: How convolutions are computed, of
      `nfnets.convolution.FORMS`; None: as is fast on the platform.
    remat: What a gradient keeps of the forward pass: `none` of it is computed
      again, or all but the inputs of `blocks` or `stages`, which takes less
      memory and more time.
    is_scanned: Whether equal blocks are compiled once, as a loop: compiling
      deep networks takes less time, running takes more. Least of both with
      parameters that are stacked already (`Model.stack`).
    is_packed: Whether `Model.stack` packs parameters, for training on GPUs
      (None: on these), unless the network is scanned.
    **overrides: Any column of the table (`nfnets.models.nfnet.Variant`), such
      as `depth=(1, 1, 1, 1)` or `second_conv=False`.

  Raises:
    InputError: see `variant`; or for an unknown way of computing.
  """
  row = variant(name, **overrides)
  try:
    num_classes = operator.index(num_classes)
  except TypeError:
    raise InputError(
      f"num_classes={num_classes!r} is no whole number"
    ) from None
  if num_classes < 1:
    raise InputError(f"num_classes={num_classes}: at least 1 is needed")
  if convolution is not None and convolution not in FORMS:
    raise unknown("form of convolution", convolution, FORMS)
  if remat not in REMATS:
    raise unknown("remat", remat, REMATS)
  execution = Execution(
    is_folded=is_folded,
    convolution=convolution,
    remat=remat,
    is_scanned=is_scanned,
    is_packed=is_packed,
  )
  return _make(name, row, num_classes, execution)


def _make(
  name: str, row: Variant, num_classes: int, execution: Execution
) -> Model:
  plan = _FAMILIES[type(row)].plan(row)

  def forward(
    images,
    is_training=False,
    return_metrics=False,
    return_features=False,
    execution=execution,
  ):
    _check_images(images)
    return Network(plan, num_classes, execution)(
      images,
      is_training=is_training,
      return_metrics=return_metrics,
      return_features=return_features,
    )

  init = drawn_together(forward)
  published = hk.transform_with_state(forward).apply

  def apply(params, state, rng, images, *args, **options):
    if isinstance(params, packed.Turned):
      params = packed.turn_back(params)
    elif packed.is_packed(params):
      # All kernels of an array are standardised at once.
      params = packed.standardize(plan, num_classes, params, images.dtype)
      options["execution"] = execution._replace(is_folded=True)
    elif execution.is_folded and any("gain" in x for x in params.values()):
      raise InputError(
        "these weights have gains, which a folded network does not apply: use "
        "both the network and the weights that `models.fold` returns"
      )
    return published(params, state, rng, images, *args, **options)

  return Model(name, row, plan, num_classes, execution, init, apply)


def _check_images(images: Any) -> None:
  shape, dtype = jnp.shape(images), jnp.result_type(images)
  is_shaped = len(shape) == 4 and shape[3] == 3 and 0 not in shape
  if not is_shaped or not jnp.issubdtype(dtype, jnp.floating):
    raise InputError(
      f"images of {dtype}, shape {list(shape)}: networks take [N, H, W, 3], of "
      "float32 or bfloat16, normalised; `nfnets.predict.Classifier` takes files"
    )


def folded(model: Model) -> Model:
  """The same network for weights that are standardised already."""
  execution = model.execution._replace(is_folded=True)
  return _make(model.name, model.variant, model.num_classes, execution)


def standardize(model: Model, params: hk.Params) -> hk.Params:
  """Weights for `folded`, as a function that has a gradient."""
  if packed.is_packed(params):
    return packed.standardize(model.plan, model.num_classes, params)

  def kernel_of(w, gain):
    is_stacked = w.ndim > 4
    run = jax.vmap(layers.standardize) if is_stacked else layers.standardize
    return run(w, gain)

  return _fold(params, kernel_of, map)


def fold(model: Model, params: hk.Params) -> tuple[Model, hk.Params]:
  """The same function with its weights standardised once and for all.

  Args:
    model, params: A network and its weights.

  Returns:
    A folded network and its weights, in which each convolution's `w` is the
    kernel that is convolved and there is no `gain`. Equal up to the rounding of
    float32.
  """
  params = model.unstack(params)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return folded(model), _fold(params, layers.folded_kernel, pool.map)


def _fold(
  params: hk.Params, kernel_of: Callable[..., Any], map_: Callable[..., Any]
) -> hk.Params:
  def fold_module(values):
    values = dict(values)
    if "gain" in values:
      values["w"] = kernel_of(values["w"], values.pop("gain"))
    return values

  return dict(zip(params, map_(fold_module, params.values()), strict=True))
