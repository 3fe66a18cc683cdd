"""PyTorch's answers, which engines are compared with, against those of the library that users would have used."""

import json

import pytest

from resources.accuracy import evaluation_set, reference
from resources.checkpoints.requests import evaluation_requests
from resources.errors import CheckpointError
from resources.pipelines import tokenization
from resources.pipelines.tokenization import TextEncoder
from resources.processes.isolation import Limits
from resources.tasks import classification, embedding
from resources.tasks.embedding import Pooling
from resources.tasks.samples import rare_texts, sample_texts
from tests.conftest import entry_for
from tests.making import collect_checkpoint
from tests.twins import TWINS, embedder, pooled

LIMITS = Limits(timeout_s=240, memory_bytes=6 * 10**9)
#: Of the usual texts; all of the rare ones are always asked.
EVERY = 16
#: Two of each kind.
FEW = (
    *(
        "minilm",
        "truncated",
        "sst2",
        "deberta classifier",
        "bart",
        "xnli",
        "ms-marco",
        "deberta reranker",
        "ner",
        "bilou",
    ),
    *("squad2", "no spaces", "bert", "albert"),
)


@pytest.fixture
def compared(tmp_path):
    """A function that answers as our baseline does and as the library does, in this process, and compares them."""

    def compare(folder, task, options=None, every=EVERY, **fields):
        from resources.artifacts.store import ArtifactStore

        entry = entry_for(folder, task=task, options=options or {}, **fields)
        store = ArtifactStore(tmp_path / "artifacts")
        record = collect_checkpoint(entry, store, LIMITS).record
        items, right = evaluation_requests(entry, record.settings, record.max_tokens)
        # The rare ones are behind the usual ones.
        some = [*items[: -len(rare_texts()) - 1 : every], *items[-len(rare_texts()) - 1 :]]
        places = [tmp_path / "evaluation", tmp_path / "reference"]
        for place in places:
            place.mkdir(exist_ok=True)
        source = store.folder(record)
        evaluation_set.answer_requests(record, source, entry.trust, some, right[: len(some)], places[0], 1)
        return reference.compare_with_library(record, source, entry.trust, *places, 1)

    return compare


def check_twin(compared, name, folder, **more):
    twin = TWINS[name]
    found = compared(twin.make(folder), twin.task, twin.options, **more)
    assert found.compared > 20
    assert found.refused <= 3 or twin.task == "fill-mask"
    assert bool(found.retokenized) is twin.retokenized


@pytest.mark.parametrize("name", FEW)
def test_twins_of_deployed_checkpoints_answer_as_their_library(compared, tmp_path, name):
    check_twin(compared, name, tmp_path / "twin")


@pytest.mark.whole
@pytest.mark.parametrize("name", TWINS)
def test_every_twin_answers_as_its_library(compared, tmp_path, name):
    check_twin(compared, name, tmp_path / "twin", every=1)


def plain(encoder_file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(encoder_file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    content = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**content, "normalizer": None}))


def padded_on_the_left(self, encodings, length):
    import numpy as np

    arrays = {name: np.zeros((len(encodings), length), dtype=np.int64) for name in self.inputs}
    for row, encoding in enumerate(encodings):
        for name, array in arrays.items():
            array[row, length - len(encoding) :] = tokenization._VALUES[name](encoding)
    return arrays


