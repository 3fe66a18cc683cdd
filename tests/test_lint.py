"""Every rule has a repository that breaks it and one that does not; where the embedded server can tell, it agrees."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from orchestration.cli import main
from orchestration.cli.lint import as_sarif, as_text
from resources.errors import ReleaseError, ServerError
from resources.triton.layout import CONFIG
from resources.triton.lint import RULES, Finding, lint
from resources.triton.lint.model import Model
from resources.triton.lint.sources import source_findings
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.releases import LABELS, make_plan, unasked

ECHO = """
name: "echo"
backend: "python"
max_batch_size: 8
input [{ name: "TEXT", data_type: TYPE_STRING, dims: [1] }]
output [{ name: "COPY", data_type: TYPE_STRING, dims: [1], label_filename: "labels.txt" }]
dynamic_batching { preferred_batch_size: [4] }
instance_group [{ count: 1, kind: KIND_CPU }]
model_warmup [{
  name: "warm", batch_size: 1, inputs { key: "TEXT" value: { data_type: TYPE_STRING dims: [1] zero_data: true } }
}]
version_policy { specific { versions: [1] } }
"""
MODEL_PY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([
                pb_utils.Tensor("COPY", pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy())
            ])
            for request in requests
        ]
"""
TWICE = """
name: "twice"
platform: "ensemble"
max_batch_size: 8
input [{ name: "TEXT", data_type: TYPE_STRING, dims: [1] }]
output [{ name: "RESULT", data_type: TYPE_STRING, dims: [1] }]
ensemble_scheduling {
  step [
    { model_name: "echo", model_version: 1,
      input_map { key: "TEXT" value: "TEXT" }
      output_map { key: "COPY" value: "between" } },
    { model_name: "echo", model_version: -1,
      input_map { key: "TEXT" value: "between" }
      output_map { key: "COPY" value: "RESULT" } }
  ]
}
"""
DOUBLE = """
name: "double"
backend: "onnxruntime"
max_batch_size: 4
input [{ name: "x", data_type: TYPE_FP32, dims: [3] }]
output [{ name: "y", data_type: TYPE_FP32, dims: [3] }]
"""


def graph(rows="batch", width=3):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name in "xy")
    node = helper.make_node("Add", ["x", "x"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)])


@pytest.fixture
def repository(tmp_path):
    """A Python model, an ensemble of two of it, and an ONNX model; nothing is wrong."""
    root = tmp_path / "models"
    for name, config in (("echo", ECHO), ("twice", TWICE), ("double", DOUBLE)):
        (root / name / "1").mkdir(parents=True)
        (root / name / CONFIG).write_text(config)
    (root / "echo" / "1" / "model.py").write_text(MODEL_PY)
    (root / "echo" / "labels.txt").write_text("one\n")
    (root / "twice" / "1" / "placeholder").touch()
    onnx.save(graph(), root / "double" / "1" / "model.onnx")
    return root


def nest(root):
    """Python that no parser takes."""
    (root / "echo" / "1" / "model.py").write_text("-" * 20_000 + "1\n" + MODEL_PY)


