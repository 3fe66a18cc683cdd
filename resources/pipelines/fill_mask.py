"""What a masked language model would write in place of each mask, as transformers' fill-mask pipeline says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Item, Pipeline, Row
from .limits import RefusedError

#: The model's input that says which position of a row is asked for: only there is the large head computed.
POSITION = "mask_position"
#: What may be tokenized of a long text for all of its masks, as a multiple of the longest text that is read whole.
_LONGEST_READS = 16

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
        """From what is near each mask: tokens depend on what is near them, and a row shows no more."""
        mask = self.settings["mask_token"]
        masks = text.count(mask)
        self._require(masks)
        # For all masks together, so that many of them cost no more than a few.
        longest = self.encoder.longest_read()
        most = min(longest // 2, _LONGEST_READS * longest // (2 * masks))
        rows, place = [], text.find(mask)
        while place >= 0:
            rows.append(self._row_of_long(text, place, place + len(mask), most))
            place = text.find(mask, place + len(mask))
        return rows

    def _row_of_long(self, text: str, place: int, stop: int, most: int) -> Row:
        """The row of the mask at `place`. most: characters that are looked at on either side."""
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
