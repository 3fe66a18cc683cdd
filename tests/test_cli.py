"""The command line, as processes: what people type, what they read, and exit codes that tell success from failure."""

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.cli.arguments import parser
from orchestration.cli.serving import _items
from orchestration.ui.ui import page_addresses
from resources.pipelines import pipeline_class
from resources.tasks import TASKS
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_job

REFINERY = str(Path(sys.executable).with_name("refinery"))


def environment(workspace, **more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
    return {
        **clean,
        "REFINERY_HOME": str(workspace.home),
        "REFINERY_CATALOG": str(workspace.catalog_path),
        "COLUMNS": "200",
        **more,
    }


def refinery(workspace, *arguments, timeout=480, **more):
    result = subprocess.run(
        [REFINERY, *arguments],
        env=environment(workspace, **more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def empty(workspace):
    workspace.catalog_path.write_text("models: []\n")
    return workspace


def test_a_folder_becomes_a_model_and_is_asked(empty, made_checkpoint, triton_settings):
    folder = made_checkpoint(labels=("no", "yes"))
    options = ["--name", "yes-or-no", "--seq-len", "16", "--batch-size", "1,2", "--engines", "onnxruntime_fp32"]
    code, out, err = refinery(empty, "optimize", str(folder), *options, "--seconds", "5", "--serving-seconds", "0")
    assert code == 0, out + err
    # The task was told from the checkpoint; the entry is in a file of its own.
    entry = (empty.home / "models.d" / "yes-or-no.yaml").read_text()
    assert "task: classification" in entry
    assert "- 2x16" in entry
    assert "  seconds: 5.0" in entry
    assert "  search_seconds: 0.0" in entry
    # Plain lines in a log: no control characters, a line a step, the table, the release, and how to ask.
    assert "\x1b" not in out
    assert re.search(r"s  onnx_graph  made in", out)
    assert re.search(r"onnxruntime_fp32 +│.*│ champion: ", out)
    assert re.search(r"\n.*\btensorrt_fp16\b.*: unsupported: ", out)
    assert "Release 1 of yes-or-no serves onnxruntime_fp32" in out
    assert 'refinery query yes-or-no "any text"' in out

    code, out, err = refinery(empty, "query", "yes-or-no", "Is this a question?", "No.")
    assert code == 0, err
    assert "so one is started for this request" in err
    assert re.search(r"(no|yes) 0\.\d{4}, (no|yes) 0\.\d{4}", out)
    code, out, _ = refinery(empty, "query", "yes-or-no", "x", "--json")
    assert sum(json.loads(out)) == pytest.approx(1.0, abs=1e-3)

    code, out, _ = refinery(empty, "models")
    assert code == 0
    assert re.search(r"yes-or-no .*release 1, onnxruntime_fp32", out)
    code, out, _ = refinery(empty, "releases", "yes-or-no")
    assert code == 0
    assert re.search(r"1 +│ current +│ onnxruntime_fp32 .* MB +│ [0-9a-f]{32} ", out)
    # The name is taken now; what it is for is written in its file.
    code, _, err = refinery(empty, "optimize", "yes-or-no", "--seq-len", "8")
    assert code == 1
    assert "--seq-len" in err


def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_serving_answers_until_interrupted(empty, made_checkpoint, triton_settings):
    from dataclasses import replace

    ready = replace(empty, triton=triton_settings)
    add_entry(ready, entry_for(made_checkpoint(), shapes=["1x16"], engines=["onnxruntime_fp32"]))
    assert run_job(ready, "tiny").success
    ports = [free() for _ in range(4)]
    named = [f"--{name}-port" for name in ("http", "grpc", "metrics", "health")]
    options = [part for pair in zip(named, map(str, ports), strict=True) for part in pair]
    command = [REFINERY, "serve", *options]
    server = subprocess.Popen(command, env=environment(empty), stdout=subprocess.PIPE, text=True)
    try:
        lines = [server.stdout.readline() for _ in range(2)]
        assert f"127.0.0.1:{ports[1]}" in "".join(lines)
        code, out, err = refinery(empty, "query", "tiny", "hello", "--url", f"127.0.0.1:{ports[1]}")
        assert (code, err) == (0, "")
        assert "32 values:" in out
        # A second server on the same ports is refused, and the first serves on.
        code, _, err = refinery(empty, "serve", *options)
        assert code == 1
        assert f"{ports[0]}" in err
        assert "--http-port" in err
        named = {"REFINERY_TRITON_GRPC": f"127.0.0.1:{ports[1]}"}
        assert refinery(empty, "query", "tiny", "hello", **named)[2] == ""  # it was asked, and none was started
        code, _, err = refinery(empty, "query", "other", "hello", **named)
        assert code == 1
        assert "other is not served by any of" in err
        assert "REFINERY_TRITON_GRPC" in err
        # What loads and unloads finds the key by itself, and another home does not.
        key = empty.home / "keys" / f"{ports[1]}.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        back = ("rollback", "tiny", "--to", "1")
        assert "is what is pointed to and served already" in refinery(empty, *back, **named)[2]
        named["REFINERY_TRITON_REPOSITORIES"] = str(empty.repository("cpu").parent)
        named["REFINERY_HOME"] = str(empty.home.parent / "other")
        assert "Set REFINERY_TRITON_KEY" in refinery(empty, *back, **named)[2]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def test_interrupting_leaves_nothing_half_made(empty, made_checkpoint):
    command = [REFINERY, "optimize", str(made_checkpoint()), "--name", "tiny", "--seq-len", "16"]
    process = subprocess.Popen(
        command,
        env=environment(empty),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "onnx_graph" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "refinery: interrupted. No unfinished files were left behind.\n"
    store = empty.home / "artifacts"
    assert not list((store / "staging").iterdir())
    assert all(
        (folder / "record.json").exists()
        for kind in store.iterdir()
        if kind.name not in ("current", "staging", "locks", "caches")
        for folder in kind.iterdir()
    )
    assert not (empty.home / "triton_models").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optimize", "no-such-model"], "There is no model named 'no-such-model' in the catalog"),
        (["optimize", "./no-such-folder"], "does not exist"),
        (["optimize", "./no-such-folder", "--task", "embedding"], "does not exist"),
        (["optimize", "/dev/null"], "not a folder"),
        (["optimize", "/usr", "--task", "embedding"], "usr: config.json is missing from /usr"),
        (["optimize", "x/y", "--task", "poetry"], "'poetry' is not one of"),
        (
            ["optimize", "x/y", "--task", "embedding", "--seq-len", "16,long"],
            "--seq-len: 'long' is not a whole number of at least 1",
        ),
        (["optimize", "x/y", "--task", "embedding", "--name", "a b"], "cannot be used by Triton"),
        (["query", "no-such-model", "text"], "no release of it"),
        (["query", "no-such-model", "text", "--url", "127.0.0.1:9"], "No Triton answers gRPC at 127.0.0.1:9"),
        (["releases", "no-such-model"], "There is no model named 'no-such-model'"),
        (["rollback", "no-such-model"], "no release of it"),
        (["verify", "no-such-model"], "There is no model named"),
        (["retain", "no-such-model"], "no release of it"),
        (["serve", "--control", "none"], "holds no release yet"),
    ],
)
def test_mistakes_are_one_clear_message(empty, arguments, expected):
    code, out, err = refinery(empty, *arguments, HF_HUB_OFFLINE="1")
    assert code == 1, out
    assert err.startswith("refinery: ")
    assert expected in err
    assert "Traceback" not in err
    assert not list((empty.home / "models.d").glob("*")) if (empty.home / "models.d").exists() else True


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"REFINERY_CATALOG": "/no/such/file.yaml"}, "Set REFINERY_CATALOG"),
        ({"REFINERY_STEP_SECONDS": "soon"}, "REFINERY_STEP_SECONDS: 'soon'"),
        ({"REFINERY_TARGETS": "tpu"}, "REFINERY_TARGETS: 'tpu' is not a target"),
        ({"REFINERY_TRITON_FLAVOUR": "vanilla"}, "REFINERY_TRITON_FLAVOUR: 'vanilla'"),
    ],
)
def test_wrong_settings_are_named(empty, variables, expected):
    code, _, err = refinery(empty, "models", **variables)
    assert code == 1
    assert expected in err


