"""Build TensorRT engines, strongly typed and tuned to the lengths and batches that are served.

The module serves TensorRT 10, TensorRT 11 and TensorRT-RTX. Where they differ, it looks for the name in the installed
version: version 10 has to be told that networks are strongly typed, and RTX has to be told which GPUs it builds for.
All names were compared with the bindings of 10.16.1, 11.4.0 and RTX 1.7.1.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.artifacts.records import Engine
from resources.engines.interface import Built, Sources
from resources.engines.precision.tensorrt_precision import typed_graph
from resources.engines.specs import EngineSpec
from resources.engines.tensorrt.tensorrt_session import TensorRtSession, fresh_log, installed_flavour, mismatch
from resources.engines.tuning import Profile, Tuning, check_profiles
from resources.errors import EngineError, first_line
from resources.machine.device import first_gpu
from resources.machine.targets import Device
from resources.storage.atomic import write_whole
from resources.storage.locks import file_lock
from resources.tasks import TASKS

if TYPE_CHECKING:
    import numpy as np

    from resources.engines.interface import Goal

PLAN_FILE = "model.plan"
INSPECTOR_FILE = "model.inspector.json"
#: A phase of the builder is shown once it has taken this long. Its steps are then shown no more often than this.
SHOWN_AFTER_SECONDS = 2.0
#: Phases up to this depth below the whole build are shown from their beginning.
_DEPTH = 1


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None, device: Device) -> Built:
    """Write the plan and, if there is a GPU, the inspector's report on it.

    If there is a GPU, the plan also runs once as a check.

    Raises:
        EngineError: TensorRT is not installed, it cannot build the plan, or the plan fails the check.
    """
    del device
    started, model = time.monotonic(), sources.checkpoint.model
    assert goal is not None and goal.tuning is not None, "a TensorRT engine is built with a goal and a tuning"
    tuning = goal.tuning
    flavour = installed_flavour()
    if flavour is None:
        raise EngineError(
            f"{model}: {spec.name} needs TensorRT, which is not installed. "
            "Install it: pip install 'transformer-refinery[tensorrt]'."
        )
    trt = import_module(flavour)
    check_profiles(model, tuning.profiles, sources.checkpoint.max_tokens)
    graph = folder / "typed.onnx"
    try:
        reduced = typed_graph(sources, spec, goal, graph)
        operators = _operators(graph)
        gpu = first_gpu()
        parameters = {
            **reduced.parameters,
            "flavour": flavour,
            "tensorrt": str(trt.__version__),
            "compute_capability": gpu.capability if gpu is not None else "",
            "optimization_level": str(tuning.settings.optimization_level),
            "profiles": str(len(tuning.profiles)),
            **{f"profile_{number}": str(profile) for number, profile in enumerate(tuning.profiles)},
        }
        plan, parameters["timing_cache"] = make_plan(trt, graph, sources, tuning, started + tuning.seconds)
    finally:
        for leftover in folder.glob(f"{graph.name}*"):
            leftover.unlink()
    (folder / PLAN_FILE).write_bytes(plan)
    if gpu is None:
        parameters["inspector"] = "not run: the inspector needs a GPU, and nvidia-smi shows none on this machine"
    else:
        (folder / INSPECTOR_FILE).write_text(_inspect(trt, plan, model), encoding="utf-8")
        parameters["inspector"] = INSPECTOR_FILE
        from resources.engines.onnxruntime.runner import check_answer

        check_answer(TensorRtRunner(folder / PLAN_FILE, sources.graph.output, parameters, what=model), sources)
    documents = () if gpu is None else (INSPECTOR_FILE,)
    return Built(PLAN_FILE, parameters, operators, reduced.kept, reduced.steps, reduced.kept_nodes, documents)


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> TensorRtRunner:
    """Load the plan on the first GPU of this machine.

    Raises:
        EngineError: The plan was built by another version of TensorRT or for another GPU, or it cannot be loaded.
    """
    del sources, threads
    what = f"{engine.model}: {engine.name}"
    gpu = first_gpu()
    problem = mismatch(engine.parameters, gpu.capability if gpu is not None else "")
    if problem:
        raise EngineError(f"{what} cannot be loaded: {problem}")
    return TensorRtRunner(folder / engine.entry_file, engine.output, engine.parameters, what=what)


class TensorRtRunner:
    """A session over a plan, whose errors name the model."""

    def __init__(self, plan: Path, output: str, built: dict[str, str], *, what: str) -> None:
        try:
            self._session = TensorRtSession(plan, output, built)
        except Exception as error:
            raise EngineError(f"{what} cannot be loaded: {first_line(error)}") from error

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Return the plan's output for one batch."""
        return self._session.run(batch)


