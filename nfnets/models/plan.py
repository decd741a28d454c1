"""A network worked out: the list of layers that everything else reads.

A family (`nfnet.py`, `nf_regnet.py`, `nf_resnet.py`) turns a row of its table
into a `Plan`. The network itself, the shapes and counts of its parameters, the
names they have in other libraries and the graphs that are exported all follow
from it.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from nfnets import layers
from nfnets.errors import InputError, unknown

Shapes = dict[str, dict[str, tuple[int, ...]]]

# SAME as TensorFlow has it, whose stride-two windows start at the first pixel
# of an even image; or PyTorch's, the same number of zeros at every edge.
PADDINGS = ("same", "symmetric")

ATTENTIONS = ("se", "eca")


class Conv(NamedTuple):
  """One weight-standardised convolution."""

  name: str  # Of its module, below the block or the network.
  in_channels: int
  channels: int
  kernel_size: int = 1
  stride: int = 1
  groups: int = 1

  @property
  def fan_in(self) -> int:
    return self.in_channels // self.groups * self.kernel_size**2


class Attention(NamedTuple):
  """A gate per channel, computed from the means of all channels."""

  kind: str  # Of ATTENTIONS: squeeze-and-excitation or efficient (ECA).
  channels: int
  size: int  # Hidden width ("se"), taps of the convolution ("eca").
  is_in_middle: bool  # Before the block's last convolution, or after it.


class Block(NamedTuple):
  """One residual block."""

  name: str  # nf_block_3
  stage: int  # From 1.
  beta: float  # 1 / the analytic standard deviation of the input.
  stochdepth_rate: float
  convs: tuple[Conv, ...]  # Of the residual branch, in order.
  shortcut: Conv | None  # Where the shape changes.
  attention: Attention | None
  is_pooled: bool  # The shortcut's stride is an average, not a step.

  @property
  def kind(self) -> str:
    """Its name without the number."""
    return self.name.rstrip("_0123456789")

  @property
  def in_channels(self) -> int:
    return self.convs[0].in_channels

  @property
  def channels(self) -> int:
    return self.convs[-1].channels

  @property
  def width(self) -> int:
    return self.convs[0].channels

  @property
  def groups(self) -> int:
    return self.convs[1].groups

  @property
  def stride(self) -> int:
    return self.convs[1].stride


class Plan(NamedTuple):
  """A whole network, all numbers worked out."""

  name: str  # Of its Haiku module.
  stem: tuple[Conv, ...]
  has_stem_pool: bool  # A 3x3 maximum with stride 2 after the stem.
  blocks: tuple[Block, ...]
  final_conv: Conv | None
  alpha: float
  activation: str
  drop_rate: float
  padding: str  # Of PADDINGS.
  classifier_std: float = 0.01  # Of the classifier's initial weights.

  @property
  def num_features(self) -> int:
    """What enters the classifier."""
    last = self.final_conv or self.blocks[-1].convs[-1]
    return last.channels


def in_evaluation(plan: Plan) -> Plan:
  """Without what counts in training alone: two are equal that compute alike."""
  blocks = (block._replace(stochdepth_rate=0.0) for block in plan.blocks)
  return plan._replace(drop_rate=0.0, blocks=tuple(blocks), classifier_std=0.0)


class Place(NamedTuple):
  """Where in a network a block is, and the numbers that follow from it."""

  index: int
  stage: int  # From 1.
  is_first: bool  # Of its stage.
  beta: float  # See Block, as the rate.
  stochdepth_rate: float


def places(row) -> Iterator[Place]:
  """Of all blocks of a row of any family's table.

  The expected variance of a block's input grows by alpha² per block; a
  transition's shortcut starts from a normalised input and so resets it to 1
  first.
  """
  index, variance = 0, 1.0
  for stage, num in enumerate(row.depth, start=1):
    for i in range(num):
      rate = row.stochdepth_rate * index / sum(row.depth)
      yield Place(index, stage, i == 0, 1 / math.sqrt(variance), rate)
      variance = (variance if i else 1.0) + row.alpha**2
      index += 1


def block_name(prefix: str, index: int) -> str:
  """As Haiku numbers modules of one name."""
  return f"{prefix}_{index}" if index else prefix


def round_to(value: float, multiple: int, *, limit: float = 0.9) -> int:
  """The nearest multiple, but not below `limit` of the value; 1: cut off."""
  if multiple == 1:
    return max(1, int(value))
  rounded = max(multiple, int(value + multiple / 2) // multiple * multiple)
  return rounded + multiple if rounded < limit * value else rounded


def squeeze_excite(
  channels: int, ratio: float, *, is_in_middle: bool, multiple: int = 1
) -> Attention | None:
  """Squeeze-and-excitation of a hidden width in proportion; 0 is none."""
  if not ratio:
    return None
  hidden = round_to(channels * ratio, multiple, limit=0)
  return Attention("se", channels, hidden, is_in_middle)


def efficient_attention(channels: int, *, is_in_middle: bool) -> Attention:
  """ECA (arXiv:1910.03151), whose taps grow with the channels' logarithm."""
  taps = int(abs(math.log2(channels) + 1) / 2)
  return Attention("eca", channels, max(3, taps | 1), is_in_middle)


