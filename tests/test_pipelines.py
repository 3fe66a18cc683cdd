"""Texts in, answers out: the same as transformers' own pipelines give, from the same PyTorch model.

What is served is the same code around an engine instead of PyTorch.
"""

import json
from itertools import pairwise

import numpy as np
import pytest

from resources.accuracy.batches import PlannedBatch
from resources.accuracy.inference import answer_items
from resources.boundary.trust import Trust
from resources.catalog.entries import ModelEntry
from resources.checkpoints.collect import checkpoint_files
from resources.pipelines import beginnings, open_pipeline
from resources.pipelines.limits import RefusedError
from resources.pipelines.tokenization import TextEncoder
from resources.pipelines.zero_shot_classification import ZeroShotClassificationPipeline
from resources.processes.isolation import Limits
from resources.tasks import TASKS
from resources.tasks.samples import sample_texts
from tests.answers import CHECKPOINTS, assert_same, transformers_answers
from tests.making import collect_checkpoint

#: Short, empty, odd, and longer than the small checkpoints take (64 tokens).
TEXTS = [
    "My name is Sarah Connor and I live in Los Angeles.",
    "",
    "Überraschung! 🙂 naïve café — 東京へ行く",
    "مرحبا بالعالم",
    "a",
    "no-one's  double  spaces\tand tabs; U.S.A. (1999)",
    *[text for text in sample_texts() if len(text) < 160][:24],
]
LONG = " ".join(sample_texts()[:6])


class Asked:
    """A collected checkpoint, its pipeline, and PyTorch behind it."""

    def __init__(self, workspace, folder, task, options):
        entry = ModelEntry(name="m", source=str(folder), task=task, shapes=["1x16"], options=options)
        record = collect_checkpoint(entry, workspace.store, Limits(240, 6 * 10**9)).record
        stored = workspace.store.folder(record)
        self.folder, self.record, self.task = folder, record, TASKS[task]
        self.pipeline = open_pipeline(str(stored))
        self.module = self.task.module(checkpoint_files(record, stored, Trust()))

    def answers(self, items, rows=4):
        """In batches of several rows, padded: what a request gets must not depend on its neighbours."""
        import torch

        def run(batch):
            with torch.inference_mode():
                return self.module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()

        def plan(requests):
            lengths = [length for request in requests for length in request]
            numbers = range(len(lengths))
            groups = [list(numbers)[start : start + rows] for start in range(0, len(lengths), rows)]
            return [PlannedBatch(tuple(group), max(lengths[index] for index in group)) for group in groups]

        answered = answer_items(self.pipeline, run, items, plan, per_token=self.task.per_token)
        assert answered.broken == ""
        return answered.answers


@pytest.fixture
def asked(workspace, made_checkpoint):
    def ask(task, architecture="bert", checkpoint=None, **options):
        folder = made_checkpoint(architecture=architecture, **(checkpoint or CHECKPOINTS[task]))
        return Asked(workspace, folder, task, options)

    return ask


TOKENIZERS = ["bert", "roberta", "camembert"]  # WordPiece, byte-level BPE, Unigram


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("architecture", TOKENIZERS)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities(asked, architecture, strategy):
    model = asked("token-classification", architecture, aggregation_strategy=strategy)
    items = [{"TEXT": text} for text in TEXTS]
    # Ours has windows unless it is told otherwise; half of the limit is the most that they share.
    windows = {} if strategy == "none" else {"stride": 32}
    same = {"aggregation_strategy": strategy, **windows}
    expected = transformers_answers("token-classification", model.folder, items, **same)
    found = model.answers(items)
    assert sum(map(len, expected)) > 100
    for text, one, other in zip(TEXTS, found, expected, strict=True):
        assert_same(one, other)
        assert all(0 <= entity["start"] <= entity["end"] <= len(text) for entity in one)