def make_plan(trt: Any, graph: Path, sources: Sources, tuning: Tuning, deadline: float) -> tuple[bytes, str]:
    """Build the engine.

    The build stops at `deadline`, a time of time.monotonic(), and keeps the timings that it has made until then.

    Returns:
        The serialized engine, and whether the timing cache was reused or begun.

    Raises:
        EngineError: TensorRT cannot build the engine, or not before the deadline.
    """
    model, log = sources.checkpoint.model, fresh_log(trt.__name__)
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 has no other networks
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    _parse(trt, graph, network, log, model)
    config = builder.create_builder_config()
    config.builder_optimization_level = tuning.settings.optimization_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(tuning.settings.workspace_gb * 1e9))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector's report then names layers and kernels
    _choose_gpu(trt, config, model)
    extra = TASKS[sources.checkpoint.task].extra_inputs
    for profile in tuning.profiles:
        config.add_optimization_profile(_profile(builder, network, profile, extra))
    cache = TimingCache(tuning.caches, trt)
    attached = cache.attach(config)
    monitor = make_monitor(trt, deadline, _write)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    cache.keep(config)
    if plan is None and monitor.late:
        raise EngineError(
            f"{model}: TensorRT was stopped after {tuning.seconds:.0f} s, shortly before the time limit of a step. "
            "Its timings are kept, so the next build gets further. Raise REFINERY_STEP_SECONDS, or lower "
            "`tensorrt: {optimization_level, profiles}` in the models file."
        )
    if plan is None:
        raise EngineError(f"{model}: TensorRT {trt.__version__} could not build the engine: {log.last()}")
    return bytes(plan), attached


def _parse(trt: Any, graph: Path, network: Any, log: Any, model: str) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    said = "; ".join(
        f"node {error.node_name()!r} ({error.node_operator()}): {' '.join(error.desc().split())[:300]}"
        for error in errors[:3]
    )
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    raise EngineError(
        f"{model}: TensorRT {trt.__version__} does not accept the graph: {said or log.last()}{more}. Leave the "
        "engine out (`engines` in the models file), or use a version of TensorRT that has the operator."
    )


def _profile(builder: Any, network: Any, profile: Profile, extra: tuple[str, ...]) -> Any:
    made = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        name = network.get_input(number).name
        alone = name in extra  # such an input has one number for each row
        made.set_shape(
            name,
            (1, 1 if alone else profile.shortest),
            (profile.best.batch, 1 if alone else profile.best.sequence),
            (profile.batch, 1 if alone else profile.longest),
        )
    return made


