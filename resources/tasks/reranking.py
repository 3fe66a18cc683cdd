"""Reranking: a cross-encoder reads a query and a text at once, and scores how well the text answers the query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
    read_labels,
    stacked,
)
from resources.tasks.classification import HEAD
from resources.tasks.grading import ndcg_at_10, number, require
from resources.tasks.heads import Activation, classifier
from resources.tasks.libraries import cross_encoder, sentence_transformers_name
from resources.tasks.samples import ranking_items
from resources.tasks.sentence_transformers import CONFIG, optional_json, read_modules, refuse_changed_texts

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder

#: Two texts have no order if their scores differ by less than this share of the range of all scores.
_TIE = 1e-4
_ACTIVATIONS: dict[str, Activation] = {"Identity": "identity", "Sigmoid": "sigmoid"}


class RerankingGates(Gates):
    """The gates of reranking.

    Args:
        order_agreement: The share of pairs of texts of one query that keep PyTorch's order.
        score_error: The largest error of a score, as a share of the range of all scores.
    """

    order_agreement: float = at_least(0.98)
    score_error: float = at_most(0.05)


def activation(files: CheckpointFiles) -> Activation:
    """Return the activation that sentence-transformers' CrossEncoder chooses for the checkpoint.

    It is in that library's own file since version 6, in a section of config.json in version 4, and in a field of
    config.json before. Without any of these it is the sigmoid.

    Raises:
        CheckpointError: The activation is not served.
    """
    section = files.config.get("sentence_transformers")
    named = {
        CONFIG: optional_json(files, CONFIG).get("activation_fn"),
        "config.json": (section.get("activation_fn") if isinstance(section, dict) else None)
        or files.config.get("sbert_ce_default_activation_function"),
    }
    file, path = next(((file, path) for file, path in named.items() if path), ("", "torch.nn.Sigmoid"))
    kind = str(path).rpartition(".")[2]
    if kind not in _ACTIVATIONS:
        raise files.refuse(
            f"{file} asks for the activation {path}, and only Identity and Sigmoid are served",
            "Use a cross-encoder with one of those",
        )
    return _ACTIVATIONS[kind]


class RerankingTask(Task):
    """The task with inputs QUERY and TEXT and output `score`, FP32 `[batch, 1]`. A higher score is better."""

    name: ClassVar[str] = "reranking"
    gates: ClassVar[type[Gates]] = RerankingGates
    fields: ClassVar[tuple[str, ...]] = ("query", "text", "relevance")

    def example(self, settings: dict[str, Any]) -> str:
        return '--query "a query" "any text"'

    def check(self, files: CheckpointFiles) -> None:
        files.require_head(self.name, HEAD, "a cross-encoder's head")
        labels = len(read_labels(files))
        if labels != 1:
            raise files.refuse(
                f"task 'reranking' needs a cross-encoder with one output, and this checkpoint has {labels}",
                "Use task 'classification' or 'zero-shot-classification'",
            )
        activation(files)
        read_modules(files, ("Transformer",))
        refuse_changed_texts(files)

    def output(self, files: CheckpointFiles) -> str:
        return "score"

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForSequenceClassification

        return classifier(load_pretrained(AutoModelForSequenceClassification, files, **load), activation(files))

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        model = cross_encoder(files, tokenizer, encoder.max_tokens, **load)

        def answer(item: Item) -> Any:
            return model.predict([(item["QUERY"], item["TEXT"])], batch_size=1, show_progress_bar=False)

        return Library(sentence_transformers_name("CrossEncoder"), answer)

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        (wanted,), (given,) = expected, found
        return "" if is_near(float(wanted), float(given)) else f"score {given:.6g}, and not {wanted:.6g}"

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return ranking_items(max_tokens)

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        query, text = require(line, "query", "text")
        relevance = number(line, "relevance") if "relevance" in line else None
        if relevance is not None and relevance < 0:
            raise ValueError(f"'relevance' is {relevance:g}; the least is 0, for a text that does not answer the query")
        return [({"QUERY": query, "TEXT": text}, relevance)]

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        known = [place for place, relevance in enumerate(right) if relevance is not None]
        if not known:
            return {}
        queries = [items[place]["QUERY"] for place in known]
        scores = stacked(answers)[known, 0].tolist()
        return {"ndcg_at_10": ndcg_at_10(queries, [right[place] for place in known], scores)}

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        expected, found = stacked(baseline), stacked(answers)
        result: np.ndarray = 1.0 - np.abs(expected - found)[:, 0] / _range(expected)
        return result

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        import numpy as np

        expected, found = stacked(baseline)[:, 0], stacked(answers)[:, 0]
        error = float(np.abs(expected - found).max())
        return {
            "order_agreement": order_agreement([item["QUERY"] for item in items], expected, found),
            "score_error": error / _range(expected),
            "max_abs_error": error,
        }


def order_agreement(queries: Sequence[str], expected: np.ndarray, found: np.ndarray) -> float:
    """Return the share of pairs of one query's texts that `found` orders as `expected` does.

    Both arrays are `[items]`. Only pairs that `expected` orders count. Without such pairs the share is 1, or 0 if
    `found` holds NaN or infinity.
    """
    import numpy as np

    tie = _TIE * _range(expected)
    same = ordered = 0
    for query in dict.fromkeys(queries):
        of_query = [number for number, other in enumerate(queries) if other == query]
        true = expected[of_query, None] - expected[None, of_query]
        asked = true > tie
        ordered += int(asked.sum())
        same += int((asked & (found[of_query, None] > found[None, of_query])).sum())
    return same / ordered if ordered else float(np.isfinite(found).all())


def _range(scores: np.ndarray) -> float:
    return float(scores.max() - scores.min()) or 1.0
