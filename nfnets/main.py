"""The command line `nfnets`.

Exit codes: 0 done, 1 failed (with one line that says why), 2 wrong usage, 75
stopped by a signal with all saved: the same command goes on.
Anything heavy is imported by the command that needs it.
"""

import argparse
import ast
import csv
import difflib
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfnets.errors import (
  InputError,
  StoppedError,
  UsageError,
  is_out_of_memory,
  unknown,
)
from nfnets.files import check_keeps, check_output, local

_CONFIG_HELP = (
  "recipe file, file.py:VARIANT for one of a family; any value of it is "
  "changed with --config.key=value (default: the config of the workdir if it "
  "has one, else configs/digits.py)"
)

_POD_HELP = "this process is one of a multi-host job (jax.distributed)"

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")

_WEIGHTS_HELP = (
  "or weights: a file (ours, a released F*_haiku.npz, timm's safetensors) or a "
  "published name, dm_nfnet_f0 to dm_nfnet_f6, which is downloaded once"
)


# What to do where a device's memory is too small.
_TO_SAVE_MEMORY = {
  "train": "--config.train.accumulate=4, which computes a batch in four parts, "
  "--config.train.remat=blocks, which keeps less for the gradient, or a "
  "smaller --config.train.batch_size",
  "evaluate": "a smaller --config.eval.batch_size",
  "predict": "a smaller --batch_size, or --precision=bfloat16",
}


# Memory in pages of 2 MB rather than 4 kB, where the system has them, and kept
# when it is free. XLA takes a program's memory on a CPU anew at every call, and
# the system clears each page that it gives: with small ones a fifth of the time
# of F0's gradient goes there (experiments/speed.md).
MALLOC = (
  "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824"
  ":glibc.malloc.trim_threshold=4294967296"
)


def start() -> int:
  """The console script: `main` in a process with `MALLOC`.

  The C library reads such settings when a process begins and not later, so this
  one begins again, with the same arguments and process id.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = MALLOC
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  if sys.stdout is not None and sys.stdout.errors == "strict":
    # Names that a terminal cannot show are escaped.
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    return main()
  except KeyboardInterrupt:
    print("nfnets: interrupted", file=sys.stderr)
    # Now: threads that still compile would outlive the interpreter, and crash.
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code."""
  parser = _make_parser()
  args, rest = parser.parse_known_args(argv)
  # One line for each, without the place in the code.
  warnings.formatwarning = lambda message, *_: f"nfnets: {message}\n"
  try:
    has_config = hasattr(args, "config")
    several = getattr(args, "paths", getattr(args, "overrides", None))
    for option in rest:
      is_value = not option.startswith("--") or option.startswith("--config.")
      if several is not None and not option.startswith("-"):
        several.append(option)  # As it comes after another option.
      elif not (has_config and is_value):
        raise _no_option(parser, args.command, option)
    for name, value in vars(args).items():
      if isinstance(value, Path):
        setattr(args, name, Path(local(str(value))))
    code = args.run(args, rest) or 0
    sys.stdout.flush()  # Here, where it may fail.
    return code
  except UsageError as error:
    print(f"nfnets {args.command}: {error}", file=sys.stderr)
    print(f"see `nfnets {args.command} --help`", file=sys.stderr)
    return 2
  except BrokenPipeError:  # Who reads has enough, such as `head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (InputError, OSError) as error:
    print(f"nfnets {args.command}: {error}", file=sys.stderr)
    return os.EX_TEMPFAIL if isinstance(error, StoppedError) else 1
  except MemoryError as error:
    text = str(error) or "it is full"
    print(f"nfnets {args.command}: memory: {text}", file=sys.stderr)
    return 1
  except (RuntimeError, AssertionError) as error:
    if is_out_of_memory(error):
      text = f"does not fit into the device's memory ({_one_line(error)})"
      if advice := _TO_SAVE_MEMORY.get(args.command):
        text += f"; try {advice}"
    elif not _has_devices():
      given = os.environ.get("JAX_PLATFORMS")
      text = (
        f"JAX finds no device (JAX_PLATFORMS is {given!r}): install what it "
        "needs (`pip install -e '.[cuda]'` in the checkout, or tpu), or leave "
        "JAX_PLATFORMS unset"
      )
    else:
      raise
    print(f"nfnets {args.command}: {text}", file=sys.stderr)
    return 1


def _has_devices() -> bool:
  import jax

  try:
    return bool(jax.devices())
  except (RuntimeError, AssertionError):  # Of a platform that JAX has not.
    return False


