"""Build each model's `config.pbtxt` with Triton's own protobuf, and read back every file that is written."""

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
#: On a CPU, rows are padded to the next multiple of this. Padding only serves to form batches, and batches save little
#: on a CPU: 8 rows of 32 tokens took 0.80 of the time of 8 single rows, and 4 rows of 128 tokens took as long as 4
#: single rows. Before, a ninth of all work was padding.
_CPU_LENGTH_STEP = 8
#: With rate limiting on, Triton gives a free instance of priority n one turn for every n turns of a free instance of
#: priority 1. So the first instance gets nearly every request that arrives alone, and the others help while it is busy.
#: By default Triton lets the instances take turns. Each process would then find the other's data in the caches, and on
#: a GPU the other's context (docs/measurements.md, "Serving on a GPU").
_HELPER_PRIORITY = 10_000
#: The parameters of an engine that its `model.py` needs. They say where a plan runs and which provider computes.
_BUILT = ("flavour", "tensorrt", "compute_capability", "provider")


def public_config(plan: ReleasePlan, number: int, name: str | None = None) -> ModelConfig:
    """Return the ensemble that takes text, gives the task's answer, and is pinned to one release.

    A pipeline is the ensemble's only step. It runs or calls the engine itself, as often as windows and labels require.
    Without a pipeline the steps are the tokenizer and the engine.

    Args:
        plan: The release to serve.
        number: The number of the release.
        name: The ensemble's name. None means the public model. Only a proof gives another name.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name or plan.model, platform="ensemble", max_batch_size=plan.max_batch_size)
    config.version_policy.specific.versions.append(number)
    # Triton caches answers by model, version and request. Release numbers are never reused, so the cache never returns
    # an answer of another release. The ensemble of a proof is not cached, because its engine has to answer.
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
    """Return the Python model that reads text.

    The model is a pipeline that holds the engine, a pipeline that calls the engine, or a tokenizer alone.
    """
    if plan.whole:
        return _served_config(plan, number)
    from tritonclient.grpc import model_config_pb2 as pb

    config = _step(plan, internal_name(plan.model, number, "pipeline" if plan.structured else "tokenizer"), "python")
    _texts(config, plan)
    if plan.structured:
        # A warm-up request would call the engine, which is not loaded yet. The model warms its tokenizer itself.
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
    """Return the Python model that takes text and gives the answer, with the engine inside.

    It has no warm-up requests. The model warms itself, because only the model knows the lengths that it will run.
    """
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
    """Return the model of the engine on Triton's own backend."""
    from tritonclient.grpc import model_config_pb2 as pb

    backend = plan.engine.runtime
    config = _step(plan, internal_name(plan.model, number, "engine"), backend, on_gpu=device_of(plan.target) == "cuda")
    _instances(config, plan)
    # An instance on this backend cannot tell whether another instance computes, so it always takes the smaller number.
    threads = str(plan.serving.threads_beside or plan.serving.threads)
    extra = _task(plan).extra_inputs
    rows = []
    if backend == "openvino":
        # With batching, this backend answers batches of exactly the largest size. Without batching it takes any shape.
        # A batching ensemble may have a step without batching if the step's shapes begin with the batch
        # (ensemble_utils.cc of Triton's core).
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
        # ParseParameters in openvino.cc reads these names. Its only setting for bfloat16 is one that turns it on.
        values = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
        _parameters(config, values)
    elif backend == "tensorrt":
        # One group has all profiles. Triton gives a request to any free instance, whatever the request's shape, and an
        # instance chooses only among its own profiles. With one group for each profile, every other request would be
        # refused.
        profiles = range(int(plan.engine.parameters["profiles"]))
        config.instance_group[0].profile.extend(str(number) for number in profiles)
        _parameters(config, {f"refinery_{name}": plan.engine.parameters[name] for name in _BUILT[:3]})
    else:
        # The backend passes no setting for spinning to ONNX Runtime, according to its source of June 2026.
        _parameters(config, {"intra_op_thread_count": threads, "inter_op_thread_count": "1"})
        if device_of(plan.target) == "cuda":
            _accelerator(config, plan)
    # The row looks like one of the tokenizer's. Random ids would lie outside the vocabulary, and models look for
    # special tokens.
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
    """Add the serving setting that was measured for the engine, and the rate limiter from the catalog."""
    config.dynamic_batching.max_queue_delay_microseconds = plan.serving.queue_delay_us
    group, limiter = config.instance_group[0], plan.rate_limiter
    group.count = plan.serving.instances
    if limiter is not None:
        group.rate_limiter.priority = limiter.priority
        for name, count in limiter.resources.items():
            group.rate_limiter.resources.add(name=name, count=count)
    # If instances wait for resources, Triton binds a batch to an instance before the instance has its resources. A
    # helper's batch would wait longer and longer behind the first instances of all other models (0.9 s were seen). So
    # models with resources have no helpers.
    if plan.whole and group.count > 1 and not (limiter and limiter.resources):
        first = limiter.priority if limiter is not None else 1
        group.count, group.rate_limiter.priority = 1, first
        helpers = config.instance_group.add(kind=group.kind, count=plan.serving.instances - 1)
        helpers.rate_limiter.priority = first * _HELPER_PRIORITY


