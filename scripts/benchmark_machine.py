"""The machine that a benchmark runs on, and what else it is doing."""

import os
import platform
import time
from pathlib import Path


def describe_machine() -> dict:
  """Processor, cores and memory."""
  name = platform.processor() or platform.machine()
  try:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        name = line.partition(":")[2].strip()
        break
  except OSError:
    pass
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  cores = num_cores()
  return {
    "cpu": name,
    "cores": cores,
    "memory_bytes": memory,
    "python": platform.python_version(),
    "system": platform.platform(terse=True),
    "text": f"{cores} cores of {name}, {memory / 2**30:.0f} GiB",
  }


def num_cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Load:
  """Counts from its making what other processes use of the processors."""

  def __init__(self, pid: int):
    self._pid = pid
    self._start = time.perf_counter(), *self._read()

  def of_others(self) -> float | None:
    """Share of all processors that neither `pid` nor this process used."""
    start, busy_before, own_before = self._start
    busy, own = self._read()
    if None in (busy, own, busy_before, own_before):
      return None
    ticks = (busy - busy_before) - (own - own_before)
    total = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return min(1.0, max(0.0, ticks / os.sysconf("SC_CLK_TCK") / total))

  def _read(self) -> tuple[int | None, int | None]:
    """Ticks that the machine was busy, and those of worker and driver."""
    try:
      cpu = Path("/proc/stat").read_text().split("\n", 1)[0].split()
      # user, nice, system, (idle, iowait,) irq, softirq, steal.
      busy = sum(int(cpu[i]) for i in (1, 2, 3, 6, 7, 8))
      own = 0
      for pid in (self._pid, os.getpid()):
        text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        own += int(text[11]) + int(text[12])
    except (OSError, IndexError, ValueError):
      return None, None
    return busy, own
