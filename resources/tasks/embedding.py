"""Sentence embeddings: one vector a text, pooled and normalized as the checkpoint's own configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from resources.tasks.base import (
    CheckpointFiles,
    Gates,
    Library,
    Metrics,
    Task,
    at_least,
    at_most,
    is_near,
    load_pretrained,
    stacked,
)
from resources.tasks.grading import number, require, spearman
from resources.tasks.libraries import sentence_transformer, sentence_transformers_name
from resources.tasks.samples import text_items
from resources.tasks.sentence_transformers import module_file, read_json, read_modules, refuse_prompts

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder

T = TypeVar("T")

#: The flags of sentence-transformers' `1_Pooling/config.json`, in the order in which it concatenates their results.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}


#: Of a text's vector with the library's.
LEAST_COSINE = 0.99999
#: Neighbours of a text that are looked at. What retrieval serves from.
NEIGHBOURS = 10


class EmbeddingGates(Gates):
    """Cosine similarity with PyTorch's vector of the same text, the share of its ten nearest texts that stay the same,
    and the largest relative error of the norm.
    """

    cosine_mean: float = at_least(0.995, low=-1.0, mean=True)
    cosine_worst: float = at_least(0.99, low=-1.0, worst=True)
    neighbours: float = at_least(0.95)
    norm_error: float = at_most(0.1)


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: `modes` are concatenated, then normalized to length 1 or not."""

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False


def read_pooling(files: CheckpointFiles) -> Pooling:
    """The sentence-transformers configuration (`modules.json`); mean pooling without one, as that library does.

    Raises CheckpointError for modules and modes that are not served.
    """
    pooling, normalize = Pooling(), False
    for kind, module in read_modules(files, ("Transformer", "Pooling", "Normalize")):
        if kind == "Pooling":
            pooling = _read_modes(files, module_file(files, module, "config.json"))
        normalize = normalize or kind == "Normalize"
    return Pooling(pooling.modes, normalize)


def _read_modes(files: CheckpointFiles, path: str) -> Pooling:
    config = read_json(files, path, dict)
    if config.get("include_prompt") is False:
        raise files.refuse(
            f"{path} leaves the prompt out of the pooling (include_prompt), which is not served",
            "Use a checkpoint that pools over all of the text",
        )
    if "pooling_mode" in config:  # sentence-transformers 5 and later
        named = config["pooling_mode"]
        modes = tuple(map(str, named)) if isinstance(named, list) else (str(named),)
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
    gates: ClassVar[type[Gates]] = EmbeddingGates
    fields: ClassVar[tuple[str, ...]] = ("text", "pair", "score")

    def check(self, files: CheckpointFiles) -> None:
        if files.config.get("is_encoder_decoder") or files.architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise files.refuse(
                f"task 'embedding' needs an encoder, and this checkpoint is a {files.architecture}",
                "Use an encoder checkpoint (BERT, RoBERTa, MPNet, ModernBERT, ...)",
            )
        read_pooling(files)
        refuse_prompts(files)

    def output(self, files: CheckpointFiles) -> str:
        # Not `embedding`: the exporter gives that name to an inner value too, and the graph is then invalid.
        return "sentence_embedding"

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModel

        # Most checkpoints for sentences were saved without BERT's pooler, which only BERT's own heads read.
        return _embedder(load_pretrained(AutoModel, files, unread=("pooler.",), **load), read_pooling(files))

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        model = sentence_transformer(files, tokenizer, encoder.max_tokens, **load)
        return Library(
            sentence_transformers_name("SentenceTransformer"),
            lambda item: model.encode([item["TEXT"]], batch_size=1, show_progress_bar=False)[0],
        )

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        import numpy as np

        if np.shape(expected) != np.shape(found):
            return f"a vector of {np.size(found)} numbers, and not of {np.size(expected)}"
        (cosine,) = self.scores(settings, [expected], [found])
        if not cosine >= LEAST_COSINE:
            return f"cosine {cosine:.6f}"
        norms = float(np.linalg.norm(expected)), float(np.linalg.norm(found))
        return "" if is_near(*norms) else f"a vector of length {norms[1]:.6g}, and not {norms[0]:.6g}"

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return text_items(max_tokens)

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        (text,) = require(line, "text")
        if "pair" not in line:
            if "score" in line:
                raise ValueError("'score' says how alike two texts are, and there is no 'pair'")
            return [({"TEXT": text}, None)]
        (pair,) = require(line, "pair")
        # The right answer of the second is how alike it is to the one before it.
        return [({"TEXT": text}, None), ({"TEXT": pair}, number(line, "score") if "score" in line else None)]

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        pairs = [place for place, score in enumerate(right) if score is not None]
        if not pairs:
            return {}
        vectors = stacked(answers)
        before = [place - 1 for place in pairs]
        likeness = self.scores(settings, list(vectors[before]), list(vectors[pairs]))
        return {"spearman": spearman([right[place] for place in pairs], likeness.tolist())}

    def scores(self, settings: dict[str, Any], reference: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        first, second = stacked(reference), stacked(answers)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosine = (first * second).sum(axis=1) / np.where(norms > 0, norms, 1.0)
        both_zero = (np.abs(first).max(axis=1) == 0) & (np.abs(second).max(axis=1) == 0)
        result: np.ndarray = np.where(both_zero, 1.0, cosine)
        return result

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], reference: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        import numpy as np

        cosine = self.scores(settings, reference, answers)
        first, second = stacked(reference), stacked(answers)
        norms = np.linalg.norm(first, axis=1)
        ratios = np.linalg.norm(second, axis=1) / np.where(norms > 0, norms, 1.0)
        # Each text once: a batch that is filled up with texts again would make them their own neighbours.
        once = list({item["TEXT"]: number for number, item in enumerate(items)}.values())
        return {
            "cosine_mean": float(cosine.mean()),
            "cosine_worst": float(cosine.min()),
            "neighbours": neighbour_agreement(first[once], second[once]),
            "norm_error": float(np.abs(ratios - 1.0)[norms > 0].max(initial=0.0)),
            "max_abs_error": float(np.abs(first - second).max()),
        }


def neighbour_agreement(reference: np.ndarray, answers: np.ndarray, count: int = NEIGHBOURS) -> float:
    """Share of each vector's nearest others, by cosine, that are among its nearest in the reference too.

    Both fp64 `[texts, width]`. Others as near as the last of the reference's nearest, to a millionth, count as nearest:
    texts that are equal but for punctuation have no order. 1 for a single text.
    """
    import numpy as np

    count = min(count, len(reference) - 1)
    if count < 1:
        return 1.0

    def similarities(vectors: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(norms > 0, norms, 1.0)
        found: np.ndarray = unit @ unit.T
        np.fill_diagonal(found, -np.inf)  # nobody is his own neighbour
        return found

    true, found = similarities(reference), similarities(answers)
    nearest = np.argpartition(-found, count - 1, axis=1)[:, :count]
    last = np.partition(true, -count, axis=1)[:, -count]
    return float((np.take_along_axis(true, nearest, axis=1) >= last[:, None] - 1e-6).mean())


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
