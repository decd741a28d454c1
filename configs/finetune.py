"""Fine-tuning: on a folder of one's own images, a TFDS set, or ImageNet.

    nfnets train --config=configs/finetune.py:folder \\
      --config.init_from=dm_nfnet_f0 --config.data.dir=photos --workdir=WORKDIR

`folder` and `tfds` are for small sets: the network, its image size and its
preprocessing are those of the weights, the classifier is new where the classes
are. AGC with the larger threshold that small batches want, the classifier
unclipped; light augmentation; the best weights on the held-out part are kept
and the run ends when eight evaluations brought nothing better. When images or
classes are added to the folder, the same command goes on from the last weights
in another round. `--config.optim.frozen=stem,stage1,stage2` trains the rest
alone; `--config.data.train_size=...` takes another resolution;
`--config.train.precision=bfloat16` is for accelerators, and for processors with
AMX. Small sets have no published number to expect: the README shows a
run on digits.

    nfnets train --config=configs/finetune.py:imagenet \\
      --config.init_from=PRETRAINED/weights.safetensors \\
      --config.data.dir=TFDS_DATA_DIR --workdir=WORKDIR

is 2102.06171, appendix A.5, after large-scale pre-training: 15,000 steps of
2,048 images at a peak learning rate of 0.1 (scaled with another batch size, as
everywhere), 5,000 of them warm-up, with SAM, dropout and stochastic depth; the
paper finds results without these similar.
Expected top-1 (Table 5): F4 and F4+ 89.2 after JFT-300M. Those weights were
never released, so this is not run here. Not stated in the paper: augmentation,
taken as crop and flip; label smoothing, as in the ImageNet recipe; the image
size, the variant's own. `--config.model.name` chooses another network; F4+ of
the pre-training recipe is `--config.model.name=nfnet_f4_plus
--config.model.group_width=192,128,128,128`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base
from nfnets.errors import unknown

VARIANTS = ("folder", "tfds", "imagenet")


def get_config(variant: str = "folder") -> ConfigDict:
  """The recipe for one kind of data."""
  if variant not in VARIANTS:
    raise unknown("variant", variant, VARIANTS)
  config = base.get_config()
  config.augment.mixup_alpha = 0.0
  config.augment.cutmix = False
  config.augment.randaugment_layers = 0
  return _imagenet(config) if variant == "imagenet" else _small(config, variant)


def _small(config: ConfigDict, source: str) -> ConfigDict:
  config.model.name = placeholder(str)
  config.model.drop_rate = 0.2
  config.model.stochdepth_rate = 0.1

  config.data.source = source
  config.data.grows = source == "folder"
  config.data.min_area = 0.35
  config.data.eval_crop = placeholder(str)
  config.data.eval_margin = placeholder(int)
  config.data.mean = placeholder(tuple)
  config.data.std = placeholder(tuple)

  config.train.epochs = 30.0
  config.train.batch_size = 32
  config.train.precision = "float32"
  config.train.patience = 8

  config.optim.lr_per_256 = 0.1
  config.optim.warmup_epochs = 1.0
  config.optim.agc_clipping = 0.16  # 0.01 is for batches from 1,024 on.
  config.optim.ema_decay = 0.99

  config.eval.batch_size = 64
  config.eval.every_epochs = 1.0
  config.log_every_steps = 10
  config.checkpoint_every_steps = 100
  return config


def _imagenet(config: ConfigDict) -> ConfigDict:
  config.model.name = "nfnet_f4"
  config.model.drop_rate = 0.25
  config.model.stochdepth_rate = 0.1

  config.data.source = "tfds"
  config.data.tfds_name = "imagenet2012"

  config.train.batch_size = 2048
  config.train.steps = 15_000
  config.optim.lr_per_256 = 0.1 * 256 / 2048  # 0.1 for 2,048 images.
  config.optim.warmup_steps = 5000
  config.optim.weight_decay = 1e-5
  config.optim.sam_rho = 0.05
  return config
