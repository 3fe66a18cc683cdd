"""The candidates of a masked language model for each mask, in the form of transformers' fill-mask pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Item, Pipeline, Row
from .limits import RefusedError

#: The model's input that holds the position of the mask in a row. The large head is computed at that position only.
POSITION = "mask_position"
#: The most text that is tokenized for all masks of a long text, as a multiple of the longest text that is read whole.
_LONGEST_READS = 16

#: The replacements of transformers' `clean_up_tokenization`.
_CLEANING = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


class FillMaskPipeline(Pipeline):
    """The pipeline that turns a text with mask tokens into candidates: `score`, `token`, `token_str`, `sequence`.

    The answer is one list of candidates for one mask, and a list of such lists for several masks. A text that is too
    long is cut around each mask. Each mask has its own row, and the engine's output for it is probabilities
    `[vocabulary]`. The settings are `mask_id`, `mask_token`, `pad_id`, `top_k` and `clean_up`, which removes spaces
    before punctuation.
    """

    def prepare(self, item: Item) -> list[Row]:
        text = item["TEXT"]
        return self._rows(text) if len(text) <= self.encoder.longest_read() else self._rows_of_long(text)

    def tokenize(self, prepared: Sequence[Any]) -> list[list[Row]]:
        return list(prepared)

    def answer(self, item: Item, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> list[Any]:
        found = [self._candidates(row, output, len(rows) == 1) for row, output in zip(rows, outputs, strict=True)]
        return found[0] if len(found) == 1 else found

    def _rows(self, text: str) -> list[Row]:
        encoding = self.encoder.whole(text)
        masks = self._masks(encoding)
        self._require(len(masks))
        if len(encoding.ids) <= self.encoder.max_tokens:
            return [Row(encoding, {POSITION: place}) for place in masks]
        return [self._around(text, encoding, place) for place in masks]

    def _rows_of_long(self, text: str) -> list[Row]:
        """Return a row for each mask of a long text, made from the text near the mask.

        A token depends only on nearby text, and a row has no room for more.
        """
        mask = self.settings["mask_token"]
        masks = text.count(mask)
        self._require(masks)
        # The masks share one budget, so that many of them cost no more than a few.
        longest = self.encoder.longest_read()
        most = min(longest // 2, _LONGEST_READS * longest // (2 * masks))
        rows, place = [], text.find(mask)
        while place >= 0:
            rows.append(self._row_of_long(text, place, place + len(mask), most))
            place = text.find(mask, place + len(mask))
        return rows

    def _row_of_long(self, text: str, place: int, stop: int, most: int) -> Row:
        """Return the row of the mask at `place`, made from at most `most` characters on either side."""
        tokens = self.encoder.max_tokens + self.encoder.margin
        reach = min(8 * self.encoder.max_tokens, most)
        while True:
            begin, end = max(0, place - reach), min(len(text), stop + reach)
            encoding = self.encoder.whole(text[begin:end])
            number = encoding.char_to_token(place - begin)
            if number is None or encoding.ids[number] != self.settings["mask_id"]:
                raise RefusedError(f"the tokenizer does not find {text[place:stop]} at character {place} of TEXT")
            enough = (begin == 0 or number >= tokens) and (end == len(text) or len(encoding.ids) - number > tokens)
            if enough or 2 * reach > most:
                return self._around(text[begin:end], encoding, number)
            reach *= 2

    def _masks(self, encoding: Any) -> list[int]:
        return [place for place, token in enumerate(encoding.ids) if token == self.settings["mask_id"]]

    def _require(self, masks: int) -> None:
        if not masks:
            raise RefusedError(f"TEXT holds no mask; write {self.settings['mask_token']} where a word is wanted")
        if masks > self.limits.masks:
            raise RefusedError(f"TEXT holds {masks} masks; give at most {self.limits.masks}")

    def _around(self, text: str, encoding: Any, place: int) -> Row:
        """Return a row with as much text on both sides of the mask as the model takes."""
        room = self.encoder.max_tokens - self.encoder.special_tokens()
        start = max(0, min(place - room // 2, len(encoding.ids) - room))
        offsets = [offset for offset in encoding.offsets[start : start + room] if offset != (0, 0)]
        begin, end, mask = offsets[0][0], offsets[-1][1], encoding.offsets[place][0]
        # The cut text may have more tokens than before, which can push the mask out of the row. So the text before the
        # mask is halved until the row contains the mask.
        while True:
            piece = self.encoder.tokens([text[begin:end]])[0]
            for number, offset in enumerate(piece.offsets):
                if piece.ids[number] == self.settings["mask_id"] and offset[0] <= mask - begin < offset[1]:
                    return Row(piece, {POSITION: number})
            if begin == mask:
                raise RefusedError(
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
