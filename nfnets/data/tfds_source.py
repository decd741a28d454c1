"""TFDS image classification sets, ImageNet first, without TensorFlow.

Read through `tfds` data sources, which need the set prepared as `array_record`
(random access); `scripts/prepare_imagenet.sh` makes such a set or converts one.
"""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nfnets.errors import InputError, unknown

# Of the training examples, the first so many are the paper's validation split.
_NUM_VALID = 10_000

# That a process lets itself open where the system sets no limit.
_MANY_FILES = 10_240

SPLITS = ("train", "train_and_valid", "valid", "test")


def open_builder(root: Path, name: str) -> Any:
  """The TFDS builder of a prepared set.

  Args:
    root: TFDS's data_dir.
    name: Such as `imagenet2012` or `imagenet2012:5.1.0`.

  Raises:
    InputError: when the set is not there, prepared in another format, or
      lacks files.
  """
  try:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
  except ImportError as error:
    raise InputError(
      f"TFDS sets need packages that are missing ({error}): pip install "
      "-e '.[tfds]' in the checkout"
    ) from None
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=str(root))
  except (
    tfds.core.DatasetNotFoundError,
    FileNotFoundError,
    ValueError,
  ) as error:
    raise InputError(
      f"there is no prepared TFDS set {name!r} below {root}: --config.data.dir "
      f"is TFDS's data_dir ({str(error).strip().splitlines()[0]})"
    ) from None
  formats = [f.value for f in builder.info.available_file_formats()]
  if "array_record" not in formats:
    raise InputError(
      f"{builder.data_dir} is prepared as {formats[0]}, which has no random "
      "access: convert it once with `scripts/prepare_imagenet.sh --convert="
      f"{builder.data_dir}` (TFDS's own converter; it adds to the set)"
    )
  if missing := missing_shards(builder):
    raise InputError(
      f"{builder.data_dir} lacks {len(missing)} of its files, as "
      f"{missing[0].name}: copy them there, or, where the set was converted, "
      "go on with `scripts/prepare_imagenet.sh --convert="
      f"{builder.data_dir}`"
    )
  return builder


def shards(builder: Any) -> list[tuple[Path, int]]:
  """The array_record files of a set, and how many examples each has."""
  found = []
  for split in builder.info.splits.values():
    template = split.filename_template.replace(filetype_suffix="array_record")
    paths = template.sharded_filepaths(split.num_shards)
    found += zip(map(Path, paths), split.shard_lengths, strict=True)
  return found


def missing_shards(builder: Any) -> list[Path]:
  """Those of them that are not there."""
  return [path for path, _ in shards(builder) if not path.is_file()]


def _allow_open_files(builder: Any, split: str) -> None:
  """Lets this process have all shards of a split open, as array_record does.

  Raises:
    InputError: when the system allows too few.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  most = _MANY_FILES if hard == unlimited else hard
  if soft != unlimited and soft < most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  name = slice_of(builder, split).partition("[")[0]
  num_shards = builder.info.splits[name].num_shards
  if hard != unlimited and hard < num_shards:
    raise InputError(
      f"{builder.data_dir} has {num_shards:,} files of {name}, which stay "
      f"open, and this process may open {hard:,} (`ulimit -Hn`): raise that "
      "limit, which the system's administrator can"
    )


def keys(builder: Any) -> tuple[str, str]:
  """Names of the image and of the label in its examples.

  Raises:
    InputError: unless there is exactly one of each.
  """
  import tensorflow_datasets as tfds

  found = []
  for kind in (tfds.features.Image, tfds.features.ClassLabel):
    names = [n for n, f in builder.info.features.items() if type(f) is kind]
    if len(names) != 1:
      raise InputError(
        f"{builder.info.name} has {len(names)} features of kind "
        f"{kind.__name__}: one image and one label are needed"
      )
    found += names
  return found[0], found[1]


def slice_of(builder: Any, split: str) -> str:
  """TFDS's words for a split with the paper's name.

  `train_and_valid` is TFDS's train, `valid` its first 10,000 examples (or a
  tenth, where that is less), `train` the rest, `test` its validation split
  (ImageNet's own test labels are secret) or, without one, its test split.
  """
  if split not in SPLITS:
    raise unknown("split", split, SPLITS)
  splits = builder.info.splits
  if split == "test":
    names = [n for n in ("validation", "test") if n in splits]
    if not names:
      raise InputError(
        f"{builder.info.name} has no validation or test split (it has "
        f"{', '.join(splits)}): use --config.data.test_split=valid with "
        "--config.data.train_split=train"
      )
    return names[0]
  if "train" not in splits:
    raise InputError(
      f"{builder.info.name} has no split to train on (it has "
      f"{', '.join(splits)})"
    )
  num_valid = min(_NUM_VALID, splits["train"].num_examples // 10)
  return {
    "train_and_valid": "train",
    "train": f"train[{num_valid}:]",
    "valid": f"train[:{num_valid}]",
  }[split]


def open_split(
  builder: Any, split: str
) -> tuple[int, Callable[[int], tuple[bytes, int, str]]]:
  """How many examples a split has, and a function to read one.

  It returns the image file, the label and a name for errors, and raises
  InputError for an example that is damaged, OSError for a file that cannot be
  read.

  Raises:
    InputError: when too few files may be open.
  """
  import tensorflow_datasets as tfds
  from google.protobuf import message
  from tensorflow_datasets.proto import tf_example_pb2

  _allow_open_files(builder, split)
  # Parsed here: TFDS's own decoding takes 180 us per example, this 45.
  records = builder.as_data_source(
    split=slice_of(builder, split),
    deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
  )
  image_key, label_key = keys(builder)

  def read(index: int) -> tuple[bytes, int, str]:
    name = f"{builder.info.name} {split} [{index}]"
    try:
      example = tf_example_pb2.Example.FromString(records[index])
      feature = example.features.feature
      image, label = feature[image_key], feature[label_key]
      return image.bytes_list.value[0], label.int64_list.value[0], name
    except (IndexError, message.DecodeError) as error:
      raise InputError(f"{name} is damaged: {error}") from None
    except RuntimeError as error:  # array_record's, for all that goes wrong.
      text = f"{name}: {str(error).splitlines()[0]}"
      if "Corrupted" in text:
        raise InputError(text) from None
      raise OSError(text) from None

  return len(records), read
