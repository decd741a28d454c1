"""NFNet-F0 to F7: the networks of arXiv:2102.06171 (section 4, appendix C).

A family is a table, a variant is a row. `plan` turns a row into the list of
blocks, and everything else (the network, its parameter and operation counts,
the stage that a parameter belongs to) reads that list.

Shapes: N batch, H height, W width, C channels; images [N, H, W, 3].
"""

import math
import re
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets import layers
from nfnets.errors import InputError, unknown


class Variant(NamedTuple):
  """One row of the table; every column can be overridden by name."""

  depth: tuple[int, ...]  # Blocks in each of the stages.
  width: tuple[int, ...]  # Output channels of each stage.
  drop_rate: float  # Dropout before the classifier, in training.
  train_size: int  # Training image side, pixels.
  test_size: int  # Evaluation image side, pixels.
  randaugment_magnitude: int  # Of 4 RandAugment layers (Table 1).
  group_width: tuple[int, ...] = (128, 128, 128, 128)  # Channels per group.
  bottleneck_ratio: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
  stem_width: tuple[int, ...] = (16, 32, 64)  # Then half of width[0].
  second_conv: bool = True  # The second 3x3 convolution of a block.
  se_ratio: float = 0.5  # Squeeze-excite hidden / channels; 0 leaves it out.
  alpha: float = 0.2  # Scale of the residual branch.
  stochdepth_rate: float = 0.25  # A block's is this x index / num_blocks.
  activation: str = "gelu"
  final_conv_ratio: float = 2.0  # Channels of the last 1x1 / width[-1].


def _f(n: int, drop_rate: float, train: int, test: int, magnitude: int):
  """Row n of Table 1: depths are n + 1 times those of F0."""
  return Variant(
    depth=(n + 1, 2 * n + 2, 6 * n + 6, 3 * n + 3),
    width=(256, 512, 1536, 1536),
    drop_rate=drop_rate,
    train_size=train,
    test_size=test,
    randaugment_magnitude=magnitude,
  )


_F = {
  "nfnet_f0": _f(0, 0.2, 192, 256, 5),
  "nfnet_f1": _f(1, 0.3, 224, 320, 10),
  "nfnet_f2": _f(2, 0.4, 256, 352, 10),
  "nfnet_f3": _f(3, 0.4, 320, 416, 15),
  "nfnet_f4": _f(4, 0.5, 384, 512, 15),
  "nfnet_f5": _f(5, 0.5, 416, 544, 15),
  "nfnet_f6": _f(6, 0.5, 448, 576, 15),
  # Not in the paper; a row of the released code.
  "nfnet_f7": _f(7, 0.5, 480, 608, 15),
}

# The wider rows with the geometry of the released code. The paper's F4+ (527M
# parameters, 367B multiply-accumulates, Table 5) has one group of 192 channels
# in the first stage: `group_width=(192, 128, 128, 128)`.
_PLUS = {
  f"{name}_plus": row._replace(width=(384, 768, 2048, 2048))
  for name, row in _F.items()
}

# Not a published network: F0's shape at a size that learns small images on a
# laptop in minutes.
_TINY = {
  "nfnet_tiny": Variant(
    depth=(1, 2, 3, 1),
    width=(32, 64, 96, 96),
    drop_rate=0.0,
    train_size=32,
    test_size=32,
    randaugment_magnitude=0,
    group_width=(8, 8, 16, 16),
    stochdepth_rate=0.0,
  )
}

VARIANTS: dict[str, Variant] = _F | _PLUS | _TINY


class Block(NamedTuple):
  """What one residual block is, after the row has been worked out."""

  stage: int  # From 1.
  in_channels: int
  channels: int  # Output channels.
  width: int  # Channels of the bottleneck, a multiple of the group width.
  groups: int
  stride: int
  beta: float  # 1 / the analytic standard deviation of the input.
  stochdepth_rate: float

  @property
  def has_projection(self) -> bool:
    return self.stride > 1 or self.in_channels != self.channels


def check(row: Variant) -> None:
  """Raises `InputError` for a row that describes no network."""
  num_stages = len(row.depth)
  for column in ("width", "group_width", "bottleneck_ratio"):
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
  for column in ("train_size", "test_size", "final_conv_ratio"):
    if not getattr(row, column) > 0:
      raise InputError(f"{column}={getattr(row, column)} is not positive")
  if not row.stem_width or min(row.stem_width) < 1:
    raise InputError(f"stem_width={row.stem_width}: widths of 1 or more")
  if not math.isfinite(row.alpha):
    raise InputError(f"alpha={row.alpha} is not finite")
  if row.se_ratio < 0:
    raise InputError(f"se_ratio={row.se_ratio} is negative; 0 leaves it out")
  if row.activation not in layers.ACTIVATIONS:
    raise unknown("activation", row.activation, layers.ACTIVATIONS)
  stages = zip(row.width, row.bottleneck_ratio, row.group_width, strict=True)
  for stage, (width, ratio, group_width) in enumerate(stages, start=1):
    if group_width < 1 or int(width * ratio) < group_width:
      raise InputError(
        f"stage {stage}: a bottleneck of {int(width * ratio)} channels (width "
        f"{width} x bottleneck_ratio {ratio}) has no room for one group of "
        f"group_width {group_width}: lower group_width or raise the width"
      )


