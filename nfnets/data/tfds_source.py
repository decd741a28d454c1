"""TFDS image classification sets, ImageNet first, without TensorFlow.

Read through `tfds` data sources, which need the set prepared as `array_record`
(random access); `scripts/prepare_imagenet.sh` makes such a set or converts one.
"""

import bisect
import itertools
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nfnets.errors import InputError, unknown

# Of the training examples, the first so many are the paper's validation split.
_NUM_VALID = 10_000

# That a process lets itself open where the system sets no limit.
_MANY_FILES = 10_240

SPLITS = ("train", "train_and_valid", "valid", "validation", "test")


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
    from google.protobuf import json_format
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
    json_format.ParseError,
  ) as error:
    raise InputError(
      f"there is no prepared TFDS set {name!r} below {root}: --config.data.dir "
      f"is TFDS's data_dir{_hint(root)} "
      f"({str(error).strip().splitlines()[0]})"
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


def _hint(root: Path) -> str:
  """Which folder was meant, where one below it was given."""
  above = root.resolve().parent
  if (root / "dataset_info.json").is_file():
    return f", here {above.parent}"
  return f", here {above}" if any(root.glob("*/dataset_info.json")) else ""


def shards(builder: Any, split: str | None = None) -> list[tuple[Path, int]]:
  """The array_record files of a set, and how many examples each has.

  Of all splits, or of one with TFDS's name.
  """
  found = []
  splits = builder.info.splits
  for info in splits.values() if split is None else [splits[split]]:
    template = info.filename_template.replace(filetype_suffix="array_record")
    paths = template.sharded_filepaths(info.num_shards)
    found += zip(map(Path, paths), info.shard_lengths, strict=True)
  return found


def missing_shards(builder: Any) -> list[Path]:
  """Those of them that are not there."""
  return [path for path, _ in shards(builder) if not path.is_file()]


def damaged_shards(builder: Any, split: str | None = None) -> list[Path]:
  """Those that have another number of examples than the set says, or none."""
  from array_record.python.array_record_module import ArrayRecordReader

  def is_damaged(shard: tuple[Path, int]) -> bool:
    path, num_examples = shard
    try:
      reader = ArrayRecordReader(str(path))
      num_found = reader.num_records()
      reader.close()
    except RuntimeError:
      return True
    return num_found != num_examples

  found = shards(builder, split)
  with ThreadPoolExecutor(16) as pool:  # A file may be far away.
    damaged = list(pool.map(is_damaged, found))
  return [path for (path, _), bad in zip(found, damaged, strict=True) if bad]


def _allow_open_files(builder: Any, split: str) -> None:
  """Lets a process have all shards of TFDS's split open, as array_record does.

  Raises:
    InputError: when the system allows too few.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  most = _MANY_FILES if hard == unlimited else hard
  if soft != unlimited and soft < most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  num_shards = builder.info.splits[split].num_shards
  if hard != unlimited and hard < num_shards:
    raise InputError(
      f"{builder.data_dir} has {num_shards:,} files of {split}, which stay "
      f"open, and this process may open {hard:,} (`ulimit -Hn`): raise that "
      "limit, which the system's administrator can"
    )


def keys(builder: Any) -> tuple[str, str]:
  """Names of the image and of the label in its examples.

  Those that the set is to be trained with, where it says so and has several.

  Raises:
    InputError: unless there is one of each.
  """
  import tensorflow_datasets as tfds

  found = []
  told = builder.info.supervised_keys or ()
  for kind in (tfds.features.Image, tfds.features.ClassLabel):
    names = [n for n, f in builder.info.features.items() if type(f) is kind]
    names = [name for name in names if name in told] or names
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
  tenth, where that is less), `train` the rest, `validation` its validation
  split, and `test` its test split or, without one and of ImageNet (whose test
  labels are secret), its validation split.
  """
  if split not in SPLITS:
    raise unknown("split", split, SPLITS)
  name, splits = builder.info.name, builder.info.splits
  if split in ("validation", "test"):
    is_validation = split == "validation" or name == "imagenet2012"
    names = ("validation",) if is_validation else ("test", "validation")
    if found := [n for n in names if n in splits]:
      return found[0]
    raise InputError(
      f"{name} has no {' or '.join(names)} split (it has {', '.join(splits)}): "
      "use --config.data.test_split=valid with --config.data.train_split=train"
    )
  if "train" not in splits:
    raise InputError(
      f"{name} has no split to train on (it has {', '.join(splits)}): to "
      "evaluate on it, give --config.data.train_split=test"
    )
  num_valid = min(_NUM_VALID, max(1, splits["train"].num_examples // 10))
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
  InputError for an example that is damaged or of none of the classes, OSError
  for a file that cannot be read.

  Raises:
    InputError: when files are damaged, or too few may be open.
  """
  import tensorflow_datasets as tfds
  from google.protobuf import message
  from tensorflow_datasets.proto import tf_example_pb2

  part = slice_of(builder, split)
  whole = part.partition("[")[0]
  _allow_open_files(builder, whole)
  if not builder.info.splits[part].num_examples:
    raise InputError(f"{builder.info.name} has no examples in {part}")
  if damaged := damaged_shards(builder, whole):
    raise InputError(
      f"{builder.data_dir} has {len(damaged)} damaged files, as "
      f"{damaged[0].name}, whose examples are not those that the set should "
      "have: copy them there again"
    )
  # Parsed here: TFDS's own decoding takes 180 us per example, this 45.
  records = builder.as_data_source(
    split=part,
    deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
  )
  image_key, label_key = keys(builder)
  num_classes = builder.info.features[label_key].num_classes
  files = builder.info.splits[part].file_instructions
  ends = list(itertools.accumulate(file.take for file in files))
  suffix = builder.info.file_format.file_suffix  # A converted set has two.

  def read(index: int) -> tuple[bytes, int, str]:
    file = Path(files[bisect.bisect(ends, index)].filename).name
    file = file.replace(suffix, "array_record")
    name = f"{builder.info.name} {split} [{index}] of {file}"
    try:
      example = tf_example_pb2.Example.FromString(records[index])
      feature = example.features.feature
      image, label = (
        feature[image_key].bytes_list.value[0],
        feature[label_key].int64_list.value[0],
      )
      if not 0 <= label < num_classes:
        raise InputError(
          f"{name} has label {label}, which is none of {num_classes} classes "
          "(-1 where a test split has no labels: give "
          "--config.data.test_split=validation)"
        )
      return image, label, name
    except (IndexError, message.DecodeError) as error:
      raise InputError(f"{name} is damaged: {error}") from None
    except RuntimeError as error:  # array_record's, for all that goes wrong.
      text = f"{name}: {str(error).splitlines()[0]}"
      if "Corrupted" in text:
        raise InputError(text) from None
      raise OSError(text) from None

  return len(records), read
