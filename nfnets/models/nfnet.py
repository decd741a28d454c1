"""NFNet-F0 to F7: the networks of arXiv:2102.06171 (section 4, appendix C).

A family is a table, a variant is a row; `plan` works a row out.
"""

from typing import NamedTuple

from nfnets.errors import InputError, unknown
from nfnets.models import plan as plans
from nfnets.models.plan import (
  ATTENTIONS,
  Attention,
  Block,
  Conv,
  Plan,
  block_name,
  efficient_attention,
  places,
  squeeze_excite,
)

NAME = "NFNet"


class Variant(NamedTuple):
  """One row of the table; every column can be overridden by name."""

  depth: tuple[int, ...]  # Blocks in each of the stages.
  width: tuple[int, ...]  # Output channels of each stage.
  drop_rate: float  # Dropout before the classifier, in training.
  train_size: int  # Training image side, pixels.
  test_size: int  # Evaluation image side, pixels.
  randaugment_magnitude: int  # Of 4 layers (Table 1); 0: none published.
  group_width: tuple[int, ...] = (128, 128, 128, 128)  # Channels per group.
  bottleneck_ratio: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
  stem_width: tuple[int, ...] = (16, 32, 64)  # Then half of width[0].
  second_conv: bool = True  # The second 3x3 convolution of a block.
  se_ratio: float = 0.5  # Squeeze-excite hidden / channels; 0 leaves it out.
  alpha: float = 0.2  # Scale of the residual branch.
  stochdepth_rate: float = 0.25  # A block's is this x index / num_blocks.
  activation: str = "gelu"
  final_conv_ratio: float = 2.0  # Channels of the last 1x1 / width[-1].
  attention: str = "se"  # Or "eca", which has no se_ratio.
  padding: str = "same"  # Or "symmetric", as PyTorch pads.


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

# As PyTorch Image Models has them: exact GELU, its padding. Its light networks
# have narrower bottlenecks and SiLU; all published weights of it are of those.
_TIMM = {
  f"timm_{name}": row._replace(activation="gelu_exact", padding="symmetric")
  for name, row in _F.items()
}


def _light(n: int, features: float, train: int, test: int, attention: str):
  return _f(n, 0.0, train, test, 0)._replace(
    group_width=(64, 64, 64, 64),
    bottleneck_ratio=(0.25, 0.25, 0.25, 0.25),
    se_ratio=0.25,
    stochdepth_rate=0.0,
    activation="silu",
    final_conv_ratio=features,
    attention=attention,
    padding="symmetric",
  )


_LIGHT = {
  "nfnet_l0": _light(0, 1.5, 224, 288, "se"),
  "eca_nfnet_l0": _light(0, 1.5, 224, 288, "eca"),
  "eca_nfnet_l1": _light(1, 2.0, 256, 320, "eca"),
  "eca_nfnet_l2": _light(2, 2.0, 320, 384, "eca"),
  "eca_nfnet_l3": _light(3, 2.0, 352, 448, "eca"),
}

VARIANTS: dict[str, Variant] = _F | _PLUS | _TINY | _LIGHT | _TIMM


def check(row: Variant) -> None:
  """Raises `InputError` for a row that describes no network."""
  plans.check(row, ("width", "group_width", "bottleneck_ratio"))
  if int(row.final_conv_ratio * row.width[-1]) < 1:
    raise InputError(
      f"final_conv_ratio={row.final_conv_ratio} of width={row.width}: no "
      "channels are left"
    )
  if not row.stem_width or min(row.stem_width) < 1:
    raise InputError(f"stem_width={row.stem_width}: widths of 1 or more")
  if row.attention not in ATTENTIONS:
    raise unknown("attention", row.attention, ATTENTIONS)
  stages = zip(row.width, row.bottleneck_ratio, row.group_width, strict=True)
  for stage, (width, ratio, group_width) in enumerate(stages, start=1):
    if group_width < 1 or int(width * ratio) < group_width:
      raise InputError(
        f"stage {stage}: a bottleneck of {int(width * ratio)} channels (width "
        f"{width} x bottleneck_ratio {ratio}) has no room for one group of "
        f"group_width {group_width}: lower group_width or raise the width"
      )


def plan(row: Variant) -> Plan:
  """The layers of a row."""
  stem, channels = [], 3
  widths = [*row.stem_width, row.width[0] // 2]
  for i, width in enumerate(widths):
    stride = 2 if i in (0, len(widths) - 1) else 1
    stem.append(Conv(f"stem_conv{i}", channels, width, 3, stride))
    channels = width

  blocks = []
  for place in places(row):
    stage = place.stage - 1
    new, group_width = row.width[stage], row.group_width[stage]
    groups = int(new * row.bottleneck_ratio[stage]) // group_width
    width = groups * group_width
    stride = 2 if place.is_first and place.index else 1
    convs = [
      Conv("conv0", channels, width),
      Conv("conv1", width, width, 3, stride, groups),
    ]
    if row.second_conv:
      convs.append(Conv("conv1b", width, width, 3, 1, groups))
    convs.append(Conv("conv2", width, new))
    is_projected = stride > 1 or new != channels
    blocks.append(
      Block(
        name=block_name("nf_block", place.index),
        stage=place.stage,
        beta=place.beta,
        stochdepth_rate=place.stochdepth_rate,
        convs=tuple(convs),
        shortcut=Conv("conv_shortcut", channels, new) if is_projected else None,
        attention=_attention(row, new),
        is_pooled=True,
      )
    )
    channels = new
  features = int(row.final_conv_ratio * channels)
  return Plan(
    name=NAME,
    stem=tuple(stem),
    has_stem_pool=False,
    blocks=tuple(blocks),
    final_conv=Conv("final_conv", channels, features),
    alpha=row.alpha,
    activation=row.activation,
    drop_rate=row.drop_rate,
    padding=row.padding,
  )


def _attention(row: Variant, channels: int) -> Attention | None:
  if row.attention == "eca":
    return efficient_attention(channels, is_in_middle=False)
  return squeeze_excite(channels, row.se_ratio, is_in_middle=False)
