"""Makes the TFDS set that training reads, once; needs TensorFlow.

Started by prepare_imagenet.sh, in an environment that has it.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from nfnets.data import tfds_source

TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
NAME = "imagenet2012"
NUM_EXAMPLES = {"train": 1_281_167, "validation": 50_000}


def main() -> None:
  """Prepares or converts, then counts."""
  args = parse()
  if args.tars:
    builder = prepare(args.tars, args.out)
    again = (
      "compare the tar files with the checksums on image-net.org, delete "
      f"{builder.data_path} and start again"
    )
    expect(builder, args, again)
  else:
    builder = open_prepared(args.convert)
    expect(builder, args, "the set that is to be converted has no more")
    convert(builder)
    again = "delete them and start again: they are converted once more"
  check_shards(builder, again)
  say(f"done: {builder.data_path}")


def parse() -> argparse.Namespace:
  """What the user wants."""
  parser = argparse.ArgumentParser(
    prog="prepare_imagenet.sh",
    description="Makes TFDS's imagenet2012 in the array_record format, which "
    "training reads without TensorFlow: from the two tar files of "
    "image-net.org, or from a set that was prepared as tfrecord.",
    epilog="Afterwards: nfnets train --config=configs/nfnet_imagenet.py:F0 "
    "--config.data.dir=DATA_DIR",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--tars", type=Path, help=f"folder with {' and '.join(TARS)}"
  )
  source.add_argument(
    "--convert",
    type=Path,
    metavar="VERSION_DIR",
    help="folder of the prepared set, such as DATA_DIR/imagenet2012/5.1.0; "
    "the new files are written beside the old ones",
  )
  parser.add_argument(
    "--out",
    type=Path,
    help="with --tars: TFDS's data_dir for the result",
  )
  parser.add_argument(
    "--num_train",
    type=int,
    help="images that the training set should have (default for imagenet2012: "
    "1281167)",
  )
  parser.add_argument(
    "--num_validation",
    type=int,
    help="images that the validation set should have (default for "
    "imagenet2012: 50000)",
  )
  args = parser.parse_args()
  if bool(args.tars) != bool(args.out):
    parser.error("--out goes with --tars")
  return args


def prepare(tars: Path, out: Path):
  """Runs TFDS's own builder on the tar files."""
  if missing := [name for name in TARS if not (tars / name).is_file()]:
    fail(
      f"{tars} lacks {' and '.join(missing)}: download both from "
      "https://image-net.org/download-images (an account is needed) and put "
      "them there as they are, not unpacked"
    )

  import tensorflow_datasets as tfds

  builder = tfds.builder(NAME, data_dir=str(out))
  path = Path(builder.data_path)
  if (path / "dataset_info.json").is_file():
    if "array_record" not in formats_of(builder):
      fail(
        f"{path} is there already as {formats_of(builder)[0]}: convert it with "
        f"--convert={path}, or choose another --out"
      )
    say(f"{path} is there already")
    return builder
  if path.exists():
    fail(
      f"{path} is there, but no finished set (it has no dataset_info.json): "
      "move it away, or choose another --out"
    )
  for left in path.parent.glob("incomplete.*"):
    size = sum(f.stat().st_size for f in left.rglob("*") if f.is_file())
    say(
      f"{left} was left by a run that was killed: {size / 1e9:.0f} GB that can "
      "be deleted"
    )
  # The examples are sorted on disk before they reach the set.
  need_space(out, 2 * sum((tars / name).stat().st_size for name in TARS))
  builder = tfds.builder(NAME, data_dir=str(out), file_format="array_record")
  say(f"Preparing {builder.data_path} (hours for all of ImageNet) ...")
  config = tfds.download.DownloadConfig(
    manual_dir=str(tars.absolute()), try_download_gcs=False
  )
  builder.download_and_prepare(download_config=config)
  return builder