@pytest.mark.parametrize("architecture", TOKENIZERS)
def test_entities_of_a_text_that_is_too_long_come_from_windows(asked, architecture):
    model = asked("token-classification", architecture, stride=16)
    expected = transformers_answers(
        "token-classification", model.folder, [{"TEXT": LONG}], aggregation_strategy="simple", stride=16
    )
    (found,) = model.answers([{"TEXT": LONG}])
    assert_same(found, expected[0])
    assert found[-1]["end"] > 0.9 * len(LONG)
    places = [(entity["start"], entity["end"]) for entity in found]
    assert all(first[1] <= second[0] for first, second in pairwise(places))


def test_windows_have_a_limit(asked):
    model = asked("token-classification", stride=16, windows=2)
    (rows,) = model.pipeline.rows([{"TEXT": LONG}])
    assert len(rows) == 2
    (rows,) = asked("token-classification", aggregation_strategy="none").pipeline.rows([{"TEXT": LONG}])
    assert len(rows) == 1


QUESTIONS = [
    {"QUESTION": "Where does Sarah live?", "CONTEXT": TEXTS[0]},
    {"QUESTION": "¿Quién? 🙂", "CONTEXT": TEXTS[2]},
    {"QUESTION": "", "CONTEXT": "Only a context."},
    {"QUESTION": "What about a long one?", "CONTEXT": LONG},
    *[{"QUESTION": "What is it about?", "CONTEXT": text} for text in TEXTS[6:24]],
]


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "albert"])
def test_spans(asked, architecture, impossible):
    model = asked("question-answering", architecture, stride=12, handle_impossible_answer=impossible)
    limits = {"stride": 12, "max_tokens": model.record.max_tokens}
    expected = transformers_answers("question-answering", model.folder, QUESTIONS, impossible=impossible, **limits)
    found = model.answers(QUESTIONS)
    for one, other, item in zip(found, expected, QUESTIONS, strict=True):
        assert_same(one, other)
        assert one["answer"] == item["CONTEXT"][one["start"] : one["end"]]
    assert len(model.pipeline.rows([QUESTIONS[3]])[0]) > 3
    if not impossible:
        assert sum(bool(answer["answer"]) for answer in found) > len(found) * 0.7


@pytest.mark.parametrize(
    "item",
    [
        {"QUESTION": "word " * 500, "CONTEXT": "A short context about nothing."},
        {"QUESTION": "word " * 500, "CONTEXT": LONG},
        {"QUESTION": "x" * 1000, "CONTEXT": "y" * 1000},
    ],
)
def test_a_question_that_is_too_long_leaves_room_for_the_context(asked, item):
    model = asked("question-answering")
    (rows,) = model.pipeline.rows([item])
    assert all(row.tokens <= model.record.max_tokens for row in rows)
    assert all(1 in row.encoding.sequence_ids for row in rows)
    (answer,) = model.answers([item])
    assert answer["answer"]


def test_without_a_context_there_is_no_answer(asked):
    (answer,) = asked("question-answering").answers([{"QUESTION": "What?", "CONTEXT": ""}])
    assert answer == {"answer": "", "score": 0.0, "start": 0, "end": 0}


def test_spans_are_no_longer_than_asked_for(asked):
    """Of one token, widened to its word; with the default some are longer (how long depends on how the tokenizer's
    training breaks ties, which is not always the same)."""
    short, usual = asked("question-answering", max_answer_tokens=1), asked("question-answering")
    words = [len(answer["answer"].split()) for answer in short.answers(QUESTIONS)]
    assert max(words) == 1
    assert max(len(answer["answer"].split()) for answer in usual.answers(QUESTIONS)) > 1


def test_a_question_that_fits_is_not_cut(asked):
    model = asked("question-answering")  # 64 tokens
    question = " ".join(["who"] * 40)
    ((row,),) = model.pipeline.rows([{"QUESTION": question, "CONTEXT": "Sarah did."}])
    assert row.encoding.sequence_ids.count(0) == model.pipeline.encoder.count(question, 64)