def edit(name, old, new):
    def change(root):
        path = root / name / CONFIG
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def write(path, content=""):
    def change(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    return change


def drop(path):
    def change(root):
        shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return change


def save(proto):
    def change(root):
        onnx.save(proto, root / "double" / "1" / "model.onnx")

    return change


def with_weights(root):
    """Weights in a file of their own, as an exporter writes them."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    w = helper.make_tensor("w", TensorProto.FLOAT, [3], bytes(12), raw=True)
    made = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [w])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    path = root / "double" / "1" / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def in_a_folder(root):
    with_weights(root)
    folder = root / "double" / "1"
    for name in ("model.onnx", "weights.bin"):
        (folder / name).rename(folder / f"moved-{name}")
    (folder / "model.onnx").mkdir()
    for name in ("model.onnx", "weights.bin"):
        (folder / f"moved-{name}").rename(folder / "model.onnx" / name)


def cut_off(root):
    in_a_folder(root)
    path = root / "double" / "1" / "model.onnx" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-4])


def without_weights(root):
    in_a_folder(root)
    (root / "double" / "1" / "model.onnx" / "weights.bin").unlink()


def sparse(path, size_bytes):
    """A file of that size that takes no room."""

    def change(root):
        with (root / path).open("r+b") as file:
            file.truncate(size_bytes)

    return change


def link(path, target):
    """A link in place of what is there, to what is outside of the repository unless it is given otherwise."""

    def change(root):
        place = root / path
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(target)

    return change


def pipe(path):
    """A pipe that nobody writes into: whoever opens it waits for ever."""

    def change(root):
        (root / path).unlink()
        os.mkfifo(root / path)

    return change


def weights_in(location, *, where="initializer", **entries):
    """A graph in a folder of its own whose weights are said to lie in that place."""

    def change(root):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location, "offset": "0", "length": "12", **entries}.items():
            tensor.external_data.add(key=key, value=value)
        proto = graph()
        if where == "initializer":
            proto.graph.initializer.append(tensor)
        elif where == "attribute":
            proto.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        elif where == "inner graph":
            inner = proto.graph.node[0].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
            inner.g.initializer.append(tensor)
        elif where == "function":
            node = proto.functions.add(name="f").node.add(op_type="Constant")
            node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        else:
            proto.graph.sparse_initializer.add().values.CopyFrom(tensor)
        folder = root / "double" / "1" / "model.onnx"
        folder.unlink()
        folder.mkdir()
        (folder / "model.onnx").write_bytes(proto.SerializeToString())

    return change


def linked_weights(root):
    in_a_folder(root)
    (root / "double" / "1" / "model.onnx" / "weights.bin").rename(root / "double" / "weights.bin")
    (root / "double" / "1" / "model.onnx" / "weights.bin").symlink_to(root / "double" / "weights.bin")


def move_echo(root):
    edit("twice", '"echo"', '"an echo"')(root)
    edit("echo", '"echo"', '"an echo"')(root)
    (root / "echo").rename(root / "an echo")


OUT = "leads out of its folder, or has an empty part. Put them beside the graph."
RANDOM = """
model_warmup { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_INT64 dims: [3] random_data: true } } }
"""
#: What is done to the repository, and the one rule that it breaks, with what is said of it.
BROKEN = {
    "weights elsewhere": (weights_in("../../../../etc/passwd"), "external-data", f"'../../../../etc/passwd' {OUT}"),
    "weights at a path": (weights_in("/etc/passwd"), "external-data", f"'/etc/passwd' {OUT}"),
    "weights by a link": (linked_weights, "external-data", "'weights.bin' is a link that leads out of"),
    "weights with a null in their name": (
        weights_in("a\0b"),
        "external-data",
        "holds a backslash or a control character",
    ),
    "a tensor of an operator elsewhere": (weights_in("../x", where="attribute"), "external-data", OUT),
    "weights of an inner graph elsewhere": (weights_in("../x", where="inner graph"), "external-data", OUT),
    "weights of a function elsewhere": (weights_in("../x", where="function"), "external-data", OUT),
    "sparse weights elsewhere": (weights_in("../x", where="sparse"), "external-data", OUT),
    "weights that begin nowhere": (
        weights_in("w.bin", offset="²"),
        "external-data",
        "'w' begins at '²' of 'w.bin' and has '12' bytes. Export it again.",
    ),
    "weights of any length": (
        lambda root: (weights_in("w", length="")(root), write("double/1/model.onnx/w", "1234")(root)),
        "external-data",
        "w has 4 bytes of 12",
    ),
    "4 GB of configuration": (sparse(f"double/{CONFIG}", 4 * 2**30), "too-large", "double/config.pbtxt: error: is lar"),
    "4 GB of Python": (sparse("echo/1/model.py", 4 * 2**30), "too-large", "larger than 1,048,576 bytes"),
    "4 GB of graph": (sparse("double/1/model.onnx", 4 * 2**30), "too-large", "larger than 2,147,483,647 bytes"),
    "a configuration of mistakes": (
        write(f"double/{CONFIG}", "input {}\n" * 500),
        "too-large",
        "double: error: has 200 findings or more",
    ),
    "a configuration elsewhere": (link(f"double/{CONFIG}", "/etc/passwd"), "link", "double/config.pbtxt: warning: lea"),
    "a graph elsewhere": (link("double/1/model.onnx", "/etc/passwd"), "link", "double/1/model.onnx: warning: lea"),
    "a model elsewhere": (link("double", "/etc"), "link", "double: warning: leads out of the repository"),
    "a version elsewhere": (link("double/1", "/etc"), "link", "double/1: warning: leads out of the repository"),
    "any file elsewhere": (link("echo/1/more.txt", "/etc/passwd"), "link", "echo/1/more.txt: warning: leads out"),
    "a link in a circle": (link("echo/1/model.py", "model.py"), "model-file", "model.py is missing"),
    "a configuration that is a pipe": (pipe(f"double/{CONFIG}"), "no-config", "double: "),
    "Python that is a pipe": (pipe("echo/1/model.py"), "model-file", "model.py is missing"),
    "a graph that is a pipe": (pipe("double/1/model.onnx"), "model-file", "holds no model.onnx"),
    "labels elsewhere": (
        edit("echo", "labels.txt", "../../etc/passwd"),
        "label-file",
        "are not in the model's folder: ",
    ),
    "labels at a path": (edit("echo", "labels.txt", "/etc/passwd"), "label-file", "are not in the model's folder: "),
    "a warm-up from elsewhere": (
        edit("echo", "zero_data: true", 'input_data_file: "../labels.txt"'),
        "warm-up",
        "its data is not in warmup/: '../labels.txt' leads out",
    ),
    "a space in a name": (
        lambda root: (edit("twice", '"echo"', '"an echo"')(root), move_echo(root)),
        "shell-path",
        "an echo/1/model.py: error: has a character",
    ),
    "a resource without copies": (
        edit("echo", "kind: KIND_CPU", 'kind: KIND_CPU, rate_limiter { resources [{ name: "r", count: 0 }] }'),
        "rate-limiter",
        "0 of 'r'",
    ),
    "a cache of many answers": (
        edit("echo", "backend", "response_cache { enable: true } model_transaction_policy { decoupled: true } backend"),
        "response-cache",
        "is decoupled",
    ),
    "a field that is not there": (edit("echo", "backend", "bakend"), "config-syntax", "echo/config.pbtxt:3"),
    "TYPE_BYTES": (edit("echo", "TYPE_STRING", "TYPE_BYTES"), "config-syntax", "echo/config.pbtxt:5"),
    "two schedulers": (
        edit("twice", "ensemble_scheduling", "dynamic_batching {}\nensemble_scheduling"),
        "config-syntax",
        "twice",
    ),
    "no configuration": (drop(f"double/{CONFIG}"), "no-config", "double: "),
    "another name": (edit("double", '"double"', '"triple"'), "model-name", "double/config.pbtxt:2"),
    "a hidden folder": (write(".git/HEAD"), "stray-folder", ".git"),
    "an empty folder": (lambda root: (root / "new").mkdir(), "stray-folder", "new"),
    "no version": (drop("double/1"), "no-version", "double"),
    "a version in the making": (
        write("double/4.tmp/model.onnx"),
        "stray-version",
        "double/4.tmp: error: is read as version 4",
    ),
    "a version with a zero": (write("double/01/model.onnx"), "ignored-version", "double/01"),
    "a policy of what is not there": (edit("echo", "versions: [1]", "versions: [3]"), "version-policy", "version 3"),
    "no backend": (
        lambda root: (
            edit("double", 'backend: "onnxruntime"', "")(root),
            (root / "double" / "1" / "model.onnx").rename(root / "double" / "1" / "weights"),
        ),
        "no-backend",
        "double/config.pbtxt: error: names no backend",
    ),
    "no model.py": (drop("echo/1/model.py"), "model-file", "hangs the whole server"),
    "no graph": (drop("double/1/model.onnx"), "model-file", "model.onnx is missing"),
    "an empty graph": (write("double/1/model.onnx"), "empty-file", "double/1/model.onnx"),
    "a graph cut off": (write("double/1/model.onnx", "\x08\x0a:\x7fno"), "onnx-graph", "double/1/model.onnx"),
    "weights beside the graph": (with_weights, "external-data", "a folder named model.onnx/"),
    "weights cut off": (cut_off, "external-data", "weights.bin has 8 bytes of 12"),
    "weights missing": (without_weights, "external-data", "weights.bin are missing"),
    "an input that is not the graph's": (edit("double", '"y"', '"z"'), "tensor-name", "no output 'z' (it has y)"),
    "another type": (edit("double", "TYPE_FP32", "TYPE_INT64"), "tensor-type", "input 'x' is TYPE_INT64, and FLOAT"),
    "no type": (
        edit("echo", "data_type: TYPE_STRING, dims: [1] }", "dims: [1] }"),
        "tensor-type",
        "'TEXT' has no data_type",
    ),
    "a dimension of nothing": (edit("echo", "dims: [1]", "dims: [0]"), "tensor-dims", "a dimension of 0"),
    "other dims": (
        edit("double", "dims: [3]", "dims: [3, 3]"),
        "tensor-dims",
        "dims [3, 3] after the batch, and [-1, 3]",
    ),
    "a graph of one row": (save(graph(rows=1)), "batch-size", "has 1 rows"),
    "a step that takes fewer rows": (edit("twice", "max_batch_size: 8", "max_batch_size: 16"), "batch-size", "echo 8"),
    "a preference beyond the largest": (edit("echo", "[4]", "[16]"), "batching", "prefers 16 of at most 8"),
    "batches of nothing": (
        edit("double", "max_batch_size: 4", "max_batch_size: 0\ndynamic_batching {}"),
        "no-batching",
        "max_batch_size is 0",
    ),
    "fewer than no instances": (edit("echo", "count: 1", "count: -1"), "instance-group", "-1"),
    "a processor with a GPU": (
        edit("echo", "KIND_CPU", "KIND_CPU, gpus: [0]"),
        "instance-group",
        "KIND_CPU has no gpus",
    ),
    "a warm-up without its input": (edit("echo", 'key: "TEXT"', 'key: "OTHER"'), "warm-up", "does not give 'TEXT'"),
    "a warm-up of random ids": (
        edit("double", "max_batch_size: 4", "max_batch_size: 4" + RANDOM),
        "warm-up",
        "random integers",
    ),
    "a warm-up from no file": (
        edit("echo", "zero_data: true", 'input_data_file: "ids"'),
        "warm-up",
        "warmup/ids is missing",
    ),
    "no labels": (drop("echo/labels.txt"), "label-file", "labels.txt is missing"),
    "a step that is not there": (edit("twice", '"echo"', '"ecco"'), "ensemble-step", "'ecco' is not in the repository"),
    "a step's version left out": (edit("twice", ", model_version: 1", ""), "ensemble-step", "has no model_version"),
    "a step's version that is not there": (
        edit("twice", "model_version: 1", "model_version: 2"),
        "ensemble-step",
        "no version 2",
    ),
    "an input that the step has not": (
        edit("twice", 'key: "TEXT"', 'key: "TXT"'),
        "ensemble-map",
        "echo has no input 'TXT'",
    ),
    "an output that the step has not": (
        edit("twice", 'key: "COPY"', 'key: "CPY"'),
        "ensemble-map",
        "echo has no output 'CPY'",
    ),
    "a tensor that nothing makes": (
        edit("twice", 'value: "between"', 'value: "else"'),
        "ensemble-map",
        "nothing makes 'between'",
    ),
    "a tensor that is made twice": (
        edit("twice", 'value: "between"', 'value: "RESULT"'),
        "ensemble-map",
        "'RESULT' is made by echo",
    ),
    "a tensor that nothing reads": (
        edit("twice", 'key: "TEXT" value: "between"', 'key: "TEXT" value: "TEXT"'),
        "ensemble-unused",
        "nothing reads 'between'",
    ),
    "a step that waits for itself": (
        edit("twice", 'key: "TEXT" value: "between"', 'key: "TEXT" value: "RESULT"'),
        "ensemble-cycle",
        "echo waits",
    ),
    "no Python": (write("echo/1/model.py", "def (:"), "python-syntax", "echo/1/model.py:1"),
    "Python nested beyond all measure": (nest, "python-syntax", "echo/1/model.py"),
    "a folder for a file": (
        lambda root: (drop("echo/1/model.py")(root), write("echo/1/model.py/x")(root)),
        "model-file",
        "model.py is missing",
    ),
    "a file elsewhere": (
        edit("double", "max_batch_size", 'default_model_filename: "/etc/passwd"\nmax_batch_size'),
        "model-file",
        "is no plain file name",
    ),
    "a type of another step": (
        edit("twice", "data_type: TYPE_STRING", "data_type: TYPE_INT64"),
        "tensor-type",
        "'TEXT' is TYPE_INT64 of the input, and TYPE_STRING for echo",
    ),
    "a type that there is not": (edit("double", "TYPE_FP32", "99"), "tensor-type", "input 'x' is 99"),
    "a version that is not served": (
        lambda root: (
            edit("echo", "versions: [1]", "versions: [2]")(root),
            shutil.copytree(root / "echo" / "1", root / "echo" / "2"),
        ),
        "ensemble-step",
        "no version 1 that its policy",
    ),
    "no class": (write("echo/1/model.py", "import json\n"), "python-syntax", "no class TritonPythonModel"),
    "an import that is nowhere": (
        write("echo/1/model.py", "import nowhere_at_all\n" + MODEL_PY),
        "python-import",
        "echo/1/model.py:1",
    ),
}


#: What is broken with it, where that is more than the one rule.
FOLLOWING = {
    "a policy of what is not there": {"ensemble-step"},
    "no type": {"warm-up"},
    "a configuration of mistakes": {"tensor-type", "tensor-dims"},
    "a configuration elsewhere": {"no-config"},
    "a version elsewhere": {"no-version"},
    "batches of nothing": {"tensor-dims"},
    "a tensor that nothing makes": {"ensemble-unused"},
    "a step that waits for itself": {"ensemble-unused"},
}


def test_nothing_is_wrong_with_what_is_right(repository):
    assert lint(repository) == []
    # What is beside a model, guarded, or part of Python is found.
    (repository / "echo" / "1" / "helper.py").write_text("")
    edit("echo", "labels.txt", "./labels.txt")(repository)
    source = "import os.path, helper\nfrom . import x\ntry:\n    import nowhere_at_all\nexcept ImportError:\n    pass\n"
    write("echo/1/model.py", source + MODEL_PY)(repository)
    in_a_folder(repository)
    assert lint(repository) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_found_with_its_place(repository, what):
    change, rule, said = BROKEN[what]
    change(repository)
    found = lint(repository)
    assert any(finding.rule == rule and said in str(finding) for finding in found), found
    assert {finding.rule for finding in found} <= {rule, *FOLLOWING.get(what, ())}, found


def test_every_rule_has_something_that_breaks_it():
    assert {rule for _, rule, _ in BROKEN.values()} | {"unreadable"} == set(RULES)


def test_what_cannot_be_read_is_said_and_the_rest_is_looked_at(repository, monkeypatch):
    drop("echo/labels.txt")(repository)
    listed = Path.iterdir

    def refused(path):  # permissions do not stop root, who runs tests in containers
        if path == repository / "double":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "double")
    monkeypatch.setattr(Path, "iterdir", refused)
    assert [(finding.rule, finding.path) for finding in lint(repository)] == [
        ("unreadable", "double"),
        ("label-file", f"echo/{CONFIG}"),
    ]


def test_python_that_cannot_be_read_is_said(repository):
    """It may be another user's, or change between two looks; permissions do not stop root."""
    model = Model(repository, repository / "echo", None, "", (1,))
    path = repository / "echo" / "1" / "model.py"
    path.unlink()
    for expected in ("No such file", "is not a regular file"):
        (finding,) = source_findings(model, path)
        assert finding.rule == "python-syntax"
        assert expected in finding.message
        path.exists() or os.mkfifo(path)


