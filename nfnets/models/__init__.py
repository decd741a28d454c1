"""The one table of networks by name, and `make`.

model = models.make("nfnet_f0", num_classes=1000, stochdepth_rate=0.1)
params, state = model.init(rng, images)
outputs, state = model.apply(params, state, rng, images, is_training=False)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets.errors import InputError, unknown
from nfnets.models import nfnet

VARIANTS: dict[str, nfnet.Variant] = nfnet.VARIANTS


class Model(NamedTuple):
  """A network as pure functions.

  Attributes:
    name: Key of the table.
    variant: Its row, with the overrides in place.
    num_classes: Width of the logits.
    init: `(rng, images) -> (params, state)`. Parameters are a two-level dict
      `{module: {name: float32 array}}` with the published names.
    apply: `(params, state, rng, images, is_training=False,
      return_metrics=False) -> (outputs, state)`. Images [N, H, W, 3] float32
      or bfloat16, normalised; `outputs["logits"]` [N, num_classes] float32,
      `outputs["pool"]` [N, features] float32. `rng` is needed in training only.
  """

  name: str
  variant: nfnet.Variant
  num_classes: int
  init: Callable[..., tuple[hk.Params, hk.State]]
  apply: Callable[..., tuple[dict[str, Any], hk.State]]

  def stage_of(self, module: str) -> str:
    """Part of the network a parameter's module is in: stem, stage1 .. head."""
    return nfnet.stage_of(self.variant, module)

  def shapes(self) -> tuple[Any, Any]:
    """Shapes of parameters and state, without computing them."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(self.init, jax.random.key(0), image)

  def count_params(self) -> int:
    """Number of trainable scalars."""
    return nfnet.count_params(self.variant, self.num_classes)

  def count_macs(self, size: int) -> float:
    """Multiply-accumulates of one size x size image (Table 3's "#FLOPs")."""
    return nfnet.count_macs(self.variant, self.num_classes, size)


def variant(name: str, **overrides: Any) -> nfnet.Variant:
  """The row of the table called `name`, with columns replaced.

  Raises:
    InputError: for an unknown name or column, or a row that is no network.
  """
  if name not in VARIANTS:
    raise unknown("model", name, VARIANTS)
  row = VARIANTS[name]
  for column, value in overrides.items():
    if column not in row._fields:
      raise unknown("model column", column, row._fields)
    overrides[column] = _as_type_of(column, getattr(row, column), value)
  row = row._replace(**overrides)
  nfnet.check(row)
  return row


def _as_type_of(column: str, old: Any, new: Any) -> Any:
  """`new` in the type of the value that it replaces."""
  if isinstance(old, tuple) and isinstance(new, tuple | list):
    return tuple(_as_type_of(column, old[0], item) for item in new)
  if isinstance(old, float) and type(new) is int:
    return float(new)
  if type(new) is not type(old):
    raise InputError(
      f"{column}={new!r} is a {type(new).__name__}, but the table holds "
      f"{type(old).__name__} there, such as {old!r}"
    )
  return new


def make(name: str, num_classes: int = 1000, **overrides: Any) -> Model:
  """Builds a network.

  Args:
    name: `nfnet_f0` ... `nfnet_f7`, `nfnet_f0_plus` ... `nfnet_f7_plus`, or
      `nfnet_tiny`.
    num_classes: Width of the logits.
    **overrides: Any column of the table (`nfnets.models.nfnet.Variant`), such
      as `depth=(1, 1, 1, 1)` or `second_conv=False`.

  Raises:
    InputError: see `variant`.
  """
  row = variant(name, **overrides)
  if num_classes < 1:
    raise InputError(f"num_classes={num_classes}: at least 1 is needed")

  def forward(images, is_training=False, return_metrics=False):
    net = nfnet.NFNet(row, num_classes)
    return net(images, is_training=is_training, return_metrics=return_metrics)

  network = hk.transform_with_state(forward)
  return Model(name, row, num_classes, network.init, network.apply)
