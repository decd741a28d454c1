"""Floors of a train step: what its operations and bytes take at least.

    python experiments/roofline.py

works out every layer of NFNet-F0 to F7 from its plan and writes the tables of
roofline.md (between its markers) and roofline.png. The rules of counting are
in roofline.md.

Sizes are those of one device; B is its batch.
"""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nfnets import models
from nfnets.models.plan import Conv

HERE = Path(__file__).resolve().parent
NAMES = tuple(f"nfnet_f{n}" for n in range(8))
BATCH = 32  # Images per device, as published.

BF16, FP32 = 2, 4  # Bytes of a number.
KERNEL_FORWARD = FP32 + 2 * BF16  # w read; standardised written and read.
# Standardised read; its gradient written, and read by the update.
KERNEL_BACKWARD = 3 * BF16
LINEAR_FORWARD, LINEAR_BACKWARD = FP32, 3 * FP32  # w; w and its gradient.
UPDATE = 6 * FP32  # Weights, momentum, average, read and written.
STATE = 4 * FP32  # Weights, gradient, momentum, average, kept.
USABLE = 0.9  # Of a device's memory.


class Device(NamedTuple):
  """Public figures of one accelerator (of one core, where that is said)."""

  flops: float  # Dense bfloat16 (V100: float16) operations per second.
  bandwidth: float  # Bytes per second.
  memory: float  # GiB.


DEVICES = {
  "H100": Device(989e12, 3.35e12, 80),
  "H200": Device(989e12, 4.8e12, 141),
  "A100": Device(312e12, 2.04e12, 80),
  "TPU v4": Device(275e12, 1.2e12, 32),
  "TPU v5e": Device(197e12, 0.82e12, 16),
  "TPU v5p": Device(459e12, 2.77e12, 95),
}
MEMORIES = (16, 32, 80, 141)  # GiB.

# Published milliseconds of a step with 32 images (2102.06171, Table 3), F0 to
# F5: on one core of a TPU v3, of two on a chip, and on a V100.
OLD_DEVICES = {
  "TPU v3 core": Device(61.5e12, 0.45e12, 16),
  "V100": Device(125e12, 0.9e12, 16),
}
PUBLISHED = {
  "TPU v3 core": (73.3, 158.5, 295.8, 532.2, 1033.3, 1398.5),
  "V100": (56.7, 133.9, 226.3, 524.5, 1190.6, 2177.1),
}


class Layer(NamedTuple):
  """What one layer computes and moves; per image, but for the weights."""

  part: str  # stem, stage1 ..., head.
  block: int  # Index of the block; -1 outside of blocks.
  macs: float  # Of the forward pass; the backward pass has twice as many.
  forward: float  # Bytes of activations.
  backward: float
  weights_forward: float  # Bytes.
  weights_backward: float
  kept: float  # Bytes of activations that the backward pass needs.
  passing: float  # Bytes of gradients that exist while it goes backward.

  def seconds(self, device: Device, batch: int) -> float:
    """Forward and backward, each as long as its slower half."""
    return sum(
      max(
        2 * passes * self.macs * batch / device.flops,
        (bytes_ * batch + weights) / device.bandwidth,
      )
      for passes, bytes_, weights in (
        (1, self.forward, self.weights_forward),
        (2, self.backward, self.weights_backward),
      )
    )