def test_what_triton_completes_or_takes_is_no_error(repository):
    # No backend, inputs or outputs: told from the files.
    (repository / "double" / CONFIG).write_text("")
    (repository / "echo" / CONFIG).write_text('backend: "python"')
    # Of two versions the newest alone is served; a class may come from elsewhere.
    shutil.copytree(repository / "double" / "1", repository / "double" / "2")
    (repository / "double" / "1" / "model.onnx").write_bytes(b"old and broken")
    (repository / "echo" / "1" / "shared.py").write_text("class TritonPythonModel: ...")
    (repository / "echo" / "1" / "model.py").write_text("from shared import TritonPythonModel\n")
    assert lint(repository) == []


def test_a_repeated_step_is_named_at_its_own_line(repository):
    edit("twice", "model_version: -1", "model_version: 7")(repository)
    write(f"twice/{CONFIG}", '# "echo"\n' + (repository / "twice" / CONFIG).read_text())(repository)
    (found,) = lint(repository)
    assert (found.rule, found.line) == ("ensemble-step", 13)


def test_foreign_code_is_read_and_not_run(repository, tmp_path):
    write("echo/1/model.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n{MODEL_PY}")(repository)
    assert lint(repository) == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("labels", [(), LABELS])
def test_our_own_releases_are_clean(tmp_path, labels):
    for seed, flavour in enumerate(("python", "native")):
        root = tmp_path / flavour
        for number in range(2):
            plan = make_plan(tmp_path / f"plans-{flavour}", labels=labels, seed=seed + number, flavour=flavour)
            publish(plan, root, Steps(prove=unasked))
        assert lint(root) == []


