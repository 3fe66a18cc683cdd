"""What importing the definitions adds to importing Dagster, in seconds: `python -m tests.performance.imports`.

Fresh interpreters in turns; the median of the differences, pair by pair.
"""

import statistics
import subprocess
import sys
import time

PAIRS = 11
LIMIT_SECONDS = 0.3


def seconds(statement: str) -> float:
    """One fresh interpreter, from start to exit."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    """Print the figures; 1 if the limit is missed."""
    for statement in ("import dagster", "import orchestration.definitions"):
        seconds(statement)  # compiles what was never imported before
    pairs = [(seconds("import dagster"), seconds("import orchestration.definitions")) for _ in range(PAIRS)]
    added = statistics.median(ours - theirs for theirs, ours in pairs)
    dagster = statistics.median(theirs for theirs, _ in pairs)
    print(f"import dagster {dagster:.2f} s; orchestration.definitions adds {added:.3f} s (limit {LIMIT_SECONDS} s)")
    return 0 if added <= LIMIT_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
