"""What a user can do wrong, as exceptions whose text is one clear line.

Every message says what was given, what is needed, and what to do. The command
line prints it without a traceback; in a notebook it is a `ValueError`. Beside
them is what all commands share that read and write files.
"""

import contextlib
import difflib
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
  """Something given by the user cannot be used (exit code 1)."""


class UsageError(InputError):
  """The command line or the config itself is wrong (exit code 2)."""


class StoppedError(InputError):
  """A run was asked to end early; its state is saved (exit code 75)."""


def unknown(kind: str, given: Any, known: Iterable[str]) -> UsageError:
  """The error for a wrong name: the nearest right ones, then all of them."""
  known, text = list(known), str(given)
  close = difflib.get_close_matches(text, known, n=3)
  close = close or [name for name in known if text and text in name][:3]
  hint = f"did you mean {' or '.join(close)}? " if close else ""
  return UsageError(
    f"unknown {kind} {given!r}: {hint}known: {', '.join(known)}"
  )


def local(path: str) -> str:
  """A path as the shell would have it, which leaves `--option=~/x` as it is.

  Raises:
    InputError: for an address on the network.
  """
  if path.startswith("file:"):
    path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
  if re.match(r"[a-z]\w+:/", path):  # A `Path` has one slash there.
    raise InputError(
      f"{path} is on the network: give a path on this machine (mount what is "
      "there, or download it)"
    )
  return os.path.expanduser(path)


def is_out_of_memory(error: Exception) -> bool:
  """Whether something did not fit into the device's memory."""
  is_full = "RESOURCE_EXHAUSTED" in str(error)
  return isinstance(error, RuntimeError) and is_full


def check_output(path: Path, endings: Iterable[str]) -> None:
  """Raises `InputError` for a file that could not be written in the end."""
  endings = list(endings)
  if path.suffix not in endings:
    raise InputError(
      f"{path}: its name must end in {', '.join(endings)}, which says what is "
      "written"
    )
  if not path.absolute().parent.is_dir():
    raise InputError(f"{path}: there is no folder {path.absolute().parent}")


def check_keeps(path: Path, inputs: Iterable[str | Path]) -> None:
  """Raises `InputError` for an output in the place of one of the inputs."""
  if path.exists() and any(
    os.path.exists(given) and path.samefile(given) for given in inputs
  ):
    raise InputError(
      f"{path} is read, and would be overwritten: give another name"
    )


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
  """Where to write a file that appears as `path` when it is whole.

  Raises:
    InputError: when it cannot be written; nothing of it is left.
  """
  partial = path.with_name(f".partial-{path.name}")
  try:
    yield partial
    os.replace(partial, path)
  except OSError as error:
    reason = error.strerror or str(error)
    raise InputError(f"{path} could not be written: {reason}") from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()
