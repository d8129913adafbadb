"""Whether this machine has something else to do: a time that was taken beside it says nothing.

What another guest of the same host takes cannot be seen; where the system counts it as stolen time, it is counted here.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.2  # of one core
LOOK = 0.1  # seconds

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Moment:
    """Seconds, all cores together: of everybody's work, of this process's, and by the clock."""

    busy: float
    own: float
    clock: float

    @classmethod
    def now(cls) -> Moment:
        return cls(_busy(), time.process_time(), time.perf_counter())


def others_since(then: Moment) -> float:
    """Cores that others have kept busy on average since; 0 where the system does not tell."""
    now = Moment.now()
    seconds = now.clock - then.clock
    if seconds <= 0:
        return 0.0
    return max(0.0, (now.busy - then.busy - (now.own - then.own)) / seconds)


def wait_for_quiet(patience: float) -> float | None:
    """None as soon as the machine is quiet; after `patience` seconds, the cores that others have kept busy."""
    deadline = time.perf_counter() + patience
    while True:
        then = Moment.now()
        time.sleep(LOOK)
        others = others_since(then)
        if others <= QUIET:
            return None
        if time.perf_counter() > deadline:
            return others


def _busy() -> float:
    """Of all cores since the start: user, nice, system, interrupts and what the host took for others."""
    if not _STAT.exists():
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, _STAT.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def busiest(count: int = 3) -> list[str]:
    """Names of the processes, but this one, that took the most time within a short look."""
    before = _seconds_by_process()
    time.sleep(LOOK)
    took = {
        process: seconds - before.get(process, seconds)
        for process, seconds in _seconds_by_process().items()
        if process[0] != os.getpid()
    }
    return [
        f"{name} ({pid})" for pid, name in sorted(took, key=took.__getitem__, reverse=True)[:count] if took[pid, name]
    ]


def _seconds_by_process() -> dict[tuple[int, str], float]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (", 1)
        except OSError:  # it has ended
            continue
        name, fields = rest.rsplit(") ", 1)
        user, system = fields.split()[11:13]
        found[int(pid), name] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found