def test_a_resource_has_a_name_and_a_number(empty):
    code, _, err = refinery(empty, "serve", "--resource", "cores")
    assert code == 2
    assert "--resource: 'cores' does not have the form NAME=N, for example cores=4" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [verb, "tiny"]
        for verb in ("optimize", "plan", "bench", "load", "releases", "rollback", "promote", "retain", "verify")
    ]
    + [["query", "tiny", "text"], ["serve"]],
    ids=lambda arguments: arguments[0],
)
def test_a_target_is_one_that_there_could_be(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--target", "abacus"])
    assert caught.value.code == 2
    assert "--target: 'abacus' is not a target; use cpu, or cuda_sm" in capsys.readouterr().err


def test_a_target_that_cannot_be_built_here_is_refused_before_anything_is_done(empty, made_checkpoint, capsys):
    code, out, err = refinery(empty, "optimize", str(made_checkpoint()), "--target", "cuda_sm77")
    assert (code, out) == (1, "")
    assert "cuda_sm77 needs an NVIDIA GPU of compute capability 7.7" in err
    assert not (empty.home / "models.d").exists()


def test_a_mistyped_hub_id_can_be_put_right(empty):
    offline = {"HF_HUB_OFFLINE": "1"}
    code, _, err = refinery(empty, "optimize", "no-org/no-model", "--task", "embedding", **offline)
    assert code == 1
    assert "is not in the Hub cache and cannot be fetched" in err
    assert "defect" not in err
    code, _, err = refinery(empty, "optimize", "right-org/no-model", "--task", "embedding", **offline)
    assert "right-org/no-model is not in the Hub cache" in err


@pytest.mark.parametrize("task", TASKS)
def test_the_example_of_a_task_gives_what_its_models_take(task):
    arguments = shlex.split(f"query m {TASKS[task].example({'mask_token': '[MASK]'})}")
    (item,) = _items(parser().parse_args(arguments), pipeline_class(task).inputs)
    assert set(item) == set(pipeline_class(task).inputs)
    assert (task == "fill-mask") == ("[MASK]" in item.get("TEXT", ""))


def test_the_mask_of_a_checkpoint_is_no_command_in_the_example():
    text = TASKS["fill-mask"].example({"mask_token": '"; touch $(pwd)/x; "'})
    assert shlex.split(text) == ['any text with a "; touch $(pwd)/x; "']
    assert subprocess.run(["/bin/sh", "-c", f"echo {text}"], capture_output=True, text=True, check=True).stdout == (
        'any text with a "; touch $(pwd)/x; "\n'
    )


def test_another_repository_is_asked_as_it_is_said(empty, made_checkpoint, triton_settings, tmp_path):
    add_entry(empty, entry_for(made_checkpoint(), shapes=["1x16"], engines=["onnxruntime_fp32"]))
    code, out, err = refinery(empty, "optimize", "tiny", "--output", str(tmp_path / "o"))
    assert code == 0, out + err
    (said,) = re.findall(r"Ask it: +(.*)", out)
    bin_folder = Path(REFINERY).parent
    command = subprocess.run(
        ["/bin/bash", "-c", said],
        env=environment(empty, PATH=f"{bin_folder}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert command.returncode == 0, command.stderr
    assert "32 values:" in command.stdout


def test_a_failed_run_ends_in_one_message(empty, tmp_path):
    """Not in a line for every step that did not run because of it."""
    (tmp_path / "hollow").mkdir()
    code, out, err = refinery(empty, "optimize", str(tmp_path / "hollow"), "--task", "embedding")
    assert code == 1
    assert out == ""
    assert err.startswith("refinery: hollow: config.json is missing")
    assert len(err.splitlines()) == 1
    assert not list((empty.home / "models.d").glob("*")), "what is no checkpoint is not left for the sensor"
    (tmp_path / "hollow" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    entry = {"name": "hollow", "source": str(tmp_path / "hollow"), "task": "embedding"}
    empty.catalog_path.write_text(json.dumps({"models": [entry]}))
    code, out, err = refinery(empty, "optimize", "hollow")
    assert code == 1
    first, step = out.splitlines()
    assert first == f"hollow: embedding, {tmp_path / 'hollow'}"
    assert "checkpoint" in step
    assert err.startswith("refinery: hollow: there are no weights")
    assert len(err.splitlines()) == 1


def test_wrong_command_lines_exit_with_2(empty):
    assert refinery(empty)[0] == 2
    assert refinery(empty, "serve", "--http-port", "99999")[0] == 2


def test_ui_refuses_a_port_in_use(empty):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = refinery(empty, "ui", "--dagster-port", str(port))
    assert code == 1
    assert f"Port {port}" in err
    assert "--dagster-port" in err


@pytest.mark.parametrize(
    ("fields", "dagster", "mlflow"),
    [
        ({}, "http://127.0.0.1:3001", "http://127.0.0.1:5001"),
        ({"tracking_uri": "http://mlflow:5000"}, "http://127.0.0.1:3001", "http://mlflow:5000"),
        ({"dagster_ui": "https://d", "tracking_ui": "https://m"}, "https://d", "https://m"),
    ],
)
def test_runs_that_the_pages_start_know_where_the_pages_are(empty, fields, dagster, mlflow):
    assert page_addresses(replace(empty, **fields), 3001, 5001) == {
        "REFINERY_DAGSTER_UI": dagster,
        "REFINERY_MLFLOW_UI": mlflow,
    }


def test_dagster_accepts_the_definitions(empty):
    command = [str(Path(sys.executable).with_name("dagster")), "definitions", "validate", "-w", "workspace.yaml"]
    result = subprocess.run(
        command,
        env=environment(empty),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr


def test_a_repository_that_cannot_be_made_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(tmp_path / "file" / "models"))
    assert main(["serve"]) == 1
    said = capsys.readouterr().err
    assert "models/cpu does not exist and could not be created: Not a directory. Correct this" in said