def _no_option(
  parser: argparse.ArgumentParser, command: str, given: str
) -> UsageError:
  """The error for an option that a command does not have."""
  given = given.partition("=")[0]
  (subparsers,) = parser._subparsers._group_actions
  known = subparsers.choices[command]._option_string_actions
  close = difflib.get_close_matches(given, known, n=1)
  if "--config" in known:
    from configs import base

    name = given.lstrip("-").replace("-", "_")
    for section, values in base.get_config().to_dict().items():
      if section == name:
        close = [f"--config.{name}"]
      elif isinstance(values, dict) and name in values:
        close = [f"--config.{section}.{name}"]
  hint = f": did you mean {close[0]}?" if close else ""
  return UsageError(f"{given} is no option of `nfnets {command}`{hint}")


def _make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="nfnets",
    description="Normalizer-Free Networks: train, evaluate, predict, export.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a "
    "signal, as at a preemption: the same command goes on.",
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
      name, help=text, description=text, allow_abbrev=False
    )
    command.set_defaults(run=run)
    return command

  command = add("train", _train, "Train from a config, or go on with a run.")
  command.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
  command.add_argument(
    "--workdir",
    type=Path,
    help="folder of the run; given again, it goes on (default: a folder named "
    "after the config in $NFNETS_RUNS, or in ./runs)",
  )
  command.add_argument("--pod", action="store_true", help=_POD_HELP)

  command = add("evaluate", _evaluate, "Accuracy and loss on the test split.")
  command.add_argument("--workdir", type=Path, help="a run of nfnets train")
  command.add_argument("--weights", metavar="SOURCE", help=_WEIGHTS_HELP)
  command.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
  command.add_argument("--pod", action="store_true", help=_POD_HELP)
  command.add_argument("--json", action="store_true", help="print JSON")
  command.add_argument(
    "--details",
    type=Path,
    metavar="FOLDER",
    help="also write per_class.csv, confusion.csv and confusion.png there",
  )

  command = add("predict", _predict, "Classify image files.")
  command.add_argument(
    "paths",
    nargs="+",
    metavar="PATH",
    help="image files, folders of them, or quoted patterns such as '**/*.jpg'",
  )
  command.add_argument("--workdir", type=Path, help="a run of nfnets train")
  command.add_argument("--weights", metavar="SOURCE", help=_WEIGHTS_HELP)
  command.add_argument(
    "--top", type=int, default=5, help="classes per image (default: 5)"
  )
  command.add_argument(
    "--batch_size",
    type=int,
    help="images at a time (default: 32; on a CPU fewer if they are large, 8 "
    "of 256 px)",
  )
  command.add_argument(
    "--precision",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of activations; bfloat16 is for accelerators, and for processors "
    "with AMX (default: float32)",
  )
  form = command.add_mutually_exclusive_group()
  form.add_argument("--json", action="store_true", help="print JSON lines")
  form.add_argument(
    "--csv", action="store_true", help="print CSV, a row per image and class"
  )
  command.add_argument(
    "--grid", type=Path, metavar="FILE", help="also draw the images, as .png"
  )

  command = add(
    "export",
    _export,
    "Write weights, or a program that runs without this package.",
  )
  command.add_argument(
    "out",
    type=Path,
    metavar="OUT",
    help="what it becomes is told by its ending: weights as .safetensors or "
    ".npz, a .stablehlo program for JAX, or .onnx; a model card, OUT.md, is "
    "written beside it",
  )
  command.add_argument(
    "--int8",
    action="store_true",
    help="weights in a quarter of the bytes: kernels and matrices rounded to "
    "255 levels for each output channel",
  )
  command.add_argument("--workdir", type=Path, help="a run of nfnets train")
  command.add_argument("--weights", metavar="SOURCE", help=_WEIGHTS_HELP)

  command = add(
    "convert",
    _convert,
    "Rewrite weights between the released form, ours and timm's.",
  )
  command.add_argument("source", metavar="IN", help="see --weights of predict")
  command.add_argument(
    "out", type=Path, metavar="OUT", help=".safetensors or .npz"
  )
  command.add_argument(
    "--to",
    choices=("ours", "timm"),
    default="ours",
    help="whose names: the published ones of Haiku, with a card (default), or "
    "timm's",
  )
  command.add_argument(
    "--fold_epsilon",
    action="store_true",
    help="for a dm_nfnet only: from timm, the weights were trained there; to "
    "timm, they shall give the same outputs there, where kernels are "
    "standardised with another epsilon (other networks are always rewritten)",
  )

  command = add(
    "show-batch", _show_batch, "Draw an augmented training batch, to look at."
  )
  command.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
  command.add_argument(
    "--out", type=Path, default=Path("batch.png"), help="default: batch.png"
  )
  command.add_argument(
    "--num_images", type=int, default=16, help="how many (default: 16)"
  )

  command = add("info", _info, "The models, or all about one.")
  command.add_argument("model", nargs="?", help="such as nfnet_f3")
  command.add_argument(
    "overrides",
    nargs="*",
    metavar="COLUMN=VALUE",
    help="columns of the variant table, such as group_width=192,128,128,128",
  )
  command.add_argument(
    "--groups",
    action="store_true",
    help="which parameters are clipped and decayed (default model: nfnet_f0)",
  )
  return parser


