"""What a masked language model would write in place of each mask, as transformers' fill-mask pipeline says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Item, Pipeline, Row

MOST_MASKS = 100
#: The model's input that says which position of a row is asked for: only there is the large head computed.
POSITION = "mask_position"


#: What transformers' `clean_up_tokenization` replaces.
_CLEANING = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


class FillMaskPipeline(Pipeline):
    """A text with the tokenizer's mask token in it to candidates: `score`, `token`, `token_str`, `sequence`.

    One list of candidates for one mask, a list of such lists for several. A text that is too long is cut around each
    mask. settings: `mask_id`, `mask_token`, `pad_id`, `top_k`; `clean_up`: no space is left before punctuation.
    outputs: probabilities `[vocabulary]`, one row a mask.
    """

    def complaint(self, item: Item) -> str:
        masks = len(self._masks(item["TEXT"])[1])
        if not masks:
            return f"TEXT holds no mask; write {self.settings['mask_token']} where a word is wanted"
        return f"TEXT holds {masks} masks; give at most {MOST_MASKS}" if masks > MOST_MASKS else ""

    def rows(self, items: Sequence[Item]) -> list[list[Row]]:
        return [self._rows(item["TEXT"]) for item in items]

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> list[Any]:
        found = [self._candidates(row, output, len(rows) == 1) for row, output in zip(rows, outputs, strict=True)]
        return found[0] if len(found) == 1 else found

    def _masks(self, text: str) -> tuple[Any, list[int]]:
        encoding = self.encoder.whole(text)
        return encoding, [place for place, token in enumerate(encoding.ids) if token == self.settings["mask_id"]]

    def _rows(self, text: str) -> list[Row]:
        encoding, masks = self._masks(text)
        if len(encoding.ids) <= self.encoder.max_tokens:
            return [Row(encoding, {POSITION: place}) for place in masks]
        return [self._around(text, encoding, place) for place in masks]

    def _around(self, text: str, encoding: Any, place: int) -> Row:
        """As much of the text on both sides of a mask as the model takes."""
        room = self.encoder.max_tokens - self.encoder.special_tokens()
        start = max(0, min(place - room // 2, len(encoding.ids) - room))
        offsets = [offset for offset in encoding.offsets[start : start + room] if offset != (0, 0)]
        begin, end, mask = offsets[0][0], offsets[-1][1], encoding.offsets[place][0]
        # Cut there, the text may fall into more tokens than it did: halve what is before the mask until it is inside.
        while True:
            piece = self.encoder.tokens([text[begin:end]])[0]
            for number, offset in enumerate(piece.offsets):
                if piece.ids[number] == self.settings["mask_id"] and offset[0] <= mask - begin < offset[1]:
                    return Row(piece, {POSITION: number})
            if begin == mask:
                raise ValueError(
                    f"the tokenizer does not find {self.settings['mask_token']} in {text[begin:end][:40]!r}"
                )
            begin = (begin + mask + 1) // 2

    def _text(self, ids: list[int], *, skip: bool = False) -> str:
        text = self.encoder.decode(ids, skip_special_tokens=skip)
        for before, after in _CLEANING if self.settings["clean_up"] else ():
            text = text.replace(before, after)
        return text

    def _candidates(self, row: Row, probabilities: np.ndarray, only: bool) -> list[dict[str, Any]]:
        count = min(self.settings["top_k"], len(probabilities))
        best = np.argpartition(-probabilities, count - 1)[:count]
        candidates = []
        for token in best[np.argsort(-probabilities[best], kind="stable")].tolist():
            ids = list(row.encoding.ids)
            ids[row.extra[POSITION]] = token
            candidates.append(
                {
                    "score": float(probabilities[token]),
                    "token": token,
                    "token_str": self._text([token]),
                    "sequence": self._text([one for one in ids if one != self.settings["pad_id"]], skip=only),
                }
            )
        return candidates
