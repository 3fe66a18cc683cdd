"""The tasks' arithmetic is that of the libraries people trained with, and their gates can be missed."""

import json

import numpy as np
import pytest
import torch

from resources.errors import CheckpointError
from resources.evaluation.texts import load_texts
from resources.tasks import TASKS, CheckpointFiles
from resources.tasks.embedding import Pooling, read_pooling
from tests.checkpoints import edit_json


def files_of(folder, name="m"):
    return CheckpointFiles(name, folder, json.loads((folder / "config.json").read_text()), frozenset())


def run(module, folder, texts):
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, return_tensors="pt", truncation=True, max_length=60
    )
    with torch.inference_mode():
        return module(**batch).numpy()


def with_pooling(folder, pooling, normalize=False):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_real_checkpoint_embeds_as_sentence_transformers_does(minilm):
    from sentence_transformers import SentenceTransformer

    texts = [text for text in load_texts() if len(text) < 200][:24]
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts, batch_size=24)
    found = run(TASKS["embedding"].module(files_of(minilm)), minilm, texts)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
    ],
)
def test_pooling_is_sentence_transformers_own(own_checkpoint, pooling, normalize):
    from sentence_transformers import SentenceTransformer

    folder = with_pooling(own_checkpoint(), pooling, normalize)
    texts = ["short", "a longer text with several words in it", ""]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    found = run(TASKS["embedding"].module(files_of(folder)), folder, texts)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_pooling_without_a_configuration_is_the_mean(own_checkpoint):
    assert read_pooling(files_of(own_checkpoint())) == Pooling(("mean",), normalize=False)


@pytest.mark.parametrize("field", ["cls", "max", "mean"])
def test_newer_configurations_name_the_mode(own_checkpoint, field):
    folder = with_pooling(own_checkpoint(), {"pooling_mode": field})
    assert read_pooling(files_of(folder)).modes == (field,)


@pytest.mark.parametrize("pooling", [{"pooling_mode_lasttoken": True}, {"pooling_mode": "weightedmean"}, {}])
def test_other_pooling_is_refused(own_checkpoint, pooling):
    with pytest.raises(CheckpointError, match="only mean, cls and max are served"):
        read_pooling(files_of(with_pooling(own_checkpoint(), pooling)))


def test_dense_layer_is_refused(own_checkpoint):
    folder = with_pooling(own_checkpoint(), {"pooling_mode_mean_tokens": True})
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="Dense"):
        TASKS["embedding"].check(files_of(folder))


@pytest.mark.parametrize(
    ("problem", "activation"),
    [("single_label_classification", torch.softmax), ("multi_label_classification", None)],
)
def test_classification_is_softmax_or_sigmoid(made_checkpoint, problem, activation):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = made_checkpoint(labels=("a", "b", "c"), problem_type=problem)
    texts = ["one text", "another, rather different"]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch).logits
    expected = activation(logits, -1) if activation else torch.sigmoid(logits)
    found = run(TASKS["classification"].module(files_of(folder)), folder, texts)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert TASKS["classification"].labels(files_of(folder)) == ("a", "b", "c")


def test_regression_is_refused(own_checkpoint):
    folder = own_checkpoint(labels=("score", "unused"))
    edit_json(folder / "config.json", problem_type="regression", id2label={"0": "score"})
    with pytest.raises(CheckpointError, match="regression"):
        TASKS["classification"].check(files_of(folder))


def test_missing_weights_are_refused_not_invented(own_checkpoint):
    folder = own_checkpoint()
    edit_json(folder / "config.json", architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b"})
    with pytest.raises(CheckpointError, match=r"m: the checkpoint lacks 2 weights.*classifier"):
        TASKS["classification"].module(files_of(folder))


def unit(rows, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


EMBEDDING = TASKS["embedding"]
CLASSES = TASKS["classification"]


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda x: x, []),
        (lambda x: x + 1e-4, []),
        (lambda x: x[::-1], ["cosine_mean", "cosine_worst"]),
        (lambda x: np.concatenate([x[:-1], x[:1]]), ["cosine_mean", "cosine_worst"]),
        (lambda x: x * 1.2, ["norm_error"]),
        (lambda x: x[:, :8], ["shape"]),
        (lambda x: x[:5], ["shape"]),
        (lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x), ["NaN or infinity in the answers to 1 of 20"]),
        (lambda x: x * 0, ["cosine_mean", "cosine_worst", "norm_error"]),
    ],
)
def test_embedding_gates(change, missed):
    reference = unit(20)
    _, found = EMBEDDING.verdict(reference, change(reference).astype(np.float32), EMBEDDING.gates())
    assert len(found) == len(missed)
    assert all(part in sentence for part, sentence in zip(missed, found, strict=True))


def test_worst_cosine_is_of_the_worst_text():
    reference = unit(4)
    answers = reference.copy()
    answers[2] = reference[2] * 0.5 + unit(4, 1)[2] * 0.5
    scores = EMBEDDING.scores(reference, answers)
    assert int(scores.argmin()) == 2
    assert EMBEDDING.compare(reference, answers)["cosine_worst"] == pytest.approx(scores[2])


@pytest.mark.parametrize(
    ("answers", "missed"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], []),
        ([[0.88, 0.12], [0.24, 0.76]], []),
        ([[0.9, 0.1], [0.51, 0.49]], ["label_agreement", "probability_error"]),
        ([[0.84, 0.16], [0.2, 0.8]], ["probability_error"]),
    ],
)
def test_classification_gates(answers, missed):
    reference = np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    _, found = CLASSES.verdict(reference, np.array(answers, dtype=np.float32), CLASSES.gates())
    assert [sentence.split()[0] for sentence in found] == missed


def test_multi_label_agreement_is_by_label():
    reference = np.array([[0.9, 0.8, 0.1]], dtype=np.float32)
    assert CLASSES.compare(reference, np.array([[0.9, 0.49, 0.1]], dtype=np.float32))["label_agreement"] == 0.0
