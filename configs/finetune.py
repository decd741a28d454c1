"""Fine-tuning on ImageNet after large-scale pre-training (2102.06171, A.5).

    nfnets train --config=configs/finetune.py:imagenet \\
      --config.init_from=PRETRAINED/weights.safetensors \\
      --config.data.dir=TFDS_DATA_DIR --workdir=WORKDIR

The classifier is new where the weights have other classes. 15,000 steps of
2,048 images at a peak learning rate of 0.1, 5,000 of them warm-up, with SAM,
dropout and stochastic depth; the paper finds results without these similar.

Expected top-1 (Table 5): F4 and F4+ 89.2 after JFT-300M. Those weights were
never released, so this is not run here. Not stated in the paper: augmentation,
taken as crop and flip; label smoothing, as in the ImageNet recipe; the image
size, the variant's own. `--config.model.name` chooses another network.
"""

from ml_collections import ConfigDict

from configs import base
from nfnets.errors import unknown

VARIANTS = ("imagenet",)


def get_config(variant: str = "imagenet") -> ConfigDict:
  """The recipe for one kind of data."""
  if variant not in VARIANTS:
    raise unknown("variant", variant, VARIANTS)
  config = base.get_config()
  config.model.name = "nfnet_f4"
  config.model.drop_rate = 0.25
  config.model.stochdepth_rate = 0.1

  config.data.source = "tfds"
  config.data.tfds_name = "imagenet2012"

  config.augment.mixup_alpha = 0.0
  config.augment.cutmix = False
  config.augment.randaugment_layers = 0

  config.train.batch_size = 2048
  config.train.steps = 15_000
  config.optim.lr_per_256 = 0.1 * 256 / 2048  # 0.1 whatever the batch size.
  config.optim.warmup_steps = 5000
  config.optim.weight_decay = 1e-5
  config.optim.sam_rho = 0.05
  return config
