"""Mutated checkpoints: each is refused with a CheckpointError or can be loaded, in bounded time and memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from resources.checkpoints.validation import validate
from resources.errors import IsolationError
from resources.processes.isolation import Limits, Worker
from tests.checkpoints import make_checkpoint
from tests.fuzzing import INDEX, MOST_BYTES, MOST_SECONDS, SHARD, Reader, entry

#: How many of those that planning does not refuse are then read by transformers in `make test`.
READ = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small classifier with every kind of document: sharded weights, and modules of sentence-transformers."""
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path_factory.mktemp("fuzzing") / "base", labels=("a", "b", "c"), hidden_size=16)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: number for word, number in vocabulary.items() if number < 100}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(folder / "model.safetensors")
    names = [SHARD, SHARD.replace("00001", "00002", 1)]
    shards = {name: names[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({key: tensors[key] for key in shards if shards[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    for number in (0, 1):
        validate(entry(number, folder), folder)
    return folder


def judged(base, scratch, first, count):
    """The mutations that planning does not refuse."""
    shutil.rmtree(scratch, ignore_errors=True)
    command = [sys.executable, "-m", "tests.fuzzing", str(base), str(scratch), str(first), str(count)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["passed"]


def read(base, scratch, numbers, *, load):
    """Read the mutations in one child, as a run reads a copy in one of its own."""
    shutil.rmtree(scratch, ignore_errors=True)
    limits = Limits(timeout_s=60.0, memory_bytes=8 * 10**9)
    with Worker(Reader, base, scratch, limits=limits, what="fuzzing") as child:
        assert child.call("read", 10**9, load) is not None  # the first one imports what is needed
        room = psutil.Process(child.pid).memory_info().rss + MOST_BYTES
        child._limits = Limits(timeout_s=MOST_SECONDS, memory_bytes=room)
        said = []
        for number in numbers:
            try:
                said.append(child.call("read", number, load))
            except IsolationError as error:
                raise AssertionError(f"mutation {number}: {error}") from error
        return said


def test_a_thousand_mutations(base, tmp_path):
    passed = judged(base, tmp_path / "judged", 0, 1000)
    assert 100 < len(passed) < 900, "mutations are all alike"
    said = read(base, tmp_path / "read", passed[:: max(1, len(passed) // READ)], load=False)
    assert any(said)
    assert not all(said)


@pytest.mark.whole
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_mutations(base, tmp_path, part):
    """Of those that planning takes, every fourth is read and loaded as well."""
    passed = judged(base, tmp_path / "judged", part * 5000, 5000)
    read(base, tmp_path / "read", passed[::4], load=True)
