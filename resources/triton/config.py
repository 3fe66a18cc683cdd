"""`config.pbtxt`, written with Triton's own protobuf and read back before it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.errors import ReleaseError
from resources.machine.targets import device_of
from resources.pipelines import pipeline_class
from resources.pipelines.names import TOKEN_COUNT, TOKEN_IDS
from resources.tasks import TASKS, Task
from resources.triton.layout import CONFIG, internal_name
from resources.triton.release import LABELS_FILE, RESULT, ReleasePlan

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_WARM_UP_TOKENS = 16
_WARM_UP_FILES = {"input_ids": "ids", "attention_mask": "ones"}
#: What padding is for are batches. On a CPU they save little: 8 rows of 32 tokens took 0.80 of the time of 8 single
#: ones, and 4 of 128 all of it; and a ninth of all work was padding. So rows are padded there to the next eight.
_CPU_LENGTH_STEP = 8
#: While Triton heeds rate limiters, an instance with priority n gets one turn where the one with priority 1 gets n, of
#: those that are free. So the first instance has nearly every request that is alone, and the others help while it is
#: busy. In turns, as Triton gives them by itself, each process would find the other's data in the caches, and on a GPU
#: the other's context (docs/measurements.md, "Serving on a GPU").
_HELPER_PRIORITY = 10_000
#: Of an engine's parameters, what its `model.py` has to know: where a plan runs, and what computes.
_BUILT = ("flavour", "tensorrt", "compute_capability", "provider")


def public_config(plan: ReleasePlan, number: int, name: str | None = None) -> ModelConfig:
    """The ensemble that is pinned to one release: text in, the task's answer out.

    A pipeline is its only step, and runs or calls the engine itself, as often as windows and labels ask for.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name or plan.model, platform="ensemble", max_batch_size=plan.max_batch_size)
    config.version_policy.specific.versions.append(number)
    # By model, version and request, and numbers are not given out twice: what another release answered is never given.
    # Nor is what a proof asks for: the engine has to answer.
    if plan.response_cache and name is None:
        config.response_cache.enable = True
    _texts(config, plan)
    lineage = {"refinery_release": str(number), "refinery_revision": plan.checkpoint.revision, **plan.lineage}
    engine_name = internal_name(plan.model, number, "engine")
    front = config.ensemble_scheduling.step.add(model_version=1)
    for given in config.input:
        front.input_map[given.name] = given.name
    if plan.whole or plan.structured:
        front.model_name = internal_name(plan.model, number, "pipeline")
        config.output.append(_answer(plan))
        front.output_map[config.output[0].name] = config.output[0].name
        if not plan.whole:
            lineage["refinery_engine"] = engine_name
    else:
        front.model_name = internal_name(plan.model, number, "tokenizer")
        for array in plan.inputs:
            front.output_map[array] = array
        engine = config.ensemble_scheduling.step.add(model_name=engine_name, model_version=1)
        for array in _engine_inputs(plan):
            engine.input_map[array] = array
        engine.output_map[plan.output] = plan.output
        config.output.append(_answer(plan))
    config.output.append(_count())
    front.output_map[TOKEN_COUNT] = TOKEN_COUNT
    _parameters(config, lineage)
    return config


def front_config(plan: ReleasePlan, number: int) -> ModelConfig:
    """The Python model that reads text: a pipeline that holds the engine or calls it, or a tokenizer alone."""
    if plan.whole:
        return _served_config(plan, number)
    from tritonclient.grpc import model_config_pb2 as pb

    config = _step(plan, internal_name(plan.model, number, "pipeline" if plan.structured else "tokenizer"), "python")
    _texts(config, plan)
    if plan.structured:
        # No warm-up: it would call the engine, which nobody has loaded yet. The model warms its tokenizer itself.
        config.output.extend([_answer(plan), _count()])
        called = {
            "engine": internal_name(plan.model, number, "engine"),
            "engine_inputs": ",".join(_engine_inputs(plan)),
            "engine_output": plan.output,
            "per_token": str(_task(plan).per_token).lower(),
        }
        _parameters(config, {**called, **_reading(plan)})
        return config
    _parameters(config, _reading(plan))
    for array in plan.inputs:
        config.output.append(pb.ModelOutput(name=array, data_type=pb.TYPE_INT64, dims=[-1]))
    config.output.append(_count())
    warm = config.model_warmup.add(name="empty text", batch_size=1)
    for text in plan.texts:
        warm.inputs[text].data_type = pb.TYPE_STRING
        warm.inputs[text].dims.append(1)
        warm.inputs[text].zero_data = True
    return config


