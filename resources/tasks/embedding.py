"""Sentence embeddings: one vector for each text, pooled and normalized as the checkpoint's configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resources.errors import CatalogError
from resources.tasks.base import (
    CheckpointFiles,
    Gates,
    Library,
    Metrics,
    Options,
    SpecialTokens,
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
from resources.tasks.sentence_transformers import (
    CONFIG,
    module_file,
    optional_json,
    read_json,
    read_modules,
    refuse_changed_texts,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

#: The flags in `1_Pooling/config.json` of sentence-transformers before version 6. The library concatenates the results
#: in this order.
_POOLING_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


#: The other fields of that file, in any version.
_POOLING_FIELDS = ("embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt")

#: The cosine similarity that a served vector must reach with the library's vector of the same text.
LEAST_COSINE = 0.99999
_MOST_DIMENSIONS = 2**20
#: The number of a text's nearest neighbours that are compared. Retrieval serves its results from these.
NEIGHBOURS = 10


class EmbeddingGates(Gates):
    """The gates of embedding.

    Args:
        cosine_mean: The mean cosine similarity with PyTorch's vector of the same text.
        cosine_worst: The lowest of these cosine similarities.
        neighbours: The share of a text's ten nearest texts that stay the same.
        norm_error: The largest relative error of the norm.
    """

    cosine_mean: float = at_least(0.995, low=-1.0, mean=True)
    cosine_worst: float = at_least(0.99, low=-1.0, worst=True)
    neighbours: float = at_least(0.95)
    norm_error: float = at_most(0.1)


@dataclass(frozen=True)
class Pooling:
    """The way in which a text's token vectors become one vector.

    Args:
        modes: The pooling modes. Their results are concatenated.
        normalize: Whether the concatenated vector is then normalized to length 1.
        dimensions: The number of first dimensions that are kept after that, or None for all.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    dimensions: int | None = None


class EmbeddingOptions(Options):
    """The options of embedding.

    `pooling` and `normalize` are for checkpoints that sentence-transformers did not save, because these do not record
    them. The defaults are those of sentence-transformers.

    Args:
        pooling: The pooling mode. The default is the mean.
        normalize: Whether the vector is normalized. The default is no.
        max_tokens: The length to which longer texts are cut, for any checkpoint. The default is the
            checkpoint's own limit, see resources.checkpoints.validation.
    """

    pooling: PoolingMode | None = None
    normalize: bool | None = None
    max_tokens: int | None = Field(default=None, ge=4)


def read_pooling(files: CheckpointFiles, options: EmbeddingOptions | None = None) -> Pooling:
    """Return the pooling that sentence-transformers' files describe.

    A checkpoint without these files gets the pooling of the options, or mean pooling as in that library.

    Raises:
        CheckpointError: The files ask for modules or modes that are not served, or the options repeat their choices.
    """
    options = options or EmbeddingOptions()
    modules = read_modules(files, ("Transformer", "Pooling", "Normalize"))
    if not modules:
        return Pooling((options.pooling or "mean",), bool(options.normalize))
    for name in ("pooling", "normalize"):
        if getattr(options, name) is not None:
            raise files.refuse(
                f"the models file has options.{name}, and modules.json says it as well", f"Remove options.{name}"
            )
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - {"Normalize"}:
        raise files.refuse(
            f"modules.json runs {', '.join(kinds)}, and only a Transformer, a Pooling and a Normalize are served, in "
            "this order",
            "Use a checkpoint with these",
        )
    modes = _read_modes(files, module_file(files, modules[1][1], "config.json"))
    return Pooling(modes, normalize=len(kinds) > 2, dimensions=_dimensions(files))


def _dimensions(files: CheckpointFiles) -> int | None:
    said = optional_json(files, CONFIG).get("truncate_dim")
    if said is None:
        return None
    if type(said) is not int or not 1 <= said <= _MOST_DIMENSIONS:
        raise files.refuse(f"{CONFIG}, truncate_dim: {said!r:.60} is not a number of dimensions", "Correct it")
    return said


