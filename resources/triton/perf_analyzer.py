"""Run NVIDIA's perf_analyzer where it is installed, and read its reports.

`pip install perf-analyzer` installs it; it needs glibc 2.38. It is documented at
https://github.com/triton-inference-server/perf_analyzer, in docs/cli.md and docs/input_data.md.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from resources.artifacts.records import LoadLevel
from resources.errors import ServerError
from resources.processes.variables import PROGRAM, inherited
from resources.settings.connection import PLAIN, Connection

#: perf_analyzer computes a level's figures from this many measurement windows, and measures at most this many.
_WINDOWS, _MOST_WINDOWS = 3, 5
#: Time that perf_analyzer gets beyond its windows, to start, to finish the last requests, and to write the report.
_SLACK_SECONDS = 30.0


def find_perf_analyzer() -> Path | None:
    """Return the program, on the path or beside this Python, or None if it is not installed."""
    beside = Path(sys.executable).with_name("perf_analyzer")
    found = shutil.which("perf_analyzer") or (str(beside) if beside.is_file() else None)
    return Path(found) if found else None


def run_perf_analyzer(
    program: Path,
    address: str,
    model: str,
    items: Sequence[Mapping[str, str]],
    levels: Sequence[int],
    seconds: float,
    connection: Connection = PLAIN,
) -> list[LoadLevel]:
    """Measure throughput and latency over gRPC at several numbers of concurrent requests.

    Args:
        program: The perf_analyzer program.
        address: The gRPC address of the server.
        model: The public model.
        items: The requests to send: the text of each input, by the input's name.
        levels: The numbers of concurrent requests. Each is measured for `seconds`.
        seconds: The time to measure each level.
        connection: TLS settings for the server.

    Raises:
        ServerError: perf_analyzer could not be run, failed, ran out of time or wrote no report that can be read.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "requests.json", Path(folder) / "report.csv"
        rows = [{name: {"content": [text], "shape": [1]} for name, text in item.items()} for item in items]
        data.write_text(json.dumps({"data": rows}), encoding="utf-8")
        for clients in levels:
            command = [str(program), "-m", model, "-u", address, "-i", "grpc", "--async"]
            command += ["--input-data", str(data), "--concurrency-range", f"{clients}:{clients}", "-f", str(report)]
            command += _tls(connection)
            command += ["--measurement-interval", str(max(200, round(seconds * 1000 / _WINDOWS)))]
            # If its windows differ by more than this percentage, perf_analyzer reports no figures at all. At 100, it
            # reports those of all windows.
            command += ["--max-trials", str(_MOST_WINDOWS), "--stability-percentage", "100"]
            bound = seconds * _MOST_WINDOWS / _WINDOWS + _SLACK_SECONDS
            try:
                done = subprocess.run(command, env=inherited(PROGRAM), capture_output=True, text=True, timeout=bound)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ServerError(f"perf_analyzer could not measure {model} at {address}: {error}") from error
            if done.returncode or not report.is_file():
                words = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
                raise ServerError(f"perf_analyzer could not measure {model} at {address}: {words[-1]}")
            found += read_report(report.read_text(encoding="utf-8"))
    return found


def _tls(connection: Connection) -> list[str]:
    if not connection.tls:
        return []
    files = {
        "--ssl-grpc-root-certifications-file": connection.ca,
        "--ssl-grpc-certificate-chain-file": connection.certificate,
        "--ssl-grpc-private-key-file": connection.private_key,
    }
    given = [(option, str(path)) for option, path in files.items() if path is not None]
    return ["--ssl-grpc-use-ssl", *(part for pair in given for part in pair)]


def read_report(text: str) -> list[LoadLevel]:
    """Return the levels of a report that perf_analyzer wrote with `-f`.

    The report states latencies in microseconds.

    Raises:
        ServerError: The report has a format other than that of version 2.60.
    """
    try:
        return [
            LoadLevel(
                clients=int(row["Concurrency"]),
                tool="perf_analyzer",
                requests=0,
                throughput_per_s=float(row["Inferences/Second"]),
                p50_ms=float(row["p50 latency"]) / 1000,
                p99_ms=float(row["p99 latency"]) / 1000,
                mean_batch=0.0,
                batches_per_request=0.0,
            )
            for row in csv.DictReader(io.StringIO(text))
        ]
    except (KeyError, TypeError, ValueError) as error:
        first = (text.splitlines() or [""])[0]
        raise ServerError(f"perf_analyzer's report is not what its version 2.60 writes ({error}): {first!r}") from error
