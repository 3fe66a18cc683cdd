"""Labels given with the request, judged by a model of natural language inference: does the text entail "this is ..."?

Method: Yin, Hay and Roth, "Benchmarking Zero-shot Text Classification" (2019); arithmetic as transformers' pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .base import Item, Pipeline, Row, softmax
from .limits import RefusedError
from .unicode import is_unicode

#: How much of a label is tokenized at least, in characters for each token of a row, and how much of all labels together
#: may be, as a multiple of the longest text that is read whole.
_READ_PER_TOKEN = 8
_LONGEST_READS = 16


class ZeroShotClassificationPipeline(Pipeline):
    """A text and labels (a JSON list) to `labels` and `scores`, best first.

    settings: `hypothesis_template`, `multi_label`, `entailment_id`, `contradiction_id`. outputs: logits `[classes]`.
    """

    inputs: ClassVar[tuple[str, ...]] = ("TEXT", "LABELS")
    strategy: ClassVar[str] = "only_first"
    offsets: ClassVar[bool] = False

    def segments(self, item: Item) -> list[tuple[str, ...]]:
        labels, template = self._labels(item["LABELS"]), self.settings["hypothesis_template"]
        text = item["TEXT"]
        if len(text) > self.encoder.max_tokens:
            # Once, and not once a label: what is beyond is never seen.
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
        """The hypothesis, cut to half of a row where it would leave no room for a single token of the text."""
        room = self.encoder.max_tokens - self.encoder.special_tokens(pair=True)
        # A token is at least one character, or one byte of it. Normalization may lengthen any but those of ASCII.
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