def _train(args: argparse.Namespace, rest: list[str]) -> None:
  workdir = args.workdir or _default_workdir(args.config)
  started = args.workdir
  if args.config is None and started is not None:
    from nfnets import runs

    started = (runs.rounds_of(started) or [started])[-1]
  config = _load_config(args.config, rest, started)
  from nfnets import downloads, hosts, train

  downloads.keep_compiled()
  with hosts.job(is_pod=args.pod):
    result = train.train(config, workdir)
  if hosts.is_first_host():
    from nfnets import runs

    what = "EMA weights"
    if config.train.patience is not None:
      what = "the best EMA weights, which are kept"
    print(
      f"done: test accuracy {result.top1:.2%} ({what}); "
      f"weights and curves are in {runs.newest_round(workdir)}"
    )


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
  if (args.workdir is None) == (args.weights is None):
    raise UsageError("give either --workdir or --weights to evaluate")
  if args.weights is not None and args.config is None:
    raise UsageError("--weights also needs a --config to know the data")
  if args.workdir is not None:
    from nfnets import runs

    args.workdir = runs.newest_round(args.workdir)
  config = _load_config(args.config, rest, args.workdir)
  from nfnets import downloads, evaluate, hosts, progress

  downloads.keep_compiled()
  with hosts.job(is_pod=args.pod):
    results = evaluate.evaluate(
      config,
      workdir=args.workdir,
      weights=args.weights,
      given=_given(rest),
      details=args.details,
      tell=progress.Ticker(lambda line: print(line, file=sys.stderr)),
    )
  if not hosts.is_first_host():
    return
  if args.json:
    means = {
      kind: {k: v for k, v in result._asdict().items() if k != "confusion"}
      for kind, result in results.items()
    }
    print(json.dumps(means))
  else:
    for kind, result in results.items():
      print(f"{kind:8}{result}")
    if args.details:
      print(f"per class: {args.details}")


def _predict(args: argparse.Namespace, rest: list[str]) -> int:
  del rest
  for name in ("top", "batch_size"):
    if (value := getattr(args, name)) is not None and value < 1:
      raise UsageError(f"--{name}={value}: must be at least 1")
  source = _source_of(args, "predict with")
  if args.grid:
    check_output(args.grid, _PICTURES)
  from nfnets import predict
  from nfnets.data import images

  found = images.find(args.paths)
  if args.grid:
    check_keeps(args.grid, found)
  _check_workdir(args)
  classifier = predict.Classifier(source, precision=args.precision)
  num_failures, shown = 0, []
  if args.csv:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "rank", "class", "probability"])
  for result in classifier.predict(
    found, top=args.top, batch_size=args.batch_size
  ):
    if isinstance(result, predict.Failure):
      num_failures += 1
      print(f"nfnets predict: {result.reason}", file=sys.stderr)
      continue
    if args.grid and len(shown) < predict.MOST_IN_GRID:
      shown.append(result)
    if args.json:
      classes = [
        {"name": name, "probability": value} for name, value in result.classes
      ]
      print(json.dumps({"path": str(result.path), "classes": classes}))
    elif args.csv:
      for rank, (name, value) in enumerate(result.classes, start=1):
        writer.writerow([result.path, rank, name, f"{value:.6f}"])
    else:
      print(result)
    sys.stdout.flush()  # Who reads it need not wait for more.
  if shown:
    predict.save_grid(shown, args.grid)
    print(f"wrote {args.grid} with {len(shown)} images", file=sys.stderr)
  if num_failures and len(found) > 1:
    print(
      f"nfnets predict: {num_failures} of {len(found)} files could not be "
      "classified",
      file=sys.stderr,
    )
  return 1 if num_failures else 0


def _export(args: argparse.Namespace, rest: list[str]) -> None:
  del rest
  source = _source_of(args, "export")
  _check_workdir(args)
  from nfnets import export

  for path in export.export(source, args.out, is_int8=args.int8):
    print(f"wrote {path} ({path.stat().st_size / 1e6:,.2f} MB)")


def _convert(args: argparse.Namespace, rest: list[str]) -> None:
  del rest
  from nfnets import export

  title = export.convert(
    args.source, args.out, to=args.to, folds_epsilon=args.fold_epsilon
  )
  print(f"wrote {args.out}: {title}")


def _source_of(args: argparse.Namespace, use: str) -> str:
  """The one that is given of --workdir and --weights."""
  if (args.workdir is None) == (args.weights is None):
    raise UsageError(f"give either --workdir or --weights to {use}")
  return str(args.workdir or args.weights)


