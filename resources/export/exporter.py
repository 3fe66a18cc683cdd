"""PyTorch to ONNX with dynamic batch and sequence, proven equal at shapes it was not exported at.

Runs in child processes only.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from resources.artifacts.records import Checkpoint, ParityCase
from resources.boundary.trust import Trust
from resources.checkpoints.collect import checkpoint_files
from resources.engines.onnxruntime.runner import MODEL_FILE, OnnxRuntimeRunner
from resources.errors import ExportError, first_line
from resources.export.exported import Exported
from resources.pipelines.tokenization import TextEncoder, framed
from resources.tasks import TASKS, Task

#: 20 is the newest opset whose operators the fusion rules know all of; 23 has an Attention of its own that they do not.
OPSET = 20
#: Largest difference from PyTorch that counts as the same, relative to the largest value of the answer. Exported graphs
#: of thirty architectures and tasks agreed to 5e-7; a wrong mask or position shows from 1e-3 up.
PARITY_TOLERANCE = 1e-4
#: Rows and tokens that parity is checked at; the export itself sees 2 rows of 12.
PARITY_SHAPES = ((1, 1), (1, 7), (3, 33), (5, 64))
_EXPORT_SHAPE = (2, 12)


def export(
    checkpoint: Checkpoint, source: Path, trust: Trust, folder: Path, external_data_threshold_bytes: int
) -> Exported:
    """Export the checkpoint's task module to `folder/model.onnx` and compare it with PyTorch. Raises ExportError."""
    task = TASKS[checkpoint.task]
    files = checkpoint_files(checkpoint, source, trust)
    maker = _BatchMaker(TextEncoder.from_folder(str(source)), task, int(files.config.get("type_vocab_size") or 1))
    module = task.module(files, **trust.load_arguments)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    external = weights > external_data_threshold_bytes
    path = folder / MODEL_FILE
    _export(module, maker.batch(*_EXPORT_SHAPE, padded=True), checkpoint, path, external)
    gc.collect()  # the exporter's own copy of the weights, before the runtime makes another
    complaint = _check(path)
    # A graph that the checker refuses is not worth running.
    parity, width, misses = ([], 0, []) if complaint else _compare(module, path, maker, checkpoint.output)
    proto = onnx.load(path, load_external_data=False)
    return Exported(
        opset=OPSET,
        nodes=len(proto.graph.node),
        parameters=sum(tensor.numel() for tensor in module.parameters()),
        inputs=tuple(item.name for item in proto.graph.input),
        output=checkpoint.output,
        width=width,
        external_data=external,
        parity=tuple(parity),
        checker=complaint,
        parity_misses=tuple(misses),
    )


def _export(
    module: torch.nn.Module, batch: dict[str, np.ndarray], checkpoint: Checkpoint, path: Path, external: bool
) -> None:
    # One symbol each for all inputs: with Dim.DYNAMIC the mask gets a batch size of its own.
    rows = torch.export.Dim("batch", min=1, max=1024)
    tokens = torch.export.Dim("sequence", min=1, max=checkpoint.max_tokens)
    extra = TASKS[checkpoint.task].extra_inputs
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch.export, nothing a user could act on
            program = torch.onnx.export(
                module,
                kwargs={name: torch.from_numpy(array) for name, array in batch.items()},
                dynamo=True,
                opset_version=OPSET,
                input_names=list(batch),
                output_names=[checkpoint.output],
                dynamic_shapes={name: {0: rows} if name in extra else {0: rows, 1: tokens} for name in batch},
                verbose=False,
            )
            assert program is not None  # it is None for the old exporter alone
            program.save(path, external_data=external)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise ExportError(f"torch.onnx cannot export it: {type(error).__name__}: {lines[0][:300]}") from error


