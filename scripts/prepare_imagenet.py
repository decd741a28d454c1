"""Makes the TFDS set that training reads, once; needs TensorFlow.

Started by prepare_imagenet.sh, in an environment that has it.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
NAME = "imagenet2012"


def main() -> None:
  """Prepares or converts, then counts."""
  args = parse()
  builder = prepare(args.tars, args.out) if args.tars else convert(args.convert)
  check(builder, {"train": args.num_train, "validation": args.num_validation})


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
    default=1_281_167,
    help="images that the training set should have (default: %(default)s)",
  )
  parser.add_argument(
    "--num_validation",
    type=int,
    default=50_000,
    help="images that the validation set should have (default: %(default)s)",
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
  if builder.data_path.exists():
    if "array_record" not in formats_of(builder):
      fail(
        f"{builder.data_path} is there already as {formats_of(builder)[0]}: "
        f"convert it with --convert={builder.data_path}, or choose another "
        "--out"
      )
    say(f"{builder.data_path} is there already")
    return builder
  # The examples are sorted on disk before they reach the set.
  need_space(out, 2 * sum((tars / name).stat().st_size for name in TARS))
  builder = tfds.builder(NAME, data_dir=str(out), file_format="array_record")
  say(f"Preparing {builder.data_path} (hours for all of ImageNet) ...")
  config = tfds.download.DownloadConfig(
    manual_dir=str(tars.absolute()), try_download_gcs=False
  )
  builder.download_and_prepare(download_config=config)
  return builder


def convert(version_dir: Path):
  """Runs TFDS's own converter: adds a second format to a prepared set."""
  if not (version_dir / "dataset_info.json").is_file():
    fail(
      f"{version_dir} is no prepared TFDS set (no dataset_info.json): give "
      "the folder of its version, such as DATA_DIR/imagenet2012/5.1.0"
    )
  if not os.access(version_dir, os.W_OK):
    fail(f"{version_dir} cannot be written to: copy it to where you may write")

  import tensorflow_datasets as tfds
  from tensorflow_datasets.scripts.cli import convert_format_utils

  load = lambda: tfds.builder_from_directory(str(version_dir))
  if "array_record" not in formats_of(load()):
    need_space(
      version_dir, sum(path.stat().st_size for path in version_dir.iterdir())
    )
    say(f"Converting {version_dir}; stopped, it goes on with the next shard")
    convert_format_utils.convert_dataset(
      dataset_version_dir=str(version_dir.absolute()),
      out_dir=None,  # Beside the old shards: elsewhere, labels are left behind.
      out_file_format="array_record",
      num_workers=1,  # Threads of the converter hide its errors.
    )
  if "array_record" not in formats_of(load()):
    fail(
      "the converter did not finish: delete *.array_record-* in "
      f"{version_dir} and start again"
    )
  return load()


def check(builder, expected: dict[str, int]) -> None:
  """Compares the numbers of examples with those of the published set."""
  splits = builder.info.splits
  found = {
    name: splits[name].num_examples if name in splits else 0
    for name in expected
  }
  for name, num in found.items():
    say(f"{name}: {num:,} images, {expected[name]:,} expected")
  if found != expected:
    fail(
      f"{builder.data_path} is not the whole of ImageNet: compare the tar "
      "files with the checksums on image-net.org, delete that folder and "
      "start again, or say how many there should be (--num_train, "
      "--num_validation)"
    )
  say(f"done: {builder.data_path}")


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
