"""The memory of this machine or of a process's container, and the memory that a tree of processes takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
#: The names of the files with the memory limit, for cgroups of version 2 and version 1.
_LIMIT_FILES = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}


def available_bytes(proc: Path = _PROC) -> int:
    """Return the machine's memory, or less if this process's cgroup, or one around it, has a limit."""
    limits = [_machine_bytes()]
    for folder, file, top in _cgroups(proc):
        while True:
            with suppress(OSError, ValueError):  # `max` means that there is no limit
                limits.append(int((folder / file).read_text()))
            if folder == top:
                break
            folder = folder.parent
    return min(limits)


def _machine_bytes() -> int:
    """Return the machine's memory as /proc/meminfo tells it, which containers of LXC have a version of their own of."""
    with suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / "meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemTotal:")).split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroups(proc: Path) -> Iterator[tuple[Path, str, Path]]:
    """Yield the folder, limit file and mount point of each cgroup that bounds this process's memory.

    The sources are cgroups(7) and proc_pid_mountinfo(5). A container sees its own cgroup as the top of the mount,
    whatever path the cgroup has outside.
    """
    paths: dict[str, PurePosixPath] = {}
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                paths["cgroup" if controllers else "cgroup2"] = PurePosixPath(own)
    with suppress(OSError):
        for line in (proc / "self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            if kind not in paths or (kind == "cgroup" and "memory" not in options.split(" ")[-1].split(",")):
                continue
            root, top = before.split(" ")[3:5]
            path = paths[kind]
            inner = path.relative_to(root) if path.is_relative_to(root) and ".." not in path.parts else PurePosixPath()
            yield Path(top) / inner, _LIMIT_FILES[kind], Path(top)


def tree_bytes(pid: int, limit: int) -> int:
    """Return the memory that a process and all its descendants take.

    The result is the sum of their resident memory, which counts a page once for each process that shares it. If that
    exceeds `limit`, each page is counted once, which takes the kernel longer.

    Raises:
        psutil.NoSuchProcess: The process has ended.
    """
    import psutil

    process = psutil.Process(pid)
    inner = descendants(pid)
    resident = process.memory_info().rss + sum(map(_resident, inner))
    if resident <= limit or not inner:
        return int(resident)
    return sum(map(_proportional, (pid, *inner)))


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on, without those that have just ended.

    psutil would read the state of every process of the machine for that, which would disturb a measurement.
    """
    found, waiting = list[int](), [pid]
    while waiting:
        for file in _PROC.glob(f"{waiting.pop()}/task/*/children"):
            with suppress(OSError):
                children = [int(child) for child in file.read_text().split()]
                found += children
                waiting += children
    return found


def _resident(pid: int) -> int:
    import psutil

    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _proportional(pid: int) -> int:
    """Return the memory of a process, with only its part of each page that it shares."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return _resident(pid)
