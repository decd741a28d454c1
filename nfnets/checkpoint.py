"""Checkpoints of a run: the whole `TrainState` and the position in the data.

Written by Orbax: asynchronously (training goes on) and atomically (a folder
has its final name only when it is complete, so a run killed while writing
leaves the previous checkpoint as the newest). One item per use: `weights` is
all that evaluation and prediction read.
"""

import contextlib
import errno
import fcntl
import inspect
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nfnets import devices
from nfnets.errors import InputError, is_out_of_memory
from nfnets.models import Model
from nfnets.steps import TrainState

_LOGS = [logging.getLogger(name) for name in ("absl", "asyncio")]  # Orbax's.

_WEIGHTS = ("params", "state", "ema_params", "ema_state")


class Checkpoints:
  """The checkpoints of one workdir; a context manager.

  Args:
    workdir: They are in its folder `checkpoints`, one folder per step.
    keep: How many of the newest to keep; None: this only reads.
  """

  def __init__(self, workdir: str | Path, *, keep: int | None = None):
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._root = Path(workdir).resolve() / "checkpoints"
    self._has_failed = False
    self._filter = lambda record: not record.exc_info
    self._manager = ocp.CheckpointManager(
      self._root,
      item_names=("weights", "optimizer", "data"),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=keep is not None,
        # What a killed run left half written.
        cleanup_tmp_directories=keep is not None,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    # What Orbax's threads raise is raised here too, and told once.
    self._hook, sys.unraisablehook = sys.unraisablehook, _ignore_closed_loops
    for log in _LOGS:
      log.addFilter(self._filter)
    return self

  def __exit__(self, *exception: Any) -> None:
    with self._writing():
      self._manager.close()  # Waits for what is being written.
    if not self._has_failed:  # Else they go on telling for a while.
      sys.unraisablehook = self._hook
      for log in _LOGS:
        log.removeFilter(self._filter)

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def folder(self, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return self._root / str(step)

  def wait(self) -> None:
    """Returns when every checkpoint is complete on disk; errors as `save`."""
    with self._writing():
      self._manager.wait_until_finished()

  def save(self, state: TrainState, *, position: int) -> None:
    """Starts writing; `position` counts the examples that were given out.

    Raises:
      InputError: when this one, or the one before, cannot be written.
    """
    args = self._ocp.args
    values = state._asdict()
    weights = {name: values.pop(name) for name in _WEIGHTS}
    with self._writing():
      self._manager.save(
        int(state.step),
        args=args.Composite(
          weights=args.StandardSave(weights),
          optimizer=args.StandardSave(values),
          data=args.JsonSave({"position": position}),
        ),
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """What goes wrong while writing (a full disk), as one line."""
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      self._has_failed = True
      if is_out_of_memory(error):
        raise
      # Whatever the manager counts: a folder with its final name is complete.
      steps = [int(p.name) for p in self._root.glob("*") if p.name.isdigit()]
      kept = (
        f"step {max(steps)} is the newest one that is complete"
        if steps
        else "none is complete yet"
      )
      raise InputError(
        f"a checkpoint could not be written to {self._root} "
        f"({_reason(error)}); {kept}: see that there is room and that the "
        "folder can be written, and give the same command again"
      ) from error

  def restore(self, like: TrainState, mesh: Mesh) -> tuple[TrainState, int]:
    """The newest state, on the devices of the mesh, and its position.

    Args:
      like: A state (or its shapes) of the same structure.

    Raises:
      InputError: when the checkpoint is damaged or of another structure, or
        cannot be read now.
    """
    values = like._asdict()
    weights = {name: values.pop(name) for name in _WEIGHTS}
    args = self._ocp.args
    restored = self._restore(
      weights=args.StandardRestore(_on(mesh, weights)),
      optimizer=args.StandardRestore(_on(mesh, values)),
      data=args.JsonRestore(),
    )
    state = TrainState(**restored["weights"], **restored["optimizer"])
    return state, restored["data"]["position"]

  def restore_weights(self, like: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """`params`, `state` and their averages `ema_params`, `ema_state`.

    Raises:
      InputError: as `restore`.
    """
    args = self._ocp.args
    target = args.StandardRestore(_on(mesh, like))
    return self._restore(weights=target)["weights"]

  def _restore(self, **items: Any) -> Any:
    step = self.latest_step()
    if step is None:
      raise InputError(f"{self.folder(0).parent} holds no checkpoint yet")
    try:
      return self._manager.restore(step, args=self._ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      if "tree structures do not match" in str(error):
        raise InputError(
          f"the checkpoint {self.folder(step)} is of another model, or of "
          "another version of nfnets: go on with what wrote it, or choose "
          "another --workdir"
        ) from error
      self._has_failed = True
      if is_out_of_memory(error):
        raise
      if _may_be_whole(error):
        raise InputError(
          f"the checkpoint {self.folder(step)} cannot be read now "
          f"({_reason(error)}); it is left as it is: give the same command "
          "again once it can"
        ) from error
      steps = [s for s in self._manager.all_steps() if s != step]
      to_do = (
        f"move that folder away to go on from step {max(steps)}"
        if steps
        else "there is no other one: start again with a new workdir"
      )
      raise InputError(
        f"the checkpoint {self.folder(step)} is damaged or of another model "
        f"({_reason(error)}): {to_do}"
      ) from error


def _reason(error: Exception) -> str:
  """What the system said, or else the beginning of an error's text."""
  if found := re.search(r": ([^:]*) \[os_error_code=", str(error)):
    return found[1]
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].partition(" See full TensorStore")[0][:160].rstrip(". ")


def _may_be_whole(error: Exception) -> bool:
  """Whether reading failed for what lies outside of the checkpoint's files."""
  if isinstance(error, MemoryError):
    return True
  number = getattr(error, "errno", None)
  if found := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
    number = int(found[1])
  if number is not None:  # Files that are missing are damage.
    return number not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
  codes = "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED"
  return re.search(codes, str(error)) is not None


def load_weights(
  workdir: str | Path, model: Model, mesh: Mesh
) -> dict[str, Any]:
  """Weights of a run's newest checkpoint, on the devices.

  Returns:
    `params`, `state`, and their averages `ema_params`, `ema_state`.

  Raises:
    InputError: when there is no checkpoint or it cannot be read.
  """
  params, state = model.shapes()
  like = {
    "params": params,
    "state": state,
    "ema_params": params,
    "ema_state": state,
  }
  with Checkpoints(workdir) as checkpoints:
    if checkpoints.latest_step() is None:
      raise InputError(
        f"{workdir} has no checkpoint yet: train it with `nfnets train`"
      )
    return checkpoints.restore_weights(like, mesh)


def _ignore_closed_loops(unraisable: Any) -> None:
  """A hook for what Python cannot raise.

  Once one array cannot be read or written, Orbax closes the event loop, and
  TensorStore prints a traceback for each of the others that were not done.
  """
  is_reading = inspect.iscoroutine(unraisable.object)
  if not is_reading and "Event loop is closed" not in str(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)


def _on(mesh: Mesh, tree: Any) -> Any:
  """Shapes of a tree, as copies on every device of the mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=devices.replicated(mesh)
    ),
    tree,
  )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Keeps a second process out of a workdir; one that dies leaves no lock.

  On a network's file system a machine that dies may leave it, so that the file
  says who has it.
  """
  path = workdir / ".lock"
  with path.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise InputError(
        f"another process is training in {workdir} "
        f"({file.read() or 'it does not say which'}): wait for it, stop it, "
        "or choose another --workdir; if that machine is gone, remove "
        f"{path}"
      ) from None
    except OSError as error:
      warnings.warn(
        f"{workdir} cannot be locked ({error.strerror}): nothing keeps two "
        "runs apart that are started in it",
        stacklevel=1,
      )
    holder = f"host {socket.gethostname()}, process {os.getpid()}"
    with contextlib.suppress(OSError):  # A full disk is told elsewhere.
      file.truncate(0)
      os.write(file.fileno(), holder.encode())
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        file.truncate(0)
