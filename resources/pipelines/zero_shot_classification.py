"""Labels given with the request, judged by a model of natural language inference: does the text entail "this is ..."?

Method: Yin, Hay and Roth, "Benchmarking Zero-shot Text Classification" (2019); arithmetic as transformers' pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row, softmax
from .unicode import is_unicode

MOST_LABELS = 1000


class ZeroShotClassificationPipeline(Pipeline):
    """A text and labels (a JSON list) to `labels` and `scores`, best first.

    settings: `hypothesis_template`, `multi_label`, `entailment_id`, `contradiction_id`. outputs: logits `[classes]`.
    """

    inputs: ClassVar[tuple[str, ...]] = ("TEXT", "LABELS")
    strategy: ClassVar[str] = "only_first"
    offsets: ClassVar[bool] = False

    def complaint(self, item: Item) -> str:
        try:
            labels = json.loads(item["LABELS"])
        except (ValueError, RecursionError):
            labels = None
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            return 'LABELS is not a JSON list of texts, such as ["urgent", "not urgent"]'
        if not all(map(is_unicode, labels)):
            return "LABELS holds half of a surrogate pair, which is no text"
        if not labels:
            return "LABELS holds no label; give at least one"
        if len(labels) > MOST_LABELS:
            return f"LABELS holds {len(labels)} labels; give at most {MOST_LABELS}"
        return ""

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        text, template = item["TEXT"], self.settings["hypothesis_template"]
        if len(text) > self.encoder.max_tokens:
            # Once, and not once a label: what is beyond is never seen.
            text = self.encoder.cut(text, self.encoder.max_tokens)
        return [(text, self._hypothesis(template.format(label))) for label in json.loads(item["LABELS"])]

    def _hypothesis(self, text: str) -> str:
        """The hypothesis, cut to half of a row where it would leave no room for a single token of the text."""
        room = self.encoder.max_tokens - self.encoder.special_tokens(pair=True)
        return text if self.encoder.count(text) < room else self.encoder.cut(text, max(1, room // 2))

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        labels, logits = json.loads(item["LABELS"]), np.stack(outputs)
        entailment = self.settings["entailment_id"]
        if self.settings["multi_label"] or len(labels) == 1:
            scores = softmax(logits[:, [self.settings["contradiction_id"], entailment]])[:, 1]
        else:
            scores = softmax(logits[:, entailment])
        order = np.argsort(scores, kind="stable")[::-1]
        return {"labels": [labels[place] for place in order], "scores": [float(scores[place]) for place in order]}