def _choose_gpu(trt: Any, config: Any, model: str) -> None:
    """Tell TensorRT-RTX to build for the GPU of this machine.

    By default it builds for all GPUs that it supports. TensorRT itself builds only for the GPU of this machine.
    """
    gpu = first_gpu()
    if gpu is None or not hasattr(config, "set_compute_capability"):
        return
    wanted = getattr(trt.ComputeCapability, f"SM{gpu.capability.replace('.', '')}", None)
    if wanted is None:
        raise EngineError(
            f"{model}: TensorRT-RTX {trt.__version__} does not build for compute capability {gpu.capability} "
            f"({gpu.name}). Install TensorRT instead: pip install 'transformer-refinery[tensorrt]'."
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(wanted, 0)


class TimingCache:
    """The timings of one version of TensorRT on one kind of GPU, in a file that its builds share.

    The file is complete at any moment, because it is written under another name and then renamed. Builds that end at
    the same time add their timings to each other's.
    """

    def __init__(self, folder: Path, trt: Any) -> None:
        gpu = first_gpu()
        device = "".join(letter if letter.isalnum() else "-" for letter in gpu.name) if gpu is not None else "no-gpu"
        self.path = folder / f"{trt.__name__}-{trt.__version__}-{device}.timings"

    def attach(self, config: Any) -> str:
        """Let the builder use the cache.

        Returns:
            "reused" if the file held timings, else "begun".
        """
        known = self._read()
        with _no_deprecation():
            # TensorRT treats a damaged cache as an empty one and writes a warning to the log.
            self._attached = config.create_timing_cache(known)  # the builder uses it, so this object must keep it
            config.set_timing_cache(self._attached, False)
        return "reused" if known else "begun"

    def keep(self, config: Any) -> None:
        """Write the builder's timings, together with those that other builds have written in the meantime."""
        with _no_deprecation(), file_lock(self.path.with_suffix(".lock")):
            cache = config.get_timing_cache()
            if cache is None:
                return
            others = self._read()
            if others:
                cache.combine(config.create_timing_cache(others), False)
            write_whole(self.path, bytes(cache.serialize()))

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""


@contextmanager
def _no_deprecation() -> Iterator[None]:
    """Suppress the warnings of TensorRT-RTX 1.2 and later, which still has these calls but keeps no timings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def make_monitor(trt: Any, deadline: float, write: Callable[[str], None]) -> Any:
    """Return a progress monitor that shows long phases through `write` and ends the build at the deadline.

    Its attribute `late` is then true. The builder calls the monitor from several threads.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.late = False
            self._lock = threading.Lock()
            self._phases: dict[str, _Phase] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                above = self._phases.get(parent or "")
                phase = _Phase(above.depth + 1 if above is not None else 0, steps, time.monotonic())
                self._phases[name] = phase
                if phase.depth <= _DEPTH:
                    write(f"{phase.indent}{name} ...")

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                phase, now = self._phases.get(name), time.monotonic()
                if phase is not None and now - phase.shown > SHOWN_AFTER_SECONDS:
                    phase.shown = now
                    write(f"{phase.indent}{name}: {step + 1} of {phase.steps}, {now - phase.started:.0f} s")
                if now > deadline and not self.late:
                    self.late = True
                    write("no time left: stopping")
                return not self.late

        def phase_finish(self, name: str) -> None:
            with self._lock:
                phase, now = self._phases.pop(name, None), time.monotonic()
                if phase is not None and (phase.depth <= _DEPTH or now - phase.started > SHOWN_AFTER_SECONDS):
                    write(f"{phase.indent}{name}: done in {now - phase.started:.1f} s")

    return Monitor()


class _Phase:
    """A phase of the build that is running."""

    def __init__(self, depth: int, steps: int, started: float) -> None:
        self.depth, self.steps, self.started, self.shown = depth, steps, started, started
        self.indent = "  " * depth


def _write(line: str) -> None:
    """Write a line to the step's log, which is the output of the process that builds."""
    sys.stdout.write(f"tensorrt: {line}\n")
    sys.stdout.flush()


def _inspect(trt: Any, plan: bytes, model: str) -> str:
    """Return the inspector's report on the engine as JSON: its layers, their kernels, precisions and profiles."""
    log = fresh_log(trt.__name__)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{model}: TensorRT {trt.__version__} cannot read the plan that it built: {log.last()}")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _operators(graph: Path) -> dict[str, int]:
    import onnx

    proto = onnx.load(graph, load_external_data=False)
    return dict(Counter(node.op_type for node in proto.graph.node))