def _check_workdir(args: argparse.Namespace) -> None:
  """Raises for a --workdir that is none."""
  if args.workdir is not None:
    from nfnets import runs

    runs.read_config(runs.newest_round(args.workdir))


def _show_batch(args: argparse.Namespace, rest: list[str]) -> None:
  config = _load_config(args.config, rest)
  if args.num_images < 1:
    raise UsageError(f"--num_images={args.num_images}: must be at least 1")
  check_output(args.out, _PICTURES)
  from nfnets import show_batch

  show_batch.show_batch(config, args.out, num_images=args.num_images)
  print(f"wrote {args.out}")


def _info(args: argparse.Namespace, rest: list[str]) -> None:
  del rest
  from rich.console import Console

  from nfnets import info, models

  console = Console(soft_wrap=True, highlight=False)
  if args.model is None and not args.groups:
    info.print_models(console)
    return
  name, overrides = args.model or "nfnet_f0", args.overrides
  try:
    columns = ["num_classes", *models.variant(name)._fields]
    overrides = dict(_parse_override(text, columns) for text in overrides)
    model = models.make(name, **overrides)
  except InputError as error:
    raise UsageError(str(error)) from None
  if args.groups:
    info.print_groups(console, model)
  else:
    info.print_model(console, model)


def _parse_override(text: str, columns: Sequence[str]) -> tuple[str, Any]:
  column, equals, value = text.partition("=")
  if not equals:
    raise UsageError(f"{text!r}: an override is written COLUMN=VALUE")
  if column not in columns:
    raise unknown("model column", column, columns)
  try:
    return column, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return column, value  # A plain word, such as an activation's name.


def _given(options: list[str]) -> list[str]:
  """The keys among `--config.key=value`."""
  keys = [option.partition("=")[0] for option in options]
  start = "--config."
  return [key.removeprefix(start) for key in keys if key.startswith(start)]


def _load_config(
  path: str | None, overrides: list[str], workdir: Path | None = None
) -> Any:
  """A config with `--config.key=value` overrides in place.

  It is that of the file; without one, that of a workdir that has been started;
  and else that of the digits. `None` leaves a key open that may be.
  """
  from absl import flags
  from ml_collections import config_flags

  from nfnets import recipe

  opened = {f"--config.{key}=None": key for key in recipe.open_keys()}
  opened = {o: key for o, key in opened.items() if o in overrides}
  others = [o for o in overrides if o not in opened]
  values = flags.FlagValues()
  if (
    path is None and workdir is not None and (workdir / "config.json").exists()
  ):
    config = recipe.load_config(workdir)
    argv = others
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=argv
    )
  else:
    file, colon, variant = (path or "configs/digits.py").partition(":")
    argv = [f"--config={_find_config(file)}{colon}{variant}", *others]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    extra = values(["nfnets", *argv])[1:]
    config = values["config"].value
    hasattr(config, "to_dict")  # Raises if a recipe could not open a file.
  except UsageError:
    raise
  except Exception as error:  # A recipe is code, and may do anything.
    raise UsageError(f"--config: {_one_line(error)}") from None
  if extra:
    raise UsageError(f"{extra[0]!r} is not understood")
  recipe.check(config)
  config.update_from_flattened_dict(dict.fromkeys(opened.values()))
  recipe.check_given(config, _given(others))
  return config


def _one_line(error: Exception) -> str:
  """What a config library's error says, without quoting and tracebacks."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = str(error.args[0]) if error.args else ""
  if found := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
    return f"there is no key {found[2]!r}: did you mean {found[1]!r}?"
  if isinstance(error, KeyError | AttributeError):
    return f"there is no such key: {text.strip()}; configs/base.py has them all"
  lines = str(error).strip().splitlines()
  if "Traceback" in str(error):  # Of the recipe's own error.
    return re.sub(r"^[\w.]*Error: ", "", lines[-1])
  return " ".join(lines)


def _find_config(file: str) -> Path:
  """A recipe by path; one of ours also from any other folder."""
  file = local(file)
  ours = Path(importlib.util.find_spec("configs").origin).parent.parent
  for path in (Path(file), ours / file):
    if path.is_file():
      return path
  known = sorted(
    f"configs/{p.name}"
    for p in (ours / "configs").glob("*.py")
    if p.stem not in ("__init__", "base")
  )
  raise UsageError(
    f"--config: there is no file {file}; recipes at hand: {', '.join(known)}"
  )


def _default_workdir(config: str | None) -> Path:
  file, _, variant = (config or "configs/digits.py").partition(":")
  name = "-".join(filter(None, (Path(file).stem, variant)))
  return Path(os.environ.get("NFNETS_RUNS", "runs")) / name


if __name__ == "__main__":
  sys.exit(start())
