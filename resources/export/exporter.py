"""The export from PyTorch to ONNX with dynamic batch and sequence, checked at shapes other than the exported one.

This module is imported in child processes only.
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

#: 20 is the newest opset whose operators the fusion rules all know. Opset 23 has an Attention operator that they do not
#: know.
OPSET = 20
#: The largest difference from PyTorch that counts as equal, relative to the largest value of the answer. The exported
#: graphs of thirty architectures and tasks agreed to 5e-7, and a wrong mask or position gives 1e-3 or more.
PARITY_TOLERANCE = 1e-4
#: The shapes, as rows and tokens, at which parity is checked. The export itself sees 2 rows of 12 tokens.
PARITY_SHAPES = ((1, 1), (1, 7), (3, 33), (5, 64))
_EXPORT_SHAPE = (2, 12)


def export(
    checkpoint: Checkpoint, source: Path, trust: Trust, folder: Path, external_data_threshold_bytes: int
) -> Exported:
    """Export the checkpoint's task module to `folder/model.onnx`, and compare the graph with PyTorch.

    Args:
        checkpoint: The checkpoint's record.
        source: The folder with the checkpoint's files.
        trust: Whether the checkpoint's own code and its pickles may run.
        folder: The folder for the graph.
        external_data_threshold_bytes: Larger weights are stored beside the graph and not in it.

    Raises:
        ExportError: torch.onnx cannot export the module.
    """
    task = TASKS[checkpoint.task]
    files = checkpoint_files(checkpoint, source, trust)
    maker = _BatchMaker(TextEncoder.from_folder(str(source)), task, int(files.config.get("type_vocab_size") or 1))
    module = task.module(files, **trust.load_arguments)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    external = weights > external_data_threshold_bytes
    path = folder / MODEL_FILE
    _export(module, maker.batch(*_EXPORT_SHAPE, padded=True), checkpoint, path, external)
    gc.collect()  # The exporter's copy of the weights must go before the runtime makes another one.
    complaint = _check(path)
    # Parity is not checked on a graph that the checker refuses.
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
    # All inputs share one symbol for rows and one for tokens. With Dim.DYNAMIC the mask gets a batch size of its own.
    rows = torch.export.Dim("batch", min=1, max=1024)
    tokens = torch.export.Dim("sequence", min=1, max=checkpoint.max_tokens)
    extra = TASKS[checkpoint.task].extra_inputs
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Users cannot act on the deprecations inside torch.export.
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
            assert program is not None  # Only the old exporter returns None.
            program.save(path, external_data=external)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        raise ExportError(f"torch.onnx cannot export the model: {type(error).__name__}: {lines[0][:300]}") from error


def _check(path: Path) -> str:
    """Return the ONNX checker's complaint, or an empty text.

    The checker gets a path, because it cannot check a proto above 2 GB in memory.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        return f"The ONNX checker refuses the graph: {first_line(error)}"
    return ""


@dataclass(frozen=True)
class _BatchMaker:
    """A maker of random batches, with ids from the whole vocabulary and every kind of token that a model tells apart.

    Args:
        encoder: The checkpoint's tokenizer.
        task: The checkpoint's task.
        segments: The number of token types that the model has.
    """

    encoder: TextEncoder
    task: Task
    segments: int

    @property
    def fewest(self) -> int:
        """The number of tokens of the shortest possible row: its special tokens, or one if there are none."""
        return max(1, len(self.encoder.before) + len(self.encoder.after))

    def batch(self, rows: int, tokens: int, *, padded: bool) -> dict[str, np.ndarray]:
        """Return int64 arrays by input name, with rows that the tokenizer could have made.

        If `padded` is true, each row is shorter than the one before, down to a row of special tokens alone.
        """
        encoder, generator = self.encoder, np.random.default_rng(rows * 1000 + tokens)
        # Special ids are kept out of the text. Models that count positions from the pad id (RoBERTa) read one inside a
        # text as padding, and some models find the end of a text by its token (BART).
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
    # Attention's memory grows with the square of the length: 8,192 tokens, two heads and one row take half a gigabyte.
    last = (2 if longest <= 1024 else 1, longest)
    shapes = [(rows, max(tokens, maker.fewest)) for rows, tokens in PARITY_SHAPES]
    for rows, tokens in [*((rows, tokens) for rows, tokens in shapes if tokens < longest), last]:
        for padded in (False, True) if rows > 1 and tokens > 1 else (False,):
            batch = maker.batch(rows, tokens, padded=padded)
            with torch.inference_mode():
                expected = module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
            found = runner.run(batch)
            width = expected.shape[-1]
            # Values at padded positions are not compared. No answer uses them, and models differ there (ModernBERT).
            said = batch["attention_mask"] == 1 if maker.task.per_token else slice(None)
            scale = max(float(np.abs(expected[said]).max()), 1e-6)
            same_shape = found.shape == expected.shape
            error = float(np.abs(found[said] - expected[said]).max()) / scale if same_shape else float("inf")
            cases.append(ParityCase(shape=f"{rows}x{tokens}", padded=padded, max_relative_error=error))
            if not error <= PARITY_TOLERANCE:  # This form also catches NaN, which compares as false.
                misses.append(
                    f"At {rows}x{tokens}, {'padded' if padded else 'unpadded'}, the graph differs from PyTorch by "
                    f"{error:.2g} of the largest value (allowed: {PARITY_TOLERANCE:g})."
                )
    return cases, width, misses