def plan(row: Variant) -> list[Block]:
  """The blocks of a row, in order."""
  blocks = []
  num_blocks = sum(row.depth)
  channels = row.width[0] // 2  # What the stem gives out.
  variance = 1.0
  for stage in range(len(row.depth)):
    width = row.width[stage]
    groups = int(width * row.bottleneck_ratio[stage]) // row.group_width[stage]
    for index_in_stage in range(row.depth[stage]):
      is_transition = index_in_stage == 0
      blocks.append(
        Block(
          stage=stage + 1,
          in_channels=channels,
          channels=width,
          width=groups * row.group_width[stage],
          groups=groups,
          stride=2 if is_transition and stage > 0 else 1,
          beta=1 / math.sqrt(variance),
          stochdepth_rate=row.stochdepth_rate * len(blocks) / num_blocks,
        )
      )
      channels = width
      # The variance grows by alpha² per block; a transition's shortcut starts
      # from a normalised input and so resets it to 1 first.
      variance = (1.0 if is_transition else variance) + row.alpha**2
  return blocks


class NFBlock(hk.Module):
  """`shortcut + alpha * skip_gain * f(x * beta)`, figure 1 of the paper."""

  def __init__(self, block: Block, row: Variant, name: str | None = None):
    super().__init__(name=name)
    self.block, self.alpha = block, row.alpha
    self.activation = layers.ACTIVATIONS[row.activation]
    conv, width, groups = layers.WSConv2D, block.width, block.groups
    self.conv0 = conv(width, 1, name="conv0")
    self.conv1 = conv(
      width, 3, stride=block.stride, groups=groups, name="conv1"
    )
    if row.second_conv:
      self.conv1b = conv(width, 3, groups=groups, name="conv1b")
    else:
      self.conv1b = None
    self.conv2 = conv(block.channels, 1, name="conv2")
    if block.has_projection:
      self.conv_shortcut = conv(block.channels, 1, name="conv_shortcut")
    if row.se_ratio:
      self.squeeze_excite = layers.SqueezeExcite(block.channels, row.se_ratio)
    else:
      self.squeeze_excite = None

  def __call__(
    self, x: jax.Array, *, is_training: bool
  ) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, in_channels] -> [N, H / stride, W / stride, channels].

    Also returns the mean channel variance of the residual branch, a scalar.
    """
    act = self.activation
    out = act(x) * self.block.beta

    shortcut = x
    if self.block.has_projection:
      pooled = layers.average_pool(out) if self.block.stride > 1 else out
      shortcut = self.conv_shortcut(pooled)

    out = self.conv0(out)
    out = self.conv1(act(out))
    if self.conv1b is not None:
      out = self.conv1b(act(out))
    out = self.conv2(act(out))
    if self.squeeze_excite is not None:
      out = out * self.squeeze_excite(out) * 2  # 2: the gate starts near 1/2.
    residual_variance = jnp.mean(jnp.var(out.astype(jnp.float32), (0, 1, 2)))

    out = layers.stochastic_depth(
      out, self.block.stochdepth_rate, is_training=is_training
    )
    # SkipInit: every block starts as its shortcut.
    skip_gain = hk.get_parameter("skip_gain", (), jnp.float32, jnp.zeros)
    out = shortcut + out * (self.alpha * skip_gain).astype(out.dtype)
    return out, residual_variance


class NFNet(hk.Module):
  """The network of one row."""

  def __init__(self, row: Variant, num_classes: int, name: str = "NFNet"):
    super().__init__(name=name)
    conv = layers.WSConv2D
    self.row = row
    self.activation = layers.ACTIVATIONS[row.activation]
    self.stem = [
      conv(width, 3, stride=stride, name=f"stem_conv{i}")
      for i, (width, stride) in enumerate(stem_plan(row))
    ]
    self.blocks = [NFBlock(block, row, name="nf_block") for block in plan(row)]
    self.final_conv = conv(final_width(row), 1, name="final_conv")
    self.classifier = hk.Linear(
      num_classes,
      w_init=hk.initializers.RandomNormal(stddev=0.01),
      name="linear",
    )

  def __call__(
    self,
    images: jax.Array,
    *,
    is_training: bool,
    return_metrics: bool = False,
  ) -> dict[str, jax.Array]:
    """Classifies normalised images [N, H, W, 3], float32 or bfloat16.

    Returns:
      `logits` [N, num_classes] and `pool` [N, features], both float32. With
      `return_metrics` also the signal propagation of each block:
      `avg_sq_mean_i` and `avg_var_i` (0 is the stem), `res_avg_var_i`.
    """
    outputs = {}
    x = images
    for i, conv in enumerate(self.stem):
      x = conv(self.activation(x) if i else x)
    if return_metrics:
      outputs.update(layers.signal_metrics(x, 0))

    for i, block in enumerate(self.blocks):
      x, residual_variance = block(x, is_training=is_training)
      if return_metrics:
        outputs.update(layers.signal_metrics(x, i + 1))
        outputs[f"res_avg_var_{i}"] = residual_variance

    x = self.activation(self.final_conv(x))
    pool = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [N, features]
    outputs["pool"] = pool
    if is_training and self.row.drop_rate:
      pool = hk.dropout(hk.next_rng_key(), self.row.drop_rate, pool)
    outputs["logits"] = self.classifier(pool)  # [N, num_classes]
    return outputs


def stem_plan(row: Variant) -> list[tuple[int, int]]:
  """(channels, stride) of each 3x3 convolution of the stem."""
  widths = [*row.stem_width, row.width[0] // 2]
  last = len(widths) - 1
  return [(w, 2 if i in (0, last) else 1) for i, w in enumerate(widths)]


def final_width(row: Variant) -> int:
  """Features that enter the classifier."""
  return int(row.final_conv_ratio * row.width[-1])


def stage_of(row: Variant, module: str) -> str:
  """Part of the network that a module is in: stem, stage1 ..., or head."""
  found = re.search(r"nf_block(?:_(\d+))?(?:/|$)", module)
  if found:
    return f"stage{plan(row)[int(found[1] or 0)].stage}"
  return "stem" if "stem_conv" in module else "head"


class _Conv(NamedTuple):
  """One convolution, for counting."""

  in_channels: int
  channels: int
  kernel_size: int
  groups: int
  positions: float  # Output height x width.

  @property
  def num_params(self) -> int:
    fan_in = self.in_channels // self.groups * self.kernel_size**2
    return (fan_in + 2) * self.channels  # w, gain, bias

  @property
  def macs(self) -> float:
    fan_in = self.in_channels / self.groups * self.kernel_size**2
    return self.positions * self.channels * fan_in


def _convolutions(row: Variant, size: int) -> list[_Conv]:
  found = []
  positions = float(size * size)
  channels = 3
  for width, stride in stem_plan(row):
    positions /= stride**2
    found.append(_Conv(channels, width, 3, 1, positions))
    channels = width
  for b in plan(row):
    before, positions = positions, positions / b.stride**2
    found.append(_Conv(b.in_channels, b.width, 1, 1, before))
    for _ in range(1 + row.second_conv):
      found.append(_Conv(b.width, b.width, 3, b.groups, positions))
    found.append(_Conv(b.width, b.channels, 1, 1, positions))
    if b.has_projection:
      found.append(_Conv(b.in_channels, b.channels, 1, 1, positions))
    channels = b.channels
  found.append(_Conv(channels, final_width(row), 1, 1, positions))
  return found


def _squeeze_weights(row: Variant) -> list[tuple[int, int]]:
  """(channels, hidden width) of every squeeze-excite."""
  if not row.se_ratio:
    return []
  return [
    (b.channels, layers.squeeze_width(b.channels, row.se_ratio))
    for b in plan(row)
  ]


def count_params(row: Variant, num_classes: int) -> int:
  """Number of trainable scalars."""
  convolutions = sum(c.num_params for c in _convolutions(row, 1))
  gates = sum(2 * c * h + c + h for c, h in _squeeze_weights(row))
  skip_gains = sum(row.depth)
  classifier = (final_width(row) + 1) * num_classes
  return convolutions + gates + skip_gains + classifier


def count_macs(row: Variant, num_classes: int, size: int) -> float:
  """Multiply-accumulates for one image of size x size pixels.

  Counted as in the paper ("#FLOPs" of Table 3): convolutions, squeeze-excite
  and classifier; no biases, activations or weight standardisation.
  """
  convolutions = sum(c.macs for c in _convolutions(row, size))
  gates = sum(2 * c * h for c, h in _squeeze_weights(row))
  return convolutions + gates + final_width(row) * num_classes
