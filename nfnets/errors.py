"""What a user can do wrong, as exceptions whose text is one clear line.

Every message says what was given, what is needed, and what to do. The command
line prints it without a traceback; in a notebook it is a `ValueError`.
"""

import difflib
from collections.abc import Iterable
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


def is_out_of_memory(error: Exception) -> bool:
  """Whether something did not fit into the device's memory."""
  is_full = "RESOURCE_EXHAUSTED" in str(error)
  return isinstance(error, RuntimeError) and is_full