def _read_modes(files: CheckpointFiles, path: str) -> tuple[str, ...]:
    config = read_json(files, path, dict)
    prompts = optional_json(files, CONFIG).get("prompts")
    if config.get("include_prompt") is False and isinstance(prompts, dict) and any(prompts.values()):
        raise files.refuse(
            f"{path} says include_prompt: false, so the prompts of {CONFIG} are read by the model and left out of the "
            "pooling, which is not served",
            f"Remove the prompts from {CONFIG} if no text is to have one",
        )
    unknown = [name for name, value in config.items() if value and name not in _POOLING_FIELDS]
    if unknown := [name for name in unknown if not name.startswith("pooling_mode_")]:
        raise files.refuse(
            f"{path}: sentence-transformers' Pooling has no field {', '.join(unknown)[:100]}",
            "Remove it, or give the checkpoint as its author saved it",
        )
    if "pooling_mode" in config:  # sentence-transformers 6 and later
        named = config["pooling_mode"]
        modes = tuple(map(str, named)) if isinstance(named, list) else (str(named),)
    else:
        modes = tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag))
        modes += tuple(
            flag for flag in config if flag.startswith("pooling_mode_") and config[flag] and flag not in _POOLING_FLAGS
        )
    unknown = [mode for mode in modes if mode not in _POOLING_FLAGS.values()]
    if unknown:
        raise files.refuse(
            f"{path} asks for pooling {', '.join(unknown)}, and only {', '.join(_POOLING_FLAGS.values())} are served",
            "Use a checkpoint with one of those",
        )
    return modes or ("mean",)


class EmbeddingTask(Task):
    """The task with input TEXT and output `sentence_embedding`, FP32 `[batch, width]`."""

    name: ClassVar[str] = "embedding"
    gates: ClassVar[type[Gates]] = EmbeddingGates
    fields: ClassVar[tuple[str, ...]] = ("text", "pair", "score")
    options: ClassVar[type[Options]] = EmbeddingOptions
    computing: ClassVar[tuple[str, ...]] = ("pooling", "normalize")

    def check(self, files: CheckpointFiles) -> None:
        if files.config.get("is_encoder_decoder") or files.architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise files.refuse(
                f"task 'embedding' needs an encoder, and this checkpoint is a {files.architecture}",
                "Use an encoder checkpoint (BERT, RoBERTa, MPNet, ModernBERT, ...)",
            )
        read_pooling(files)
        refuse_changed_texts(files)
        kind = optional_json(files, CONFIG).get("model_type", "SentenceTransformer")
        if kind != "SentenceTransformer":
            raise files.refuse(
                f"{CONFIG} says that it is a {kind!s:.60}, which is not served", "Use a SentenceTransformer"
            )

    def output(self, files: CheckpointFiles) -> str:
        # The name `embedding` would make the graph invalid, because the exporter gives it to an inner value too.
        return "sentence_embedding"

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModel

        # Most checkpoints for sentences were saved without BERT's pooler. Only BERT's own heads read the pooler.
        pooling = pooling_of(files.settings) if files.settings else read_pooling(files)
        return _embedder(load_pretrained(AutoModel, files, unread=("pooler.",), **load), pooling)

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        assert isinstance(options, EmbeddingOptions)
        pooling = read_pooling(files, options)
        # The modes are a list, because a JSON record returns a list.
        return {**asdict(pooling), "modes": [*pooling.modes], "max_tokens": options.max_tokens}

    def max_tokens(self, limit: int, options: Options) -> int:
        assert isinstance(options, EmbeddingOptions)
        if options.max_tokens is not None and options.max_tokens > limit:
            raise CatalogError(
                f"options.max_tokens is {options.max_tokens}, and the checkpoint takes {limit} tokens. Give a smaller "
                "number, or none."
            )
        return options.max_tokens or limit

    def assumed(self, files: CheckpointFiles, options: Options) -> tuple[str, ...]:
        assert isinstance(options, EmbeddingOptions)
        if read_modules(files, ("Transformer", "Pooling", "Normalize")):
            return ()
        pooling = read_pooling(files, options)
        chosen = {
            "pooling": (options.pooling is None, pooling.modes[0]),
            "normalize": (options.normalize is None, str(pooling.normalize).lower()),
        }
        return tuple(f"{name}: {value}" for name, (assumed, value) in chosen.items() if assumed)

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        pooling = pooling_of(settings)
        model = sentence_transformer(
            files,
            tokenizer,
            encoder.max_tokens,
            chosen_tokens=settings["max_tokens"],
            pooling=pooling.modes[0],
            normalize=pooling.normalize,
            **load,
        )
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
        # The right answer of the second item is its similarity to the item before it.
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

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        first, second = stacked(baseline), stacked(answers)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosine = (first * second).sum(axis=1) / np.where(norms > 0, norms, 1.0)
        both_zero = (np.abs(first).max(axis=1) == 0) & (np.abs(second).max(axis=1) == 0)
        result: np.ndarray = np.where(both_zero, 1.0, cosine)
        return result

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        import numpy as np

        cosine = self.scores(settings, baseline, answers)
        first, second = stacked(baseline), stacked(answers)
        norms = np.linalg.norm(first, axis=1)
        ratios = np.linalg.norm(second, axis=1) / np.where(norms > 0, norms, 1.0)
        # Each text counts once. A text that fills up a batch a second time would be its own neighbour.
        once = list({item["TEXT"]: number for number, item in enumerate(items)}.values())
        return {
            "cosine_mean": float(cosine.mean()),
            "cosine_worst": float(cosine.min()),
            "neighbours": neighbour_agreement(first[once], second[once]),
            "norm_error": float(np.abs(ratios - 1.0)[norms > 0].max(initial=0.0)),
            "max_abs_error": float(np.abs(first - second).max()),
        }