def _served_config(plan: ReleasePlan, number: int) -> ModelConfig:
    """Text to answer in one Python model. It warms itself: it alone knows the lengths that it will run."""
    on_gpu = device_of(plan.target) == "cuda"
    config = _step(plan, internal_name(plan.model, number, "pipeline"), "python", on_gpu=on_gpu)
    _texts(config, plan)
    answer = _answer(plan)
    if plan.has_label_file:
        answer.label_filename = LABELS_FILE
    config.output.extend([answer, _count()])
    _instances(config, plan)
    extra = [name for name in _task(plan).extra_inputs if name in plan.engine.inputs]
    values = {
        "entry_file": plan.engine.entry_file,
        "engine_output": plan.output,
        "extra_inputs": ",".join(extra),
        "per_token": str(_task(plan).per_token).lower(),
        "device": device_of(plan.target),
        "threads": str(plan.serving.threads),
        "threads_beside": str(plan.serving.threads_beside or plan.serving.threads),
        "spinning": str(plan.serving.spinning).lower(),
    }
    built = {name: plan.engine.parameters[name] for name in _BUILT if name in plan.engine.parameters}
    _parameters(config, {**values, **built, **_reading(plan)})
    return config


def engine_config(plan: ReleasePlan, number: int) -> ModelConfig:
    """The engine on Triton's own backend."""
    from tritonclient.grpc import model_config_pb2 as pb

    backend = plan.engine.runtime
    config = _step(plan, internal_name(plan.model, number, "engine"), backend, on_gpu=device_of(plan.target) == "cuda")
    _instances(config, plan)
    # Its instances cannot tell whether another one computes.
    threads = str(plan.serving.threads_beside or plan.serving.threads)
    extra = _task(plan).extra_inputs
    rows = []
    if backend == "openvino":
        # This backend answers batches of exactly the largest size. Without batching it takes any shape, and an ensemble
        # that batches may have such a step if its shapes begin with the batch (ensemble_utils.cc of Triton's core).
        config.max_batch_size, rows = 0, [-1]
        config.ClearField("dynamic_batching")
    for array in _engine_inputs(plan):
        dims = [*rows, 1] if array in extra else [*rows, -1]
        config.input.append(pb.ModelInput(name=array, data_type=pb.TYPE_INT64, dims=dims))
    output = pb.ModelOutput(name=plan.output, data_type=pb.TYPE_FP32, dims=[*rows, *_output_dims(plan)])
    if plan.has_label_file:
        output.label_filename = LABELS_FILE
    config.output.append(output)
    if backend == "openvino":
        # What it reads: ParseParameters in openvino.cc. It knows bfloat16 only as something to be asked for.
        values = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
        _parameters(config, values)
    elif backend == "tensorrt":
        # One group with all profiles. Triton gives a request to any instance that is free, whatever its shape, and an
        # instance chooses among its own profiles: with a group for each, every other request would be refused.
        profiles = range(int(plan.engine.parameters["profiles"]))
        config.instance_group[0].profile.extend(str(number) for number in profiles)
        _parameters(config, {f"refinery_{name}": plan.engine.parameters[name] for name in _BUILT[:3]})
    else:
        # The backend hands on no setting for spinning (its source of June 2026 was read).
        _parameters(config, {"intra_op_thread_count": threads, "inter_op_thread_count": "1"})
        if device_of(plan.target) == "cuda":
            _accelerator(config, plan)
    # One row as the tokenizer could have made it: random ids lie outside the vocabulary, and models look for special
    # tokens.
    warm = config.model_warmup.add(name="one short text", batch_size=1)
    for array in _engine_inputs(plan):
        item = warm.inputs[array]
        item.data_type = pb.TYPE_INT64
        item.dims.extend([*([1] if rows else []), 1 if array in extra else _WARM_UP_TOKENS])
        if array in _WARM_UP_FILES:
            item.input_data_file = _WARM_UP_FILES[array]
        else:
            item.zero_data = True
    return config


def _instances(config: ModelConfig, plan: ReleasePlan) -> None:
    """What was found for the engine, and what the catalog says of it."""
    config.dynamic_batching.max_queue_delay_microseconds = plan.serving.queue_delay_us
    group, limiter = config.instance_group[0], plan.rate_limiter
    group.count = plan.serving.instances
    if limiter is not None:
        group.rate_limiter.priority = limiter.priority
        for name, count in limiter.resources.items():
            group.rate_limiter.resources.add(name=name, count=count)
    # Where instances wait for resources, a batch is bound to one before it has them: a helper's would wait for ever
    # longer behind every other model's first instance (0.9 s were seen).
    if plan.whole and group.count > 1 and not (limiter and limiter.resources):
        first = limiter.priority if limiter is not None else 1
        group.count, group.rate_limiter.priority = 1, first
        helpers = config.instance_group.add(kind=group.kind, count=plan.serving.instances - 1)
        helpers.rate_limiter.priority = first * _HELPER_PRIORITY