def _accelerator(config: ModelConfig, plan: ReleasePlan) -> None:
    """Give Triton's ONNX Runtime backend the provider's settings of the python flavour.

    This is not verified, because no server with that backend was available. LoadModel in onnxruntime.cc of
    triton-inference-server/onnxruntime_backend reads the settings. CUDA graphs are left out, because the backend binds
    other memory at every run and names no graph. TensorRT's cache is left out too, because its path would be one of
    the server's machine. So the provider builds its engines when the model is loaded.
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
    """Write the files with the ids and the mask of the engine's warm-up: `[tokens]` int64, raw.

    Args:
        encoder_file: The file with the tokens before and after a text. See resources.pipelines.tokenization.
        folder: The folder of the engine's model.
    """
    encoder = json.loads(encoder_file.read_text(encoding="utf-8"))
    before, after = encoder.get("before", []), encoder.get("after", [])
    inside = [encoder.get("filler", 0)] * (_WARM_UP_TOKENS - len(before) - len(after))
    values = {"input_ids": [*before, *inside, *after], "attention_mask": [1] * _WARM_UP_TOKENS}
    (folder / "warmup").mkdir()
    for array, file in _WARM_UP_FILES.items():
        (folder / "warmup" / file).write_bytes(b"".join(value.to_bytes(8, "little") for value in values[array]))


def write_config(config: ModelConfig, path: Path) -> None:
    """Write a configuration and read it back, because Triton only says 'failed to poll' of a bad one.

    Raises:
        ReleaseError: The file does not read back as it was written.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    path.write_text(text_format.MessageToString(config), encoding="utf-8")
    if text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig()) != config:
        raise ReleaseError(f"{path.parent.name}/{CONFIG} does not read back as it was written.")


def _engine_inputs(plan: ReleasePlan) -> tuple[str, ...]:
    """Return the arrays that the graph reads. An exporter drops inputs that have no effect."""
    return tuple(name for name in (*plan.inputs, *_task(plan).extra_inputs) if name in plan.engine.inputs)


def _reading(plan: ReleasePlan) -> dict[str, str]:
    """Return the parameters of the model that reads text.

    They are the limits of a request, and the length step where rows are not padded to the checkpoint's own buckets.
    """
    told = {"limits": json.dumps(plan.limits.model_dump(), sort_keys=True)}
    if plan.engine.runtime == "onnxruntime" and device_of(plan.target) == "cpu":
        told["length_step"] = str(_CPU_LENGTH_STEP)
    return told


def _task(plan: ReleasePlan) -> Task:
    return TASKS[plan.checkpoint.task]


def _output_dims(plan: ReleasePlan) -> list[int]:
    """Return the output's dims without the batch: `[width]` for a row, or `[tokens, width]` for its tokens."""
    return [-1, plan.engine.width] if _task(plan).per_token else [plan.engine.width]


def _answer(plan: ReleasePlan) -> Any:
    """Return the public output."""
    from tritonclient.grpc import model_config_pb2 as pb

    if plan.structured:
        return pb.ModelOutput(name=RESULT, data_type=pb.TYPE_STRING, dims=[1])
    return pb.ModelOutput(name=plan.output, data_type=pb.TYPE_FP32, dims=_output_dims(plan))


def _texts(config: ModelConfig, plan: ReleasePlan) -> None:
    from tritonclient.grpc import model_config_pb2 as pb

    kind = pipeline_class(plan.checkpoint.task)
    # All inputs are optional for Triton. When a request lacks an input of an ensemble, Triton only says "unexpected
    # deadlock", and the pipeline can name the input.
    for text in (*kind.inputs, *kind.optional):
        config.input.append(pb.ModelInput(name=text, data_type=pb.TYPE_STRING, dims=[1], optional=True))
    config.input.append(pb.ModelInput(name=TOKEN_IDS, data_type=pb.TYPE_INT64, dims=[-1], optional=True))


def _count() -> Any:
    """Return the second output, which is the number of tokens that were read."""
    from tritonclient.grpc import model_config_pb2 as pb

    return pb.ModelOutput(name=TOKEN_COUNT, data_type=pb.TYPE_INT64, dims=[1])


def _step(plan: ReleasePlan, name: str, backend: str, *, on_gpu: bool = False) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=plan.max_batch_size)
    config.version_policy.specific.versions.append(1)
    # Requests do not wait for others, because batches form anyway while an instance is busy.
    config.dynamic_batching.max_queue_delay_microseconds = 0
    # By default Triton starts two instances on a CPU, each with all the threads that one instance was measured with.
    kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(kind=kind, count=1)
    return config


def _parameters(config: ModelConfig, values: dict[str, str]) -> None:
    for name, value in sorted(values.items()):
        config.parameters[name].string_value = value
