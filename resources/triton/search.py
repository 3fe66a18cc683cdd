"""How the champion is served best: instances and queue delay, found under load on a real server within a bound.

Successive halving (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
2016): all settings are measured shortly and in turns, the better half again for twice as long, until two are left.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import (
    Champion,
    Checkpoint,
    Engine,
    EvaluationSet,
    ServingConfiguration,
    ServingSetting,
    ServingTrial,
    ThreadSetting,
)
from resources.artifacts.store import Made
from resources.catalog import ModelEntry, ServingSettings
from resources.device import describe_device
from resources.errors import ReleaseError, ServerError
from resources.evaluation.reference import read_evaluation_set
from resources.locks import benchmarking
from resources.targets import device_of
from resources.triton.config import front_config, write_config
from resources.triton.environment import is_installed, requirements
from resources.triton.layout import CONFIG, internal_name
from resources.triton.load import WARM_UP_SECONDS, closed_loop, server_statistics, statistics_since
from resources.triton.mix import load_of, request_mix
from resources.triton.release import ReleasePlan
from resources.triton.server import EmbeddedServer
from resources.triton.settings import TritonSettings
from resources.triton.stage import stage
from resources.workspace import Workspace

if TYPE_CHECKING:
    from resources.pipelines.base import Item

#: What a configuration depends on, beside what is served.
CODE = (
    "resources.triton.search",
    "resources.triton.load",
    "resources.triton.mix",
    "resources.triton.config",
    "resources.triton.launch",
    "resources.triton.python_models",
    "resources.pipelines",
    "resources.engines.sessions",
    "resources.engines.cuda",
)
#: Waiting longer than this for company costs more than any batch wins back at the speeds that engines have here.
QUEUE_DELAYS_US = (0, 500, 2000)
#: More instances than this share the machine's memory bandwidth and the GPU's multiprocessors without winning.
MOST_INSTANCES = 4
#: What all instances on a CPU may hold of weights; each holds the engine's twice.
MOST_WEIGHTS_BYTES = 2**30
#: Within this share of the best settings are equal, and the simplest is taken: the same setting, measured twice for
#: some seconds on a machine that others use too, differed by up to ten percent.
NOISE = 0.1
#: Fewer requests say nothing about their 99th percentile.
FEWEST_REQUESTS = 50
#: Shorter than this a trial says nothing.
_SHORTEST_SECONDS = 0.5
#: The number that a staged release needs and that nobody sees.
_NUMBER = 1

#: The figures of a setting under load for so many seconds, at that stage of the search.
Measure = Callable[[ServingSetting, float, int], ServingTrial]


def settings_to_try(
    measured: ThreadSetting, serving: ServingSettings, *, device: str, cores: int, engine_bytes: int
) -> tuple[ServingSetting, ...]:
    """What is worth a try, the most promising first: numbers of instances, with each queue delay.

    measured: what the engine was fastest with, alone. cores: that it may use; on a CPU instances share them, and each
    holds its weights once for one request alone and once for several at a time. What the catalog fixes is not varied.
    """
    counts = [2**power for power in range(MOST_INSTANCES.bit_length())]
    if device == "cpu":
        fitting = max(1, MOST_WEIGHTS_BYTES // max(1, 2 * engine_bytes))
        counts = [count for count in counts if count <= min(cores, fitting)]
    counts = counts if serving.instances is None else [serving.instances]
    delays = QUEUE_DELAYS_US if serving.queue_delay_us is None else (serving.queue_delay_us,)
    return tuple(
        ServingSetting(
            instances=count,
            threads=measured.threads,
            threads_beside=min(measured.threads, max(1, cores // count)) if device == "cpu" and count > 1 else 0,
            spinning=measured.spinning,
            queue_delay_us=delay,
        )
        for delay in delays
        for count in counts
    )


def rank(trials: Sequence[ServingTrial], p99_limit_ms: float | None) -> list[ServingTrial]:
    """Best first: what keeps the limit by throughput, then what does not by latency, then what failed."""

    def key(trial: ServingTrial) -> tuple[int, float]:
        if trial.reason:
            return 2, 0.0
        if p99_limit_ms is not None and trial.p99_ms > p99_limit_ms:
            return 1, trial.p99_ms
        return 0, -trial.throughput_per_s

    return sorted(trials, key=key)


def choose(trials: Sequence[ServingTrial], p99_limit_ms: float | None) -> tuple[ServingSetting, str]:
    """The setting to serve with, and why. trials: of one stage, the simplest first. Raises ReleaseError for none."""
    ranked = rank(trials, p99_limit_ms)
    if not ranked or ranked[0].reason:
        raise ReleaseError(f"no setting could be served: {ranked[0].reason if ranked else 'none was tried'}")
    best = ranked[0]
    if p99_limit_ms is not None and best.p99_ms > p99_limit_ms:
        return best.setting, (
            f"no setting keeps {p99_limit_ms:g} ms; the lowest 99th percentile is that of {best.setting}: "
            f"{best.p99_ms:.1f} ms at {best.throughput_per_s:.0f} requests a second"
        )
    equal = [
        trial
        for trial in trials
        if not trial.reason
        and trial.throughput_per_s >= (1 - NOISE) * best.throughput_per_s
        and (p99_limit_ms is None or trial.p99_ms <= p99_limit_ms)
    ]
    taken = min(equal, key=lambda trial: _weight(trial.setting))
    return taken.setting, (
        f"{taken.setting}: {taken.throughput_per_s:.0f} requests a second, 99th percentile {taken.p99_ms:.1f} ms"
    )


def _weight(setting: ServingSetting) -> tuple[int, int]:
    """How far a setting is from the simplest."""
    return setting.instances, setting.queue_delay_us


def halve(
    settings: Sequence[ServingSetting], measure: Measure, seconds: float, p99_limit_ms: float | None
) -> list[ServingTrial]:
    """Trials of all stages that begin within `seconds`. The last stage's decide.

    There the settings are measured twice, the second time in the opposite order: machines have moods. The first of
    them, the simplest, stays to the end. What the first stage has not come to when half of the time is over is not
    tried.
    """
    left, trials = list(settings), list[ServingTrial]()
    stages = max(1, math.ceil(math.log2(len(left)))) if len(left) > 1 else 1
    deadline = time.monotonic() + seconds
    for number in range(1, stages + 1):
        share = (deadline - time.monotonic()) / (stages - number + 1) / len(left)
        if number > 1 and share < _SHORTEST_SECONDS:
            break
        if number < stages:
            found = list[ServingTrial]()
            for setting in left:
                if len(found) > 1 and time.monotonic() > (deadline - seconds / 2 if number == 1 else deadline):
                    break
                found.append(measure(setting, max(share, _SHORTEST_SECONDS), number))
            if number > 1 and len(found) < len(left):
                break
        else:
            half = max(share / 2, _SHORTEST_SECONDS)
            there = [measure(setting, half, number) for setting in left]
            back = [measure(setting, half, number) for setting in reversed(left)]
            found = [_pooled(*pair) for pair in zip(there, reversed(back), strict=True)]
        trials += found
        kept = rank(found, p99_limit_ms)[: max(2, len(found) // 2)]
        # In their own order again, so that the simplest comes first.
        kept_settings = [trial.setting for trial in (*kept, found[0]) if not trial.reason]
        left = [setting for setting in left if setting in kept_settings]
        if not left:
            break
    return trials


def _pooled(first: ServingTrial, second: ServingTrial) -> ServingTrial:
    """Two trials of one setting as one. A limit of latency has to be kept both times."""
    if first.reason or second.reason:
        return first if first.reason else second
    return first.model_copy(
        update={
            "requests": first.requests + second.requests,
            "throughput_per_s": (first.throughput_per_s + second.throughput_per_s) / 2,
            "p50_ms": (first.p50_ms + second.p50_ms) / 2,
            "p99_ms": max(first.p99_ms, second.p99_ms),
            "mean_batch": (first.mean_batch + second.mean_batch) / 2,
        }
    )


def last_stage(trials: Sequence[ServingTrial]) -> list[ServingTrial]:
    """The trials that decide: those of the last stage, which had the most time, or of the last with any figures."""
    stages = {trial.stage for trial in trials if not trial.reason} or {trial.stage for trial in trials}
    return [trial for trial in trials if trial.stage == max(stages)]


def make_serving_configuration(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    engine: Engine,
    evaluation: EvaluationSet,
    champion: Champion,
) -> Made[ServingConfiguration]:
    """How the champion is to be served. Raises ReleaseError where no setting can be, ServerError without a server."""
    serving, device = entry.serving, describe_device(champion.target)
    measured = champion.setting or ThreadSetting(threads=workspace.threads(entry))
    tried = settings_to_try(
        measured,
        serving,
        device=device_of(champion.target),
        cores=workspace.threads(entry),
        engine_bytes=engine.size_bytes,
    )
    embedded = workspace.triton.flavour == "python" and is_installed(workspace.triton.environment)
    searched = len(tried) > 1 and serving.search_seconds > 0 and embedded
    made_of = Fingerprint.of(
        "serving_configuration",
        model=entry.name,
        target=champion.target,
        engine=[engine.digest, engine.content_digest],
        checkpoint=[checkpoint.tokenizer_digest, checkpoint.pipeline_digest],
        settings=[setting.model_dump() for setting in tried],
        batch=entry.max_batch_size,
        serving=serving.model_dump(include={"p99_ms", "clients", "search_seconds", "rate_limiter"})
        if searched
        else None,
        server=requirements() if searched else None,
        load=load_of(evaluation, checkpoint) if searched else None,
        device=device,
        flavour=workspace.triton.flavour,
        code=code_versions(*CODE),
    )
    record = ServingConfiguration(
        digest=made_of.digest,
        model=entry.name,
        target=champion.target,
        engine=engine.name,
        engine_digest=engine.digest,
        setting=tried[0],
        reason="",
        clients=serving.clients,
        p99_limit_ms=serving.p99_ms,
        device=device,
    )

    def make(folder: Path) -> ServingConfiguration:
        del folder
        if not searched:
            why = (
                "there is no embedded server with its backend to measure on"
                if not embedded
                else "there is nothing to choose"
                if len(tried) == 1
                else "search_seconds is 0"
            )
            return record.model_copy(update={"reason": f"{tried[0]}: {why}"})
        workspace.store.require_whole(engine, checkpoint, evaluation)
        plan = ReleasePlan(
            model=entry.name,
            target=champion.target,
            flavour="python",
            checkpoint=checkpoint,
            checkpoint_folder=workspace.store.folder(checkpoint),
            engine=engine,
            engine_folder=workspace.store.folder(engine),
            max_batch_size=entry.max_batch_size,
            serving=tried[0],
            rate_limiter=serving.rate_limiter,
        )
        items = request_mix(
            read_evaluation_set(workspace.store.folder(evaluation)).items, checkpoint, plan.checkpoint_folder
        )
        log = workspace.log(entry.name, f"serving-{champion.target}")
        with benchmarking(), trial_server(plan, workspace.triton, items, serving.clients, log) as measure:
            trials = halve(tried, measure, serving.search_seconds, serving.p99_ms)
        last = last_stage(trials)
        if all(trial.reason for trial in last) and any(trial.requests for trial in trials):
            setting, reason = (
                tried[0],
                f"{tried[0]}: too few requests are answered in the time to compare it with others",
            )
        else:
            try:
                setting, reason = choose(last, serving.p99_ms)
            except ReleaseError as error:
                raise ReleaseError(
                    f"{entry.name}: {engine.name} on {champion.target}: {error} The log is {log}."
                ) from error
        count = len({trial.setting for trial in trials})
        reason += f" ({count} of {len(tried)} settings tried)"
        return record.model_copy(update={"setting": setting, "reason": reason, "trials": tuple(trials)})

    return workspace.store.get_or_make(ServingConfiguration, made_of, make, light=not searched)


@contextmanager
def trial_server(
    plan: ReleasePlan, settings: TritonSettings, items: Sequence[Item], clients: int, log: Path
) -> Iterator[Measure]:
    """A real server of the plan's release alone, which is loaded anew with each setting that is measured."""
    with tempfile.TemporaryDirectory(prefix="refinery-serving-") as scratch:
        root, pipeline = Path(scratch) / "models", internal_name(plan.model, _NUMBER, "pipeline")
        root.mkdir()
        stage(plan, _NUMBER, root)
        with (
            EmbeddedServer(root, settings, models=[plan.model], log=log) as server,
            server.client() as client,
        ):
            contract = client.contract(plan.model)
            loaded = plan.serving

            def measure(setting: ServingSetting, seconds: float, number: int) -> ServingTrial:
                nonlocal loaded
                trial = ServingTrial(setting=setting, stage=number)
                started = time.monotonic()
                try:
                    if setting != loaded:
                        config = front_config(replace(plan, serving=setting), _NUMBER)
                        write_config(config, root / pipeline / CONFIG)
                        client.load(pipeline)
                        loaded = setting
                    before = server_statistics(server.grpc_address, [pipeline])
                    # What loading took is taken from the trial's own time: the bound is for all of it.
                    left = seconds - (time.monotonic() - started) - WARM_UP_SECONDS / 2
                    result = closed_loop(
                        server.grpc_address,
                        plan.model,
                        contract,
                        items,
                        concurrency=clients,
                        seconds=max(left, _SHORTEST_SECONDS),
                        warm_up_seconds=WARM_UP_SECONDS / 2,
                        seed=number,
                    )
                    after = server_statistics(server.grpc_address, [pipeline])
                except ServerError as error:
                    return trial.model_copy(update={"reason": str(error)})
                if result.requests < FEWEST_REQUESTS:
                    few = f"{result.requests} requests in {result.seconds:.1f} s are too few to say anything"
                    return trial.model_copy(update={"requests": result.requests, "reason": few})
                if result.failures:
                    return trial.model_copy(
                        update={"reason": f"{result.failures} requests failed: {result.first_error}"}
                    )
                figures = {
                    "requests": result.requests,
                    "throughput_per_s": result.throughput,
                    "p50_ms": result.p50_ms,
                    "p99_ms": result.p99_ms,
                    "mean_batch": statistics_since(before, after)[pipeline].mean_batch,
                }
                return trial.model_copy(update=figures)

            yield measure
