"""What the networks are: the tables that `nfnets info` prints."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nfnets import models, optim

_NUM_CLASSES = 1000  # ImageNet, as in the papers' tables.


def print_models(console: Console) -> None:
  """One line for each network of the table."""
  table = Table("model", box=None, header_style="bold", pad_edge=False)
  for column in (
    "parameters",
    "train px",
    "test px",
    "MACs train",
    "MACs test",
  ):
    table.add_column(column, justify="right")
  for name in models.VARIANTS:
    model = models.make(name, _NUM_CLASSES)
    row = model.variant
    table.add_row(
      name,
      f"{model.count_params() / 1e6:.2f}M",
      str(row.train_size),
      str(row.test_size),
      _giga(model.count_macs(row.train_size)),
      _giga(model.count_macs(row.test_size)),
    )
  console.print(table)


def print_model(console: Console, model: models.Model) -> None:
  """Everything about one network."""
  row = model.variant
  num_params = model.count_params()
  megabytes = num_params * 4 / 2**20
  table = Table(box=None, show_header=False, pad_edge=False)
  for label, text in (
    ("model", model.name),
    ("parameters", f"{num_params:,}"),
    ("classes", f"{model.num_classes:,}"),
    ("train size", f"{row.train_size} px, {_macs(model, row.train_size)}"),
    ("test size", f"{row.test_size} px, {_macs(model, row.test_size)}"),
    ("RandAugment", _randaugment(row.randaugment_magnitude)),
    ("dropout", f"{row.drop_rate:g}"),
    ("stochastic depth", f"{row.stochdepth_rate:g} x index / blocks"),
    ("activation", f"{row.activation}, alpha {row.alpha:g}"),
    ("memory", f"{megabytes:,.0f} MiB parameters (float32)"),
    ("", f"{megabytes:,.0f} MiB momentum"),
    ("", f"{megabytes:,.0f} MiB EMA"),
    ("", f"{3 * megabytes:,.0f} MiB in all, before gradients and activations"),
  ):
    table.add_row(label, text)
  console.print(table)
  console.print()
  console.print(_stages(model))


def _stages(model: models.Model) -> Table:
  plan, size = model.plan, model.variant.test_size
  table = Table("part", box=None, header_style="bold", pad_edge=False)
  for column in ("blocks", "channels", "bottleneck", "groups", f"at {size} px"):
    table.add_column(column, justify="right")
  for conv in plan.stem:
    size = -(-size // conv.stride)
  if plan.has_stem_pool:
    size = -(-size // 2)
  num = len(plan.stem)
  table.add_row(
    "stem",
    f"{num} conv{'s'[: num > 1]}",
    str(plan.stem[-1].channels),
    "",
    "",
    _square(size),
  )
  for stage, depth in enumerate(model.variant.depth, start=1):
    # The last: the first of a stage may have another bottleneck.
    *_, block = (block for block in plan.blocks if block.stage == stage)
    if any(b.stride > 1 for b in plan.blocks if b.stage == stage):
      size = -(-size // 2)
    table.add_row(
      f"stage {stage}",
      str(depth),
      str(block.channels),
      str(block.width),
      f"{block.groups} x {block.width // block.groups}",
      _square(size),
    )
  if plan.final_conv is not None:
    table.add_row("final conv", "", str(plan.num_features), "", "", "")
  table.add_row("classifier", "", str(model.num_classes), "", "", "")
  return table


def print_groups(console: Console, model: models.Model) -> None:
  """Which parameters the optimiser clips and decays, and how many."""
  params, _ = model.shapes()
  sizes: dict[str, list[int]] = {group.name: [] for group in optim.GROUPS}
  for module, values in params.items():
    for name, value in values.items():
      group = optim.group_of(module, name)
      sizes[group.name].append(int(np.prod(value.shape)))
  table = Table("group", box=None, header_style="bold", pad_edge=False)
  for column in ("clipped", "decayed", "arrays", "parameters"):
    table.add_column(column, justify="right")
  for group in optim.GROUPS:
    table.add_row(
      group.name,
      _yes(group.clipped),
      _yes(group.decayed),
      f"{len(sizes[group.name]):,}",
      f"{sum(sizes[group.name]):,}",
    )
  total = [size for group in sizes.values() for size in group]
  table.add_row("all", "", "", f"{len(total):,}", f"{sum(total):,}")
  console.print(f"{model.name} with {model.num_classes:,} classes")
  console.print(table)


def _randaugment(magnitude: int) -> str:
  return f"4 layers of magnitude {magnitude}" if magnitude else "none published"


def _yes(value: bool) -> str:
  return "yes" if value else "no"


def _giga(macs: float) -> str:
  return f"{macs / 1e9:.2f}G" if macs >= 1e8 else f"{macs / 1e6:.2f}M"


def _macs(model: models.Model, size: int) -> str:
  return f"{_giga(model.count_macs(size))} multiply-accumulates"


def _square(size: Any) -> str:
  return f"{size} x {size}"
