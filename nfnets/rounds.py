"""A folder of images that grows: each time it has, another round of training.

A round is a run of its own, in `round_001`, `round_002` ... below the workdir,
that starts from the weights of the one before. Classes that are new get rows of
the classifier, the others keep theirs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nfnets import (
  checkpoint,
  devices,
  evaluate,
  hosts,
  pretrained,
  recipe,
  runs,
  steps,
)
from nfnets.errors import InputError
from nfnets.files import local, unfinished

# Of classes that a round did not know: none is ever recognised.
_NEVER = -1e9


def choose(config: ConfigDict, workdir: Path) -> tuple[ConfigDict, Path]:
  """The round to train: the newest, or a new one when there are other images.

  Of a workdir that is a round itself it is that one.

  Returns:
    The config with what it starts from, and the folder.

  Raises:
    InputError: when the workdir is another run, or the config names weights
      that no round started from.
  """
  config = config.copy_and_resolve_references()
  path = workdir.resolve()
  is_round = path in runs.rounds_of(path.parent)
  if not is_round and (workdir / runs.CONFIG).is_file():
    raise InputError(
      f"{workdir} holds another run, one without rounds: choose another "
      "--workdir for images that are added to (config.data.grows)"
    )
  rounds = runs.rounds_of(path.parent if is_round else workdir)
  if not rounds:
    return config, workdir / "round_001"
  last = workdir if is_round else rounds[-1]
  saved = recipe.load_config(last)
  starts = [recipe.load_config(folder).init_from for folder in rounds]
  is_whole = rounds[0].name == "round_001"  # Else what it began with is gone.
  if (
    config.init_from
    and is_whole
    and _place(config.init_from) not in map(_place, starts)
  ):
    raise InputError(
      f"{workdir} holds rounds that began with --config.init_from={starts[0]}, "
      "and go on from their own weights: give the same, or for "
      f"{config.init_from} choose another --workdir"
    )
  sizes = {  # Open ones stay those of the round; `fill` may take another.
    name: saved.data[name] if config.data[name] is None else config.data[name]
    for name in ("train_size", "test_size")
  }
  config = recipe.fill(config, runs.card_of(last))
  config.data.update(sizes)
  config.init_from = saved.init_from
  if not runs.has_weights(last):  # It is to begin.
    config.init_from = _where_it_is_now(saved.init_from, last.parent)
  found = recipe.resolve(config).source.fingerprint
  if is_round or found == runs.read_config(last)["derived"]["images"]:
    return config, last
  folder = workdir / f"round_{int(last.name[6:]) + 1:03}"
  if runs.has_weights(folder):
    raise InputError(
      f"{folder} has weights but no {runs.CONFIG}: put that back, or move the "
      "folder away"
    )
  if hosts.is_first_host():
    with checkpoint.locked(last):  # Raises while that one is trained.
      pass
  newest = runs.newest_round(workdir)
  if runs.has_weights(newest):
    config.init_from = str(newest)
  if hosts.is_first_host():
    print(
      f"the images are others than those of {last.name} ({found}): another "
      f"round starts from {config.init_from}"
    )
  return config, folder


def _where_it_is_now(init_from: str | None, workdir: Path) -> str | None:
  """What a round starts from, also when its workdir was moved since."""
  if init_from is None or Path(init_from).exists():
    return init_from
  sibling = workdir / Path(init_from).name
  return str(sibling if sibling in runs.rounds_of(workdir) else init_from)


def _place(weights: str | None) -> str | None:
  """Where weights are, however that was written; of a name it is the name."""
  if weights is None:
    return None
  path = Path(local(weights))
  return str(path.resolve()) if path.exists() else weights


def report(r: recipe.Recipe, folder: Path) -> None:
  """Prints and writes what a round did to classes that were known and new.

  `growth.json` has the same numbers: of each group of classes how many held-out
  images there are, and top-1 before and after the round (shares).
  """
  init_from = _where_it_is_now(r.config.init_from, folder.parent)
  if init_from is None:
    return
  hosts.wait_for_hosts("weights")  # One has written them.
  load = lambda: pretrained.load_with_card(init_from)
  try:
    old, card = hosts.on_all_hosts(load)
  except InputError as error:  # They were moved since the start.
    if hosts.is_first_host():
      print(f"what was known before cannot be compared: {error}")
    return
  names = r.card.class_names
  if card is None or not set(card.class_names) & set(names):
    return  # A classifier that has nothing in common.
  is_known = np.array([name in card.class_names for name in names])
  new = pretrained.load(folder)
  nothing = {
    module: {name: np.zeros_like(value) for name, value in values.items()}
    for module, values in new.items()
  }
  before = pretrained.transfer(
    old,
    nothing,
    r.model,
    old_names=card.class_names,
    new_names=names,
    origin=init_from,
  )
  before[f"{r.model.plan.name}/~/linear"]["b"][~is_known] = _NEVER

  mesh = devices.make_small_mesh()
  eval_step = steps.make_eval_step(
    r.model, mesh, normalization=r.normalization, with_confusion=True
  )

  results = evaluate.over_split(
    eval_step,
    {
      "before": (devices.replicate(before, mesh), {}),
      "after": (devices.replicate(new, mesh), {}),
    },
    r.source.test,
    batch_size=r.config.eval.batch_size,
    image_size=r.card.image_size,
    mesh=mesh,
  )
  tables = {when: result.confusion for when, result in results.items()}
  rows = compare(tables, is_known)
  if not hosts.is_first_host():
    return
  with unfinished(folder / "growth.json") as partial:
    partial.write_text(json.dumps(rows, indent=2) + "\n")
  print(f"held-out images       number  {'before':>8}  {folder.name:>9}")
  for group, row in rows.items():
    print(
      f"{group:<20} {row['images']:>7,}  {row['before']:>8.2%}  "
      f"{row['after']:>9.2%}"
    )


def compare(
  tables: dict[str, np.ndarray], is_known: np.ndarray
) -> dict[str, dict[str, Any]]:
  """The rows of `growth.json`.

  Args:
    tables: Confusion tables [classes, classes] of the same images, by column.
    is_known: [classes], whether the round before had them.

  Returns:
    By group of classes; one of which no image is held out is not there.
  """
  groups = {"known classes": is_known, "new classes": ~is_known}
  if is_known.all():
    groups = {}
  groups["all classes"] = np.ones_like(is_known)
  rows = {}
  for group, members in groups.items():
    images = {when: table[members].sum() for when, table in tables.items()}
    if not all(images.values()):
      continue
    rows[group] = {
      "classes": int(members.sum()),
      "images": int(max(images.values())),
    } | {
      when: float(np.diag(table)[members].sum() / images[when])
      for when, table in tables.items()
    }
  return rows