def _accelerator(config: ModelConfig, plan: ReleasePlan) -> None:
    """The provider's settings of the python flavour, for Triton's ONNX Runtime backend. Not verified: no server here.

    What that backend reads: onnxruntime.cc of triton-inference-server/onnxruntime_backend, LoadModel. No CUDA graphs:
    it binds other memory at every run, and names no graph. TensorRT's cache is left out too: its path would be one of
    the server's machine, so the provider builds its engines when the model is loaded.
    """
    from resources.engines.onnxruntime.cuda import SETTINGS

    found = config.optimization.execution_accelerators.gpu_execution_accelerator
    if plan.engine.parameters.get("provider") == "tensorrt":
        given = {name: value for name, value in plan.engine.parameters.items() if name.startswith("trt_")}
        given["precision_mode"] = "FP16" if given.pop("trt_fp16_enable", "") == "1" else "FP32"
        given["max_workspace_size_bytes"] = given.pop("trt_max_workspace_size")
        found.add(name="tensorrt", parameters=dict(sorted(given.items())))
    else:
        found.add(name="cuda", parameters=SETTINGS)


def write_warm_up(encoder_file: Path, folder: Path) -> None:
    """The files that the engine's warm-up reads its ids and its mask from: `[tokens]` int64, raw.

    encoder_file: says which tokens stand before and after a text. See resources.pipelines.tokenization.
    """
    encoder = json.loads(encoder_file.read_text(encoding="utf-8"))
    before, after = encoder.get("before", []), encoder.get("after", [])
    inside = [encoder.get("filler", 0)] * (_WARM_UP_TOKENS - len(before) - len(after))
    values = {"input_ids": [*before, *inside, *after], "attention_mask": [1] * _WARM_UP_TOKENS}
    (folder / "warmup").mkdir()
    for array, file in _WARM_UP_FILES.items():
        (folder / "warmup" / file).write_bytes(b"".join(value.to_bytes(8, "little") for value in values[array]))


def write_config(config: ModelConfig, path: Path) -> None:
    """Write it and read it back. Triton's own complaint about a bad one is only 'failed to poll'."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    path.write_text(text_format.MessageToString(config), encoding="utf-8")
    if text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig()) != config:
        raise ReleaseError(f"{path.parent.name}/{CONFIG} does not read back as it was written.")


def _engine_inputs(plan: ReleasePlan) -> tuple[str, ...]:
    """The arrays the graph really reads: an exporter drops inputs that do nothing."""
    return tuple(name for name in (*plan.inputs, *_task(plan).extra_inputs) if name in plan.engine.inputs)


def _reading(plan: ReleasePlan) -> dict[str, str]:
    """What the model that reads texts is told: the limits of a request, and lengths to pad to where those are not the
    checkpoint's own buckets.
    """
    told = {"limits": json.dumps(plan.limits.model_dump(), sort_keys=True)}
    if plan.engine.runtime == "onnxruntime" and device_of(plan.target) == "cpu":
        told["length_step"] = str(_CPU_LENGTH_STEP)
    return told


def _task(plan: ReleasePlan) -> Task:
    return TASKS[plan.checkpoint.task]


def _output_dims(plan: ReleasePlan) -> list[int]:
    """Without the batch: the engine's numbers of a row, or of each of its tokens."""
    return [-1, plan.engine.width] if _task(plan).per_token else [plan.engine.width]


def _answer(plan: ReleasePlan) -> Any:
    """The public output."""
    from tritonclient.grpc import model_config_pb2 as pb

    if plan.structured:
        return pb.ModelOutput(name=RESULT, data_type=pb.TYPE_STRING, dims=[1])
    return pb.ModelOutput(name=plan.output, data_type=pb.TYPE_FP32, dims=_output_dims(plan))


def _texts(config: ModelConfig, plan: ReleasePlan) -> None:
    from tritonclient.grpc import model_config_pb2 as pb

    kind = pipeline_class(plan.checkpoint.task)
    # All are optional for Triton: of an ensemble without one of its inputs it says "unexpected deadlock". The pipeline
    # says which one a request lacks.
    for text in (*kind.inputs, *kind.optional):
        config.input.append(pb.ModelInput(name=text, data_type=pb.TYPE_STRING, dims=[1], optional=True))
    config.input.append(pb.ModelInput(name=TOKEN_IDS, data_type=pb.TYPE_INT64, dims=[-1], optional=True))


def _count() -> Any:
    """The output beside the answer: how many tokens were read."""
    from tritonclient.grpc import model_config_pb2 as pb

    return pb.ModelOutput(name=TOKEN_COUNT, data_type=pb.TYPE_INT64, dims=[1])


def _step(plan: ReleasePlan, name: str, backend: str, *, on_gpu: bool = False) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=plan.max_batch_size)
    config.version_policy.specific.versions.append(1)
    # No waiting for company: batches form by themselves while an instance is busy.
    config.dynamic_batching.max_queue_delay_microseconds = 0
    # Left out, Triton would start two on a CPU, each with all the threads that one was measured with.
    kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(kind=kind, count=1)
    return config


def _parameters(config: ModelConfig, values: dict[str, str]) -> None:
    for name, value in sorted(values.items()):
        config.parameters[name].string_value = value
