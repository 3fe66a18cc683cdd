"""The beginning of a long text gives the same tokens as the whole text, for every kind of tokenizer and odd text."""

import random
import threading
import time
from functools import cache

import pytest

from resources.pipelines import beginnings
from resources.pipelines.limits import RefusedError
from resources.pipelines.tokenization import TextEncoder
from resources.tasks.samples import sample_texts

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def _wordpiece(**normalizer):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)


def _bytes(normalizer=None):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _split(pattern):
    """Byte-level BPE with an expression of its own, as models after GPT-2 have it."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer, trainer = _bytes("NFC")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return tokenizer, trainer


def _unigram(words=True, normalizer=("NFKC", "Lowercase")):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [*(getattr(normalizers, name)() for name in normalizer), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=700, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )


TOKENIZERS = {
    "wordpiece": lambda: _wordpiece(),
    "wordpiece, accents kept": lambda: _wordpiece(strip_accents=False, lowercase=False, handle_chinese_chars=False),
    "bytes": lambda: _bytes(),
    "bytes, NFC": lambda: _bytes("NFC"),
    "bytes, NFKC": lambda: _bytes("NFKC"),
    "bytes, numbers from the right": lambda: _split(
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+"
    ),
    "unigram": lambda: _unigram(),
    "unigram, NFD": lambda: _unigram(normalizer=("NFD", "StripAccents")),
    "unigram without words": lambda: _unigram(words=False),
}


@cache
def _trained(name):
    from tokenizers import AddedToken, processors

    tokenizer, trainer = TOKENIZERS[name]()
    tokenizer.train_from_iterator(sample_texts()[:120], trainer)
    # As the masks of most models are: the spaces in front belong to it.
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    tokenizer.add_tokens([AddedToken("New York", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str()


@pytest.fixture
def encoder_of(tmp_path):
    def make(name, **settings):
        (tmp_path / "tokenizer.json").write_text(_trained(name))
        usual = {"max_tokens": 17, "inputs": ["input_ids"], "pad_id": 0}
        return TextEncoder(str(tmp_path / "tokenizer.json"), **{**usual, **settings})

    return make


PIECES = (
    *("word", "Überraschung", "a", "a.", "no-one's", "U.S.A.", "12", "1234567", "(1999)", "New York", "New", "don't"),
    *(
        "[MASK]",
        "[SEP]",
        "[MA",
        "\u0301",
        "\u0323",
        "e\u0301",
        "\u0345",
        "\uff9e",
        "が",
        "\u3099",
        "🙂",
        "👩\u200d👩\u200d👧",
        "👋🏽",
        "🇩🇪",
    ),
    *(
        "東京へ行く",
        "。",
        "กรุงเทพ",
        "مرحبا",
        "각",
        "\u1100\u1161\u11a8",
        "ﬁ",
        "\u00a0",
        "\u2028",
        "\x00",
        "\ufeff",
        "\u0600",
        "İ",
    ),
    *("#", "$", "<", ">", "_", "-", "...", "=" * 30, "x" * 99, "x" * 101, "y" * 300),
)
BETWEEN = ("", "", " ", " ", " ", "  ", "\n", "\t", " " * 40, ", ")


def _text(rng, characters):
    """Of one of many kinds: usual words, a few pieces over and over, everything, or long runs of one piece."""
    kind, words = rng.randrange(5), " ".join(sample_texts()).split(" ")
    found, length = [], 0
    some = rng.sample(PIECES, 3)
    while length < characters:
        if kind == 0:
            piece = rng.choice(words) + " "
        elif kind == 1:
            piece = rng.choice(some) + rng.choice(BETWEEN)
        elif kind == 2:
            piece = rng.choice(PIECES) + rng.choice(BETWEEN)
        elif kind == 3:
            piece = rng.choice((*PIECES, " ")) * rng.randrange(1, 400)
        else:
            piece = rng.choice(PIECES) + (" " * rng.randrange(600) if rng.random() < 0.2 else rng.choice(BETWEEN))
        found.append(piece)
        length += len(piece)
    return "".join(found)[: 2 * characters]


def _seen(encoding):
    return encoding.ids, encoding.offsets, encoding.word_ids, encoding.type_ids, encoding.special_tokens_mask


def _compare(encoder_of, monkeypatch, name, seed, rounds):
    """How many texts were cut, and how many refused; the tokens of the others are those of the whole texts."""
    # Small beginnings: what is special about a cut happens as often as the texts allow.
    monkeypatch.setattr(beginnings, "_FIRST_CHARACTERS", 16)
    monkeypatch.setattr(beginnings, "MOST_CHARACTERS", 1024)
    rng, cut, refused = random.Random(seed), 0, 0  # noqa: S311
    encoders = [
        (1, encoder_of(name)),
        (1, encoder_of(name, max_tokens=40)),
        (5, encoder_of(name, stride=5)),
        *((1, encoder_of(name, max_tokens=32, strategy=strategy)) for strategy in ("longest_first", "only_first")),
        (4, encoder_of(name, max_tokens=32, strategy="only_second", stride=3)),
    ]
    for _ in range(rounds):
        windows, encoder = rng.choice(encoders)
        whole = (_text(rng, rng.randrange(50, 3000)),)
        if encoder.strategy == "only_second":
            whole = ("a question", *whole)
        elif encoder.strategy == "only_first":
            whole = (*whole, "a label")
        elif encoder.max_tokens == 32:
            # Beyond that, characters decide which of two texts gets the odd token.
            whole = (whole[0][:800], _text(rng, rng.randrange(50, 800))[:800])
        try:
            enough = encoder.enough(whole, windows=windows)
        except RefusedError:
            refused += 1
            continue
        cut += enough != whole
        (found,), (expected,) = encoder.tokens([enough]), encoder.tokens([whole])
        pairs = list(zip([found, *found.overflowing], [expected, *expected.overflowing], strict=False))[:windows]
        assert len(pairs) == min(windows, 1 + len(expected.overflowing))
        for one, other in pairs:
            assert _seen(one) == _seen(other), (whole, enough)
    return cut, refused


@pytest.mark.parametrize("name", ["wordpiece", "bytes, numbers from the right", "unigram"])
def test_a_beginning_has_the_tokens_of_the_whole_text(encoder_of, monkeypatch, name):
    cut, _ = _compare(encoder_of, monkeypatch, name, seed=0, rounds=30)
    assert cut > 10


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_many_beginnings_have_the_tokens_of_the_whole_text(encoder_of, monkeypatch, name, seed):
    cut, refused = _compare(encoder_of, monkeypatch, name, seed, rounds=250)
    assert cut > 60
    assert refused < 125


def test_a_beginning_that_is_denser_than_the_rest_is_no_reason_to_refuse(encoder_of):
    """No end of a word settles these: two beginnings are compared, whatever the first thousand characters promise."""
    encoder = encoder_of("unigram without words", max_tokens=2304)
    whole = (" ".join(sample_texts())[:500] + "temperature. " * 3000,)
    enough = encoder.enough(whole)
    assert len(enough[0]) < len(whole[0])
    (found,), (expected,) = encoder.tokens([enough]), encoder.tokens([whole])
    assert _seen(found) == _seen(expected)


def test_a_text_that_is_tokenized_keeps_no_other_thread_waiting(encoder_of):
    """A thread that does nothing but look at the clock is compared with the call beside it, in the best of five."""
    encoder, shares = encoder_of("wordpiece"), []
    text = "All work and no play makes a dull text. " * 4000
    for _ in range(5):
        ended, pauses = threading.Event(), [0.0]

        def watch(ended=ended, pauses=pauses):
            before = time.monotonic()
            while not ended.is_set():
                now = time.monotonic()
                before, pauses[0] = now, max(pauses[0], now - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.monotonic()
        beginnings.encode_alone(encoder._endless, text)
        took = time.monotonic() - begun
        ended.set()
        watcher.join()
        shares.append(pauses[0] / took)
    assert min(shares) < 0.5, shares


#: What costs most where all of it is tokenized.
HOSTILE = {
    "words": "All work and no play makes a dull text. ",
    "one word": "a",
    "a.": "a.",
    "marks": "\u0301",
    "one emoji": "🙂",
    "spaces": " ",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["wordpiece", "bytes, numbers from the right", "unigram"])
def test_a_huge_text_takes_no_time(encoder_of, name, kind):
    encoder = encoder_of(name, max_tokens=512)
    text = HOSTILE[kind] * (10**6 // len(HOSTILE[kind]))
    before = time.process_time()
    try:
        (encoding,) = encoder.tokens([encoder.enough((text,))])
        assert len(encoding.ids) == 512
    except RefusedError as error:
        assert kind not in ("words", "a.")
        assert "send a shorter text" in str(error)
    assert time.process_time() - before < 1.0
