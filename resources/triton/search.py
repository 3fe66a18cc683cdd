"""Search for the number of instances and the queue delay that serve the champion best.

The settings are measured under load on a real server, within a time limit. The method is successive halving (Jamieson
and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016): all settings are
measured briefly and in turns, then the better half again for twice as long, until two are left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import (
    Checkpoint,
    Engine,
    EvaluationSet,
    ServingConfiguration,
    ServingSetting,
    ServingTrial,
    ThreadSetting,
)
from resources.catalog.entries import ModelEntry, ServingSettings
from resources.errors import ReleaseError
from resources.machine.lock import benchmarking
from resources.settings.triton import Flavour, TritonSettings
from resources.settings.workspace import Workspace
from resources.triton.environment import is_installed
from resources.triton.mix import request_mix
from resources.triton.release import ReleasePlan
from resources.triton.trials import SHORTEST_SECONDS, Measure, configured_trials, embedded_trials

#: Queue delays to try. At the speeds of these engines, a longer wait costs more than a larger batch wins back.
QUEUE_DELAYS_US = (0, 500, 2000)
#: More instances gain nothing, because they share the machine's memory bandwidth and the GPU's multiprocessors.
MOST_INSTANCES = 4
#: Upper limit of the weights that all instances on a CPU hold together. A Python model's instance holds them twice.
MOST_WEIGHTS_BYTES = 2**30
#: Settings within this share of the best throughput count as equal, and the simplest of them is taken. The same
#: setting, measured twice for some seconds on a shared machine, differed by up to ten percent.
NOISE = 0.1


def settings_to_try(
    measured: ThreadSetting,
    serving: ServingSettings,
    *,
    device: str,
    cores: int,
    engine_bytes: int,
    flavour: Flavour = "python",
) -> tuple[ServingSetting, ...]:
    """Return the settings to try, the default first: several numbers of instances, with each queue delay.

    A Python model's instance uses all cores while no other instance computes, and holds its weights twice for that, so
    one instance is its default. An instance on Triton's own backend never uses more than its share of the cores, so
    there the default is one instance per core.

    Args:
        measured: The threads with which the engine was fastest alone.
        serving: The catalog's settings. A value that they fix is not varied.
        device: The device that the engine runs on.
        cores: The number of cores that the engine may use. On a CPU, the instances share them.
        engine_bytes: The size of the engine, which is mostly weights.
        flavour: Whether a Python model or one of Triton's own backends runs the engine.
    """
    counts = [2**power for power in range(MOST_INSTANCES.bit_length())]
    shared = device == "cpu"
    if shared:
        held = engine_bytes * (2 if flavour == "python" else 1)
        most = min(cores, max(1, MOST_WEIGHTS_BYTES // max(1, held)))
        counts = [count for count in counts if count <= most]
        if flavour == "native":
            counts = list(dict.fromkeys([most, *counts]))
    counts = counts if serving.instances is None else [serving.instances]
    delays = QUEUE_DELAYS_US if serving.queue_delay_us is None else (serving.queue_delay_us,)
    found = []
    for delay in delays:
        for count in counts:
            threads, beside = measured.threads, 0
            if shared and count > 1:
                beside = min(threads, max(1, cores // count))
                if flavour == "native":
                    threads, beside = beside, 0
            found.append(
                ServingSetting(
                    instances=count,
                    threads=threads,
                    threads_beside=beside,
                    spinning=measured.spinning,
                    queue_delay_us=delay,
                )
            )
    return tuple(found)


def rank(trials: Sequence[ServingTrial], p99_limit_ms: float | None) -> list[ServingTrial]:
    """Return the trials, best first.

    Trials that keep the latency limit come first, by throughput. Those that exceed it follow, by latency. Failed trials
    come last.
    """

    def key(trial: ServingTrial) -> tuple[int, float]:
        if trial.reason:
            return 2, 0.0
        if p99_limit_ms is not None and trial.p99_ms > p99_limit_ms:
            return 1, trial.p99_ms
        return 0, -trial.throughput_per_s

    return sorted(trials, key=key)


def choose(trials: Sequence[ServingTrial], p99_limit_ms: float | None) -> tuple[ServingSetting, str]:
    """Return the setting to serve with, and the reason.

    Args:
        trials: The trials of one stage, the simplest setting first.
        p99_limit_ms: The limit of the 99th percentile of latency, if there is one.

    Raises:
        ReleaseError: All trials failed, or there are none.
    """
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
    """Return a sort key that puts simpler settings first."""
    return setting.instances, setting.queue_delay_us


def successive_halving(
    settings: Sequence[ServingSetting], measure: Measure, seconds: float, p99_limit_ms: float | None
) -> list[ServingTrial]:
    """Return the trials of all stages that begin within `seconds`. The last stage decides.

    The last stage measures each setting twice, the second time in the opposite order, because a machine's speed drifts.
    The first setting, which is the simplest, stays to the end. The first stage ends when half of the time is over;
    settings that it has not measured by then are not tried.
    """
    left, trials = list(settings), list[ServingTrial]()
    stages = max(1, math.ceil(math.log2(len(left)))) if len(left) > 1 else 1
    deadline = time.monotonic() + seconds
    for number in range(1, stages + 1):
        share = (deadline - time.monotonic()) / (stages - number + 1) / len(left)
        if number > 1 and share < SHORTEST_SECONDS:
            break
        if number < stages:
            found = list[ServingTrial]()
            for setting in left:
                if len(found) > 1 and time.monotonic() > (deadline - seconds / 2 if number == 1 else deadline):
                    break
                found.append(measure(setting, max(share, SHORTEST_SECONDS), number))
            if number > 1 and len(found) < len(left):
                break
        else:
            half = max(share / 2, SHORTEST_SECONDS)
            there = [measure(setting, half, number) for setting in left]
            back = [measure(setting, half, number) for setting in reversed(left)]
            found = [_pooled(*pair) for pair in zip(there, reversed(back), strict=True)]
        trials += found
        kept = rank(found, p99_limit_ms)[: max(2, len(found) // 2)]
        # The settings keep their original order, so that the simplest comes first.
        kept_settings = [trial.setting for trial in (*kept, found[0]) if not trial.reason]
        left = [setting for setting in left if setting in kept_settings]
        if not left:
            break
    return trials


def _pooled(first: ServingTrial, second: ServingTrial) -> ServingTrial:
    """Return two trials of one setting as one, with the larger 99th percentile: both have to keep a latency limit."""
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
    """Return the trials of the last stage that has figures, or of the last stage if none has any.

    These trials decide, because the last stage had the most time.
    """
    stages = {trial.stage for trial in trials if not trial.reason} or {trial.stage for trial in trials}
    return [trial for trial in trials if trial.stage == max(stages)]


def why_not_measured(settings: TritonSettings, serving: ServingSettings, tried: Sequence[ServingSetting]) -> str:
    """Return why the settings are not measured, as the end of a sentence. The text is empty if they are measured."""
    if len(tried) == 1:
        return "there is nothing to choose"
    if serving.search_seconds == 0:
        return "search_seconds is 0"
    if settings.flavour == "python":
        return "" if is_installed(settings.environment) else "there is no embedded server to measure on"
    if not settings.driven:
        return "no server with Triton's own backends is configured to measure on"
    if settings.control != "explicit":
        return "servers in poll model control are not measured on, because they load nothing when they are told"
    return ""


def find_setting(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    engine: Engine,
    evaluation: EvaluationSet,
    tried: Sequence[ServingSetting],
    record: ServingConfiguration,
) -> ServingConfiguration:
    """Measure the settings on a real server, and choose one.

    Args:
        workspace: The workspace with the store, the repositories and the Triton settings.
        entry: The model's catalog entry.
        checkpoint: The model's checkpoint.
        engine: The champion.
        evaluation: The evaluation set whose items are sent as requests.
        tried: The settings to try, the default first.
        record: The record, with all fields that are known before the measurement.

    Raises:
        ReleaseError: No setting can be served.
        ServerError: There is no server to measure on.
    """
    serving, target, store = entry.serving, record.target, workspace.store
    plan = ReleasePlan(
        model=entry.name,
        target=target,
        flavour=workspace.triton.flavour,
        checkpoint=checkpoint,
        checkpoint_folder=store.folder(checkpoint),
        engine=engine,
        engine_folder=store.folder(engine),
        max_batch_size=entry.max_batch_size,
        serving=tried[0],
        rate_limiter=serving.rate_limiter,
    )
    items = request_mix(read_evaluation_set(store.folder(evaluation)).items, checkpoint, plan.checkpoint_folder)
    log = workspace.log(entry.name, f"serving-{target}")
    if plan.flavour == "python":
        trials_on = embedded_trials(plan, workspace.triton, items, serving.clients, log)
    else:
        trials_on = configured_trials(plan, workspace.triton, workspace.repository(target), items, serving.clients)
    with benchmarking(), trials_on as measure:
        trials = successive_halving(tried, measure, serving.search_seconds, serving.p99_ms)
    last = last_stage(trials)
    if all(trial.reason for trial in last) and any(trial.requests for trial in trials):
        setting = tried[0]
        reason = f"{setting}: too few requests are answered in the time to compare it with others"
    else:
        try:
            setting, reason = choose(last, serving.p99_ms)
        except ReleaseError as error:
            raise ReleaseError(f"{entry.name}: {engine.name} on {target}: {error} The log is {log}.") from error
    count = len({trial.setting for trial in trials})
    reason += f" ({count} of {len(tried)} settings tried)"
    return record.model_copy(update={"setting": setting, "reason": reason, "trials": tuple(trials)})
