"""The contents of a candidate's run. Parameters are the settings that differ, and tags hold all descriptions."""

from __future__ import annotations

from resources.artifacts.records import BenchmarkReport, Checkpoint, Engine
from resources.tracking.names import TAG, checkpoint_tags, run_name, yes

#: The prefix of those of an engine's parameters that count how often each fusion rule applied. There are a dozen of
#: them, and they are equal for most engines.
_FUSED = "fused_"


def remembered_as(report: BenchmarkReport) -> str:
    """Return the name under which the link to a candidate's run is kept.

    The name of a failed run has its status in it, because the candidate is measured again under the same digest.
    """
    return f"candidate-{report.digest}" if report.status == "measured" else f"candidate-{report.digest}-{report.status}"


def candidate_run_name(checkpoint: Checkpoint, report: BenchmarkReport) -> str:
    """Return the name of a candidate's run, which begins with the engine and then has the revision."""
    return run_name(report.engine, checkpoint.revision, report.target)


def candidate_parameters(checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport) -> dict[str, int | str]:
    """Return a run's parameters: the axes of a comparison, revision and engine, and the engine's settings.

    Values that are the same for all runs of a model are tags. So are values that were found and not set.
    """
    knobs = {name: value for name, value in engine.parameters.items() if not name.startswith(_FUSED)}
    return {
        "revision": checkpoint.revision[:12],
        # This is the name under which the engine was measured, because the served engine is measured beside the
        # candidate of the same kind.
        "engine": report.engine,
        "runtime": engine.runtime,
        "precision": engine.precision,
        **thread_parameters(report),
        **({"kept_in_higher_precision": ", ".join(engine.kept) or "none"} if engine.steps else {}),
        **knobs,
    }


def thread_parameters(report: BenchmarkReport) -> dict[str, int | str]:
    """Return the thread setting that the engine was measured with."""
    setting = report.setting
    if setting is None:
        return {"threads": report.threads}
    return {"threads": setting.threads, "spinning": yes(setting.spinning)}


def candidate_tags(
    checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, *, accurate: bool
) -> dict[str, str]:
    """Return the tags that identify a candidate and the device that it was measured on."""
    fused = {name.removeprefix(_FUSED): value for name, value in engine.parameters.items() if name.startswith(_FUSED)}
    return {
        **checkpoint_tags(checkpoint),
        f"{TAG}kind": "candidate",
        f"{TAG}engine_name": report.engine,
        f"{TAG}engine": engine.digest,
        f"{TAG}report": report.digest,
        f"{TAG}status": report.status,
        f"{TAG}target": report.target,
        f"{TAG}device": report.device,
        f"{TAG}accurate": yes(accurate),
        **({f"{TAG}baseline_threads": str(report.baseline_threads)} if report.baseline_threads else {}),
        **({f"{TAG}fused": ", ".join(f"{name} {count}" for name, count in sorted(fused.items()))} if fused else {}),
    }


def candidate_metrics(engine: Engine, report: BenchmarkReport) -> dict[str, float]:
    """Return a candidate's metrics by flat names, with latencies in milliseconds for each shape.

    Examples of names are `p50_ms.8x128`, `speedup.8x128` and `accuracy.cosine_mean`.
    """
    metrics = {"build_seconds": engine.build_seconds, "size_bytes": float(report.engine_size_bytes)}
    for timing in report.timings:
        latency = timing.candidate
        values = {
            "p50_ms": latency.p50_ms,
            "p90_ms": latency.p90_ms,
            "p99_ms": latency.p99_ms,
            "mean_ms": latency.mean_ms,
            "std_ms": latency.std_ms,
            "max_ms": latency.max_ms,
            "throughput_per_s": latency.throughput_per_s,
            "peak_memory_bytes": float(timing.candidate_memory_bytes),
        }
        metrics |= {f"{name}.{timing.shape}": value for name, value in values.items() if value is not None}
    metrics |= speedups(report)
    if report.accuracy is not None:
        metrics |= {f"accuracy.{name}": value for name, value in report.accuracy.metrics.items()}
    return metrics


def speedups(report: BenchmarkReport) -> dict[str, float]:
    """Return how many times faster than PyTorch the engine is, for each shape."""
    return {f"speedup.{timing.shape}": timing.speedup for timing in report.timings}
