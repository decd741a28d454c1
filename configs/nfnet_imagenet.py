"""NFNet-F0 to F7 on ImageNet, as published (arXiv:2102.06171, Appendix A).

    nfnets train --config=configs/nfnet_imagenet.py:F0 \\
      --config.data.dir=TFDS_DATA_DIR --workdir=WORKDIR

VARIANT is F0 ... F7, F0_plus ... F7_plus, F5_sam or F6_sam. Everything that
differs between variants (image sizes, dropout, RandAugment's magnitude) is in
the variant table and follows `--config.model.name` too.

| | expected top-1 (Table 3) | TPUv3 ms per step of 32 images a core |
| --- | --- | --- |
| F0 | 83.6 | 73.3 |
| F1 | 84.7 | 158.5 |
| F2 | 85.1 | 295.8 |
| F3 | 85.7 | 532.2 |
| F4 | 85.9 | 1033.3 |
| F5 | 86.0 | 1398.5 |
| F5_sam | 86.3 | 1958.0 |
| F6_sam | 86.5 | 2774.1 |

SAM climbs by a fifth of each device's images (appendix A.4), 6 of the 32 on
each core; with more on a device --config.train.accumulate = batch size / (32 x
devices) does the same. The paper does not state its radius here; 0.05 is what
it gives for fine-tuning. F6 was published with SAM only, F7 and the wider rows
not at all on ImageNet alone.

Cost: 112,602 steps of 4,096 images, about 360 epochs, each with a second 4,096
decoded to be mixed in; on 128 cores F0 needs 2.3 hours of step time, F5 44. Not
run here.
"""

from ml_collections import ConfigDict

from configs import base
from nfnets.errors import unknown

VARIANTS = (
  *(f"F{n}{plus}" for plus in ("", "_plus") for n in range(8)),
  *("F5_sam", "F6_sam"),
)


def get_config(variant: str = "F0") -> ConfigDict:
  """The recipe of one variant; its values are the base's but for SAM."""
  if variant not in VARIANTS:
    raise unknown("variant", variant, VARIANTS)
  config = base.get_config()
  config.model.name = f"nfnet_{variant.lower().removesuffix('_sam')}"
  if variant.endswith("_sam"):
    config.optim.sam_rho = 0.05
  config.data.source = "tfds"
  config.data.tfds_name = "imagenet2012"
  return config