def _check(path: Path) -> str:
    """The ONNX checker's complaint, or nothing. By path: a proto above 2 GB cannot be checked in memory."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        return f"The ONNX checker refuses the graph: {first_line(error)}"
    return ""


@dataclass(frozen=True)
class _BatchMaker:
    """Batches of token ids of every part of the vocabulary, with every kind of token a model tells apart."""

    encoder: TextEncoder
    task: Task
    segments: int

    @property
    def fewest(self) -> int:
        """Tokens of the shortest row: the special ones, or one."""
        return max(1, len(self.encoder.before) + len(self.encoder.after))

    def batch(self, rows: int, tokens: int, *, padded: bool) -> dict[str, np.ndarray]:
        """int64 arrays by input name, of rows that the tokenizer could have made.

        padded: each row but the first is shorter than the one before, down to the special tokens alone.
        """
        encoder, generator = self.encoder, np.random.default_rng(rows * 1000 + tokens)
        # A pad id inside a text is read as padding by models that count positions from it (RoBERTa), and some find the
        # end of a text by its token (BART).
        special = {encoder.pad_id, *encoder.before, *encoder.after}
        usual = np.setdiff1d(np.arange(encoder.vocabulary_size), [*special])
        ids = generator.choice(usual if len(usual) else [encoder.filler], size=(rows, tokens)).astype(np.int64)
        kept = [
            tokens if row == 0 or not padded else max(self.fewest, tokens - row * max(1, tokens // rows))
            for row in range(rows)
        ]
        for row, count in enumerate(kept):
            ids[row, :count] = framed(ids[row, :count].tolist(), encoder.before, encoder.after)
        batch = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, tokens), dtype=np.int64),
            "token_type_ids": np.zeros((rows, tokens), dtype=np.int64),
        }
        if self.segments > 1:
            batch["token_type_ids"][:, tokens // 2 :] = 1
        for row, count in enumerate(kept):
            batch["input_ids"][row, count:] = encoder.pad_id
            batch["attention_mask"][row, count:] = 0
            batch["token_type_ids"][row, count:] = 0
        extra = {name: generator.integers(0, kept, dtype=np.int64)[:, None] for name in self.task.extra_inputs}
        return {**{name: batch[name] for name in encoder.inputs}, **extra}


def _compare(
    module: torch.nn.Module, path: Path, maker: _BatchMaker, output: str
) -> tuple[list[ParityCase], int, list[str]]:
    runner: Any = OnnxRuntimeRunner(path, output, threads=torch.get_num_threads())
    cases, misses, width = [], [], 0
    longest = maker.encoder.max_tokens
    # Attention takes memory by the square of the length: 8,192 tokens, two heads and one row are half a gigabyte.
    last = (2 if longest <= 1024 else 1, longest)
    shapes = [(rows, max(tokens, maker.fewest)) for rows, tokens in PARITY_SHAPES]
    for rows, tokens in [*((rows, tokens) for rows, tokens in shapes if tokens < longest), last]:
        for padded in (False, True) if rows > 1 and tokens > 1 else (False,):
            batch = maker.batch(rows, tokens, padded=padded)
            with torch.inference_mode():
                expected = module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
            found = runner.run(batch)
            width = expected.shape[-1]
            # What a model says of padding is nobody's concern, and models differ there (ModernBERT).
            said = batch["attention_mask"] == 1 if maker.task.per_token else slice(None)
            scale = max(float(np.abs(expected[said]).max()), 1e-6)
            same_shape = found.shape == expected.shape
            error = float(np.abs(found[said] - expected[said]).max()) / scale if same_shape else float("inf")
            cases.append(ParityCase(shape=f"{rows}x{tokens}", padded=padded, max_relative_error=error))
            if not error <= PARITY_TOLERANCE:  # NaN is not below anything
                misses.append(
                    f"At {rows}x{tokens}, {'padded' if padded else 'unpadded'}, the graph differs from PyTorch by "
                    f"{error:.2g} of the largest value (allowed: {PARITY_TOLERANCE:g})."
                )
    return cases, width, misses