def test_a_context_of_many_windows_is_read_whole_whatever_the_question_looks_like(asked):
    model = asked("question-answering", windows=1000)
    rows = [
        model.pipeline.rows([{"QUESTION": question, "CONTEXT": LONG}])[0]
        for question in ("What?", "What?" + " " * 2000)
    ]
    assert len(rows[0]) == len(rows[1])
    assert rows[1][-1].encoding.offsets[-2][1] >= len(LONG.rstrip()) - 1


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "albert"])
def test_labels_given_with_the_request(asked, architecture, multi_label):
    model = asked("zero-shot-classification", architecture, multi_label=multi_label)
    sets = [["urgent", "not urgent"], ["one"], ["sport", "politics", "Küche 🙂", "a label of several words", "x"]]
    items = [{"TEXT": text, "LABELS": json.dumps(labels)} for text in [*TEXTS[:12], LONG] if text for labels in sets]
    expected = transformers_answers("zero-shot-classification", model.folder, items, multi_label=multi_label)
    assert_same(model.answers(items), expected)


def test_another_sentence_about_the_label(asked):
    template = "Dieser Text handelt von {}."
    model = asked("zero-shot-classification", hypothesis_template=template)
    items = [{"TEXT": TEXTS[0], "LABELS": '["Sport", "Politik"]'}]
    (found,) = model.answers(items)
    import transformers

    ask = transformers.pipeline("zero-shot-classification", model=str(model.folder), device="cpu")
    assert found["scores"] == pytest.approx(
        ask(TEXTS[0], ["Sport", "Politik"], hypothesis_template=template)["scores"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("[]", "LABELS holds no label"),
        ("urgent", "LABELS is not a JSON list"),
        ("[1, 2]", "LABELS is not a JSON list"),
        ('{"a": 1}', "LABELS is not a JSON list"),
        (json.dumps(["a"] * 1001), "give at most 1000"),
        ('["\\ud800"]', "half of a surrogate pair"),
    ],
)
def test_labels_that_are_none(asked, labels, said):
    with pytest.raises(RefusedError, match=said):
        asked("zero-shot-classification").pipeline.prepare({"TEXT": "x", "LABELS": labels})


def test_labels_that_take_long_to_tokenize_are_refused(minilm):
    encoder = TextEncoder(str(minilm / "tokenizer.json"), max_tokens=256, inputs=["input_ids"], pad_id=0)
    pipeline = ZeroShotClassificationPipeline(encoder, {"hypothesis_template": "{}"})
    with pytest.raises(RefusedError, match="too long together"):
        pipeline.prepare({"TEXT": "x", "LABELS": json.dumps(["a b " * 1000] * 500)})


def test_a_label_that_is_too_long_is_cut(asked):
    model = asked("zero-shot-classification")
    item = {"TEXT": LONG, "LABELS": json.dumps(["word " * 500, "short"])}
    assert all(row.tokens <= 64 for row in model.pipeline.rows([item])[0])
    (answer,) = model.answers([item])
    assert sum(answer["scores"]) == pytest.approx(1, abs=1e-5)


def test_labels_that_fit_are_not_cut_and_differ_to_the_end(asked):
    model = asked("zero-shot-classification")
    label = " ".join(f"word{number}" for number in range(12))
    item = {"TEXT": "a text", "LABELS": json.dumps([f"{label} x", f"{label} y"])}
    (rows,) = model.pipeline.rows([item])
    assert 40 < rows[0].tokens <= 64
    (expected,) = transformers_answers("zero-shot-classification", model.folder, [item])
    (answer,) = model.answers([item])
    assert_same(answer, expected)
    assert answer["scores"][0] != answer["scores"][1]


def test_a_long_text_with_many_labels_takes_no_time_and_no_memory(asked):
    model = asked("zero-shot-classification")
    item = {"TEXT": "a long text " * 80_000, "LABELS": json.dumps([f"label {number}" for number in range(200)])}
    (rows,) = model.pipeline.rows([item])
    assert len(rows) == 200
    # What was cut off a text of a million characters would be thousands of pieces, for each label.
    assert all(len(row.encoding.overflowing) < 5 for row in rows)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "modernbert"])
def test_masks_are_filled(asked, architecture):
    model = asked("fill-mask", architecture, top_k=3)
    items = [{"TEXT": f"{text[:18]} [MASK] {text[18:30]}"} for text in TEXTS]
    items += [{"TEXT": "[MASK] is the [MASK] of [MASK]."}, {"TEXT": "[MASK]"}]
    # What transformers does not cut: bytes of some scripts are many tokens.
    items = [item for item in items if len(model.pipeline.encoder.whole(item["TEXT"]).ids) <= 64]
    assert len(items) > 25
    expected = transformers_answers("fill-mask", model.folder, items, top_k=3)
    assert_same(model.answers(items), expected)


