"""What the run of one candidate says: parameters are the knobs that differ, all that describes is a tag."""

from __future__ import annotations

from resources.artifacts.records import BenchmarkReport, Checkpoint, Engine
from resources.tracking.names import TAG, checkpoint_tags, run_name, yes

#: Of an engine's parameters: how often each rule fused something. A dozen of them, equal for most engines.
_FUSED = "fused_"


def remembered_as(report: BenchmarkReport) -> str:
    """What a candidate's run is remembered as. One that failed is measured again under the same digest."""
    return f"candidate-{report.digest}" if report.status == "measured" else f"candidate-{report.digest}-{report.status}"


def candidate_run_name(checkpoint: Checkpoint, report: BenchmarkReport) -> str:
    """By engine, then revision."""
    return run_name(report.engine, checkpoint.revision, report.target)


def candidate_parameters(checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport) -> dict[str, int | str]:
    """The axes of a comparison, revision and engine, and the knobs of the engine. What is the same for all runs of a
    model, or says what was found and not what was set, is a tag.
    """
    knobs = {name: value for name, value in engine.parameters.items() if not name.startswith(_FUSED)}
    return {
        "revision": checkpoint.revision[:12],
        # Under the name it was measured by: what serves is measured beside the candidate of the same kind.
        "engine": report.engine,
        "runtime": engine.runtime,
        "precision": engine.precision,
        **thread_parameters(report),
        **({"kept_in_higher_precision": ", ".join(engine.kept) or "none"} if engine.steps else {}),
        **knobs,
    }


def thread_parameters(report: BenchmarkReport) -> dict[str, int | str]:
    """What the engine was measured with."""
    setting = report.setting
    if setting is None:
        return {"threads": report.threads}
    return {"threads": setting.threads, "spinning": yes(setting.spinning)}


def candidate_tags(
    checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, *, accurate: bool
) -> dict[str, str]:
    """What identifies a candidate, and where it was measured."""
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
    """Flat names, latencies in milliseconds by shape: `p50_ms.8x128`, `speedup.8x128`, `accuracy.cosine_mean`."""
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
    """Times faster than PyTorch, by shape."""
    return {f"speedup.{timing.shape}": timing.speedup for timing in report.timings}
