"""`refinery bench`: engines in turns with each other, as people run it and as its resources measure."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestration.cli import main
from resources.artifacts.records import Engine, StoredFile, sha256_file
from resources.artifacts.store import ArtifactStore
from resources.benchmark.side_by_side import Comparison
from resources.catalog.loading import write_entry
from resources.engines.specs import engine_spec
from resources.report.side_by_side import ratio_table
from resources.settings.workspace import Workspace
from resources.steps.side_by_side import compare_engines
from tests.conftest import entry_for

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ["torch", "onnxruntime_fp32", "onnxruntime_int8"]


def command(home, *arguments):
    return [sys.executable, "-m", "orchestration.cli", "bench", *arguments], settings(home)


def settings(home):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REFINERY_", "DAGSTER_"))}
    return {**clean, "REFINERY_HOME": str(home), "REFINERY_CATALOG": str(home / "models.yaml")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, made_checkpoint: Callable[..., Path]) -> Path:
    """A home with one model; what the first test builds there is used by those that follow."""
    home = tmp_path_factory.mktemp("home")
    (home / "models.yaml").write_text("models: []\n")
    strict = {"cosine_mean": 0.9999}  # more than int8 reaches on any processor, and less than fp32 does
    entry = entry_for(
        made_checkpoint(),
        gates=strict,
        ladder={"trials": 0},
        engines=ENGINES[1:],
        benchmark={"seconds": 2.0, "threads": 2},
    )
    write_entry(entry, home / "models.d")
    return home


@pytest.fixture(scope="module")
def benched(home: Path) -> tuple[str, Comparison]:
    """What was printed and saved, and nothing but artifacts and the results left in the home."""
    arguments, variables = command(home, "tiny", "--seconds", "4")
    done = subprocess.run(arguments, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert {path.name for path in home.iterdir()} == {"models.yaml", "models.d", "artifacts", "logs", "bench"}
    assert not (home / "artifacts" / "current").exists()  # the pipeline's own pointers
    assert not (home / "artifacts" / "benchmark").exists()
    return done.stdout, Comparison.model_validate_json((home / "bench" / "tiny-cpu" / "bench.json").read_bytes())


def test_what_is_printed(benched):
    out, comparison = benched
    assert "\x1b" not in out
    assert re.search(r"s  engines/cpu/onnxruntime_fp32  made in", out)
    assert re.search(r"s  1x16  \d+ rounds of 3 engines", out)
    assert re.search(r"│ onnxruntime_fp32 +│ +[\d.]+ / ≤?[\d.]+.* \([\d.]+×\)", out)
    assert re.search(r"│ onnxruntime_int8 .*not accurate enough: cosine_mean", out)
    assert re.search(r"│ times faster than|┃ times faster than", out)
    # What cannot be had here is said with its reason, as refinery optimize does.
    assert re.search(r"\nonnxruntime_fp16\b.*: unsupported: needs an NVIDIA GPU", out)
    assert re.search(r"\nonnxruntime_int8_static\b.*: unsupported: Not among the engines that the catalog lists", out)
    assert "bench.json" in out.splitlines()[-1]
    assert comparison.measured == ENGINES


def test_what_is_saved(benched, home):
    _, comparison = benched
    assert (comparison.model, comparison.target, comparison.threads, comparison.seconds) == ("tiny", "cpu", 2, 4.0)
    assert comparison.versions["torch"].startswith("2.")
    assert set(comparison.samples) == set(comparison.ratios) == {"1x16", "2x32"}
    for shape, samples in comparison.samples.items():
        assert list(samples) == ENGINES
        assert len({len(times) for times in samples.values()}) == 1
        ratios = comparison.ratios[shape]
        for one in ENGINES:
            assert set(ratios[one]) == set(ENGINES) - {one}
        pairs = zip(samples["torch"], samples["onnxruntime_fp32"], strict=True)
        faster = sorted(first / second for first, second in pairs)
        assert faster[(len(faster) - 1) // 2] <= ratios["onnxruntime_fp32"]["torch"] <= faster[len(faster) // 2]
    header, rows = ratio_table(comparison)
    assert header == ["times faster than", *ENGINES]
    assert [row[0] for row in rows] == ENGINES
    assert [row[number + 1] for number, row in enumerate(rows)] == ["–"] * 3
    folder = home / "bench" / "tiny-cpu"
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    # For scripts that know nothing of this project.
    data = json.loads((folder / "bench.json").read_text())
    assert data["ratios"]["1x16"]["onnxruntime_fp32"]["torch"] > 0
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "bench.md").read_text()
    assert "| onnxruntime_int8 |" in text
    assert "## 2x32" in text
    assert text.count("| times faster than |") == 3


def run(home, monkeypatch, capsys, *arguments):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in settings(home).items():
        monkeypatch.setenv(name, value)
    code = main(["bench", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_folder_that_is_in_the_catalog_stays_as_it_is_there(
    benched, home, made_checkpoint, monkeypatch, capsys, tmp_path
):
    entry = home / "models.d" / "tiny.yaml"
    before = entry.read_bytes()
    options = ["--name", "tiny", "--engines", "onnxruntime_fp32", "--shapes", "1x8, 1x8", "--seconds", "1"]
    options += ["--threads", "1", "--no-accuracy", "--output", str(tmp_path / "new" / "out")]
    code, out, err = run(home, monkeypatch, capsys, str(made_checkpoint()), *options)
    assert (code, err) == (0, "")
    assert "engines/cpu/onnxruntime_fp32  there already" in out
    assert "made in" not in out
    assert entry.read_bytes() == before
    comparison = Comparison.model_validate_json((tmp_path / "new" / "out" / "bench.json").read_bytes())
    assert (comparison.threads, list(comparison.samples)) == (1, ["1x8"])
    assert {verdict.verdict for verdict in comparison.verdicts} == {"accuracy was not measured"}
    assert {report.accuracy for report in comparison.reports} == {None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no-such-model"], "There is no model named 'no-such-model'"),
        (
            ["tiny", "--engines", "onnxruntime_fp32,abacus"],
            "--engines: There is no engine named 'abacus'. The engines are torch,",
        ),
        (
            ["tiny", "--engines", "torch"],
            "--engines: torch is the baseline of every comparison. Name at least one other engine",
        ),
        (["tiny", "--shapes", "1x16,8"], "--shapes: '8' is not a shape"),
        (["tiny", "--shapes", "1x65"], "1x65 is longer than this checkpoint takes (64 tokens)"),
        (["tiny", "--shapes", "9x16"], "the batch of the shape 9x16 is larger than max_batch_size (8)"),
        (["tiny", "--shapes", "1x1", "--seconds", "1", "--no-accuracy"], "Text cannot fill rows of exactly 1 tokens"),
        (
            ["tiny", "--engines", "onnxruntime_fp32,tensorrt_fp16"],
            "--engines, --target: tensorrt_fp16 needs an NVIDIA GPU; the target 'cpu' has none",
        ),
        (
            ["tiny", "--target", "cuda_sm90"],
            "--engines, --target: cuda_sm90 needs an NVIDIA GPU of compute capability 9.0",
        ),
        (
            ["tiny", "--output", "/dev/null/x"],
            "--output: /dev/null/x cannot be created: /dev/null is not a writable folder",
        ),
        (["tiny", "--name", "other"], "is in the catalog already"),
    ],
)
def test_mistakes_are_one_clear_message(benched, home, monkeypatch, capsys, arguments, expected):
    code, _, err = run(home, monkeypatch, capsys, *arguments)
    assert code == 1
    assert err.startswith("refinery: ")
    assert expected in err


def test_a_model_without_an_engine_to_compare_says_why(home, made_checkpoint, monkeypatch, capsys):
    write_entry(entry_for(made_checkpoint(), name="none_here", engines=["tensorrt_fp16"]), home / "models.d")
    try:
        code, _, err = run(home, monkeypatch, capsys, "none_here")
    finally:
        (home / "models.d" / "none_here.yaml").unlink()
    assert code == 1
    assert "none_here: there is nothing to compare on cpu" in err
    assert "\n  tensorrt_fp16: unsupported: tensorrt_fp16 needs an NVIDIA GPU" in err


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--seconds", "soon"], ["--threads", "0"], []])
def test_wrong_command_lines_exit_with_2(home, monkeypatch, capsys, wrong):
    with pytest.raises(SystemExit) as caught:
        run(home, monkeypatch, capsys, *(["tiny"] if wrong else []), *wrong)
    assert caught.value.code == 2


def test_one_that_breaks_is_out_and_the_others_go_on(benched, home, tmp_path):
    """Its file is replaced by garbage, and its record says so, so that only loading it tells."""
    workspace = Workspace(home, home / "models.yaml")
    store = ArtifactStore(home / "artifacts")
    records = [Engine.model_validate_json(path.read_bytes()) for path in (store.root / "engine").glob("*/record.json")]
    (int8,) = [record for record in records if record.name == "onnxruntime_int8" and record.status == "built"]
    model = store.folder(int8) / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(b"x" * len(whole))
    stored = model.with_name("record.json")
    record = stored.read_text()
    files = {**int8.files, "model.onnx": StoredFile(sha256=sha256_file(model), size_bytes=len(whole))}
    stored.write_text(int8.model_copy(update={"files": files}).model_dump_json())
    said = []
    try:
        comparison = compare_engines(
            workspace,
            workspace.entry("tiny"),
            "cpu",
            [engine_spec(name) for name in ENGINES],
            lambda *line: said.append(line),
            seconds=1.0,
            accuracy=False,
        )
    finally:
        model.write_bytes(whole)
        stored.write_text(record)
    assert comparison.measured == ENGINES[:2]
    (report,) = [report for report in comparison.reports if report.engine == "onnxruntime_int8"]
    assert report.status == "failed"
    assert "ONNX Runtime cannot load the graph" in report.reason
    assert ("engines/onnxruntime_int8", report.reason) in said
    assert list(comparison.ratios["1x16"]) == ENGINES[:2]


def test_one_that_dies_while_it_is_measured(benched, home):
    """Killed from outside at its second shape: the others begin that shape again without it."""
    workspace = Workspace(home, home / "models.yaml")

    def kill(name: str, text: str) -> None:
        if name != "1x16":
            return
        log = str(home / "logs" / "tiny" / "bench-cpu-onnxruntime_fp32.log")
        for process in psutil.Process().children(recursive=True):
            if log in [file.path for file in process.open_files()]:
                process.kill()

    specs = [engine_spec(name) for name in ENGINES]
    entry = workspace.entry("tiny")
    comparison = compare_engines(workspace, entry, "cpu", specs, kill, seconds=2.0, accuracy=False)
    assert comparison.measured == ["torch", "onnxruntime_int8"]
    assert [report.reason for report in comparison.reports if report.engine == "onnxruntime_fp32"] == [
        "failed: at 2x32: tiny: comparing onnxruntime_fp32 on cpu: its process was ended by SIGKILL; the kernel "
        "often does this when memory runs out."
    ]
    # What it took before is kept, and compared with nothing.
    assert set(comparison.samples["1x16"]) == set(ENGINES)
    assert set(comparison.ratios["1x16"]) == set(comparison.samples["2x32"]) == {"torch", "onnxruntime_int8"}


def test_interrupting_ends_clean(benched, home, tmp_path):
    arguments, variables = command(home, "tiny", "--seconds", "100", "--output", str(tmp_path / "out"))
    process = subprocess.Popen(
        arguments,
        env=variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "accuracy/onnxruntime_int8" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "refinery: interrupted. No unfinished files were left behind.\n"
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not (tmp_path / "out").exists()