def pooling_of(settings: dict[str, Any]) -> Pooling:
    """Return the pooling in a pipeline's settings."""
    return Pooling(tuple(settings["modes"]), settings["normalize"], settings["dimensions"])


def neighbour_agreement(baseline: np.ndarray, answers: np.ndarray, count: int = NEIGHBOURS) -> float:
    """Return the share of each vector's nearest neighbours, by cosine, that are among its nearest in the baseline too.

    Both arrays are fp64 `[texts, width]`. A vector that is as near as the last of the baseline's nearest, to within a
    millionth, also counts as nearest, because texts that differ only in punctuation have no order. The share is 1 for a
    single text.
    """
    import numpy as np

    count = min(count, len(baseline) - 1)
    if count < 1:
        return 1.0

    def similarities(vectors: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(norms > 0, norms, 1.0)
        found: np.ndarray = unit @ unit.T
        np.fill_diagonal(found, -np.inf)  # a text is not its own neighbour
        return found

    true, found = similarities(baseline), similarities(answers)
    nearest = np.argpartition(-found, count - 1, axis=1)[:, :count]
    last = np.partition(true, -count, axis=1)[:, -count]
    return float((np.take_along_axis(true, nearest, axis=1) >= last[:, None] - 1e-6).mean())


def _embedder(encoder: torch.nn.Module, pooling: Pooling) -> torch.nn.Module:
    import torch

    class Embedder(torch.nn.Module):
        """The encoder, with the arithmetic of sentence-transformers' Pooling and Normalize modules."""

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
            parts = [_pooled(mode, hidden, attention_mask) for mode in pooling.modes]
            vector = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if pooling.normalize:
                vector = torch.nn.functional.normalize(vector, p=2.0, dim=1)
            return vector if pooling.dimensions is None else vector[:, : pooling.dimensions]

    return Embedder().eval()


def _pooled(mode: str, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Pool token vectors that are padded on the right into one vector for each row, `[batch, width]`."""
    import torch

    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return hidden.masked_fill(mask == 0, -1e9).max(dim=1).values
    if mode == "lasttoken":
        last = attention_mask.sum(dim=1, keepdim=True).sub(1).clamp(min=0)
        return torch.gather(hidden, 1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).squeeze(1)
    if mode == "weightedmean":
        mask = mask * torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype).unsqueeze(-1)
    count = mask.sum(dim=1).clamp(min=1e-9)
    return (hidden * mask).sum(dim=1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)
