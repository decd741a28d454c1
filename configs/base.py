"""Every setting that a run has, with its unit and what None means.

A recipe starts from these values (those of the paper's Appendix A wherever it
gives one, batch size 4096 for TPU pods included) and changes some. Derived
values (learning rate, steps, image sizes) are worked out after overrides from
the command line, so store here only what a person decides.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """The base of all recipes."""
  config = ConfigDict()

  # Of the initial weights, dropout, stochastic depth, augmentation, data order.
  config.seed = 0
  # Weights to start from: a file, a workdir or a published name (dm_nfnet_f0).
  # Of its classifier the rows of classes with the same name are kept.
  config.init_from = placeholder(str)

  config.model = ConfigDict()
  # `nfnets info` lists them; None: that of init_from, with its columns.
  config.model.name = "nfnet_f0"
  # Columns of the variant table; None: as the table has it.
  config.model.depth = placeholder(tuple)  # Blocks per stage.
  config.model.width = placeholder(tuple)  # Channels per stage.
  # Of NFNets the next three have a number for each stage, or for each
  # convolution of the stem but its last; of other families one number.
  config.model.group_width = placeholder(object)  # Channels per group.
  config.model.bottleneck_ratio = placeholder(object)
  config.model.stem_width = placeholder(object)
  config.model.second_conv = placeholder(bool)  # Second 3x3 in each block.
  config.model.se_ratio = placeholder(float)  # Squeeze-excite; 0: none.
  config.model.alpha = placeholder(float)  # Scale of the residual branch.
  config.model.activation = placeholder(str)
  config.model.final_conv_ratio = placeholder(float)
  config.model.drop_rate = placeholder(float)  # Before the classifier.
  config.model.stochdepth_rate = placeholder(float)  # x index / blocks.

  config.data = ConfigDict()
  # A name in nfnets/data/sources.py: digits, folder, synthetic, tfds.
  config.data.source = "digits"
  config.data.dir = placeholder(str)  # Where it is, unless part of a package.
  config.data.tfds_name = placeholder(str)  # Of a TFDS set: imagenet2012.
  # Of a TFDS set, in the paper's words: train_and_valid is all training images,
  # valid the first 10,000 of them, train the rest, test ImageNet's validation
  # set. (Of a set that has both, `test` and `validation` are its own.)
  # To test on valid, train on train.
  config.data.train_split = "train_and_valid"
  config.data.test_split = "test"
  # Share of the images for testing, where the data set does not say.
  config.data.held_out_share = 0.2
  # Whether images may be added between runs: whenever there are new ones, the
  # same command trains another round, in a folder of its own in the workdir.
  config.data.grows = False
  config.data.num_threads = placeholder(int)  # That decode; None: one per core.
  config.data.max_broken = 100  # Unreadable files that are skipped.
  config.data.train_size = placeholder(int)  # Pixels; None: the variant's.
  config.data.test_size = placeholder(int)  # Pixels; None: the variant's.
  # A training crop covers at least this share of the image (of image files).
  config.data.min_area = 0.08
  # How evaluation gets its square: "resize" distorts the whole image to
  # (test_size + margin)² and crops the middle (the published NFNets), "padded"
  # crops the middle in proportion and resizes it (the published ResNets).
  # Images of digits and synthetic come in their size: "resize", margin 0.
  config.data.eval_crop = "resize"
  config.data.eval_margin = 32  # Pixels.
  # Of red, green and blue over ImageNet's training set, grey levels 0 to 255.
  # These four may be None: those of init_from.
  config.data.mean = (123.675, 116.28, 103.53)
  config.data.std = (58.395, 57.12, 57.375)

  # Inside the compiled step, in this order.
  config.augment = ConfigDict()
  config.augment.flip = True  # Half of the images, left to right.
  config.augment.shift = 0.0  # Move by up to this share of the side; 0: none.
  config.augment.mixup_alpha = 0.2  # Of Beta(alpha, alpha); 0: no MixUp.
  config.augment.cutmix = True  # With both, each gets half of the batch.
  # What is mixed in: "fresh" decodes a second image for each, as the paper did;
  # "roll" takes the neighbour on the same device and decodes half as many.
  config.augment.partners = "fresh"
  config.augment.randaugment_layers = 4  # Operations per image; 0: none.
  config.augment.randaugment_magnitude = placeholder(int)  # None: variant's.
  # As the published networks were trained; False: what was meant.
  config.augment.randaugment_quirks = True

  config.train = ConfigDict()
  config.train.epochs = 360.0  # May be fractional.
  config.train.steps = placeholder(int)  # How long, instead of epochs.
  config.train.batch_size = 4096  # Images per step over all devices.
  # Micro-batches per step, to fit memory; gradients are averaged over them.
  # None: one, but on a CPU as many as are fast (devices.micro_batches; with
  # sam_rho one there too).
  config.train.accumulate = placeholder(int)
  config.train.precision = "bfloat16"  # Of activations; or float32.
  # What is computed again for the gradient, to fit memory: none of the network,
  # or all but the inputs of "blocks" or (no gain on a CPU) "stages".
  config.train.remat = "none"
  # Whether equal blocks are one loop, and their parameters fewer arrays: steps
  # of deep networks compile faster and run slower. On a CPU F7's compiles in a
  # sixth of the time and takes more memory; F0's gradient compiles and runs a
  # quarter slower (experiments/speed.md).
  config.train.scan = False
  # Train with parameters in fewer arrays; None: on GPUs. Checkpoints and
  # weights are the same.
  config.train.packed = placeholder(bool)
  config.train.label_smoothing = 0.1  # Share spread over all classes.
  # Evaluations without a better accuracy after which the run ends; its weights
  # are the best then. None: it goes on to the end.
  config.train.patience = placeholder(int)
  config.train.num_devices = placeholder(int)  # None: all there are.

  config.optim = ConfigDict()
  # Peak learning rate = lr_per_256 * batch_size / 256.
  config.optim.lr_per_256 = 0.1
  config.optim.warmup_epochs = 5.0  # Linear from 0; then a half cosine to 0.
  config.optim.warmup_steps = placeholder(int)  # Instead of warmup_epochs.
  config.optim.momentum = 0.9  # Nesterov's.
  config.optim.weight_decay = 2e-5  # Coupled; not on gains and biases.
  config.optim.agc_clipping = 0.01  # Lambda of AGC; 0: no clipping.
  config.optim.agc_eps = 1e-3  # Floor of the weight norms in AGC.
  # Of the averaged weights, per step; 0: no average, they are the raw ones.
  config.optim.ema_decay = 0.99999
  # Radius of sharpness-aware minimisation; 0: none. Each device climbs by the
  # first images of its own (micro-)batch, this share of them: 6 of 32 images in
  # the paper. What is logged of a step is what the climbed weights give.
  config.optim.sam_rho = 0.0
  config.optim.sam_share = 0.2

  # Parts that keep their weights, with commas: stem,stage1. See `nfnets info`.
  config.optim.frozen = ""

  config.eval = ConfigDict()
  # Images at once over all devices, at most: on a CPU those that are fast.
  config.eval.batch_size = 1024
  config.eval.every_epochs = 5.0  # And once at the end.

  config.log_every_steps = 100  # Rows of metrics.jsonl and TensorBoard.
  config.checkpoint_every_steps = 1000  # And at the end or on Ctrl-C.
  config.keep_checkpoints = 3  # The newest that are kept.

  return config.lock()  # So that a recipe cannot set a key that is not here.
