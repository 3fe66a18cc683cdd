"""Names, layout and configuration of a Triton repository: what is read from names and files alone."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from resources.artifacts.records import ServingSetting, ThreadSetting
from resources.catalog.entries import ServingSettings
from resources.errors import ReleaseError
from resources.pipelines.names import TOKEN_COUNT
from resources.triton.config import engine_config, front_config, public_config
from resources.triton.layout import (
    current_release,
    highest_number,
    internal_name,
    is_whole,
    list_releases,
    parse_internal,
    pinned_number,
    public_models,
    read_release,
)
from resources.triton.proof import choose_items, make_batches
from resources.triton.publish import Steps, publish
from resources.triton.python_models.neighbours import Neighbours
from resources.triton.release import check_plan, content_digest
from resources.triton.search import settings_to_try
from resources.triton.stage import stage
from tests.releases import INPUTS, LABELS, WIDTH, make_plan, unasked


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return make_plan(tmp_path_factory.mktemp("plan"), labels=LABELS)


def read_config(path):
    return text_format.Parse(path.read_text(), pb.ModelConfig())


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("minilm__r3__tokenizer", ("minilm", 3, "tokenizer")),
        ("a.b-C_d__r12__engine", ("a.b-C_d", 12, "engine")),
        ("minilm__r3__proof", ("minilm", 3, "proof")),
        ("minilm", None),
        ("minilm__r3__mine", None),  # somebody else's: not to be swept up
        ("minilm__r__engine", None),
    ],
)
def test_names_of_internals(name, parsed):
    assert parse_internal(name) == parsed
    if parsed is not None:
        assert internal_name(*parsed) == name


@pytest.mark.parametrize(
    "text",
    [
        "version_policy {\n  specific {\n    versions: 7\n  }\n}",
        "version_policy: { specific: { versions: [7] } }",
        "version_policy{specific{versions:[ 7 ]}}",
    ],
)
def test_the_pin_is_read_however_it_is_written(text):
    assert pinned_number(f'name: "minilm"\n{text}\nmax_batch_size: 3') == 7


def test_a_configuration_without_a_pin():
    assert pinned_number('name: "minilm"\nversion_policy { latest { num_versions: 1 } }') is None


def test_an_empty_or_absent_repository(tmp_path):
    for repository in (tmp_path, tmp_path / "absent"):
        assert public_models(repository) == []
        assert list_releases(repository, "tiny") == []
        assert current_release(repository, "tiny") is None
        assert highest_number(repository, "tiny") == 0


def test_a_repository_is_read_from_its_files(tmp_path, plan):
    for name in ("mine/1", "tiny__r9__engine/1", "tiny-2__r4__engine/1", "tiny-2/5"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mine" / "config.pbtxt").touch()
    release = publish(plan, tmp_path, Steps(prove=unasked)).release
    # The killed publisher's internal is swept up, and its number is not given again.
    assert release.number == 10
    assert public_models(tmp_path) == ["mine", "tiny"]
    assert list_releases(tmp_path, "tiny") == [current_release(tmp_path, "tiny")] == [release]
    assert highest_number(tmp_path, "tiny") == 10
    assert highest_number(tmp_path, "tiny-2") == 5
    assert read_release(tmp_path, "tiny", 10) == release
    assert read_release(tmp_path, "tiny", 9) is None


def test_a_release_that_lacks_a_file_is_not_listed(tmp_path, plan):
    release = publish(plan, tmp_path, Steps(prove=unasked)).release
    assert is_whole(tmp_path, release)
    (tmp_path / "tiny__r1__pipeline" / "1" / "model.onnx").write_bytes(b"short")
    assert list_releases(tmp_path, "tiny") == []
    (tmp_path / "tiny" / "1" / "release.json").write_text("{}")
    assert current_release(tmp_path, "tiny") is None


def test_the_configurations_say_what_a_server_must_know(tmp_path, plan):
    stage(plan, 3, tmp_path)
    public = read_config(tmp_path / "tiny" / "config.pbtxt")
    assert (public.name, public.platform, public.max_batch_size) == ("tiny", "ensemble", 8)
    assert list(public.version_policy.specific.versions) == [3]
    assert [(step.model_name, step.model_version) for step in public.ensemble_scheduling.step] == [
        ("tiny__r3__pipeline", 1),
    ]
    assert public.input[0].data_type == pb.TYPE_STRING
    assert list(public.output[0].dims) == [WIDTH]
    assert public.parameters["refinery_revision"].string_value == plan.checkpoint.revision
    config = read_config(tmp_path / "tiny__r3__pipeline" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny__r3__pipeline", "python", 8)
    assert config.HasField("dynamic_batching")
    assert [(group.kind, group.count) for group in config.instance_group] == [(pb.ModelInstanceGroup.KIND_CPU, 1)]
    assert (tmp_path / "tiny" / "3" / "config.pbtxt").read_text() == (tmp_path / "tiny" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("threads", "cores", "size_bytes", "found"),
    [
        (1, 1, 10**6, {(1, 1, 0)}),
        (2, 2, 10**6, {(1, 2, 0), (2, 2, 1)}),
        (1, 2, 10**6, {(1, 1, 0), (2, 1, 1)}),  # one thread was fastest for one request: still two of them at once
        (6, 8, 10**6, {(1, 6, 0), (2, 6, 4), (4, 6, 2)}),
        (8, 8, 10**9, {(1, 8, 0)}),  # its weights four times are too much
    ],
)
def test_on_a_cpu_instances_share_the_cores_while_several_compute(plan, threads, cores, size_bytes, found):
    tried = settings_to_try(
        ThreadSetting(threads=threads), ServingSettings(), device="cpu", cores=cores, engine_bytes=size_bytes
    )
    assert {(one.instances, one.threads, one.threads_beside) for one in tried} == found
    last = front_config(replace(plan, serving=tried[-1]), 1)
    assert sum(group.count for group in last.instance_group) == tried[-1].instances
    values = [last.parameters[name].string_value for name in ("threads", "threads_beside")]
    assert values == [str(threads), str(tried[-1].threads_beside or threads)]


def test_rows_are_padded_less_where_batches_save_little(plan):
    assert front_config(plan, 1).parameters["length_step"].string_value == "8"
    assert "length_step" not in front_config(replace(plan, target="cuda_sm90"), 1).parameters


def test_instances_know_of_each_other():
    groups = [{"count": 1}, {"count": 2}]
    first, second = (
        Neighbours({"model_name": "tiny__r1__engine" * 20, "model_instance_name": f"tiny__r1__engine_{place}"}, groups)
        for place in ("0_0", "1_1")
    )
    assert not first.at_work()
    with second:
        with first:
            assert first.at_work()
            assert second.at_work()
        assert first.at_work()
    assert first.at_work(), "a moment ago it was"
    time.sleep(0.1)
    assert not first.at_work()
    assert not second.at_work()
    third = Neighbours({"model_name": "tiny__r1__engine" * 20, "model_instance_name": "tiny__r1__engine_1_0"}, groups)
    other = Neighbours({"model_name": "other", "model_instance_name": "other_1_0"}, groups)
    with other:
        assert not first.at_work()
    with third:
        assert first.at_work()


def test_an_input_that_the_graph_does_not_read_is_not_passed_on(plan):
    short = replace(plan, flavour="native", engine=plan.engine.model_copy(update={"inputs": INPUTS[:1]}))
    assert [item.name for item in front_config(short, 1).output] == [*INPUTS, TOKEN_COUNT]
    assert [item.name for item in engine_config(short, 1).input] == list(INPUTS[:1])
    assert dict(public_config(short, 1).ensemble_scheduling.step[1].input_map) == {INPUTS[0]: INPUTS[0]}


def test_labels_lie_beside_the_engine_one_a_line(tmp_path, classifier):
    odd = classifier.checkpoint.model_copy(update={"labels": ("calm", "very\r\nglad", "größer")})
    stage(replace(classifier, checkpoint=odd), 1, tmp_path)
    stage(replace(classifier, checkpoint=odd, flavour="native"), 2, tmp_path)
    for name in ("tiny__r1__pipeline", "tiny__r2__engine"):
        assert read_config(tmp_path / name / "config.pbtxt").output[0].label_filename == "labels.txt"
        assert (tmp_path / name / "labels.txt").read_text() == "calm\nvery glad\ngrößer\n"


def test_the_native_flavour_is_what_tritons_own_backend_reads(tmp_path):
    plan = make_plan(tmp_path / "plan", flavour="native")
    stage(plan, 1, tmp_path / "one file")
    engine = tmp_path / "one file" / "tiny__r1__engine"
    config = read_config(engine / "config.pbtxt")
    assert config.backend == "onnxruntime"
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert [path.name for path in (engine / "1").iterdir()] == ["model.onnx"]
    # Weights beside the graph: Triton wants a folder of the graph's name that holds both.
    stage(make_plan(tmp_path / "plan", flavour="native", external_data=True, seed=1), 1, tmp_path / "two files")
    folder = tmp_path / "two files" / "tiny__r1__engine" / "1" / "model.onnx"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"status": "failed", "reason": "out of memory"},
            "tiny: engine table is failed and cannot be released: out of",
        ),
        ({"runtime": "torch"}, "tiny: engine table runs on torch, and only onnxruntime"),
        ({"entry_file": "other.onnx"}, "opens model.onnx alone. Use flavour 'python'"),
    ],
)
def test_engines_that_cannot_be_released(plan, changes, message):
    with pytest.raises(ReleaseError, match=message):
        check_plan(replace(plan, flavour="native", engine=plan.engine.model_copy(update=changes)))


def test_the_content_digest_is_of_what_a_server_does(plan):
    same = replace(
        plan,
        lineage={"refinery_dagster_run": "another"},
        engine=plan.engine.model_copy(update={"build_seconds": 3.0, "digest": "9" * 64}),
    )
    assert content_digest(same) == content_digest(plan)
    others = [
        replace(plan, serving=ServingSetting(threads=2)),
        replace(plan, max_batch_size=16),
        replace(plan, flavour="native"),
        replace(plan, checkpoint=plan.checkpoint.model_copy(update={"labels": LABELS})),
        replace(plan, checkpoint=plan.checkpoint.model_copy(update={"tokenizer_digest": "other"})),
    ]
    assert len({content_digest(other) for other in [plan, *others]}) == len(others) + 1


def test_the_requests_of_a_proof_are_of_all_lengths():
    items = [{"TEXT": "x" * (length % 300)} for length in range(1000)]
    chosen = choose_items(items, 64)
    lengths = sorted(len(items[index]["TEXT"]) for index in chosen)
    assert len(set(chosen)) == 64
    assert lengths[0] == 0
    assert lengths[-1] == 299
    assert max(second - first for first, second in pairwise(lengths)) < 10
    assert choose_items([{"TEXT": "b"}, {"TEXT": "a"}]) in ([0, 1], [1, 0])


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 32, 1024])
def test_the_batches_of_a_proof_ask_for_every_text_and_the_largest_batch(largest):
    groups = make_batches(range(96), largest)
    assert {index for group in groups for index in group} == set(range(96))
    assert max(len(group) for group in groups) == largest
    assert sum(len(group) for group in groups) <= max(96, 2 * largest + 6)
    assert all(groups)
