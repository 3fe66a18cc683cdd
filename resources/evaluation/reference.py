"""The evaluation set: real texts, and what PyTorch in fp32 answers to each of them alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from resources.artifacts.fingerprint import code_version, fingerprint, library_versions
from resources.artifacts.records import Checkpoint, EvaluationSet, sha256_file
from resources.artifacts.store import Made
from resources.catalog import ModelEntry
from resources.checkpoints import checkpoint_files, load_arguments
from resources.errors import CheckpointError
from resources.evaluation.batches import equal_length_batches
from resources.evaluation.texts import SAMPLE_TEXTS, load_texts
from resources.isolation import run_isolated
from resources.locks import building
from resources.tasks import TASKS
from resources.workspace import Workspace

if TYPE_CHECKING:
    import numpy as np

REFERENCE_FILE = "reference.npy"
TEXTS_FILE = "texts.json"
_BATCH = 16


@dataclass(frozen=True)
class _Reference:
    width: int
    longest_tokens: int


def make_evaluation_set(workspace: Workspace, entry: ModelEntry, checkpoint: Checkpoint) -> Made[EvaluationSet]:
    """The texts and PyTorch's answers. Raises CheckpointError where those answers cannot be a reference."""
    for shape in entry.shapes:
        if shape.sequence > checkpoint.max_tokens:
            raise CheckpointError(
                f"{entry.name}: shapes: {shape} is longer than this checkpoint takes ({checkpoint.max_tokens} tokens). "
                "Shorten it in the models file."
            )
    texts = load_texts()
    digest = fingerprint(
        "evaluation_set",
        model=entry.name,
        texts=sha256_file(SAMPLE_TEXTS),
        weights=checkpoint.weights_digest,
        tokenizer=checkpoint.tokenizer_digest,
        task=checkpoint.task,
        code=code_version("resources.evaluation.reference", "resources.tasks", "resources.tokenization"),
        libraries=library_versions("torch", "transformers", "tokenizers"),
    )

    def make(folder: Path) -> EvaluationSet:
        with building():
            found, peak = run_isolated(
                _answer,
                checkpoint,
                workspace.store.folder(checkpoint),
                texts,
                folder,
                workspace.threads(entry),
                limits=workspace.limits,
                what=f"{entry.name}, revision {checkpoint.revision}: PyTorch's answers to the evaluation texts",
                log=workspace.log(entry.name, "evaluation_set"),
            )
        return EvaluationSet(
            digest=digest,
            model=entry.name,
            texts=len(texts),
            width=found.width,
            longest_tokens=found.longest_tokens,
            tokenizer_checked=len(texts),
            peak_memory_bytes=peak,
        )

    return workspace.store.get_or_make(EvaluationSet, digest, make)


def read_evaluation_set(folder: Path) -> tuple[list[str], np.ndarray]:
    """The texts, and PyTorch's answers fp32 `[texts, width]`."""
    import numpy as np

    return json.loads((folder / TEXTS_FILE).read_text(encoding="utf-8")), cast(
        "np.ndarray", np.load(folder / REFERENCE_FILE)
    )


def _answer(checkpoint: Checkpoint, source: Path, texts: list[str], folder: Path, threads: int) -> _Reference:
    import numpy as np
    import torch

    from resources.tokenization import TextEncoder

    torch.set_num_threads(threads)
    encoder = TextEncoder.from_folder(str(source))
    encodings = encoder.tokens(texts)
    _check_tokenizer(checkpoint, source, texts, [encoding.ids for encoding in encodings])
    module = TASKS[checkpoint.task].module(checkpoint_files(checkpoint, source), **load_arguments(checkpoint))
    lengths = [len(encoding.ids) for encoding in encodings]
    rows: list[np.ndarray | None] = [None] * len(texts)
    for batch in equal_length_batches(lengths, _BATCH):
        arrays = encoder.pad([encodings[index] for index in batch.indices], batch.length)
        with torch.inference_mode():
            answers = module(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        for index, answer in zip(batch.indices, answers, strict=True):
            rows[index] = answer
    reference = np.stack([row for row in rows if row is not None]).astype(np.float32)
    broken = int((~np.isfinite(reference)).any(axis=1).sum())
    if broken:
        raise CheckpointError(
            f"{checkpoint.model}, revision {checkpoint.revision}: PyTorch itself answers NaN or infinity to {broken} "
            f"of {len(texts)} texts in fp32, so there is nothing to serve. The weights are damaged or the training "
            "diverged: give another checkpoint."
        )
    np.save(folder / REFERENCE_FILE, reference)
    (folder / TEXTS_FILE).write_text(json.dumps(texts, ensure_ascii=False, indent=0), encoding="utf-8")
    return _Reference(width=int(reference.shape[1]), longest_tokens=max(lengths))


def _check_tokenizer(checkpoint: Checkpoint, source: Path, texts: list[str], ids: list[list[int]]) -> None:
    """What is served tokenizes with `tokenizers` alone; transformers' own tokenizer must agree on every text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
    )
    expected = tokenizer(texts, truncation=True, max_length=checkpoint.max_tokens)["input_ids"]
    wrong = [number for number, (first, second) in enumerate(zip(ids, expected, strict=True)) if first != second]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.model}, revision {checkpoint.revision}: tokenizer.json gives other tokens than transformers "
            f"for {len(wrong)} of {len(texts)} texts, the first being {texts[wrong[0]][:60]!r}. Save the tokenizer "
            "again with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) and use that folder."
        )
