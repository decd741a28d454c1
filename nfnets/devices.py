"""Devices: the mesh, the per-device program over it, and what goes on it.

A program is written for one device and mapped over the mesh, pmap style: the
batch is split, everything else is a copy. (Automatic partitioning would gather
the whole batch on every device for each grouped convolution, openxla/xla
issue 47945.) The axis has one name, `AXIS`, and gradients and sums cross it in
the step's one mean.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets.errors import InputError

AXIS = "data"


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A one-axis mesh over the first `num_devices` devices (None: all)."""
  devices = jax.devices()
  if num_devices is not None:
    if jax.process_count() > 1 and num_devices != len(devices):
      raise InputError(
        f"{num_devices} devices were asked for, but a run on several hosts "
        f"uses all {len(devices)}: leave config.train.num_devices at None"
      )
    if not 1 <= num_devices <= len(devices):
      raise InputError(
        f"{num_devices} devices were asked for, but there are {len(devices)} "
        f"({devices[0].platform}): set config.train.num_devices to 1 to "
        f"{len(devices)}, or to None for all"
      )
    devices = devices[:num_devices]
  numbers = Counter(device.process_index for device in devices)
  if len(set(numbers.values())) > 1:
    raise InputError(
      f"processes with {sorted(numbers.values())} devices: a batch is split "
      "evenly, so each needs as many"
    )
  return Mesh(np.array(devices), (AXIS,))


def make_small_mesh() -> Mesh:
  """Of one device; on several hosts, all of which must take part, of all."""
  return make_mesh(None if jax.process_count() > 1 else 1)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Raises `InputError` unless a batch divides into equal parts."""
  parts = mesh.size * accumulate
  if batch_size < 1 or batch_size % parts:
    what = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    if accumulate > 1:
      what += f" x {accumulate} accumulated micro-batches"
    down = batch_size // parts * parts
    near = f"{down} or {down + parts}" if down > 0 else f"{parts}"
    raise InputError(
      f"a batch of {batch_size} images does not divide over {what}: use a "
      f"multiple of {parts}, such as {near}"
    )


# Of the images that a program computes on a CPU at once. Of more, train steps
# are slower, as the system clears more memory at each call, and evaluations
# take more memory (experiments/speed.md).
_CPU_PIXELS = 550_000


def images_at_once(size: int) -> int | None:
  """How many images of size x size pixels a device computes best at once.

  On a CPU 8 of 256 px, 14 of 192, 537 of 32; None elsewhere: as many as fit.
  """
  if jax.default_backend() != "cpu":
    return None
  return max(1, _CPU_PIXELS // size**2)


def micro_batches(num: int, size: int) -> int:
  """Into how many equal parts a device had better divide `num` images.

  As many as leave `images_at_once` in each; 1 where there is no such number.
  """
  best = images_at_once(size)
  most = 1 if best is None else num // best
  return max((n for n in range(2, most + 1) if num % n == 0), default=1)


def data_parallel(
  function: Callable[..., Any],
  mesh: Mesh,
  *,
  in_batch: Sequence[bool],
  donate_argnums: Sequence[int] = (),
) -> Callable[..., Any]:
  """Compiles a per-device function over the mesh.

  Args:
    function: Sees its device's part of each batch argument and a copy of every
      other; reduces over `AXIS` itself, so that its outputs are equal on all.
    in_batch: For each positional argument, whether it is split (on its first
      dimension) rather than copied.
    donate_argnums: Arguments whose memory the outputs may take over.
  """
  split, copied = PartitionSpec(AXIS), PartitionSpec()
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=tuple(split if batched else copied for batched in in_batch),
    out_specs=copied,
    # The gradient of a copied parameter stays this device's own until the
    # step's explicit mean.
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=tuple(donate_argnums))


def mean(tree: Any) -> Any:
  """Over the devices, inside of `data_parallel`.

  Of one device it is the tree itself; XLA on a CPU would copy all of it.
  """
  return jax.lax.pmean(tree, AXIS) if jax.lax.axis_size(AXIS) > 1 else tree


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this host's part of a batch (NumPy) on its devices."""
  sharding = NamedSharding(mesh, PartitionSpec(AXIS))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device has a copy of."""
  return NamedSharding(mesh, PartitionSpec())


def create(function: Callable[[], Any], mesh: Mesh) -> Any:
  """Runs a function of nothing so that every device has its own results."""
  return jax.jit(function, out_shardings=replicated(mesh))()


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies a tree of arrays to every device of the mesh (fresh buffers)."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      replicated(mesh), np.asarray(x)
    ),
    tree,
  )
