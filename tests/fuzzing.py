"""Mutations of a checkpoint's documents, by number: the same number makes the same mutation of the same checkpoint.

`python -m tests.fuzzing FOLDER SCRATCH FIRST COUNT` judges mutations as plans and the sensor do, in a process that may
take a gigabyte of memory, and five seconds for each. It prints the numbers of those that were not refused.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from resources.catalog.entries import ModelEntry
from resources.checkpoints.validation import validate
from resources.errors import CheckpointError
from resources.tasks import TASKS, CheckpointFiles

SEED = 20_26
MOST_SECONDS, MOST_BYTES = 5, 10**9
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
DOCUMENTS = ("config.json", "tokenizer.json", "modules.json", INDEX, SHARD)

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 1.5, 2**31, 4_000_000_000, 10**30, -(10**30), 10**400, 1e308, -1e308),
    *(float("inf"), float("nan"), "", "12", "\ud800", "a\0b", "../../x", "/etc/passwd", "someone/kernels"),
    *([], {}, [[]], {"": {}}, [None], {"a": [1, {"b": 2}]}, "BERT", "LABEL_0", ["a"], {"0": "a"}, {"1": "a"}),
)
_FIELDS = (
    *("num_labels", "id2label", "label2id", "architectures", "model_type", "auto_map", "quantization_config", "dtype"),
    *("attn_implementation", "_attn_implementation", "text_config", "hidden_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "intermediate_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"),
    *("hidden_act", "layer_norm_eps", "problem_type", "per_layer_config", "layer_types", "rope_scaling", "torch_dtype"),
    *("is_encoder_decoder", "use_cache", "tie_word_embeddings", "chunk_size_feed_forward", "num_hidden_groups", "path"),
    *(
        "type",
        "truncation",
        "padding",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "added_tokens",
        "model",
        "vocab",
    ),
    *("merges", "unk_token", "unk_id", "max_input_chars_per_word", "continuing_subword_prefix", "__metadata__", "w"),
)


def entry(number: int, folder: Path) -> ModelEntry:
    """Every other one is a classifier's, so that modules and labels are both read."""
    task = "classification" if number % 2 else "embedding"
    return ModelEntry(name="tiny", source=str(folder), task=task)


def mutate(base: Path, folder: Path, number: int) -> None:
    """Make the checkpoint's documents those of that mutation. The folder holds the files of the base."""
    chance = random.Random(SEED * 10**6 + number)  # noqa: S311 - the same each time
    name = chance.choice(DOCUMENTS)
    for other in DOCUMENTS:
        path = folder / other
        if path.stat().st_mtime_ns != (base / other).stat().st_mtime_ns:
            shutil.copy2(base / other, path)
    data = (base / name).read_bytes()
    if name == SHARD:
        (folder / name).write_bytes(_mutated_weights(data, chance))
    elif chance.random() < 0.25:
        (folder / name).write_bytes(_mutated_bytes(data, chance))
    else:
        (folder / name).write_bytes(_mutated_document(json.loads(data), chance))


def _mutated_weights(data: bytes, chance: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = chance.random()
    if kind < 0.2:
        return struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + data[8:]
    if kind < 0.4:
        return data[:8] + _mutated_bytes(header, chance).ljust(length)[:length] + tensors
    header = _mutated_document(json.loads(header), chance)
    return struct.pack("<Q", len(header)) + header + (tensors if kind < 0.9 else tensors[: chance.randrange(999)])


def _mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    until = min(len(data), at + chance.choice((1, 1, 2, 8, 100)))
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[until:]
    if kind == 2:
        return data[:at] + bytes(chance.randrange(256) for _ in range(until - at)) + data[until:]
    if kind == 3:
        return data[:at] + data[at:until] * chance.choice((2, 3, 1000)) + data[until:]
    if kind == 4:
        return (
            data[:at]
            + chance.choice((b"[", b'{"a":', b"1", b'"', b"\0", b"\xff")) * chance.choice((1, 50, 10**5))
            + data[at:]
        )
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _mutated_document(document: Any, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        places = [*_places(document)]
        if not places:
            break
        # A vocabulary is most of a tokenizer, and one word of it is like another.
        holder, key = chance.choice([place for place in places if place[1] not in _words(document)] or places)
        kind = chance.randrange(7)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(_FIELDS)] = _odd(chance)
        elif kind == 2:
            holder[key] = [holder[key]] * chance.choice((1, 2) if isinstance(holder[key], dict | list) else (1, 1000))
        elif kind == 3:
            other, place = chance.choice(places)
            holder[key] = _copied(other[place]) if _is_there(other, place) else None
        elif kind == 4 and isinstance(holder[key], int | float):
            factor, more = chance.choice((-1, 0, 2, 1000, 10**9, 0.5)), chance.choice((0, 1, -1))
            with suppress(OverflowError):  # of an integer that no float holds
                holder[key] = holder[key] * factor + more
        else:
            holder[key] = _odd(chance)
    try:
        return json.dumps(document).encode()
    except (RecursionError, MemoryError):  # nested too deep to be written, or doubled too often
        return b"[" * 10**5


def _odd(chance: random.Random) -> Any:
    kind = chance.random()
    if kind < 0.03:
        value: Any = []
        for _ in range(chance.choice((20, 200, 2000))):
            value = [value]
        return value
    if kind < 0.06:
        return "x" * chance.choice((1000, 10**5, 3 * 10**6))
    return json.loads(json.dumps(chance.choice(_ODD)))


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value, as what holds it and its key there; not those that lie very deep."""
    left = [(document, 0)]
    while left:
        value, depth = left.pop()
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            if isinstance(value[key], dict | list) and depth < 20:
                left.append((value[key], depth + 1))


def _words(document: Any) -> set[Any]:
    model = document.get("model") if isinstance(document, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return set(vocabulary) if isinstance(vocabulary, dict) else set()


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except RecursionError:  # it is nested deep already
        return None


def _is_there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


class Reader:
    """Reads mutations as a run does once they are copied: with transformers, in a child process."""

    def __init__(self, base: Path, scratch: Path) -> None:
        self._base, self._folder = base, Path(shutil.copytree(base, scratch))

    def read(self, number: int, load: bool) -> str:
        """What is wrong with that mutation; empty: it was read, and with `load` its weights were as well."""
        from resources.checkpoints.tokenizer import prepare_tokenizer

        mutate(self._base, self._folder, number)
        entry_ = entry(number, self._folder)
        try:
            found = validate(entry_, self._folder)
            stored = sum((self._folder / name).stat().st_size for name in found.weights)
            prepare_tokenizer(self._folder, "tiny", False, stored)
            if load:
                files = CheckpointFiles("tiny", self._folder, found.config)
                TASKS[entry_.task].module(files, trust_remote_code=False, use_safetensors=True)
        except CheckpointError as error:
            return str(error)
        return ""


def main(base: Path, scratch: Path, first: int, count: int) -> None:
    """Print the numbers of the mutations that are not refused, and for how long the slowest was looked at."""
    folder = Path(shutil.copytree(base, scratch))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    passed, slowest = [], 0.0
    for number in range(first, first + count):
        mutate(base, folder, number)
        signal.alarm(MOST_SECONDS)  # it ends this process
        began = time.monotonic()
        try:
            validate(entry(number, folder), folder)
            passed.append(number)
        except CheckpointError as error:
            assert len(str(error)) < 3000, number
        except BaseException:
            print(f"mutation {number}", file=sys.stderr)
            raise
        slowest = max(slowest, time.monotonic() - began)
        signal.alarm(0)
    print(json.dumps({"passed": passed, "slowest_s": slowest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
