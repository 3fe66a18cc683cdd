"""The beginning of a long text whose first tokens are those of the whole text.

Tokenizing costs a microsecond or more and a hundred bytes for every character, also for those that truncation removes.
So only a beginning is tokenized, which grows until its first tokens are settled: nothing that follows can change them.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from .limits import RefusedError

#: Texts of at most so many characters are tokenized whole where nothing shorter settles. At some 3 microseconds a
#: character this bounds what a single text can cost to about 100 ms.
MOST_CHARACTERS = 32_768
#: Tokens of usual texts have four to five characters, spaces included.
_CHARACTERS_PER_TOKEN = 5
_FIRST_CHARACTERS = 1024
#: How far in front of a cut its effects reach, beyond runs of spaces and of combining marks, which are unbounded, and
#: beyond added tokens.
_MARGIN = 64
#: Components that read a text from left to right, each decision within a word or within `_MARGIN` characters.
_LOCAL = {
    *("BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend", "Precompiled"),
    *("Nmt", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace", "Digits", "Punctuation"),
    *("UnicodeScripts", "CharDelimiterSplit"),
}


class Beginnings:
    """Finds the beginnings for one tokenizer (of the `tokenizers` library), which truncates and pads nothing.

    margin: characters in front of a cut, and so tokens, that the cut may change.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self.margin = _MARGIN + 4 * max(map(len, added), default=0)
        self._has_edges = _is_local(tokenizer.normalizer) and _is_local(tokenizer.pre_tokenizer)

    def most(self, tokens: int) -> int:
        """The most characters that are tokenized for so many tokens."""
        return max(MOST_CHARACTERS, 2 * _CHARACTERS_PER_TOKEN * tokens)

    def find(self, text: str, tokens: int) -> str:
        """A beginning of the text whose first `tokens` tokens, with their offsets, are those of the whole text; the
        text itself where it is short. Raises RefusedError where no beginning of `most` characters settles them.
        """
        # A text of fewer characters than tokens are wanted has hardly ever that many: all of it is read.
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
        """How often the most characters are halved for the first beginning, which is to have a few more tokens than are
        wanted. At least once, because some texts are settled by comparing two beginnings alone.
        """
        enough = _CHARACTERS_PER_TOKEN * tokens
        if enough > 8 * _FIRST_CHARACTERS:  # worth asking the text's own first characters
            sample = len(encode_alone(self._tokenizer, text[:_FIRST_CHARACTERS]))
            enough = min(enough, tokens * _FIRST_CHARACTERS // max(1, sample))
        enough = max(enough * 9 // 8, _FIRST_CHARACTERS)
        return max(1, (most // enough).bit_length() - 1)

    def _ends_behind(self, text: str, size: int, found: Any, tokens: int) -> bool:
        """Whether a word ends behind the first `tokens` tokens, so far in front of the cut that the same word ends
        there in the whole text. Models see words alone, so all tokens up to there are those of the whole text.
        """
        closed = _last_closing(text, size - self.margin, digits=True)
        # Token by token: `offsets` would make a list of them all, during which no other thread runs.
        for place in range(len(found) - 1, tokens - 1, -1):
            end = found.token_to_chars(place - 1)[1]
            if end > closed or end == 0 or found.token_to_word(place) == found.token_to_word(place - 1):
                continue
            # Some tokenizers group digits from the right, so within a number nothing is settled.
            if not (text[end - 1].isdigit() and text[end].isdigit()):
                return True
        return False

    def _agrees(self, text: str, half: int, before: Any, found: Any, tokens: int) -> bool:
        """Whether a beginning and its first half agree about the first `tokens` tokens, and the half goes on behind.

        For scripts without spaces and for tokenizers without words: byte-pair encodings and unigram models decide
        within a few tokens, but no end of a word proves it.
        """
        if len(before) < tokens or before.ids[:tokens] != found.ids[:tokens]:
            return False
        offsets = found.offsets[:tokens]
        closed = _last_closing(text, half - self.margin, digits=False)
        return before.offsets[:tokens] == offsets and offsets[-1][1] <= closed


def encode_alone(tokenizer: Any, text: str, *, special: bool = False) -> Any:
    """Encode one text without keeping other threads from running.

    The library's `encode` holds Python's lock while it works, 0.15 s for 100,000 characters; `encode_batch` does not.

    Args:
        special: whether special tokens are added.
    """
    return tokenizer.encode_batch([text], add_special_tokens=special)[0]


def _is_local(component: Any) -> bool:
    """Whether a normalizer or pre-tokenizer decides by what is near."""
    return component is None or _is_known(json.loads(component.__getstate__()))


def _is_known(state: dict[str, Any]) -> bool:
    kind = state["type"]
    if kind == "Sequence":
        return all(map(_is_known, state.get("normalizers") or state.get("pretokenizers") or ()))
    if kind in ("Replace", "Split"):
        pattern = state["pattern"].get("Regex")
        # The expressions of GPT-2 and its successors, and those that shorten runs of spaces.
        return pattern is None or r"\p{L}" in pattern or not set(pattern) - set(r" \s{}[]+*,|()0123456789")
    return kind in _LOCAL


def _last_closing(text: str, end: int, *, digits: bool) -> int:
    """The place of the last character before `end` that ends a run of spaces and of combining marks; -1: there is none.

    digits: a digit does.
    """
    for place in range(min(end, len(text)) - 1, -1, -1):
        character = text[place]
        category = unicodedata.category(character)
        if category[0] not in "LPS" + "N" * digits or category == "Sk":
            continue
        # Halfwidth katakana's marks are letters, and combine once they are normalized.
        if character.isascii() or not unicodedata.combining(unicodedata.normalize("NFKD", character)[0]):
            return place
    return -1