def check(row, columns: tuple[str, ...]) -> None:
  """Raises `InputError` for what no row of any family's table can have.

  Args:
    row: A row.
    columns: Those that have an entry for each stage.
  """
  num_stages = len(row.depth)
  for column in columns:
    if len(getattr(row, column)) != num_stages:
      raise InputError(
        f"{column}={getattr(row, column)} has {len(getattr(row, column))} "
        f"entries, but depth={row.depth} has {num_stages} stages: give one "
        "entry per stage"
      )
  if num_stages == 0 or min(row.depth) < 1 or min(row.width) < 2:
    raise InputError(
      f"depth={row.depth} with width={row.width}: every stage needs at least "
      "one block and two channels"
    )
  for column in ("drop_rate", "stochdepth_rate"):
    if not 0 <= getattr(row, column) < 1:
      raise InputError(f"{column}={getattr(row, column)} is not in [0, 1)")
  for column in ("train_size", "test_size"):
    if not getattr(row, column) > 0:
      raise InputError(f"{column}={getattr(row, column)} is not positive")
  if row.se_ratio < 0:
    raise InputError(f"se_ratio={row.se_ratio} is negative; 0 leaves it out")
  if row.activation not in layers.ACTIVATIONS:
    raise unknown("activation", row.activation, layers.ACTIVATIONS)
  if row.padding not in PADDINGS:
    raise unknown("padding", row.padding, PADDINGS)


def stages(plan: Plan) -> list[list[int]]:
  """The indices of each stage's blocks."""
  indices = range(len(plan.blocks))
  key = lambda i: plan.blocks[i].stage
  return [list(group) for _, group in itertools.groupby(indices, key)]


def runs(plan: Plan, indices: list[int]) -> list[list[int]]:
  """Consecutive blocks of one shape, which differ in nothing but numbers."""

  def shape(i: int) -> Block:
    return plan.blocks[i]._replace(name="", beta=0, stochdepth_rate=0)

  return [list(group) for _, group in itertools.groupby(indices, shape)]


def shapes(plan: Plan, num_classes: int) -> Shapes:
  """Every parameter's shape, by module and name."""
  found: Shapes = {}
  for module, conv in modules(plan):
    size = conv.kernel_size
    found[module] = {
      "w": (size, size, conv.in_channels // conv.groups, conv.channels),
      "gain": (conv.channels,),
      "bias": (conv.channels,),
    }
  for block in plan.blocks:
    path = f"{plan.name}/~/{block.name}"
    found[path] = {"skip_gain": ()}
    if (gate := block.attention) is None:
      continue
    if gate.kind == "eca":
      found[f"{path}/~/eca"] = {"w": (gate.size,)}
    else:
      path += "/~/squeeze_excite/~/linear"
      channels, hidden = gate.channels, gate.size
      found[path] = {"w": (channels, hidden), "b": (hidden,)}
      found[f"{path}_1"] = {"w": (hidden, channels), "b": (channels,)}
  features = plan.num_features
  found[f"{plan.name}/~/linear"] = {
    "w": (features, num_classes),
    "b": (num_classes,),
  }
  return found


def modules(plan: Plan) -> Iterator[tuple[str, Conv]]:
  """Every convolution with the full name of its module."""
  for conv in plan.stem:
    yield f"{plan.name}/~/{conv.name}", conv
  for block in plan.blocks:
    for conv in (*block.convs, *filter(None, [block.shortcut])):
      yield f"{plan.name}/~/{block.name}/~/{conv.name}", conv
  if plan.final_conv is not None:
    yield f"{plan.name}/~/{plan.final_conv.name}", plan.final_conv


def count_params(plan: Plan, num_classes: int) -> int:
  """Number of trainable scalars."""
  return sum(
    math.prod(shape)
    for values in shapes(plan, num_classes).values()
    for shape in values.values()
  )


def count_macs(plan: Plan, num_classes: int, size: int) -> float:
  """Multiply-accumulates for one image of size x size pixels.

  Counted as in the paper ("#FLOPs" of Table 3): convolutions, attention and
  classifier; no biases, activations or weight standardisation.
  """
  total, positions = 0.0, float(size * size)
  for conv in plan.stem:
    positions /= conv.stride**2
    total += positions * conv.channels * conv.fan_in
  if plan.has_stem_pool:
    positions /= 4
  for block in plan.blocks:
    before, positions = positions, positions / block.stride**2
    for i, conv in enumerate(block.convs):
      total += (positions if i else before) * conv.channels * conv.fan_in
    if block.shortcut is not None:
      total += positions * block.shortcut.channels * block.shortcut.fan_in
    if (gate := block.attention) is not None:
      per_channel = gate.size if gate.kind == "eca" else 2 * gate.size
      total += gate.channels * per_channel
  if (final := plan.final_conv) is not None:
    total += positions * final.channels * final.fan_in
  return total + plan.num_features * num_classes


def stage_of(plan: Plan, module: str) -> str:
  """Part of the network that a module is in: stem, stage1 ..., or head."""
  if found := re.search(r"/(nf\w*_block(?:_\d+)?)(?:/|$)", module):
    name = found[1]
    return next(f"stage{b.stage}" for b in plan.blocks if b.name == name)
  is_stem = any(module.endswith(f"/{conv.name}") for conv in plan.stem)
  return "stem" if is_stem else "head"


def is_classifier(module: str) -> bool:
  """Whether it is the last layer."""
  return "linear" in module and "squeeze_excite" not in module
