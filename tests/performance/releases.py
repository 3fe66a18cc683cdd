"""What a new release costs those who are being answered: `python -m tests.performance.releases`, a quarter of an hour.

all-MiniLM-L6-v2 in fp32 on the embedded server, in explicit and in poll mode, with requests of 8 clients at a third of
what it answers at most. Releases are published and rolled back by the product's own functions. There are three kinds,
whose answers are those of the first, turned by a third; one never follows its like, so an answer says whose it is.
Latencies count from when a request was due. Prints p99 while nothing happens, while a release is copied, loaded and
proven, and from the pointer's change to the first new answer; ends with 1 where the last is more than twice the first,
or a request failed, or was answered by no release, or a switch was not followed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import ServingSetting
from resources.catalog.entries import ModelEntry
from resources.engines.specs import engine_spec
from resources.settings.triton import Control, TritonSettings
from resources.settings.workspace import Workspace
from resources.storage.locations import Location
from resources.triton.exam import fleet_steps, make_exam
from resources.triton.fleet import Fleet
from resources.triton.layout import CONFIG
from resources.triton.load import closed_loop
from resources.triton.proof import Exam
from resources.triton.publish import Steps, publish
from resources.triton.release import ReleasePlan
from resources.triton.retain import retain
from resources.triton.rollback import roll_back
from resources.triton.server import EmbeddedServer
from tests.clients import FAILED, NOBODY, Load, Requests, Switch, moved
from tests.making import collect_checkpoint, make_engine, make_evaluation_set, make_graph, sources_of
from tests.performance.cpu import make_entry
from tests.releases import unasked

MODEL = "minilm"
#: Distinct requests; of all lengths that the evaluation set has.
TEXTS = 64
ALLOWED = 2.0
KINDS = 3
WINDOWS = ("quiet", "copied", "loaded", "proven", "moved on", "moved back", "moved")


@dataclass
class Windows:
    """When what happened, `(start, end)` on `time.monotonic`'s clock. moved: from the pointer to the first answer."""

    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {name: [] for name in WINDOWS})

    def add(self, name: str, start: float, end: float) -> None:
        if end > start:
            self.spans[name].append((start, end))


class Publisher:
    """The product's functions on one repository, noting when what happened."""

    def __init__(
        self, plans: Sequence[ReleasePlan], exams: Sequence[Exam], home: Path, settings: TritonSettings
    ) -> None:
        self.plans, self.exams, self.home, self.settings = plans, exams, home, settings
        self.repository = home / "models" / "cpu"
        self.windows = Windows()
        self.switches: list[Switch] = []
        self.kinds: dict[int, int] = {}

    def publish(self) -> None:
        """The next release. Each has a batch size of its own: an equal one is not published again after a rollback."""
        count = len(self.kinds)
        kind = count % KINDS
        plan = replace(self.plans[kind], max_batch_size=self.plans[kind].max_batch_size + count)
        exam = replace(self.exams[kind], max_batch_size=plan.max_batch_size)
        began = time.monotonic()
        watched = _Watched(self.settings)
        with watched as fleet:
            done = publish(plan, self.repository, fleet_steps(fleet, lambda: exam, self.repository))
        assert done.changed
        self.kinds[done.release.number] = kind
        self._moved(done.release.number)
        load_began, load_ended = watched.held[0]
        self.windows.add("copied", began, load_began)
        self.windows.add("loaded", load_began, load_ended)
        self.windows.add("proven", load_ended, self.switches[-1].at)

    def roll_back(self) -> None:
        done = roll_back(self.repository, MODEL, self.settings, log=self.home / "rollback.log")
        self._moved(done.release.number)

    def retain(self) -> None:
        retain(self.repository, MODEL, keep=2, settings=self.settings)

    def rest(self, seconds: float) -> None:
        """Nothing happens. What came before may still settle for a moment."""
        time.sleep(2.0)
        began = time.monotonic()
        time.sleep(seconds)
        self.windows.add("quiet", began, time.monotonic())

    def _moved(self, number: int) -> None:
        self.switches.append(moved(self.repository / MODEL / CONFIG, self.kinds[number]))


class _Watched(Fleet):
    """Notes when models were loaded."""

    def __init__(self, settings: TritonSettings) -> None:
        super().__init__(settings)
        self.held: list[tuple[float, float]] = []

    def hold(self, repository: Location, name: str, number: int) -> None:
        began = time.monotonic()
        super().hold(repository, name, number)
        self.held.append((began, time.monotonic()))


def build(workspace: Workspace, folder: Path, threads: int) -> tuple[list[ReleasePlan], list[Exam], list[str]]:
    """Plans and exams of all kinds, and the texts to ask."""
    entry: ModelEntry = make_entry({}, 20.0)
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    sources = sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)
    spec = engine_spec("onnxruntime_fp32")
    engine = make_engine(workspace, entry, spec, "cpu", sources, evaluation).record
    known = read_evaluation_set(workspace.store.folder(evaluation))
    plans, exams = [], []
    for kind in range(KINDS):
        place = workspace.store.folder(engine)
        if kind:
            place = folder / f"engine-{kind}"
            turn_engine(workspace.store.folder(engine) / engine.entry_file, place / engine.entry_file, kind)
        plan = ReleasePlan(
            model=MODEL,
            target="cpu",
            flavour="python",
            checkpoint=checkpoint,
            checkpoint_folder=workspace.store.folder(checkpoint),
            engine=engine.with_files(place) if kind else engine,
            engine_folder=place,
            max_batch_size=entry.max_batch_size,
            serving=ServingSetting(threads=threads),
        )
        plans.append(plan)
        exams.append(make_exam(plan, entry.accuracy_gates(), known.items, list(turned(known.baseline, kind))))
    order = np.random.default_rng(0).permutation(len(known.items))[:TEXTS]
    return plans, exams, [known.items[index]["TEXT"] for index in order]


