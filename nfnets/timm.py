"""Weights in the form of PyTorch Image Models (timm), both ways.

Its `dm_nfnet_f*` hold the released weights as they are. Its other families
compute slightly differently, and their weights are rewritten so that our
networks give the same outputs:

* the activations' gain is inside each convolution; ours is in the activation,
  so the convolutions and the classifier whose input has none make up for it;
* there is no skip gain: ours are 1;
* a kernel is divided by `sqrt(var + 1e-5)`, ours by `sqrt(max(var, floor))`:
  the ratio of the two goes into its gain.

Arithmetic is in float64; a weight that went there and back may differ in the
last bit of float32 where it was multiplied, and is equal where it was not.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from nfnets import layers, models
from nfnets.errors import InputError

Params = dict[str, dict[str, np.ndarray]]
Tensors = dict[str, np.ndarray]

# Summand of timm's kernel variances.
_EPS = 1e-5

_CONVS = {"conv0": "conv1", "conv1": "conv2", "conv1b": "conv2b"}
_CONVS |= {"conv2": "conv3", "conv_shortcut": "downsample.conv"}


class _Leaf(NamedTuple):
  """One parameter and its tensor."""

  module: str
  name: str
  key: str  # In timm.
  kind: str  # conv, gain, vector, linear, gate, taps


def name_of(model: models.Model) -> str | None:
  """What timm calls a network, if it has it."""
  name = model.name
  if is_native(model):
    return name.removeprefix("timm_")
  is_released = name in {f"nfnet_f{n}" for n in range(7)}
  return f"dm_{name}" if is_released else None


def is_native(model: models.Model) -> bool:
  """Whether a network computes as timm's own do, not as the released ones."""
  return model.plan.padding == "symmetric"


def is_timm(keys: Mapping[str, np.ndarray]) -> bool:
  """Whether tensors have timm's names."""
  return any(key.startswith("stem.conv") for key in keys)


def shapes(model: models.Model) -> dict[str, tuple[int, ...]]:
  """Names and shapes of a network's tensors in timm."""
  params, _ = model.shapes()
  return {
    leaf.key: _shape(params[leaf.module][leaf.name].shape, leaf.kind)
    for leaf in _leaves(model)
  }


def to_ours(
  tensors: Tensors, model: models.Model, *, trained_in_timm: bool = False
) -> Params:
  """Our parameters from timm's tensors.

  Args:
    tensors: All that `shapes` has.
    model: Their network.
    trained_in_timm: Whether weights of a `dm_nfnet` were changed by training
      there, where kernels are standardised with another epsilon. The weights of
      the other families were anyway.
  """
  params: Params = {}
  for leaf in _leaves(model):
    value = _from_timm(tensors[leaf.key].astype(np.float64), leaf.kind)
    params.setdefault(leaf.module, {})[leaf.name] = value
  if is_native(model):
    gamma = layers.GAINS[model.plan.activation]
    for module in _unactivated(model):
      params[module]["gain"] *= gamma
    params[f"{model.plan.name}/~/linear"]["w"] /= gamma
    for block in model.plan.blocks:
      path = f"{model.plan.name}/~/{block.name}"
      params.setdefault(path, {})["skip_gain"] = np.ones(())
  if is_native(model) or trained_in_timm:
    for values in params.values():
      if "gain" in values:
        values["gain"] *= _ratio(values["w"])
  return {
    module: {name: _float32(value) for name, value in values.items()}
    for module, values in params.items()
  }


def from_ours(
  params: Params, model: models.Model, *, for_use_in_timm: bool = False
) -> Tensors:
  """timm's tensors from our parameters; `to_ours` backwards.

  Args:
    params, model: Our weights and their network.
    for_use_in_timm: Whether timm's `dm_nfnet` shall give our outputs, although
      it standardises with another epsilon; else the weights stay as they are,
      as in timm's own copies of the released ones.

  Raises:
    InputError: when timm does not have that network.
  """
  if name_of(model) is None:
    raise InputError(f"timm has no network like {model.name}")
  params = {
    module: {name: np.asarray(v, np.float64) for name, v in values.items()}
    for module, values in params.items()
  }
  if is_native(model) or for_use_in_timm:
    for values in params.values():
      if "gain" in values:
        values["gain"] = values["gain"] / _ratio(values["w"])
  if is_native(model):
    gamma = layers.GAINS[model.plan.activation]
    for module in _unactivated(model):
      params[module]["gain"] = params[module]["gain"] / gamma
    path = f"{model.plan.name}/~/linear"
    params[path]["w"] = params[path]["w"] * gamma
    for block in model.plan.blocks:
      _drop_skip_gain(params, block, f"{model.plan.name}/~/{block.name}")
  return {
    leaf.key: _float32(_to_timm(params[leaf.module][leaf.name], leaf.kind))
    for leaf in _leaves(model)
  }


