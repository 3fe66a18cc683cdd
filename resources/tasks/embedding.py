"""Sentence embeddings: one vector a text, pooled and normalized as the checkpoint's own configuration says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from resources.tasks.base import CheckpointFiles, Gates, Task, load_pretrained

if TYPE_CHECKING:
    import numpy as np
    import torch

#: The flags of sentence-transformers' `1_Pooling/config.json`, in the order in which it concatenates their results.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}


class EmbeddingGates(Gates):
    """Cosine similarity with PyTorch's vector of the same text, and the largest relative error of the norm."""

    cosine_mean: float = Field(default=0.995, ge=-1, le=1)
    cosine_worst: float = Field(default=0.99, ge=-1, le=1)
    norm_error: float = Field(default=0.1, ge=0)


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: `modes` are concatenated, then normalized to length 1 or not."""

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False


def read_pooling(files: CheckpointFiles) -> Pooling:
    """The sentence-transformers configuration (`modules.json`); mean pooling without one, as that library does.

    Raises CheckpointError for modules and modes that are not served.
    """
    modules = files.folder / "modules.json"
    if not modules.is_file():
        return Pooling()
    pooling, normalize = Pooling(), False
    for module in json.loads(modules.read_text(encoding="utf-8")):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _read_modes(files, Path(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise files.refuse(
                f"modules.json names a {kind} module, and only Transformer, Pooling and Normalize are served",
                "Use a checkpoint without it",
            )
    return Pooling(pooling.modes, normalize)


def _read_modes(files: CheckpointFiles, path: Path) -> Pooling:
    try:
        config = json.loads((files.folder / path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise files.refuse(f"{path} cannot be read ({error})", "Copy the checkpoint again, whole") from None
    if "pooling_mode" in config:  # sentence-transformers 5 and later
        named = config["pooling_mode"]
        modes = tuple([named] if isinstance(named, str) else named)
    else:
        modes = tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag))
        modes += tuple(
            flag for flag in config if flag.startswith("pooling_mode_") and config[flag] and flag not in _POOLING_FLAGS
        )
    unknown = [mode for mode in modes if mode not in _POOLING_FLAGS.values()]
    if unknown or not modes:
        raise files.refuse(
            f"{path} asks for pooling {', '.join(unknown) or 'of no kind'}, and only mean, cls and max are served",
            "Use a checkpoint with one of those",
        )
    return Pooling(modes)


class EmbeddingTask(Task):
    """Text in, `sentence_embedding` FP32 `[batch, width]` out."""

    name: ClassVar[str] = "embedding"
    # Not `embedding`: the exporter gives that name to an inner value too, and the graph is then invalid.
    output: ClassVar[str] = "sentence_embedding"
    gates: ClassVar[type[Gates]] = EmbeddingGates

    def check(self, files: CheckpointFiles) -> None:
        if files.config.get("is_encoder_decoder") or files.architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise files.refuse(
                f"task 'embedding' needs an encoder, and this checkpoint is a {files.architecture}",
                "Use an encoder checkpoint (BERT, RoBERTa, MPNet, ModernBERT, ...)",
            )
        read_pooling(files)

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        del files
        return ()

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModel

        return _embedder(load_pretrained(AutoModel, files, **load), read_pooling(files))

    def scores(self, reference: np.ndarray, answers: np.ndarray) -> np.ndarray:
        import numpy as np

        first, second = reference.astype(np.float64), answers.astype(np.float64)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosine = (first * second).sum(axis=1) / np.where(norms > 0, norms, 1.0)
        both_zero = (np.abs(first).max(axis=1) == 0) & (np.abs(second).max(axis=1) == 0)
        result: np.ndarray = np.where(both_zero, 1.0, cosine)
        return result

    def compare(self, reference: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        import numpy as np

        cosine = self.scores(reference, answers)
        norms = np.linalg.norm(reference.astype(np.float64), axis=1)
        ratios = np.linalg.norm(answers.astype(np.float64), axis=1) / np.where(norms > 0, norms, 1.0)
        return {
            "cosine_mean": float(cosine.mean()),
            "cosine_worst": float(cosine.min()),
            "norm_error": float(np.abs(ratios - 1.0)[norms > 0].max(initial=0.0)),
            "max_abs_error": float(np.abs(reference - answers).max()),
        }

    def misses(self, metrics: dict[str, float], gates: Gates) -> list[str]:
        assert isinstance(gates, EmbeddingGates)
        found = [
            f"{name} {metrics[name]:.5f} is below {limit:g}"
            for name, limit in (("cosine_mean", gates.cosine_mean), ("cosine_worst", gates.cosine_worst))
            if metrics[name] < limit
        ]
        if metrics["norm_error"] > gates.norm_error:
            found.append(f"norm_error {metrics['norm_error']:.5f} is above {gates.norm_error:g}")
        return found


def _embedder(encoder: torch.nn.Module, pooling: Pooling) -> torch.nn.Module:
    import torch

    class Embedder(torch.nn.Module):
        """The arithmetic of sentence-transformers' Pooling and Normalize modules."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **extra).last_hidden_state
            hidden = hidden.float()
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            parts = []
            for mode in pooling.modes:
                if mode == "cls":
                    parts.append(hidden[:, 0])
                elif mode == "max":
                    parts.append(hidden.masked_fill(mask == 0, -1e9).max(dim=1).values)
                else:
                    parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9))
            pooled = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            return torch.nn.functional.normalize(pooled, p=2.0, dim=1) if pooling.normalize else pooled

    return Embedder().eval()
