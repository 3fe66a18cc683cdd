"""The search for a beginning of a long text that has the same first tokens as the whole text.

Tokenizing costs a microsecond or more and a hundred bytes for every character, including those that truncation removes.
So only a beginning of the text is tokenized. The beginning grows until its first tokens are settled, which means that
no text after it can change them.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from .limits import RefusedError

#: A text of at most this many characters is tokenized whole if no shorter beginning settles its tokens. At about
#: 3 microseconds a character, this limits the cost of one text to about 100 ms.
MOST_CHARACTERS = 32_768
#: A token of usual text has four to five characters, spaces included.
_CHARACTERS_PER_TOKEN = 5
_FIRST_CHARACTERS = 1024
#: The number of characters before a cut that the cut can affect. Added tokens are counted on top of it, and runs of
#: spaces and of combining marks, which have no bound, are skipped separately.
_MARGIN = 64
#: Components that read a text from left to right and decide within a word or within `_MARGIN` characters.
_LOCAL = {
    *("BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend", "Precompiled"),
    *("Nmt", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace", "Digits", "Punctuation"),
    *("UnicodeScripts", "CharDelimiterSplit"),
}


class Beginnings:
    """The finder of beginnings for one tokenizer of the `tokenizers` library that neither truncates nor pads.

    Attributes:
        margin: The number of characters before a cut that the cut may change. No more tokens than that can change.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self.margin = _MARGIN + 4 * max(map(len, added), default=0)
        self._has_edges = _is_local(tokenizer.normalizer) and _is_local(tokenizer.pre_tokenizer)

    def most(self, tokens: int) -> int:
        """Return the largest number of characters that are tokenized to find so many tokens."""
        return max(MOST_CHARACTERS, 2 * _CHARACTERS_PER_TOKEN * tokens)

    def find(self, text: str, tokens: int) -> str:
        """Return a beginning whose first `tokens` tokens, with their offsets, are those of the whole text.

        A short text is returned whole.

        Raises:
            RefusedError: No beginning of up to `most` characters settles the tokens.
        """
        # A text with fewer characters than the wanted tokens almost never has that many tokens, so all of it is read.
        if len(text) <= max(_FIRST_CHARACTERS, tokens):
            return text
        most = self.most(tokens)
        halvings = self._halvings(text, tokens, most)
        before: Any = None
        for size in (most >> count for count in range(halvings, -1, -1)):
            if size >= len(text):
                return text
            found = encode_alone(self._tokenizer, text[:size])
            if len(found) >= tokens and (
                (self._has_edges and self._ends_behind(text, size, found, tokens))
                or (before is not None and self._agrees(text, size // 2, before, found, tokens))
            ):
                return text[:size]
            before = found
        raise RefusedError(
            f"the first {most} of a text's {len(text)} characters make fewer than {tokens} tokens, or a word without "
            "an end; send a shorter text, or one with usual words"
        )

    def _halvings(self, text: str, tokens: int, most: int) -> int:
        """Return how often `most` is halved to get the length of the first beginning.

        The first beginning should have a few more tokens than are wanted. There is at least one halving, because some
        texts can only be settled by comparing two beginnings.
        """
        enough = _CHARACTERS_PER_TOKEN * tokens
        if enough > 8 * _FIRST_CHARACTERS:  # so many characters are worth a sample of the text
            sample = len(encode_alone(self._tokenizer, text[:_FIRST_CHARACTERS]))
            enough = min(enough, tokens * _FIRST_CHARACTERS // max(1, sample))
        enough = max(enough * 9 // 8, _FIRST_CHARACTERS)
        return max(1, (most // enough).bit_length() - 1)

    def _ends_behind(self, text: str, size: int, found: Any, tokens: int) -> bool:
        """Return whether a word ends after the first `tokens` tokens, far enough before the cut.

        Then the same word ends there in the whole text too. The tokenizer's model reads each word alone, so all tokens
        up to there are those of the whole text.
        """
        closed = _last_closing(text, size - self.margin, digits=True)
        # `offsets` would build a list of all tokens, and no other thread runs meanwhile. So tokens are read one by one.
        for place in range(len(found) - 1, tokens - 1, -1):
            end = found.token_to_chars(place - 1)[1]
            if end > closed or end == 0 or found.token_to_word(place) == found.token_to_word(place - 1):
                continue
            # Some tokenizers group digits from the right, so no place inside a number is settled.
            if not (text[end - 1].isdigit() and text[end].isdigit()):
                return True
        return False

    def _agrees(self, text: str, half: int, before: Any, found: Any, tokens: int) -> bool:
        """Return whether a beginning and its first half agree on the first `tokens` tokens.

        The half must also go on after these tokens by more than the margin. This test is for scripts without spaces and
        for tokenizers without words. Byte-pair encodings and unigram models decide within a few tokens there, but no
        end of a word proves it.
        """
        if len(before) < tokens or before.ids[:tokens] != found.ids[:tokens]:
            return False
        offsets = found.offsets[:tokens]
        closed = _last_closing(text, half - self.margin, digits=False)
        return before.offsets[:tokens] == offsets and offsets[-1][1] <= closed


def encode_alone(tokenizer: Any, text: str, *, special: bool = False) -> Any:
    """Encode one text without keeping other threads from running.

    The library's `encode` holds Python's lock while it works, 0.15 s for 100,000 characters. `encode_batch` does not.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library.
        text: The text to encode.
        special: Whether special tokens are added.
    """
    return tokenizer.encode_batch([text], add_special_tokens=special)[0]


def _is_local(component: Any) -> bool:
    """Return whether a normalizer or pre-tokenizer decides by nearby text alone."""
    return component is None or _is_known(json.loads(component.__getstate__()))


def _is_known(state: dict[str, Any]) -> bool:
    kind = state["type"]
    if kind == "Sequence":
        return all(map(_is_known, state.get("normalizers") or state.get("pretokenizers") or ()))
    if kind in ("Replace", "Split"):
        pattern = state["pattern"].get("Regex")
        # These are the expressions of GPT-2 and its successors, and expressions that shorten runs of spaces.
        return pattern is None or r"\p{L}" in pattern or not set(pattern) - set(r" \s{}[]+*,|()0123456789")
    return kind in _LOCAL


def _last_closing(text: str, end: int, *, digits: bool) -> int:
    """Return the place of the last character before `end` that ends a run of spaces and of combining marks.

    Letters, punctuation and symbols end such a run, and with `digits` so do digits. The result is -1 if there is no
    such character.
    """
    for place in range(min(end, len(text)) - 1, -1, -1):
        character = text[place]
        category = unicodedata.category(character)
        if category[0] not in "LPS" + "N" * digits or category == "Sk":
            continue
        # The marks of halfwidth katakana are letters by category, but they combine once they are normalized.
        if character.isascii() or not unicodedata.combining(unicodedata.normalize("NFKD", character)[0]):
            return place
    return -1