class Network(NamedTuple):
  """A variant at its training size."""

  name: str
  size: int
  params: int
  layers: tuple[Layer, ...]

  @property
  def macs(self) -> float:
    return sum(layer.macs for layer in self.layers)

  def flops(self, batch: int) -> float:
    """Of a train step."""
    return 3 * 2 * self.macs * batch

  def bytes(self, batch: int) -> float:
    """Moved in a train step, at least."""
    per_image = sum(x.forward + x.backward for x in self.layers)
    weights = sum(x.weights_forward + x.weights_backward for x in self.layers)
    return per_image * batch + weights + UPDATE * self.params

  def simple_floor(self, device: Device, batch: int) -> float:
    """Seconds, if everything overlapped with everything."""
    return max(
      self.flops(batch) / device.flops, self.bytes(batch) / device.bandwidth
    )

  def floor(self, device: Device, batch: int) -> float:
    """Seconds, one layer after the other."""
    update = UPDATE * self.params / device.bandwidth
    return update + sum(x.seconds(device, batch) for x in self.layers)

  def activations(self, remat: str = "none") -> float:
    """Bytes per image at the highest: kept ones, and gradients on their way.

    With `remat` only the inputs of `blocks` or `stages` are kept, and one block
    or stage at a time is computed again.
    """
    passing = max(layer.passing for layer in self.layers)
    if remat == "none":
      return passing + sum(layer.kept for layer in self.layers)
    groups: dict = {}
    for layer in self.layers:
      where = layer.part if remat == "stages" else (layer.part, layer.block)
      if layer.part == "head":  # Small, and always kept.
        where = layer
      groups.setdefault(where, []).append(layer.kept)
    # The first tensor that a group keeps is its input.
    inputs = sum(kept[0] for kept in groups.values())
    return passing + inputs + max(sum(kept[1:]) for kept in groups.values())

  def fixed_bytes(self) -> float:
    """State, gradients, and standardised kernels."""
    return (STATE + BF16) * self.params

  def largest_batch(self, gib: float, remat: str = "none") -> int:
    """Images that fit."""
    free = USABLE * gib * 2**30 - self.fixed_bytes()
    return max(0, math.floor(free / self.activations(remat)))


def work_out(name: str) -> Network:
  """The layers of a network of the table, at its training size."""
  model = models.make(name)
  size = model.variant.train_size
  layers = tuple(_layers(model, size))
  return Network(name, size, model.count_params(), layers)


def _layers(model: models.Model, size: int) -> Iterator[Layer]:
  plan, side = model.plan, size
  for i, conv in enumerate(plan.stem):
    layer = _convolution("stem", -1, conv, side)
    # Nobody asks for the gradient of an image.
    yield layer if i else layer._replace(backward=layer.forward)
    side = math.ceil(side / conv.stride)
  for i, block in enumerate(plan.blocks):
    part, before = f"stage{block.stage}", side
    side = math.ceil(side / block.stride)
    sides = [before, before, *[side] * (len(block.convs) - 2)]
    for conv, at in zip(block.convs, sides, strict=True):
      yield _convolution(part, i, conv, at)
    if block.shortcut is not None:
      # Its input is an average of the first convolution's, not kept.
      shortcut = _convolution(part, i, block.shortcut, side)
      yield shortcut._replace(kept=0)
    yield _gate_and_sum(part, i, block, side)
  yield _convolution("head", -1, plan.final_conv, side)
  features = plan.num_features
  weights = features * model.num_classes
  yield Layer(
    part="head",
    block=-1,
    macs=weights,
    forward=0,
    backward=0,
    weights_forward=LINEAR_FORWARD * weights,
    weights_backward=LINEAR_BACKWARD * weights,
    kept=BF16 * features * side**2,  # What is averaged.
    passing=0,
  )


def _convolution(part: str, block: int, conv: Conv, side: int) -> Layer:
  """Forward: in, out. Backward: in, gradient of out, gradient of in."""
  out_side = math.ceil(side / conv.stride)
  before = BF16 * conv.in_channels * side**2
  after = BF16 * conv.channels * out_side**2
  weights = conv.channels * conv.fan_in
  return Layer(
    part=part,
    block=block,
    # As the paper counts: positions are a quotient, not rounded up.
    macs=weights * (side / conv.stride) ** 2,
    forward=before + after,
    backward=2 * before + after,
    weights_forward=KERNEL_FORWARD * weights,
    weights_backward=KERNEL_BACKWARD * weights,
    kept=before,
    passing=before + after,
  )


def _gate_and_sum(part: str, index: int, block, side: int) -> Layer:
  """Squeeze-excite and the shortcut's sum.

  The gate needs the means of the whole branch. Forward: branch and shortcut
  read, sum written; backward: its gradient read twice, the branch once.
  """
  tensor = BF16 * block.channels * side**2
  weights = 2 * block.attention.channels * block.attention.size
  return Layer(
    part=part,
    block=index,
    macs=weights,
    forward=3 * tensor,
    backward=3 * tensor,
    weights_forward=LINEAR_FORWARD * weights,
    weights_backward=LINEAR_BACKWARD * weights,
    kept=tensor,
    passing=tensor,
  )


