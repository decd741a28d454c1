"""NF-ResNets: pre-activation ResNets without normalisation (2101.08692)."""

from typing import NamedTuple

from nfnets.errors import InputError
from nfnets.models import plan as plans
from nfnets.models.plan import (
  Block,
  Conv,
  Plan,
  block_name,
  places,
  squeeze_excite,
)

NAME = "NF_ResNet"


class Variant(NamedTuple):
  """One row of the table; every column can be overridden by name."""

  depth: tuple[int, ...]  # Blocks in each of the stages.
  width: tuple[int, ...] = (256, 512, 1024, 2048)  # Channels of each stage.
  drop_rate: float = 0.25  # Dropout before the classifier, in training.
  train_size: int = 224  # Training image side, pixels.
  test_size: int = 224  # Evaluation image side, pixels.
  randaugment_magnitude: int = 0  # None was published.
  bottleneck_ratio: float = 0.25
  stem_width: int = 64
  se_ratio: float = 0.0  # Squeeze-excite hidden / channels; 0 leaves it out.
  alpha: float = 0.2  # Scale of the residual branch.
  stochdepth_rate: float = 0.1  # A block's is this x index / num_blocks.
  activation: str = "relu"
  pooled_shortcut: bool = False  # Average before it, or a strided convolution.
  padding: str = "same"  # Or "symmetric", as PyTorch pads.


VARIANTS: dict[str, Variant] = {
  "nf_resnet50": Variant((3, 4, 6, 3)),
  "nf_resnet101": Variant((3, 4, 23, 3)),
  "nf_resnet152": Variant((3, 8, 36, 3)),
  "nf_resnet200": Variant((3, 24, 36, 3)),
  "nf_resnet288": Variant((24, 24, 24, 24)),
}

# As PyTorch Image Models has them.
_TIMM = {
  "pooled_shortcut": True,
  "padding": "symmetric",
  "train_size": 256,
  "test_size": 288,
}
VARIANTS |= {
  f"timm_nf_resnet{num}": Variant(depth, **_TIMM)
  for num, depth in ((26, (2, 2, 2, 2)), (50, (3, 4, 6, 3)))
} | {"timm_nf_resnet101": Variant((3, 4, 23, 3), **_TIMM)}


def check(row: Variant) -> None:
  """Raises `InputError` for a row that describes no network."""
  plans.check(row, ("width",))
  if int(min(row.width) * row.bottleneck_ratio) < 1 or row.stem_width < 1:
    raise InputError(
      f"bottleneck_ratio={row.bottleneck_ratio} of width={row.width}, "
      f"stem_width={row.stem_width}: no channels are left"
    )


def plan(row: Variant) -> Plan:
  """The layers of a row."""
  channels = row.stem_width
  stem = (Conv("initial_conv", 3, channels, 7, 2),)
  blocks = []
  for place in places(row):
    new = row.width[place.stage - 1]
    width = int(new * row.bottleneck_ratio)
    stride = 2 if place.is_first and place.index else 1
    shortcut = None
    if stride > 1 or new != channels:
      step = 1 if row.pooled_shortcut else stride
      shortcut = Conv("conv_shortcut", channels, new, 1, step)
    blocks.append(
      Block(
        name=block_name("nf_res_block", place.index),
        stage=place.stage,
        beta=place.beta,
        stochdepth_rate=place.stochdepth_rate,
        convs=(
          Conv("conv0", channels, width),
          Conv("conv1", width, width, 3, stride),
          Conv("conv2", width, new),
        ),
        shortcut=shortcut,
        attention=squeeze_excite(new, row.se_ratio, is_in_middle=False),
        is_pooled=row.pooled_shortcut,
      )
    )
    channels = new
  return Plan(
    name=NAME,
    stem=stem,
    has_stem_pool=True,
    blocks=tuple(blocks),
    final_conv=None,
    alpha=row.alpha,
    activation=row.activation,
    drop_rate=row.drop_rate,
    padding=row.padding,
  )