BROKEN = {
    "normalizer": ("minilm", lambda patch: patch.setattr(tokenization, "_open", plain)),
    "pooling": ("bge", lambda patch: patch.setattr(embedding, "pooling_of", lambda _: Pooling(("mean",), True))),
    "normalization": ("minilm", lambda patch: patch.setattr(embedding, "pooling_of", lambda _: Pooling(("mean",)))),
    "dimensions": (
        "truncated",
        lambda patch: patch.setattr(embedding, "pooling_of", lambda _: Pooling(("mean",), True)),
    ),
    "truncation": (
        "minilm",
        lambda patch: patch.setattr(TextEncoder, "enough", lambda self, texts, **_: tuple(text[:40] for text in texts)),
    ),
    "prompt": ("prompt", lambda patch: patch.setattr(embedding, "refuse_changed_texts", lambda _: None)),
    "activation": ("sst2", lambda patch: patch.setattr(classification, "activation", lambda _: "sigmoid")),
    "segment ids": ("ms-marco", lambda patch: patch.setitem(tokenization._VALUES, "token_type_ids", lambda _: 0)),
    "padding side": ("minilm", lambda patch: patch.setattr(TextEncoder, "pad", padded_on_the_left)),
    "label order": (
        "languages",
        lambda patch: patch.setattr(classification.ClassificationTask, "module", reversed_labels),
    ),
}


def reversed_labels(self, files, **load):
    import torch

    class Reversed(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **batch):
            return self.module(**batch).flip(-1)

    return Reversed(_classifier(self, files, **load))


_classifier = classification.ClassificationTask.module


@pytest.mark.parametrize("rule", BROKEN)
def test_a_mistake_of_ours_stops_the_run_and_names_texts(compared, tmp_path, monkeypatch, rule):
    name, spoil = BROKEN[rule]
    if name == "prompt":
        config = {"prompts": {"query": "Ask this: "}, "default_prompt_name": "query"}
        folder, task, options = embedder("bert", "mean", config=config)(tmp_path / "twin"), "embedding", {}
    else:
        twin = TWINS[name]
        folder, task, options = twin.make(tmp_path / "twin"), twin.task, twin.options
    spoil(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        compared(folder, task, options, every=64)
    said = str(caught.value)
    assert "otherwise than" in said or "other tokens" in said or "is padded" in said
    asked = (text for text in (*sample_texts(), *rare_texts()) if len(text) > 8)
    assert any(text[:8] in said for text in asked), "no text is named"


def test_a_request_on_which_the_library_panics_has_no_answer(made_checkpoint):
    """A question that leaves the context less room than its windows share; transformers' pipeline fails on it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made_checkpoint(head="question"))
    cutting = {"truncation": "only_second", "max_length": 64, "stride": 32, "return_overflowing_tokens": True}
    items = [{"QUESTION": "a " * 40, "CONTEXT": "b " * 100}, {"QUESTION": "a", "CONTEXT": "b"}]
    answers, failures = reference._answers(lambda item: len(tokenizer(*item.values(), **cutting)["input_ids"]), items)
    assert answers == [None, 1]
    assert [item for item, said in failures if "stride" in said] == items[:1]


def test_weights_that_nothing_reads_are_refused(compared, tmp_path):
    """ColBERT's projection, say, or a head where an embedding is asked for."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = TWINS["simcse"].make(tmp_path / "twin")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "linear.weight": torch.zeros(4, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no place for 1 of its weights \(linear\.weight\).*unused_weights: allow"
    ):
        compared(folder, "embedding", every=64)
    assert compared(folder, "embedding", every=64, unused_weights="allow").compared > 20


def test_a_checkpoint_without_modules_says_what_is_assumed(tmp_path):
    from resources.artifacts.store import ArtifactStore

    folder, store = TWINS["simcse"].make(tmp_path / "twin"), ArtifactStore(tmp_path / "artifacts")
    record = collect_checkpoint(entry_for(folder), store, LIMITS).record
    assert record.assumed == ("pooling: mean", "normalize: false")
    chosen = entry_for(folder, options={"pooling": "cls", "normalize": True, "max_tokens": 32})
    record = collect_checkpoint(chosen, store, LIMITS).record
    assert (record.assumed, record.max_tokens, record.settings["modes"]) == ((), 32, ["cls"])
    pooled(folder, "mean")
    with pytest.raises(CheckpointError, match=r"options\.pooling, and modules\.json says it as well"):
        collect_checkpoint(chosen, store, LIMITS)
