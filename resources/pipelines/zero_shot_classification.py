"""Zero-shot classification: a model of natural language inference judges the labels of a request.

The model decides for each label whether the text entails a hypothesis such as "this is ...".
Method: Yin, Hay and Roth, "Benchmarking Zero-shot Text Classification" (2019). The arithmetic is that of transformers'
pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row, softmax
from .limits import RefusedError
from .unicode import is_unicode

#: A label counts with its length, but with at most this many characters for each token of a row. All labels together
#: may count as this multiple of the longest text that is read whole.
_READ_PER_TOKEN = 8
_LONGEST_READS = 16


class ZeroShotClassificationPipeline(Pipeline):
    """The pipeline that turns a text and labels (a JSON list) into `labels` and `scores`, best first.

    The engine's outputs are logits `[classes]`. The settings are `hypothesis_template`, `multi_label`, `entailment_id`
    and `contradiction_id`.
    """

    inputs: ClassVar[tuple[str, ...]] = ("TEXT", "LABELS")
    strategy: ClassVar[str] = "only_first"
    offsets: ClassVar[bool] = False

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        labels, template = self._labels(item["LABELS"]), self.settings["hypothesis_template"]
        text = item["TEXT"]
        if len(text) > self.encoder.max_tokens:
            # The rest of the text never reaches the model. Cutting it here costs once, and not once for each label.
            text = self.encoder.cut(text, self.encoder.max_tokens)
        return [(text, self._hypothesis(template.format(label))) for label in labels]

    def _labels(self, document: str) -> list[str]:
        try:
            labels = json.loads(document)
        except (ValueError, RecursionError):
            labels = None
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise RefusedError('LABELS is not a JSON list of texts, such as ["urgent", "not urgent"]')
        if not labels:
            raise RefusedError("LABELS holds no label; give at least one")
        if len(labels) > self.limits.labels:
            raise RefusedError(f"LABELS holds {len(labels)} labels; give at most {self.limits.labels}")
        if not all(map(is_unicode, labels)):
            raise RefusedError("LABELS holds half of a surrogate pair, which is no text")
        read = sum(min(len(label), _READ_PER_TOKEN * self.encoder.max_tokens) for label in labels)
        if read > _LONGEST_READS * self.encoder.longest_read():
            raise RefusedError(f"LABELS holds {len(labels)} labels that are too long together; give fewer or shorter")
        return labels

    def _hypothesis(self, text: str) -> str:
        """Return the hypothesis.

        If it would leave no room for a single token of the text, it is cut to half of a row.
        """
        room = self.encoder.max_tokens - self.encoder.special_tokens(pair=True)
        # A token is at least one character, or one byte of a character. Normalization cannot lengthen ASCII characters.
        if text.isascii() and len(text) < room - 1:
            return text
        return text if self.encoder.count(text, room) < room else self.encoder.cut(text, max(1, room // 2))

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        labels, logits = json.loads(item["LABELS"]), np.stack(outputs)
        entailment = self.settings["entailment_id"]
        if self.settings["multi_label"] or len(labels) == 1:
            scores = softmax(logits[:, [self.settings["contradiction_id"], entailment]])[:, 1]
        else:
            scores = softmax(logits[:, entailment])
        order = np.argsort(scores, kind="stable")[::-1]
        return {"labels": [labels[place] for place in order], "scores": [float(scores[place]) for place in order]}