def _drop_skip_gain(params: Params, block, path: str) -> None:
  """Moves a block's skip gain into its last convolution.

  Attention after that must see what it saw before.
  """
  skip = params.pop(path)["skip_gain"]
  last = params[f"{path}/~/{block.convs[-1].name}"]
  last["gain"], last["bias"] = last["gain"] * skip, last["bias"] * skip
  if block.attention is None or block.attention.is_in_middle or skip == 0:
    return
  name = "eca" if block.attention.kind == "eca" else "squeeze_excite/~/linear"
  module = params[f"{path}/~/{name}"]
  module["w"] = module["w"] / skip


def _unactivated(model: models.Model) -> list[str]:
  """Convolutions whose input did not go through an activation."""
  plan = model.plan
  convs = [plan.stem[0], *filter(None, [plan.final_conv])]
  return [f"{plan.name}/~/{conv.name}" for conv in convs]


def _ratio(w: np.ndarray) -> np.ndarray:
  """Our divisor of each kernel over timm's."""
  fan_in = np.prod(w.shape[:-1])
  var = np.var(w, axis=(0, 1, 2))
  ours = np.maximum(var * fan_in, layers.STANDARDIZE_EPS)
  return np.sqrt(ours / ((var + _EPS) * fan_in))


def _leaves(model: models.Model) -> Iterator[_Leaf]:
  """Every parameter that timm has too."""
  plan = model.plan

  def conv(module: str, key: str) -> Iterator[_Leaf]:
    yield _Leaf(module, "w", f"{key}.weight", "conv")
    yield _Leaf(module, "gain", f"{key}.gain", "gain")
    yield _Leaf(module, "bias", f"{key}.bias", "vector")

  for i, layer in enumerate(plan.stem, start=1):
    number = i if len(plan.stem) > 1 else ""
    yield from conv(f"{plan.name}/~/{layer.name}", f"stem.conv{number}")
  stage, index = 0, 0
  for block in plan.blocks:
    index = index + 1 if block.stage == stage else 0
    stage = block.stage
    ours, theirs = f"{plan.name}/~/{block.name}", f"stages.{stage - 1}.{index}"
    for layer in (*block.convs, *filter(None, [block.shortcut])):
      yield from conv(
        f"{ours}/~/{layer.name}", f"{theirs}.{_CONVS[layer.name]}"
      )
    if not is_native(model):
      yield _Leaf(ours, "skip_gain", f"{theirs}.skipinit_gain", "vector")
    if (gate := block.attention) is None:
      continue
    theirs += ".attn" if gate.is_in_middle else ".attn_last"
    if gate.kind == "eca":
      yield _Leaf(f"{ours}/~/eca", "w", f"{theirs}.conv.weight", "taps")
      continue
    ours += "/~/squeeze_excite/~/linear"
    for suffix, layer in (("", "fc1"), ("_1", "fc2")):
      yield _Leaf(ours + suffix, "w", f"{theirs}.{layer}.weight", "gate")
      yield _Leaf(ours + suffix, "b", f"{theirs}.{layer}.bias", "vector")
  if plan.final_conv is not None:
    yield from conv(f"{plan.name}/~/final_conv", "final_conv")
  yield _Leaf(f"{plan.name}/~/linear", "w", "head.fc.weight", "linear")
  yield _Leaf(f"{plan.name}/~/linear", "b", "head.fc.bias", "vector")


def _to_timm(value: np.ndarray, kind: str) -> np.ndarray:
  if kind == "conv":  # [H, W, I, O] -> [O, I, H, W]
    return value.transpose(3, 2, 0, 1)
  if kind == "gain":
    return value.reshape(-1, 1, 1, 1)
  if kind == "linear":
    return value.T
  if kind == "gate":  # A 1x1 convolution there.
    return value.T[:, :, None, None]
  return value.reshape(1, 1, -1) if kind == "taps" else value


def _from_timm(value: np.ndarray, kind: str) -> np.ndarray:
  if kind == "conv":
    return value.transpose(2, 3, 1, 0)
  if kind in ("gain", "taps"):
    return value.reshape(-1)
  if kind == "linear":
    return value.T
  return value[:, :, 0, 0].T if kind == "gate" else value


def _shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
  return _to_timm(np.broadcast_to(np.zeros(()), shape), kind).shape


def _float32(value: np.ndarray) -> np.ndarray:
  return np.array(value, np.float32, order="C")