def open_prepared(version_dir: Path):
  """The set in a folder that may be written to."""
  if not (version_dir / "dataset_info.json").is_file():
    fail(
      f"{version_dir} is no prepared TFDS set (no dataset_info.json): give "
      "the folder of its version, such as DATA_DIR/imagenet2012/5.1.0"
    )
  if not os.access(version_dir, os.W_OK):
    fail(f"{version_dir} cannot be written to: copy it to where you may write")

  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(str(version_dir))


def convert(builder) -> None:
  """Adds a second format to a prepared set, or what is missing of it."""
  version_dir = Path(builder.data_path)
  if missing := tfds_source.missing_shards(builder):
    from tensorflow_datasets.scripts.cli import convert_format_utils

    for left in version_dir.glob("*incomplete.*"):
      left.unlink()  # Of a run that was killed.
    suffix = builder.info.file_format.file_suffix
    old = [
      path.with_name(path.name.replace("array_record", suffix))
      for path in missing
    ]
    if absent := [path.name for path in old if not path.is_file()]:
      fail(
        f"{version_dir} lacks {len(absent)} of its shards, as "
        f"{absent[0]}: copy them there"
      )
    need_space(version_dir, sum(path.stat().st_size for path in old))
    say(
      f"Converting {len(missing)} shards of {version_dir}; stopped, it goes on "
      "with the next shard"
    )
    convert_format_utils.convert_dataset(
      dataset_version_dir=str(version_dir.absolute()),
      out_dir=None,  # Beside the old shards: elsewhere, labels are left behind.
      out_file_format="array_record",
      num_workers=1,  # Threads of the converter hide its errors.
    )
    if missing := tfds_source.missing_shards(builder):
      fail(
        f"{len(missing)} shards were not converted (see above), as "
        f"{missing[0].name}; those that were are kept: start again"
      )
  from tensorflow_datasets.core import dataset_info

  info = dataset_info.read_proto_from_builder_dir(version_dir)
  if "array_record" not in (info.file_format, *info.alternative_file_formats):
    # A run was killed after the last shard.
    info.alternative_file_formats.append("array_record")
    dataset_info.write_dataset_info_proto(info, dataset_info_dir=version_dir)


def expect(builder, args: argparse.Namespace, again: str) -> None:
  """Compares the numbers of examples with those of the published set."""
  wanted = dict(NUM_EXAMPLES) if builder.info.name == NAME else {}
  given = {"train": args.num_train, "validation": args.num_validation}
  wanted |= {name: num for name, num in given.items() if num is not None}
  splits = builder.info.splits
  for name in dict.fromkeys([*wanted, *splits]):
    found = splits[name].num_examples if name in splits else 0
    if (expected := wanted.get(name)) is None:
      say(f"{name}: {found:,} images")
      continue
    say(f"{name}: {found:,} images, {expected:,} expected")
    if found != expected:
      fail(
        f"{builder.data_path} is not the whole of {builder.info.name}: "
        f"{again}, or say how many there should be (--num_train, "
        "--num_validation)"
      )


def check_shards(builder, again: str) -> None:
  """Compares the files with what the set says of itself."""
  damaged = [path.name for path in tfds_source.damaged_shards(builder)]
  if damaged:
    fail(
      f"{builder.data_path} has {len(damaged)} damaged or missing shards "
      f"({', '.join(damaged[:3])}{', ...' * (len(damaged) > 3)}): {again}"
    )


def formats_of(builder) -> list[str]:
  """The file formats that a set is there in."""
  formats = builder.info.available_file_formats()
  return [file_format.value for file_format in formats]


def need_space(out: Path, num_bytes: int) -> None:
  """Fails at the start rather than after hours."""
  out.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(out).free
  if free < num_bytes:
    fail(
      f"{out} has {free / 1e9:.0f} GB of free disk, about "
      f"{num_bytes / 1e9:.0f} GB are needed"
    )


def say(text: str) -> None:
  """Progress that appears at once, in a log file too."""
  print(text, flush=True)


def fail(text: str) -> None:
  """Ends with one clear line."""
  sys.exit(f"prepare_imagenet.sh: {text}")


if __name__ == "__main__":
  main()