#: What the embedded server refuses to load, by the model that is asked for.
REFUSED = {
    "a field that is not there": "echo",
    "a cache of many answers": "echo",
    "a policy of what is not there": "echo",
    "no labels": "echo",
    "a dimension of nothing": "echo",
    "a processor with a GPU": "echo",
    "no Python": "echo",
    "a warm-up without its input": "echo",
    "a step that is not there": "twice",
    "a step's version that is not there": "twice",
    "an input that the step has not": "twice",
    "a tensor that nothing makes": "twice",
    "a tensor that nothing reads": "twice",
    "a type of another step": "twice",
    "a step that takes fewer rows": "twice",
}


def test_the_server_takes_what_is_right(repository, triton_settings, tmp_path):
    with EmbeddedServer(repository, triton_settings, models=["twice"], log=tmp_path / "log"):
        pass


@pytest.mark.parametrize("what", REFUSED)
def test_the_server_refuses_what_is_an_error(repository, triton_settings, tmp_path, what):
    change, rule, _ = BROKEN[what]
    change(repository)
    assert RULES[rule].severity == "error"
    server = EmbeddedServer(repository, triton_settings, models=[REFUSED[what]], log=tmp_path / "log")
    with pytest.raises(ServerError, match=REFUSED[what]), server:
        pass