def turned(answers: Iterable[np.ndarray], kind: int) -> np.ndarray:
    """What a release of that kind answers where the first answers so: fp32 `[texts, width]`."""
    stacked = np.stack(list(answers))
    return np.roll(stacked, kind * stacked.shape[1] // KINDS, axis=1)


def turn_engine(source: Path, target: Path, kind: int) -> None:
    """The engine of that kind."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    (output,) = model.graph.output
    width = output.type.tensor_type.shape.dim[1].dim_value
    for node in model.graph.node:
        node.output[:] = ["straight" if name == output.name else name for name in node.output]
    order = np.roll(np.arange(width), kind * width // KINDS)
    model.graph.initializer.append(numpy_helper.from_array(order, "turned"))
    model.graph.node.append(helper.make_node("Gather", ["straight", "turned"], [output.name], axis=1))
    target.parent.mkdir(parents=True)
    onnx.save_model(model, target)


def measure(
    publisher: Publisher, control: Control, texts: Sequence[str], given: argparse.Namespace
) -> tuple[Requests, float, float]:
    """All cycles in one mode; what was asked, how many requests a second, and how many the server could answer."""
    publish(publisher.plans[0], publisher.repository, Steps(prove=unasked))
    publisher.kinds[1] = 0
    log = publisher.home / "triton.log"
    with EmbeddedServer(
        publisher.repository, publisher.settings, models=[MODEL], log=log, control=control, options=given.option
    ) as server:
        publisher.settings = replace(
            publisher.settings, servers=(server.grpc_address,), connection=server.connection, control=control
        )
        with server.client() as client:
            contract = client.contract(MODEL)
            items = [{"TEXT": text} for text in texts]
            first = np.stack([client.ask(MODEL, contract, [item])[0] for item in items])
        most = closed_loop(server.grpc_address, MODEL, contract, items, concurrency=8, seconds=8.0).throughput
        rate = most * given.share
        publisher.switches.append(Switch(0.0, 0))
        with Load(
            server.grpc_address, MODEL, texts, np.stack([turned(first, kind) for kind in range(KINDS)]), rate
        ) as load:
            for _ in range(given.cycles):
                publisher.rest(given.quiet)
                publisher.publish()
                publisher.rest(given.quiet)
                publisher.roll_back()
                time.sleep(1.0)
                publisher.retain()
        assert load.requests is not None
        return load.requests, rate, most


def report(control: str, requests: Requests, rate: float, most: float, publisher: Publisher) -> bool:
    """Print a table; whether all is as it should be."""
    windows = publisher.windows
    for number, switch in enumerate(publisher.switches[1:]):
        for name in ("moved", "moved back" if number % 2 else "moved on"):
            if (answered := requests.first_answer(switch)) < float("inf"):
                windows.add(name, switch.at, answered)
    failed, nobody = int((requests.release == FAILED).sum()), int((requests.release == NOBODY).sum())
    stray = requests.out_of_turn(publisher.switches)
    # A later release of the same kind is no answer to it.
    ends = [switch.at for switch in publisher.switches[1:]] + [float("inf")]
    lost = sum(requests.first_answer(switch) >= end for switch, end in zip(publisher.switches, ends, strict=True))
    print(
        f"\n{control}: {len(requests.due)} requests at {rate:.1f} a second (of {most:.1f} at most), "
        f"{len(publisher.switches) - 1} switches; {failed} failed, {nobody} of no release, {stray} out of turn, "
        f"{lost} switches not followed\n"
    )
    print("| window | seconds each | requests | p50 ms | p99 ms | times quiet |\n|---|---|---|---|---|---|")
    quiet = ratio = float("nan")
    for name in WINDOWS:
        spans = windows.spans[name]
        mask = np.zeros(len(requests.due), dtype=bool)
        for start, end in spans:
            # Who was waiting when it began is touched by it too.
            mask |= (requests.due < end) & (requests.done >= start)
        took = requests.took_ms[mask]
        if not len(took):
            continue
        p50, p99 = np.percentile(took, [50, 99])
        quiet = p99 if name == "quiet" else quiet
        ratio = p99 / quiet
        length = np.mean([end - start for start, end in spans])
        print(f"| {name} | {length:.2f} | {len(took)} | {p50:.1f} | {p99:.1f} | {ratio:.2f} |", flush=True)
    print(requests.errors[:3] or "", flush=True)
    return ratio <= ALLOWED and not failed and not nobody and not stray and not lost


def main() -> int:
    """Both modes, each with a fresh repository and server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10, help="of a publish and a rollback, in each mode")
    parser.add_argument("--quiet", type=float, default=6.0, help="seconds before each of them")
    parser.add_argument("--share", type=float, default=1 / 3, help="of what the server answers at most")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--control", nargs="*", default=["explicit", "poll"])
    parser.add_argument("--option", nargs="*", default=[], help="of tritonserver, such as model-load-thread-count=1")
    parser.add_argument("--home", type=Path, help="of the artifacts, kept; default: a fresh one")
    given = parser.parse_args()
    given.option = [f"--{option}" for option in given.option]
    alright = True
    with tempfile.TemporaryDirectory() as folder:
        home = given.home or Path(folder) / "home"
        workspace = Workspace(home=home, catalog_path=home / "models.yaml")
        plans, exams, texts = build(workspace, Path(folder), given.threads)
        for control in given.control:
            publisher = Publisher(plans, exams, Path(folder) / control, workspace.triton)
            requests, rate, most = measure(publisher, control, texts, given)
            alright &= report(control, requests, rate, most, publisher)
    return 0 if alright else 1


if __name__ == "__main__":
    sys.exit(main())