# Tables.


def make_tables() -> dict[str, str]:
  """Every table of roofline.md, by the name in its markers."""
  networks = [work_out(name) for name in NAMES]
  return {
    "network": _network_table(networks),
    "floor": _floor_table(networks),
    "simple": _simple_table(networks),
    "images": _images_table(networks),
    "memory": _memory_table(networks),
    "published": _published_table(networks),
  }


def label(name: str) -> str:
  """nfnet_f0 -> F0."""
  return name.removeprefix("nfnet_").upper()


def mark(network: Network, device: Device) -> str:
  """Whether a batch as published fits: at once, with recomputation, not."""
  if network.largest_batch(device.memory) >= BATCH:
    return ""
  fits = any(
    network.largest_batch(device.memory, remat) >= BATCH
    for remat in ("blocks", "stages")
  )
  return "\\*" if fits else "\\*\\*"


def _network_table(networks: list[Network]) -> str:
  rows = [
    "| | px | parameters | GFLOP per image | MB moved per image | MB moved for "
    "the weights | FLOP per byte at 32 |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for x in networks:
    weights = x.bytes(0)
    rows.append(
      f"| {label(x.name)} | {x.size} | {x.params / 1e6:.1f}M "
      f"| {x.flops(1) / 1e9:.1f} | {(x.bytes(1) - weights) / 1e6:.0f} "
      f"| {weights / 1e6:.0f} | {x.flops(BATCH) / x.bytes(BATCH):.0f} |"
    )
  ridges = ", ".join(
    f"{name} {device.flops / device.bandwidth:.0f}"
    for name, device in DEVICES.items()
  )
  return "\n".join(rows) + f"\n\nFLOP per byte of the devices: {ridges}."


def _device_table(networks: list[Network], cell) -> str:
  rows = [
    f"| | {' | '.join(DEVICES)} |",
    f"| --- |{' --- |' * len(DEVICES)}",
  ]
  for network in networks:
    cells = [cell(network, device) for device in DEVICES.values()]
    rows.append(f"| {label(network.name)} | {' | '.join(cells)} |")
  return "\n".join(rows)


def _floor_table(networks: list[Network]) -> str:
  return _device_table(
    networks,
    lambda x, device: f"{x.floor(device, BATCH) * 1e3:.2f}{mark(x, device)}",
  )


def _simple_table(networks: list[Network]) -> str:
  def cell(network: Network, device: Device) -> str:
    seconds = network.simple_floor(device, BATCH)
    is_compute = network.flops(BATCH) / device.flops >= seconds
    kind = "compute" if is_compute else "memory"
    return f"{seconds * 1e3:.2f} ({kind})"

  return _device_table(networks, cell)


def _images_table(networks: list[Network]) -> str:
  return _device_table(
    networks, lambda x, device: f"{BATCH / x.floor(device, BATCH):.0f}"
  )


def _memory_table(networks: list[Network]) -> str:
  kinds = ("none", "blocks", "stages")
  rows = [
    "| | GB fixed | MB per image: all | blocks | stages "
    + "".join(f"| {gib} GiB " for gib in MEMORIES)
    + "|",
    "| --- |" + " --- |" * (4 + len(MEMORIES)),
  ]
  for x in networks:
    sizes = [f"{x.activations(kind) / 1e6:.1f}" for kind in kinds]
    batches = [
      " / ".join(str(x.largest_batch(gib, kind)) for kind in kinds)
      for gib in MEMORIES
    ]
    cells = [f"{x.fixed_bytes() / 1e9:.2f}", *sizes, *batches]
    rows.append(f"| {label(x.name)} | {' | '.join(cells)} |")
  return "\n".join(rows)


def _published_table(networks: list[Network]) -> str:
  rows = ["| |", "| --- |"]
  for name in OLD_DEVICES:
    rows[0] += f" {name}: ms | floor, ms | of peak FLOP/s | of the floor |"
    rows[1] += " --- |" * 4
  for i, network in enumerate(networks[:6]):
    row = f"| {label(network.name)} |"
    for name, device in OLD_DEVICES.items():
      seconds = PUBLISHED[name][i] / 1e3
      floor = network.floor(device, BATCH)
      compute = network.flops(BATCH) / device.flops
      row += f" {seconds * 1e3:.1f} | {floor * 1e3:.1f} |"
      row += f" {compute / seconds:.0%} | {floor / seconds:.0%} |"
    rows.append(row)
  return "\n".join(rows)


def fill_in(text: str, tables: dict[str, str]) -> str:
  """The page with its tables between the markers replaced."""
  for name, table in tables.items():
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
    text, count = re.subn(
      pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL
    )
    if count != 1:
      raise ValueError(f"roofline.md has {count} markers for {name}, not one")
  return text


# The picture.

_COLORS = dict(
  zip(
    DEVICES,
    ("#1b4f72", "#2e86c1", "#76b7e0", "#9c5a14", "#f0b46a", "#d9822b"),
    strict=True,
  )
)


def save_figure(networks: list[Network], path: Path) -> None:
  """What the devices could do at most, and where F0's time would go."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.4), layout="constrained")
  rates, parts = figure.subplots(1, 2, width_ratios=(1.15, 1))
  _draw_rates(rates, networks)
  _draw_parts(parts, networks[0], DEVICES["H100"])
  figure.savefig(path, dpi=150)


def _draw_rates(axis, networks: list[Network]) -> None:
  labels = [label(network.name) for network in networks]
  for name, device in DEVICES.items():
    values = [BATCH / x.floor(device, BATCH) for x in networks]
    color = _COLORS[name]
    axis.plot(labels, values, marker="o", ms=4, color=color, label=name)
  axis.set_yscale("log")
  ticks = (30, 100, 300, 1000, 3000, 10000)
  axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
  axis.minorticks_off()
  axis.set(
    title=f"Training: images per second at most ({BATCH} per device)",
    ylabel="images per second (logarithmic)",
  )
  axis.legend(frameon=False, ncols=2, fontsize=9)
  axis.grid(alpha=0.25)
  axis.spines[["top", "right"]].set_visible(False)


def _draw_parts(axis, network: Network, device: Device) -> None:
  parts = list(dict.fromkeys(layer.part for layer in network.layers))
  update = UPDATE * network.params / device.bandwidth * 1e3
  compute, memory, floor = [], [], []
  for part in parts:
    layers = [layer for layer in network.layers if layer.part == part]
    macs = sum(layer.macs for layer in layers)
    compute.append(6e3 * macs * BATCH / device.flops)
    moved = sum(
      (x.forward + x.backward) * BATCH + x.weights_forward + x.weights_backward
      for x in layers
    )
    memory.append(1e3 * moved / device.bandwidth)
    floor.append(1e3 * sum(x.seconds(device, BATCH) for x in layers))
  for values, last in ((compute, 0), (memory, update), (floor, update)):
    values.append(last)
  names = [*parts, "optimiser"]
  height = 0.26
  for shift, values, color, text in (
    (-height, compute, "#b8c4ce", "operations alone"),
    (0, memory, "#e3a857", "bytes alone"),
    (height, floor, "#1b4f72", "layer by layer, the slower of both"),
  ):
    at = [i + shift for i in range(len(names))]
    axis.barh(at, values, height=height * 0.92, color=color, label=text)
  axis.set_yticks(range(len(names)), names)
  axis.invert_yaxis()
  axis.set(
    title=f"{label(network.name)} on H100, {BATCH} images of "
    f"{network.size} px: {sum(floor):.2f} ms at least",
    xlabel="milliseconds of a step",
  )
  axis.legend(frameon=False, fontsize=9, loc="upper right")
  axis.grid(axis="x", alpha=0.25)
  axis.set_axisbelow(True)
  axis.tick_params(axis="y", length=0)
  axis.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
  argparse.ArgumentParser(
    description="Writes the tables of roofline.md and roofline.png."
  ).parse_args()
  page = HERE / "roofline.md"
  page.write_text(fill_in(page.read_text(), make_tables()))
  save_figure([work_out(name) for name in NAMES], HERE / "roofline.png")


if __name__ == "__main__":
  main()