def test_what_is_no_repository_is_not_passed(tmp_path):
    """A wrong path in somebody's CI would be green for ever."""
    (tmp_path / "cpu" / "tiny" / "1").mkdir(parents=True)
    (tmp_path / "cpu" / "tiny" / "config.pbtxt").write_text("")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "empty", "holds no model"),
        (tmp_path / "cpu" / "tiny", f"is the folder of one model. Give the one that holds it: {tmp_path / 'cpu'}"),
        (tmp_path, f"holds repositories, and no models. Give one of them: {tmp_path / 'cpu'}"),
    ):
        with pytest.raises(ReleaseError, match=re.escape(said)):
            lint(path)
    assert lint(tmp_path / "cpu")


def test_formats_and_exit_codes(repository, capsys):
    assert main(["lint", str(repository)]) == 0
    assert capsys.readouterr().out == "nothing found\n"
    drop(f"double/{CONFIG}")(repository)
    assert main(["lint", str(repository)]) == 0  # a warning
    assert "0 errors, 1 warnings" in capsys.readouterr().out
    drop("echo/labels.txt")(repository)
    assert main(["lint", str(repository), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(item["rule"], item["severity"], item["path"], item["line"]) for item in found] == [
        ("no-config", "warning", "double", 0),
        ("label-file", "error", f"echo/{CONFIG}", 6),
    ]
    assert main(["lint", str(repository), "--format", "sarif"]) == 1
    run = json.loads(capsys.readouterr().out)["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert [rules[result["ruleIndex"]] for result in run["results"]] == ["no-config", "label-file"]
    assert run["results"][1]["locations"][0]["physicalLocation"]["region"] == {"startLine": 6}
    with pytest.raises(ReleaseError, match="is no folder"):
        lint(repository / "nowhere")


def test_text_is_what_editors_jump_to():
    finding = Finding("model-name", "a/config.pbtxt", "says 'b', and its folder is 'a'.", 3)
    assert re.match(r"a/config\.pbtxt:3: error: says .*\[model-name\]\n1 errors", as_text([finding]))
    assert json.loads(as_sarif([]))["runs"][0]["results"] == []


def test_names_in_a_graph_may_be_no_text(repository):
    proto = graph()
    proto.graph.input[0].name = "name of the input"
    data = proto.SerializeToString().replace(b"name of the input", b"\xff\x1b[31mf the input")
    (repository / "double" / "1" / "model.onnx").write_bytes(data)
    (found, other) = lint(repository)
    assert {found.rule, other.rule} == {"tensor-name"}
    assert "\\xff" in found.message + other.message
    assert "\x1b" not in as_text([found, other])


@pytest.mark.parametrize(
    "graphs",
    [
        lambda inner: inner,  # nothing around
        lambda inner: b"\x07" + inner,  # a tag that there is not
        lambda inner: inner[: len(inner) // 2],
    ],
)
def test_graphs_that_are_nested_without_end_are_refused(repository, graphs):
    def field(number, data):
        size, prefix = len(data), b""
        while size > 127:
            size, prefix = size >> 7, prefix + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + prefix + bytes([size]) + data

    inner = b""
    for _ in range(5000):  # a graph in an attribute of an operator of a graph
        inner = field(1, field(5, field(6, inner)))
    (repository / "double" / "1" / "model.onnx").write_bytes(graphs(field(7, inner)))
    (found,) = lint(repository)
    assert (found.rule, "cannot be read" in found.message) == ("onnx-graph", True)


HOSTILE = "a\x1b]0;owned\x07\n\u202eb: error: forged [no-config]\udcff"


def test_hostile_names_are_shown_as_they_are_written(repository, capsys):
    """Neither a command to the terminal, nor a line that passes for a finding, nor text that no encoding takes."""
    (repository / "double").rename(repository / HOSTILE)
    assert main(["lint", str(repository)]) == 1
    lines = capsys.readouterr().out.splitlines()
    shown = "a\\u001b]0;owned\\u0007\\n\\u202eb: error: forged [no-config]\\udcff/config.pbtxt:2: error: says"
    assert shown in lines[0]
    assert len(lines) == 2
    for form in ("json", "sarif"):
        assert main(["lint", str(repository), "--format", form]) == 1
        out = capsys.readouterr().out
        assert out.isascii()
        assert "\x1b" not in out
        assert json.loads(out)
    place = json.loads(out)["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place.startswith("a%1B%5D0%3Bowned%07%0A%E2%80%AEb")
    assert place.endswith("%FF/config.pbtxt")


@pytest.mark.whole
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([("t0", "TEXT")] + [(f"t{n}", f"t{n - 1}") for n in range(1, 7000)], id="in order"),
        pytest.param([(f"t{n}", f"t{n + 1}") for n in range(7000)] + [("t7000", "TEXT")], id="in reverse"),
    ],
)
def test_what_a_configuration_can_hold_is_looked_at_within_seconds(repository, steps):
    """No rule may take the square of a megabyte."""
    step = (
        "step {{ model_name: 'echo' model_version: 1 input_map {{ key: 'TEXT' value: '{}' }} "
        "output_map {{ key: 'COPY' value: '{}' }} }}\n"
    )
    last = steps[-1][0] if steps[0][1] == "TEXT" else "t0"
    text = TWICE.split("ensemble_scheduling")[0].replace("RESULT", last)
    text += "ensemble_scheduling {" + "".join(step.format(read, made) for made, read in steps) + "}"
    assert 7e5 < len(text) < 2**20
    (repository / "twice" / CONFIG).write_text(text)
    began = time.process_time()
    assert lint(repository) == []
    assert time.process_time() - began < 10
