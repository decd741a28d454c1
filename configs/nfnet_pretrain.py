"""Large-scale pre-training of NFNet-F4 and F4+ (2102.06171, appendix A.5).

    nfnets train --config=configs/nfnet_pretrain.py:F4_plus \\
      --config.data.dir=TFDS_DATA_DIR --config.data.tfds_name=NAME \\
      --workdir=WORKDIR

The paper's data set, JFT-300M, is not public: NAME is any large set of labelled
images prepared for TFDS as array_record. 224 px for every model, crop and flip
alone, weight decay 1e-6, no averaging of weights.

| VARIANT | epochs of JFT-300M | then fine-tuned on ImageNet, top-1 (Table 5) |
| --- | --- | --- |
| F4 | 40 | 89.2 |
| F4_plus | 20 | 89.2 |

Cost in the paper: 3,700 and 1,860 TPUv3-core-days. Not stated there, and taken
from the ImageNet recipe: label smoothing, dropout, stochastic depth. The 5,000
steps of warm-up are those that it gives for its ResNets there. F4_plus has the
paper's geometry (527M parameters), which the released code's lacks. Not run
here. Fine-tune the weights with `configs/finetune.py`.
"""

from ml_collections import ConfigDict

from configs import base
from nfnets.errors import unknown

EPOCHS = {"F4": 40.0, "F4_plus": 20.0}


def get_config(variant: str = "F4") -> ConfigDict:
  """The recipe of one variant."""
  if variant not in EPOCHS:
    raise unknown("variant", variant, EPOCHS)
  config = base.get_config()
  config.model.name = f"nfnet_{variant.lower()}"
  if variant == "F4_plus":
    config.model.group_width = (192, 128, 128, 128)

  config.data.source = "tfds"
  config.data.train_size = 224
  config.data.test_size = 224

  config.augment.mixup_alpha = 0.0
  config.augment.cutmix = False
  config.augment.randaugment_layers = 0

  config.train.epochs = EPOCHS[variant]
  config.optim.warmup_steps = 5000
  config.optim.weight_decay = 1e-6
  config.optim.ema_decay = 0.0
  config.eval.every_epochs = 1.0
  return config
