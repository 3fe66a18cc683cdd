"""TensorRT: real plans, built with TensorRT-RTX, which needs no GPU for that.

What needs one (reading a plan, running it, its inspector, timings) is selected by `pytest -m tensorrt`.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as pb

import resources.machine.device
from resources.accuracy.measuring import missed_gates
from resources.artifacts.records import Engine
from resources.artifacts.store import RECORD_FILE
from resources.catalog.entries import Shape, TensorRtSettings
from resources.engines.availability import unsupported_reason
from resources.engines.interface import build, load
from resources.engines.onnxruntime.tensorrt_builder import provider_settings
from resources.engines.specs import BASELINE, ENGINES, engine_spec
from resources.engines.tensorrt.builder import TimingCache, make_monitor, make_plan
from resources.engines.tensorrt.tensorrt_session import installed_flavour, mismatch, pick_profile
from resources.engines.tuning import Profile, Tuning, check_profiles, profiles_of
from resources.errors import EngineError, ReleaseError, ServerError
from resources.machine.device import first_gpu, parse_gpu
from resources.processes.isolation import Limits
from resources.settings.workspace import Workspace
from resources.tasks import TASKS
from resources.triton.config import engine_config, front_config
from resources.triton.release import check_plan
from resources.triton.server import EmbeddedServer
from resources.triton.stage import stage
from tests.conftest import entry_for
from tests.making import (
    collect_checkpoint,
    goal_of,
    make_benchmark,
    make_engine,
    make_evaluation_set,
    make_graph,
    sources_of,
    tuning_of,
)
from tests.releases import INPUTS
from tests.releases import make_plan as make_release_plan

FP16 = engine_spec("tensorrt_fp16")
TUNED = [spec for spec in ENGINES if spec.tuned]
BUILT = {"flavour": "tensorrt_rtx", "tensorrt": trt.__version__, "compute_capability": "8.9"}


def shapes(*texts):
    return [Shape.parse(text) for text in texts]


@pytest.fixture(scope="module")
def ready(made_checkpoint, tmp_path_factory):
    """A workspace with everything that an engine is built from, made once: not to be changed."""
    home = tmp_path_factory.mktemp("home")
    workspace = Workspace(
        home=home, catalog_path=home / "models.yaml", limits=Limits(timeout_s=240, memory_bytes=6 * 10**9)
    )
    entry = entry_for(made_checkpoint(), max_batch_size=4, engines=None)
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    return (
        workspace,
        entry,
        sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record),
        evaluation,
    )


@pytest.fixture(scope="module")
def goal(ready):
    workspace, entry, sources, evaluation = ready
    return replace(goal_of(workspace, entry, evaluation), tuning=tuning_of(workspace, entry, sources))


@pytest.fixture
def tuning(tmp_path):
    """Of a model that takes 64 tokens."""
    profiles = profiles_of((16, 64), shapes("1x16"), 4, 2)
    return Tuning(profiles, TensorRtSettings(), tmp_path / "caches", 240.0)


def write_graph(path, operator="Relu", domain=""):
    """A table of vectors and one operator over what is looked up."""
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    outputs = [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", "sequence", 4])]
    table = onnx.numpy_helper.from_array(np.ones((9, 4), np.float32), "words")
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["hidden"]),
        helper.make_node(operator, ["hidden"], ["answer"], name="the/odd/one", domain=domain),
    ]
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, [table])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_plan_is_built_with_profiles_for_the_served_lengths(ready, goal, tmp_path, capfd):
    _, _, sources, _ = ready
    folder = tmp_path / "engine"
    folder.mkdir()
    built = build(sources, FP16, folder, goal, "cuda")
    assert built.entry_file == "model.plan"
    # Nothing of what it was made from is left, and a plan carries its weights.
    assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == ["model.plan"]
    assert (folder / "model.plan").stat().st_size > sources.checkpoint.weights_bytes / 4
    assert built.operators["MatMul"] > 4
    found = built.parameters
    assert found["flavour"] == installed_flavour()
    assert found["profiles"] == "3"
    assert found["profile_0"] == "1x1 to 4x16, best at 1x16"
    assert found["profile_1"] == "1x17 to 4x32, best at 2x32"
    assert found["profile_2"].startswith("1x33 to 4x64")
    if first_gpu() is None:
        assert "needs a GPU" in found["inspector"]
    # The builder's phases are in the log of the step, which is what the child prints.
    said = capfd.readouterr().out
    assert "tensorrt: Building engine ..." in said
    assert "Building engine: done in" in said


@pytest.mark.parametrize("name", ["tensorrt_bf16", "tensorrt_int8", "tensorrt_fp8"])
def test_every_precision_is_one_that_tensorrt_takes(ready, goal, tmp_path, name):
    (long,) = profiles_of((64,), shapes("1x64"), 4, 1)
    alone = replace(goal, tuning=replace(goal.tuning, profiles=(long,)))
    built = build(ready[2], engine_spec(name), tmp_path, alone, "cuda")
    assert (tmp_path / built.entry_file).stat().st_size
    assert ("QuantizeLinear" in built.operators) == (name != "tensorrt_bf16")


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path, ready, tuning):
    graph = write_graph(tmp_path / "graph.onnx", "Unheard", "our.own")
    with pytest.raises(EngineError) as caught:
        make_plan(trt, graph, ready[2], tuning, time.monotonic() + 60)
    for part in ("tiny", trt.__version__, "the/odd/one", "Unheard", "`engines` in the models file"):
        assert part in str(caught.value)


def test_a_build_ends_at_its_deadline_and_keeps_its_timings(ready, goal, tmp_path):
    caches, folder = tmp_path / "caches", tmp_path / "engine"
    folder.mkdir()
    late = replace(goal, tuning=replace(goal.tuning, seconds=0.0, caches=caches))
    with pytest.raises(EngineError, match="stopped after 0 s.*REFINERY_STEP_SECONDS.*optimization_level"):
        build(ready[2], FP16, folder, late, "cuda")
    assert list(folder.iterdir()) == []
    assert len(list(caches.glob("*.timings"))) == 1


def test_progress_is_shown_by_depth_and_by_time():
    said = []
    monitor = make_monitor(trt, time.monotonic() + 60, said.append)
    monitor.phase_start("all", None, 2)
    monitor.phase_start("part", "all", 3)
    monitor.phase_start("quick and deep", "part", 3)
    assert monitor.step_complete("quick and deep", 0)
    monitor.phase_finish("quick and deep")
    monitor._phases["part"].shown -= 60
    assert monitor.step_complete("part", 1)
    monitor.phase_finish("part")
    assert said == ["all ...", "  part ...", "  part: 2 of 3, 0 s", "  part: done in 0.0 s"]
    stopped = make_monitor(trt, time.monotonic() - 1, said.append)
    assert not stopped.step_complete("unknown", 0)
    assert stopped.late and said[-1] == "no time left: stopping"


def config_of():
    return trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # RTX's; pytest forgets the filter in threads
def test_the_timing_cache_is_whole_whoever_writes_it(tmp_path):
    cache = TimingCache(tmp_path, trt)
    assert trt.__version__ in cache.path.name  # of one version and one kind of GPU
    config = config_of()
    assert cache.attach(config) == "begun"
    cache.keep(config)
    first = cache.path.read_bytes()
    assert first

    def another(number):
        mine, config = TimingCache(tmp_path, trt), config_of()
        assert mine.attach(config) == "reused"
        mine.keep(config)
        return mine.path.stat().st_size

    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(another, range(12)))
    assert min(sizes) >= len(first)
    assert {path.suffix for path in tmp_path.iterdir()} == {".timings", ".lock"}  # no draft is left
    # A damaged one costs the timings, not the build.
    cache.path.write_bytes(b"no timing cache")
    damaged = config_of()
    cache.attach(damaged)
    cache.keep(damaged)
    assert cache.path.read_bytes() != b"no timing cache"


def test_profiles_hold_every_length_once_and_end_where_the_shapes_do():
    buckets = (16, 32, 64, 96, 128, 192, 256)
    found = profiles_of(buckets, shapes("1x16", "1x128", "8x128", "32x128"), 32, 4)
    assert [(profile.shortest, profile.longest) for profile in found] == [(1, 16), (17, 64), (65, 128), (129, 256)]
    assert [str(profile.best) for profile in found] == ["1x16", "8x64", "8x128", "8x256"]
    assert {profile.batch for profile in found} == {32}
    assert [profile.longest for profile in profiles_of(buckets, shapes("1x16"), 32, 1)] == [256]
    assert [profile.longest for profile in profiles_of(buckets, shapes("1x100"), 32, 2)] == [128, 256]
    assert [profile.longest for profile in profiles_of((16, 64), shapes("1x16"), 8, 9)] == [16, 64]
    # Nobody said anything about short ones, and they are not tuned for as long ones.
    assert [profile.longest for profile in profiles_of(buckets, shapes("1x256"), 32, 4)] == [32, 64, 192, 256]
    # A batch that nobody is served is nothing to tune for.
    assert str(profiles_of((16, 64), shapes("8x16"), 2, 2)[1].best) == "2x64"


def test_a_profile_longer_than_the_model_is_refused_by_us(ready, goal, tmp_path):
    long = Profile(33, 128, 4, Shape(batch=1, sequence=64))
    with pytest.raises(
        EngineError, match="tiny: an optimization profile reaches 128 tokens.*takes at most 64.*`shapes`"
    ):
        build(ready[2], FP16, tmp_path, replace(goal, tuning=replace(goal.tuning, profiles=(long,))), "cuda")
    assert list(tmp_path.iterdir()) == []
    check_profiles("tiny", (replace(long, longest=64),), 64)


def test_a_shape_finds_its_profile():
    ranges = [{"ids": ((1, 1), (8, 16)), "row": ((1, 1), (8, 1))}, {"ids": ((1, 17), (8, 64)), "row": ((1, 1), (8, 1))}]
    assert pick_profile(ranges, {"ids": (8, 16), "row": (8, 1)}) == 0
    assert pick_profile(ranges, {"ids": (1, 17), "row": (1, 1)}) == 1
    for wrong in ({"ids": (9, 16), "row": (9, 1)}, {"ids": (1, 65), "row": (1, 1)}, {"ids": (1,), "row": (1, 1)}):
        with pytest.raises(ValueError, match="no optimization profile of the plan accepts ids .*end at 8x16; 8x64"):
            pick_profile(ranges, wrong)


def engine_record(**parameters):
    return Engine(
        digest="e" * 64,
        model="tiny",
        name="tensorrt_fp16",
        target="cuda_sm89",
        runtime="tensorrt",
        precision="fp16",
        status="built",
        entry_file="model.plan",
        inputs=INPUTS,
        output="sentence_embedding",
        width=24,
        parameters={**BUILT, "profiles": "3", **parameters},
    )


def test_another_version_than_the_builders_is_refused_before_the_plan_is_read(ready, tmp_path):
    with pytest.raises(EngineError) as caught:
        load(engine_record(tensorrt="1.6.0.1"), tmp_path, ready[2], 1)  # there is no plan to read
    for part in ("tiny: tensorrt_fp16", "1.6.0.1", trt.__version__, "pip install tensorrt-rtx-cu13==1.6.0.1"):
        assert part in str(caught.value)
    assert "compute capability 8.9, but this GPU has 12.0" in mismatch(BUILT, "12.0")
    assert mismatch(BUILT, "8.9") == mismatch(BUILT) == ""


@pytest.mark.skipif(installed_flavour() == "tensorrt", reason="TensorRT itself is installed here")
def test_another_package_than_the_builders_is_refused():
    said = mismatch({**BUILT, "flavour": "tensorrt", "tensorrt": "10.16.1.11"})
    assert said.startswith("the plan was built by tensorrt 10.16.1.11, which is not installed here. Install it (pip")


@pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU here")
def test_without_a_driver_the_reason_is_said(ready, tmp_path):
    with pytest.raises(EngineError, match="tiny: tensorrt_fp16 cannot be loaded: there is no NVIDIA driver here"):
        load(engine_record(), tmp_path, ready[2], 1)


def on(monkeypatch, gpu):
    monkeypatch.setattr(resources.machine.device, "first_gpu", lambda: parse_gpu(gpu))


@pytest.mark.skipif(installed_flavour() == "tensorrt", reason="TensorRT itself is installed here")
def test_what_a_gpu_cannot_is_unsupported_with_the_reason(monkeypatch):
    on(monkeypatch, "NVIDIA H100, 9.0, 580")
    assert "does not run on GPUs of compute capability 9.0" in unsupported_reason(FP16, "cuda_sm90")
    provider = unsupported_reason(engine_spec("onnxruntime_tensorrt_fp16"), "cuda_sm90")
    assert "libnvinfer.so.10" in provider and "transformer-refinery[tensorrt]" in provider
    on(monkeypatch, "NVIDIA L4, 8.9, 580")
    for name in ("tensorrt_fp16", "tensorrt_bf16", "tensorrt_int8", "tensorrt_fp8"):
        assert unsupported_reason(engine_spec(name), "cuda_sm89") is None
    on(monkeypatch, "NVIDIA A10, 8.6, 580")
    assert "cannot compute in fp8" in unsupported_reason(engine_spec("tensorrt_fp8"), "cuda_sm86")
    on(monkeypatch, "Tesla T4, 7.5, 580")
    assert "compute capability 8.0 or more" in unsupported_reason(engine_spec("tensorrt_bf16"), "cuda_sm75")
    monkeypatch.setattr("resources.engines.tensorrt_availability.find_spec", lambda name: None)
    assert "not installed. Install it: pip install 'transformer-refinery[tensorrt]'" in unsupported_reason(
        FP16, "cuda_sm75"
    )
    assert "needs an NVIDIA GPU" in unsupported_reason(FP16, "cpu")


def test_a_build_is_an_artifact_and_a_failed_one_a_reason(ready, monkeypatch):
    workspace, entry, sources, evaluation = ready
    # This machine has no GPU that would support it; the child that builds is as it always is.
    monkeypatch.setattr("resources.steps.engine.unsupported_reason", lambda spec, target: None)
    hasty = replace(workspace, limits=Limits(timeout_s=0.3, memory_bytes=6 * 10**9))
    failed = make_engine(hasty, entry, FP16, "cuda_sm89", sources, evaluation).record
    assert failed.status == "failed" and failed.files == {}
    assert "building tensorrt_fp16 for cuda_sm89: stopped after its limit of 0.3 s" in failed.reason
    assert [path.name for path in workspace.store.folder(failed).iterdir()] == [RECORD_FILE]
    # Tried again, and then found again; and another engine where it would be tuned otherwise.
    made = make_engine(workspace, entry, FP16, "cuda_sm89", sources, evaluation).record
    assert (made.status, made.digest) == ("built", failed.digest), made.reason
    assert "model.plan" in made.files
    assert make_engine(workspace, entry, FP16, "cuda_sm89", sources, evaluation).reused
    assert list(workspace.store.caches.glob("*.timings"))
    log = workspace.log("tiny", "engine-cuda_sm89-tensorrt_fp16").read_text()
    assert "tensorrt: Building engine: done in" in log
    other = entry.model_copy(update={"tensorrt": TensorRtSettings(profiles=1)})
    assert tuning_of(workspace, other, sources).profiles != tuning_of(workspace, entry, sources).profiles
    monkeypatch.setattr("resources.steps.step.run_isolated", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_engine(workspace, other, FP16, "cuda_sm89", sources, evaluation)


def test_the_provider_is_told_one_profile_for_all_shapes(tuning):
    found = provider_settings(("input_ids", "attention_mask", "pair"), ("pair",), tuning)
    assert found["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1,pair:1x1"
    assert found["trt_profile_opt_shapes"] == "input_ids:1x64,attention_mask:1x64,pair:1x1"
    assert found["trt_profile_max_shapes"] == "input_ids:4x64,attention_mask:4x64,pair:4x1"
    assert found["trt_max_workspace_size"] == "4000000000"


@pytest.fixture
def release(tmp_path):
    """A plan of a release, whose TensorRT plan is a few bytes: nobody reads it."""
    made = make_release_plan(tmp_path / "plan")
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "model.plan").write_bytes(b"a plan")
    (folder / "model.inspector.json").write_text("{}")
    engine = engine_record(flavour="tensorrt", tensorrt="10.16.1.11").with_files(folder)
    return replace(made, target="cuda_sm89", engine=engine, engine_folder=folder)


def read_config(path):
    return text_format.Parse(path.read_text(), pb.ModelConfig())


def test_a_release_in_the_python_flavour_carries_what_opens_the_plan(release, tmp_path):
    check_plan(release)
    stage(release, 1, tmp_path / "root")
    folder = tmp_path / "root" / "tiny__r1__pipeline"
    names = {path.name for path in (folder / "1").iterdir()}
    assert {"model.py", "engine.py", "tensorrt_session.py", "model.plan"} <= names
    assert not names & {"cuda.py", "sessions.py"}
    config = read_config(folder / "config.pbtxt")
    assert config.backend == "python"
    assert config.parameters["tensorrt"].string_value == "10.16.1.11"
    assert config.parameters["flavour"].string_value == "tensorrt"
    assert config.parameters["compute_capability"].string_value == "8.9"
    assert [group.kind for group in config.instance_group] == [pb.ModelInstanceGroup.KIND_GPU]


def test_a_server_with_another_tensorrt_says_so(release, triton_settings, tmp_path):
    # On its CPU: a server without a GPU refuses the instance group before any model is asked.
    stage(replace(release, target="cpu"), 1, tmp_path / "root")
    log = tmp_path / "triton.log"
    with (
        pytest.raises(ServerError, match="(?s)The embedded Triton ended while starting:.*tiny__r1__pipeline"),
        EmbeddedServer(tmp_path / "root", triton_settings, models=["tiny"], log=log),
    ):
        pass
    said = log.read_text()
    assert "tiny__r1__pipeline cannot be served here: the plan was built by tensorrt 10.16.1.11, which is not" in said
    assert "pip install tensorrt==10.16.1.11" in said


def test_a_native_release_offers_every_profile_to_every_instance(release, tmp_path):
    native = replace(release, flavour="native")
    check_plan(native)
    stage(native, 1, tmp_path / "root")
    folder = tmp_path / "root" / "tiny__r1__engine"
    assert (folder / "1" / "model.plan").read_bytes() == b"a plan"
    config = read_config(folder / "config.pbtxt")
    assert config.backend == "tensorrt"
    assert [list(group.profile) for group in config.instance_group] == [["0", "1", "2"]]
    assert config.parameters["refinery_tensorrt"].string_value == "10.16.1.11"


def test_a_plan_of_rtx_is_not_released_natively(release):
    rtx = release.engine.model_copy(update={"parameters": {**BUILT, "profiles": "3"}})
    check_plan(replace(release, engine=rtx))
    with pytest.raises(ReleaseError, match="tiny: engine tensorrt_fp16 is a plan of TensorRT-RTX .* flavour 'python'"):
        check_plan(replace(release, engine=rtx, flavour="native"))


def test_onnxruntime_on_cuda_carries_its_providers_settings(tmp_path, tuning):
    plan = make_release_plan(tmp_path / "plan", flavour="native")
    assert not engine_config(plan, 1).HasField("optimization")
    (found,) = engine_config(
        replace(plan, target="cuda_sm90"), 1
    ).optimization.execution_accelerators.gpu_execution_accelerator
    assert (found.name, dict(found.parameters)) == (
        "cuda",
        {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"},
    )
    settings = provider_settings(INPUTS, (), tuning)
    engine = plan.engine.model_copy(update={"parameters": {"provider": "tensorrt", **settings}})
    over = replace(plan, target="cuda_sm90", engine=engine)
    (found,) = engine_config(over, 1).optimization.execution_accelerators.gpu_execution_accelerator
    assert found.name == "tensorrt"
    assert found.parameters["precision_mode"] == "FP16"
    assert found.parameters["trt_profile_max_shapes"] == settings["trt_profile_max_shapes"]
    # Names that its backend does not know would fail the load.
    assert not {"trt_fp16_enable", "trt_max_workspace_size", "trt_engine_cache_path"} & set(found.parameters)
    python = front_config(replace(over, flavour="python"), 1)
    assert python.parameters["provider"].string_value == "tensorrt"


@pytest.fixture(scope="module")
def gpu():
    """This machine's GPU, with a TensorRT that runs on it. Whoever selects these tests has them; others fail."""
    found = first_gpu()
    if found is None or installed_flavour() is None:
        pytest.fail(
            "`pytest -m tensorrt` needs an NVIDIA GPU (nvidia-smi) and TensorRT (pip install "
            f"'transformer-refinery[tensorrt]') or TensorRT-RTX; here: GPU {found}, package {installed_flavour()}."
        )
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("spec", TUNED, ids=[spec.name for spec in TUNED])
def test_build_run_parity_and_benchmark(gpu, ready, spec):
    workspace, entry, sources, evaluation = ready
    target = f"cuda_sm{gpu.capability.replace('.', '')}"
    reason = unsupported_reason(spec, target)
    if reason is not None:
        # Formats that this GPU lacks, and the provider beside TensorRT-RTX; anything else is a mistake of this machine.
        assert "cannot compute in" in reason or "libnvinfer.so.10" in reason, reason
        pytest.skip(reason)
    baseline = make_engine(workspace, entry, engine_spec(BASELINE), target, sources).record
    engine = make_engine(workspace, entry, spec, target, sources, evaluation).record
    assert engine.status == "built", engine.reason
    if spec.runtime == "tensorrt":
        report = json.loads((workspace.store.folder(engine) / "model.inspector.json").read_text())
        assert report["Layers"]
    measured = make_benchmark(workspace, entry, engine, baseline, evaluation, sources).record
    assert measured.status == "measured", measured.reason
    assert measured.accuracy is not None
    assert missed_gates(TASKS[entry.task], measured.accuracy, entry.accuracy_gates()) == []
    assert [timing.shape for timing in measured.timings] == [str(shape) for shape in entry.shapes or ()]
    print(spec.name, {timing.shape: round(timing.speedup, 2) for timing in measured.timings})


@pytest.mark.tensorrt
def test_the_runner_answers_every_length_of_every_profile(gpu, ready, goal, tmp_path):
    sources = ready[2]
    built = build(sources, FP16, tmp_path, goal, "cuda")
    engine = engine_record().model_copy(update={"parameters": built.parameters, "output": sources.graph.output})
    runner = load(engine, tmp_path, sources, 1)
    for rows, tokens in ((1, 1), (4, 16), (2, 17), (1, 64), (4, 16)):
        batch = {name: np.ones((rows, tokens), np.int64) for name in sources.graph.inputs}
        answer = runner.run(batch)
        assert answer.shape == (rows, sources.graph.width) and np.isfinite(answer).all()
    with pytest.raises(ValueError, match="no optimization profile"):
        runner.run({name: np.ones((1, 65), np.int64) for name in sources.graph.inputs})
