"""What a run has left in its workdir: settings, rounds, weights."""

import json
from pathlib import Path
from typing import Any

from nfnets.card import Card
from nfnets.errors import InputError

# What `nfnets train` writes, with everything that was worked out.
CONFIG = "config.json"


def read_config(workdir: Path) -> dict[str, Any]:
  """The parsed `config.json` of a run.

  Raises:
    InputError: when there is none, or no JSON.
  """
  path = workdir / CONFIG
  if not path.is_file():
    what = "is no workdir of a run" if workdir.exists() else "does not exist"
    raise InputError(
      f"{workdir} {what} (no {CONFIG}): give the --workdir of `nfnets train`"
    )
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise InputError(f"{path} is not JSON ({error})") from None


def newest_round(workdir: Path) -> Path:
  """Where a run is: the workdir itself, or its newest round with weights."""
  rounds = rounds_of(workdir)
  latest = rounds[-1] if rounds else workdir
  return next(filter(has_weights, reversed(rounds)), latest)


def has_weights(workdir: Path) -> bool:
  """Whether a run has got as far as a checkpoint."""
  checkpoints = workdir / "checkpoints"
  return (workdir / "weights.safetensors").is_file() or (
    checkpoints.is_dir()
    and any(path.name.isdigit() for path in checkpoints.iterdir())
  )


def rounds_of(workdir: Path) -> list[Path]:
  """The folders of a run whose images grow, oldest first.

  One in which nothing was trained, as its start failed, is none.
  """
  number = lambda path: path.name.removeprefix("round_")
  found = [
    path
    for path in workdir.glob("round_*")
    if number(path).isdigit() and (path / CONFIG).is_file()
  ]
  return sorted(found, key=lambda path: int(number(path)))


def card_of(workdir: Path) -> Card:
  """What the weights of a run are.

  Raises:
    InputError: for a folder that is none.
  """
  found = read_config(workdir)
  if "card" not in found:
    raise InputError(f"{workdir / CONFIG} has no card: it is damaged")
  return Card.from_dict(found["card"], str(workdir / CONFIG))
