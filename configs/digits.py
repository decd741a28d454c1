"""Handwritten digits on a laptop: the first run.

Trains a small NFNet on scikit-learn's 1,437 training digits (8 x 8 scans
enlarged to 32 px), with the optimiser and the step of the large networks.

    nfnets train --config=configs/digits.py

Cost: about a minute on 2 CPU cores. Expect at least 98.5 % on the 360 held-out
digits, by the trained weights and by their average.

`configs/digits.py:MODEL` trains another row of the variant table on them.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(model: str = "nfnet_tiny") -> ConfigDict:
  """The recipe, for any row of the variant table."""
  config = base.get_config()
  config.model.name = model

  config.data.source = "digits"
  config.data.train_size = 32
  config.data.test_size = 32
  config.data.eval_margin = 0  # A digit fills its image.
  # Measured over the training digits; the three colours are equal.
  config.data.mean = (78.7, 78.7, 78.7)
  config.data.std = (89.2, 89.2, 89.2)

  config.augment.flip = False  # A mirrored digit is none.
  config.augment.shift = 0.125  # 4 of 32 pixels.
  config.augment.mixup_alpha = 0.0
  config.augment.cutmix = False
  config.augment.randaugment_layers = 0

  config.train.epochs = 10.0
  config.train.batch_size = 64
  config.train.precision = "float32"

  config.optim.lr_per_256 = 2.0
  config.optim.warmup_epochs = 1.0
  # In so few steps the usual 1e-3 would leave skip gains near zero, where
  # branches add nothing; 1 is the norm of a fresh kernel's unit.
  config.optim.agc_eps = 1.0
  config.optim.ema_decay = 0.99  # 224 steps are too few for 0.99999.

  config.eval.batch_size = 360
  config.eval.every_epochs = 2.0

  config.log_every_steps = 5
  config.checkpoint_every_steps = 100
  return config
