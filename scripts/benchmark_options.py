"""The benchmark's command line: what can be measured, and who takes part."""

import argparse
import math
import os
from pathlib import Path

DESCRIPTION = "Speed of our networks beside timm's, on the device at hand."

# What is measured, in tasks of the workers.
WHAT = {
  "train": ("gradient", "step"),
  "gradient": ("gradient",),
  "step": ("step",),
  "infer": ("forward",),
  "compile": ("forward", "gradient"),
  "optimizer": ("update",),
  "input": (),
}

NETWORK = {"forward", "gradient", "step"}

# Who takes part in which tasks.
CONTESTANTS = {
  "ours": NETWORK | {"update"},
  "folded": {"forward"},
  "xla": NETWORK,
  "scanned": {"gradient", "step"},
  "remat_blocks": {"gradient", "step"},
  "remat_stages": {"gradient", "step"},
  "timm_nchw": NETWORK | {"update"},
  "timm_channels_last": NETWORK,
  "timm_nchw_compiled": NETWORK,
  "timm_channels_last_compiled": NETWORK,
}
# Only where they are asked for; timm_channels_last_compiled always on a GPU.
OPTIONAL = ("scanned", "remat_blocks", "remat_stages")
COMPILED = ("timm_nchw_compiled", "timm_channels_last_compiled")

BATCH = {"cpu": 4, "gpu": 128, "tpu": 32}


def parse(arguments: list[str]) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="benchmark.sh",
    allow_abbrev=False,  # benchmark.sh reads some of them too.
    description=DESCRIPTION,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  words = lambda text: text.split(",")

  def numbers(text: str) -> list[int]:
    return [int(x) for x in words(text)]

  add = parser.add_argument
  add(
    "--what", type=words, default=["train", "infer", "compile"],
    help=f"of {', '.join(WHAT)} (default: train,infer,compile)",
  )  # fmt: skip
  add(
    "--model", type=words, default=["nfnet_f0"],
    help="one or several, such as nfnet_f0,nfnet_f1 (default: nfnet_f0)",
  )  # fmt: skip
  add(
    "--depth", type=numbers,
    help="blocks per stage, for a smaller network (default: the model's)",
  )  # fmt: skip
  add(
    "--batch", type=numbers,
    help="images per call; several: of each network (default: "
    + ", ".join(f"{n} on {name.upper()}" for name, n in BATCH.items()) + ")",
  )  # fmt: skip
  add(
    "--size", type=int,
    help="pixels (default: the model's training size, for inference too)",
  )  # fmt: skip
  add(
    "--precision", choices=("float32", "bfloat16"),
    help="of activations (default: float32 on CPU, else bfloat16)",
  )  # fmt: skip
  add("--rounds", type=int, default=5, help="of all contestants (default: 5)")
  add(
    "--seconds", type=float, default=2,
    help="at least so long (or one call) in each round (default: 2)",
  )  # fmt: skip
  add(
    "--skip", type=words, default=[],
    help=f"contestants to leave out: timm or any of {', '.join(CONTESTANTS)}",
  )  # fmt: skip
  add(
    "--also",
    type=words,
    default=[],
    help=f"more contestants, in training: any of {', '.join(OPTIONAL)}",
  )
  add(
    "--xla_flags", action="append", default=[], metavar="FLAGS",
    help="also ours with these in XLA_FLAGS, such as "
    "--xla_flags=--xla_cpu_use_xnnpack=false; repeated, with each of them",
  )  # fmt: skip
  add(
    "--timm_compile", action="store_true",
    help="also timm through torch.compile (on a GPU: always, channels_last)",
  )  # fmt: skip
  add(
    "--profile", action="store_true",
    help="also the ten costliest kernels of our train step",
  )  # fmt: skip
  add(
    "--at_once", action="store_true",
    help="contestants of all networks and tasks compile at the same time: for "
    "machines with many cores, and memory for all; compilers that choose "
    "kernels by timing them, on GPUs, may choose worse",
  )  # fmt: skip
  add(
    "--ready_in", type=float, metavar="SECONDS",
    help="with --at_once: leave out who is not compiled by then",
  )  # fmt: skip
  add(
    "--as_found", action="store_true",
    help="build no environments: run with the packages that are there",
  )  # fmt: skip
  add(
    "--out", type=Path, default=Path(os.environ.get("NFNETS_RUNS") or "runs")
    / "benchmark", help="folder of the report (default: runs/benchmark)",
  )  # fmt: skip
  args = parser.parse_args(arguments)
  for option, given, known in (
    ("what", args.what, WHAT),
    ("skip", args.skip, ["timm", *CONTESTANTS]),
    ("also", args.also, OPTIONAL),
  ):
    if wrong := [name for name in given if name not in known]:
      parser.error(f"--{option}={wrong[0]}: use some of {', '.join(known)}")
  for flags in args.xla_flags:
    if not flags.startswith("--xla_"):
      parser.error(f"--xla_flags={flags}: flags of XLA begin with --xla_")
  for option in ("size", "rounds", "seconds", "ready_in"):
    given = getattr(args, option)
    if given is not None and not 0 < given < math.inf:
      parser.error(f"--{option}={given} is not positive and finite")
  if args.batch and not min(args.batch) > 0:
    parser.error(f"--batch={min(args.batch)} is not positive")
  if args.batch and len(args.batch) not in (1, len(args.model)):
    parser.error(
      f"--batch has {len(args.batch)} numbers, --model {len(args.model)} "
      "networks: give one number, or one for each"
    )
  if args.ready_in and not args.at_once:
    parser.error("--ready_in is for --at_once")
  if args.profile and not {"train", "step"} & {*args.what}:
    parser.error("--profile is of a train step: add train or step to --what")
  tasks = {task for what in args.what for task in WHAT[what]}
  if args.also and not tasks & CONTESTANTS["scanned"]:
    parser.error("--also is of training: add train to --what")
  take_part = lambda task: contestants(
    task,
    device="gpu",  # Where most do.
    also=args.also,
    xla_flags=args.xla_flags,
    timm_compile=args.timm_compile,
    skip=args.skip,
  )
  if tasks and not any(map(take_part, tasks)):
    parser.error("--skip leaves out all contestants")
  return args


def contestants(
  task: str,
  *,
  device: str,
  also: list[str],
  xla_flags: list[str],
  timm_compile: bool,
  skip: list[str],
) -> list[str]:
  """Who takes part in a task; flags of XLA stand for ours with them."""
  wanted = {*CONTESTANTS} - {*OPTIONAL, *COMPILED} | {*also}
  if timm_compile:
    wanted |= {*COMPILED}
  elif device == "gpu":
    wanted.add("timm_channels_last_compiled")
  if "timm" in skip:
    wanted = {name for name in wanted if not name.startswith("timm")}
  named = [
    name
    for name, tasks in CONTESTANTS.items()
    if task in tasks and name in wanted - {*skip}
  ]
  return named + (xla_flags if task in CONTESTANTS["ours"] else [])
