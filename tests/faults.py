"""Commands on a disk that fails one write of theirs, or every write from one on.

`faulty_disk.c` is preloaded into a host process, which has imported the command line once and forks for each command:
so a command costs its own work alone, and the disk fails it and all of its children in Python, C, C++ and Rust alike.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SOURCE = Path(__file__).with_name("faulty_disk.c")
#: What the commands import.
_PRELOADED = (
    *("orchestration.definitions", "orchestration.cli.gc", "orchestration.cli.optimize", "orchestration.cli.releases"),
    *("alembic.command", "dagster._core.storage.sqlite_storage", "sqlalchemy.dialects.sqlite", "tritonclient.grpc"),
    *("mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
)
#: As `struct state` there: writes counted, the first that fails, whether all after it do, whether databases are
#: spared, the folder, what failed.
_STATE = struct.Struct("QQQQ1024s1024s")


@dataclass(frozen=True)
class Done:
    """How a command ended, what it said, how many writes it made, and which one failed first, if one did."""

    code: int
    out: str
    err: str
    writes: int
    failed: str


class Commands:
    """Runs commands of ours, one at a time, on a disk that fails as it is told. home: their REFINERY_HOME."""

    def __init__(self, home: Path, process: subprocess.Popen[str], state: mmap.mmap) -> None:
        self.home, self._process, self._state = home, process, state

    def run(self, *arguments: str, at: int = 0, full: bool = False, spared: bool = False) -> Done:
        """Run one command.

        at: the number of the write below `home` that fails with ENOSPC; 0: none does. full: so does every later one
        that needs room. spared: SQLite's databases are neither counted nor failed.
        """
        self._state[:] = _STATE.pack(0, at, full, spared, os.fsencode(self.home), b"").ljust(len(self._state), b"\0")
        out, err = self.home.with_name("out"), self.home.with_name("err")
        asked = {"arguments": arguments, "out": str(out), "err": str(err)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        writes, _, _, _, _, failed = _STATE.unpack(self._state[: _STATE.size])
        said = os.fsdecode(failed.rstrip(b"\0"))
        return Done(code, out.read_text(errors="replace"), err.read_text(errors="replace"), writes, said)


@contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    """Start the host of the commands, whose home is a folder there. Without a C compiler the test is skipped."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the disk that fails is written in C, and this machine has no cc")
    home, library = folder.resolve() / "home", folder / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
    file = library.with_suffix(".so.state")
    file.write_bytes(_STATE.pack(0, 0, 0, 0, b"/nowhere", b"").ljust(mmap.PAGESIZE, b"\0"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
    variables = {"REFINERY_HOME": str(home), "REFINERY_CATALOG": str(home / "models.yaml"), "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults", str(folder / "machine.lock")],
        env={**clean, **variables, "LD_PRELOAD": str(library)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as state:
            yield Commands(home, process, state)
    finally:
        process.communicate()


def _host() -> None:
    """Run each command that is asked for in a child of its own."""
    from orchestration.cli import main as cli
    from resources.machine import lock
    from resources.triton import exam, fleet, rollback
    from resources.triton import retain as retaining

    for module in _PRELOADED:
        import_module(module)
    gc.freeze()  # or each child's first collection copies all of it
    lock.MACHINE_LOCK = Path(sys.argv[1])
    retaining.FOLLOW_SECONDS = exam.REST_SECONDS = 0.0
    fleet.GRACE_SECONDS = 0.5
    # A server that answers costs seconds: it is asked by `optimize`, whose proof is the same.
    vars(rollback)["ask_embedded"] = lambda *arguments: None
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.exit(cli(asked["arguments"]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _host()