def test_a_long_text_is_cut_around_each_mask(asked):
    model = asked("fill-mask")
    words = LONG.split(" ")
    for places in ([0], [len(words) - 1], [len(words) // 2], [5, len(words) - 9]):
        masked = ["[MASK]" if number in places else word for number, word in enumerate(words)]
        (rows,) = model.pipeline.rows([{"TEXT": " ".join(masked)}])
        assert len(rows) == len(places)
        for row in rows:
            assert row.tokens <= 64
            assert row.encoding.ids[row.extra["mask_position"]] == model.record.settings["mask_id"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"\[MASK\]"),
        ("none", r"\[MASK\]"),
        ("[MASK] " * 101, "at most 100"),
        ("none " * 10_000, r"\[MASK\]"),
        ("[MASK] " * 10_000, "at most 100"),
    ],
)
def test_texts_without_a_mask_are_refused(asked, text, said):
    with pytest.raises(RefusedError, match=said):
        asked("fill-mask").pipeline.prepare({"TEXT": text})


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_mask_in_a_text_that_is_not_read_whole_has_the_same_row(asked, monkeypatch, architecture):
    model = asked("fill-mask", architecture)
    words = " ".join(sample_texts()[:150]).split(" ")
    for place in (2, 700, len(words) - 3):
        words.insert(place, "[MASK]")
    text = " ".join(words)
    (expected,) = model.pipeline.rows([{"TEXT": text}])
    monkeypatch.setattr(beginnings, "MOST_CHARACTERS", 4096)
    assert model.pipeline.encoder.longest_read() < len(text)
    (found,) = model.pipeline.rows([{"TEXT": text}])
    assert [(row.encoding.ids, row.extra) for row in found] == [(row.encoding.ids, row.extra) for row in expected]


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_pairs_are_ranked_as_sentence_transformers_does(asked, architecture):
    model = asked("reranking", architecture)
    items = [{"QUERY": "Where does Sarah live?", "TEXT": text} for text in [*TEXTS, LONG]]
    items.append({"QUERY": LONG, "TEXT": LONG})
    expected = transformers_answers("reranking", model.folder, items)
    assert_same(model.answers(items), expected)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_classes_are_those_of_transformers(asked, problem):
    import transformers

    labels = ("score",) if problem == "regression" else ("bad", "fair", "good")
    model = asked("classification", checkpoint={"labels": labels, "problem_type": problem})
    ask = transformers.pipeline("text-classification", model=str(model.folder), device="cpu", top_k=None)
    for found, expected in zip(model.answers([{"TEXT": text} for text in TEXTS]), ask(TEXTS), strict=True):
        scores = {item["label"]: item["score"] for item in expected}
        assert dict(zip(labels, found.tolist(), strict=True)) == pytest.approx(scores, abs=2e-5)


@pytest.mark.parametrize("task", TASKS)
def test_numbers_that_are_none_are_said_whatever_a_pipeline_would_make_of_them(asked, task):
    """A NaN has no largest label, and would look like 'no entity'."""
    model = asked(task)
    items = model.task.items(model.record.settings, 32)[:3]

    def run(batch):
        rows, tokens = batch["input_ids"].shape
        width = len(model.record.labels) or 2 if task != "fill-mask" else 1205
        shape = (rows, tokens, width) if model.task.per_token else (rows, width)
        numbers = np.zeros(shape, dtype=np.float32)
        numbers[0].flat[0] = np.nan
        return numbers

    def plan(requests):
        lengths = [length for request in requests for length in request]
        return [PlannedBatch(tuple(range(len(lengths))), max(lengths))]

    answered = answer_items(model.pipeline, run, items, plan, per_token=model.task.per_token)
    assert answered.broken.startswith("NaN or infinity in the answers to 1 of")
    assert answered.answers == []
