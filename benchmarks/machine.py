"""What every number depends on: the processor, its memory, the commit; and processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def processor() -> str:
    """Its name, as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the largest cache that a core sees; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=1 << 25)


def available_memory() -> int:
    """Bytes that can be had without swapping; half of all memory where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def commit() -> str:
    """The commit whose files these are, with "+" where they were changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def in_a_process(module: str, *arguments: object) -> Any:
    """The JSON that `python -m module arguments` prints, in a process that has not held anything large yet."""
    command = ["-m", module, *map(str, arguments)]
    root = Path(__file__).parents[1]
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=root)
    if process.returncode != 0:
        raise RuntimeError(f"python {' '.join(command)} did not run: {process.stderr.strip()[-500:]}")
    return json.loads(process.stdout)
