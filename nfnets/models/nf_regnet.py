"""NF-RegNet-B0 to B5: narrow, deep networks (arXiv:2101.08692, appendix).

Against NFNets: the bottleneck expands (from the block's input), squeeze-excite
is in its middle, the stem is one convolution, every stage halves the image.
"""

from collections.abc import Iterator
from typing import NamedTuple

from nfnets.errors import InputError
from nfnets.models import plan as plans
from nfnets.models.plan import (
  Block,
  Conv,
  Place,
  Plan,
  block_name,
  places,
  round_to,
  squeeze_excite,
)

NAME = "NF_RegNet"


class Variant(NamedTuple):
  """One row of the table; every column can be overridden by name."""

  depth: tuple[int, ...]  # Blocks in each of the stages.
  width: tuple[int, ...]  # Channels of each stage, before width_ratio.
  drop_rate: float  # Dropout before the classifier, in training.
  train_size: int  # Training image side, pixels.
  test_size: int  # Evaluation image side, pixels.
  randaugment_magnitude: int = 0  # None was published.
  width_ratio: float = 0.75
  expansion: float = 2.25  # Bottleneck / input channels; 1 in the first block.
  group_width: int = 8  # Channels per group.
  se_ratio: float = 0.5  # Squeeze-excite hidden / bottleneck; 0 leaves it out.
  alpha: float = 0.2  # Scale of the residual branch.
  stochdepth_rate: float = 0.1  # A block's is this x index / num_blocks.
  activation: str = "silu"
  final_channels: int = 1280  # Per 440 channels of the last stage.
  multiple: int = 1  # Channels are rounded to multiples of this.
  padding: str = "same"  # Or "symmetric", as PyTorch pads.


_B0_WIDTH = (48, 104, 208, 440)

VARIANTS: dict[str, Variant] = {
  "nf_regnet_b0": Variant((1, 3, 6, 6), _B0_WIDTH, 0.2, 192, 224),
  "nf_regnet_b1": Variant((2, 4, 7, 7), _B0_WIDTH, 0.2, 224, 256),
  "nf_regnet_b2": Variant((2, 4, 8, 8), (56, 112, 232, 488), 0.3, 240, 272),
  "nf_regnet_b3": Variant((2, 5, 9, 9), (56, 128, 248, 528), 0.3, 288, 320),
  "nf_regnet_b4": Variant((2, 6, 11, 11), (64, 144, 288, 616), 0.4, 320, 384),
  "nf_regnet_b5": Variant((3, 7, 14, 14), (80, 168, 336, 704), 0.4, 384, 456),
}

# As PyTorch Image Models has them: channels in eights, its padding, its sizes.
_TIMM_SIZES = ((192, 256), (256, 288), (240, 272), (288, 320), (320, 384))
VARIANTS |= {
  f"timm_{name}": row._replace(
    train_size=train, test_size=test, multiple=8, padding="symmetric"
  )
  for (name, row), (train, test) in zip(
    VARIANTS.items(), (*_TIMM_SIZES, (384, 456)), strict=True
  )
}


def check(row: Variant) -> None:
  """Raises `InputError` for a row that describes no network."""
  plans.check(row, ("width",))
  for column in (
    "width_ratio",
    "expansion",
    "group_width",
    "final_channels",
    "multiple",
  ):
    if not getattr(row, column) > 0:
      raise InputError(f"{column}={getattr(row, column)} is not positive")
  for place, channels, _ in _blocks(row):
    if (wide := _bottleneck(row, place, channels)) < row.group_width:
      raise InputError(
        f"stage {place.stage}: a bottleneck of {wide} channels, of {channels} "
        "that come in, has no room for one group of group_width "
        f"{row.group_width}: lower that, or raise width or expansion"
      )


def _channels(row: Variant, channels: float) -> int:
  return round_to(channels * row.width_ratio, row.multiple)


def _blocks(row: Variant) -> Iterator[tuple[Place, int, int]]:
  """Each block's place, and how many channels it takes and returns."""
  channels = _channels(row, row.width[0])
  for place in places(row):
    new = _channels(row, row.width[place.stage - 1])
    yield place, channels, new
    channels = new


def _bottleneck(row: Variant, place: Place, channels: int) -> int:
  """Channels in a block's middle, before they are cut to whole groups."""
  expansion = row.expansion if place.index else 1
  return round_to(channels * expansion, row.multiple)


def plan(row: Variant) -> Plan:
  """The layers of a row."""
  stem = (Conv("initial_conv", 3, _channels(row, row.width[0]), 3, 2),)
  blocks = []
  for place, channels, new in _blocks(row):
    groups = _bottleneck(row, place, channels) // row.group_width
    width = groups * row.group_width
    stride = 2 if place.is_first else 1
    is_projected = stride > 1 or new != channels
    blocks.append(
      Block(
        name=block_name("nf_block", place.index),
        stage=place.stage,
        beta=place.beta,
        stochdepth_rate=place.stochdepth_rate,
        convs=(
          Conv("conv0", channels, width),
          Conv("conv1", width, width, 3, stride, groups),
          Conv("conv2", width, new),
        ),
        shortcut=Conv("conv_shortcut", channels, new) if is_projected else None,
        attention=squeeze_excite(
          width, row.se_ratio, is_in_middle=True, multiple=row.multiple
        ),
        is_pooled=True,
      )
    )
  features = row.final_channels * row.width[-1] // 440
  return Plan(
    name=NAME,
    stem=stem,
    has_stem_pool=False,
    blocks=tuple(blocks),
    final_conv=Conv("final_conv", new, _channels(row, features)),
    alpha=row.alpha,
    activation=row.activation,
    drop_rate=row.drop_rate,
    padding=row.padding,
    classifier_std=0.0,
  )
