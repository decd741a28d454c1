"""NF-RegNet-B0 to B5: narrow, deep networks (arXiv:2101.08692, appendix).

Against NFNets: the bottleneck expands (from the block's input), squeeze-excite
is in its middle, the stem is one convolution, every stage halves the image.
"""

from typing import NamedTuple

from nfnets import layers
from nfnets.errors import InputError, unknown
from nfnets.models.plan import (
  PADDINGS,
  Block,
  Conv,
  Plan,
  betas,
  block_name,
  check_stages,
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
  randaugment_magnitude: int = 0
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
  check_stages(row, ("width",))
  if row.activation not in layers.ACTIVATIONS:
    raise unknown("activation", row.activation, layers.ACTIVATIONS)
  if row.padding not in PADDINGS:
    raise unknown("padding", row.padding, PADDINGS)
  for column in ("width_ratio", "expansion", "group_width", "final_channels"):
    if not getattr(row, column) > 0:
      raise InputError(f"{column}={getattr(row, column)} is not positive")
  if row.multiple < 1 or row.se_ratio < 0:
    raise InputError(
      f"multiple={row.multiple}, se_ratio={row.se_ratio}: multiple is 1 or "
      "more, se_ratio 0 or more"
    )
  if _channels(row, row.width[0]) < row.group_width:
    raise InputError(
      f"width={row.width} x width_ratio {row.width_ratio} has no room for a "
      f"group of group_width {row.group_width}"
    )


def _channels(row: Variant, channels: float) -> int:
  return round_to(channels * row.width_ratio, row.multiple)


def plan(row: Variant) -> Plan:
  """The layers of a row."""
  stages = [i for i, num in enumerate(row.depth, start=1) for _ in range(num)]
  channels = _channels(row, row.width[0])
  stem = (Conv("initial_conv", 3, channels, 3, 2),)
  blocks = []
  for i, (stage, beta) in enumerate(
    zip(stages, betas(stages, row.alpha), strict=True)
  ):
    wide = round_to(channels * (row.expansion if i else 1), row.multiple)
    groups = wide // row.group_width
    width = groups * row.group_width
    new = _channels(row, row.width[stage - 1])
    stride = 2 if i == 0 or stages[i - 1] != stage else 1
    is_projected = stride > 1 or new != channels
    blocks.append(
      Block(
        name=block_name("nf_block", i),
        stage=stage,
        beta=beta,
        stochdepth_rate=row.stochdepth_rate * i / len(stages),
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
    channels = new
  features = row.final_channels * row.width[-1] // 440
  return Plan(
    name=NAME,
    stem=stem,
    has_stem_pool=False,
    blocks=tuple(blocks),
    final_conv=Conv("final_conv", channels, _channels(row, features)),
    alpha=row.alpha,
    activation=row.activation,
    drop_rate=row.drop_rate,
    padding=row.padding,
    classifier_std=0.0,
  )
