"""What front ends send beside text: token ids, and the second text of a pair; and how many tokens were read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tritonclient import grpc as api
from tritonclient.utils import InferenceServerException

from resources.pipelines.names import TOKEN_COUNT, TOKEN_IDS
from resources.pipelines.tokenization import TextEncoder
from resources.tasks import TASKS
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.native import play_native_backend
from tests.releases import make_task_plan, unasked

FIRST, SECOND = "Eggs are boiled for six minutes.", "How long are eggs boiled?"
TEXTS = {
    "reranking": {"QUERY": SECOND, "TEXT": FIRST},
    "question-answering": {"QUESTION": SECOND, "CONTEXT": FIRST},
    "zero-shot-classification": {"TEXT": FIRST, "LABELS": json.dumps(["food", "sport"])},
    "fill-mask": {"TEXT": "Eggs are boiled for [MASK] minutes."},
}
#: A native release, whose front is an ensemble around a tokenizer.
NATIVE = "native"


@pytest.fixture(scope="module")
def served(tmp_path_factory, triton_settings):
    """A client of one server with a release of every task, and their encoders."""
    folder, encoders = tmp_path_factory.mktemp("front"), {}
    with pytest.MonkeyPatch.context() as patch:
        play_native_backend(patch)
        for task in TASKS:
            plan = make_task_plan(folder / task, task)
            publish(plan, folder / "cpu", Steps(prove=unasked))
            encoders[task] = TextEncoder.from_folder(str(plan.checkpoint_folder))
        plan = replace(make_task_plan(folder / NATIVE, "embedding"), model=NATIVE, flavour="native")
        publish(plan, folder / "cpu", Steps(prove=unasked))
        encoders[NATIVE] = encoders["embedding"]
        models = [*TASKS, NATIVE]
        with (
            EmbeddedServer(folder / "cpu", triton_settings, models=models, log=folder / "log") as server,
            api.InferenceServerClient(server.grpc_address) as client,
        ):
            yield client, encoders


def infer(client, model, texts=(), ids=None, wanted=()):
    """The first output of a request of rows, and how many tokens each had."""
    tensors = []
    for name in texts[0] if texts else ():
        tensor = api.InferInput(name, [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[row[name].encode()] for row in texts], dtype=np.object_))
        tensors.append(tensor)
    if ids is not None:
        rows = np.array(ids, dtype=np.int64)
        tensor = api.InferInput(TOKEN_IDS, list(rows.shape), "INT64")
        tensor.set_data_from_numpy(rows)
        tensors.append(tensor)
    (output,) = {item.name for item in client.get_model_metadata(model).outputs} - {TOKEN_COUNT}
    names = wanted or (output, TOKEN_COUNT)
    found = client.infer(model, tensors, outputs=[api.InferRequestedOutput(name) for name in names])
    return tuple(found.as_numpy(name) for name in names)


def texts_of(task):
    return TEXTS.get(task, {"TEXT": FIRST})


def ids_of(encoders, task):
    """The request's texts as token ids, and what of the request is still text."""
    texts = texts_of(task)
    rest = {name: text for name, text in texts.items() if name == "LABELS"}
    (encoding,) = encoders[task].tokens([tuple(text for name, text in texts.items() if name not in rest)])
    return encoding.ids, rest


def same(task, found, expected):
    if found.dtype == np.float32:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        return
    for one, other in zip(found.ravel(), expected.ravel(), strict=True):
        got, wanted = json.loads(one), json.loads(other)
        # Places are those of the decoded text, which may have other spaces.
        assert _without_places(got) == _without_places(wanted), task


def _without_places(answer):
    if isinstance(answer, list):
        return [_without_places(one) for one in answer]
    if isinstance(answer, dict):
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in answer.items()
            if name not in ("start", "end", "answer", "sequence")
        }
    return answer


@pytest.mark.parametrize("model", [*TASKS, NATIVE])
def test_token_ids_are_answered_as_the_text_that_they_are_of(served, model):
    client, encoders = served
    task = "embedding" if model == NATIVE else model
    expected, count = infer(client, model, [texts_of(task)])
    ids, rest = ids_of(encoders, task)
    padded = [*ids, *[encoders[task].pad_id] * 3]
    found, read = infer(client, model, [rest] if rest else (), [padded])
    same(task, found, expected)
    # A label is another row of the same text.
    assert read.tolist() == count.tolist()
    if task != "zero-shot-classification":
        assert count.tolist() == [[len(ids)]]


@pytest.mark.parametrize("model", ["embedding", NATIVE])
def test_rows_of_token_ids_are_of_different_lengths(served, model):
    client, encoders = served
    texts = ["short", FIRST, "a " * 30]
    expected, counts = infer(client, model, [{"TEXT": text} for text in texts])
    rows = [encoding.ids for encoding in encoders["embedding"].tokens(texts)]
    longest = max(map(len, rows))
    found, read = infer(client, model, (), [[*row, *[0] * (longest - len(row))] for row in rows])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert read.tolist() == counts.tolist() == [[len(row)] for row in rows]


def test_a_long_text_counts_the_tokens_that_were_read(served):
    client, encoders = served
    limit = encoders["embedding"].max_tokens
    (count,) = infer(client, "embedding", [{"TEXT": "word " * 5000}], wanted=[TOKEN_COUNT])
    assert count.tolist() == [[limit]]
    # A text in windows is read more than once where they overlap.
    (count,) = infer(client, "token-classification", [{"TEXT": "eggs " * 1000}], wanted=[TOKEN_COUNT])
    assert count.tolist()[0][0] > 1000


def test_a_second_text_is_classified_with_the_first(served):
    client, encoders = served
    pair = {"TEXT": FIRST, "TEXT_PAIR": SECOND}
    (encoding,) = encoders["classification"].tokens([(FIRST, SECOND)])
    found, count = infer(client, "classification", [pair])
    by_ids, _ = infer(client, "classification", (), [encoding.ids])
    np.testing.assert_allclose(found, by_ids, rtol=0, atol=1e-6)
    assert count.tolist() == [[len(encoding)]]
    alone, _ = infer(client, "classification", [{"TEXT": FIRST}])
    assert abs(found - alone).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "texts", "ids", "said"),
    [
        ("classification", [{"TEXT_PAIR": SECOND}], None, "holds no TEXT, and no INPUT_IDS"),
        ("embedding", [{"TEXT": FIRST}], [[2, 5, 3]], "holds both TEXT and INPUT_IDS"),
        ("embedding", [], [[2, -1, 3]], "a token id that is not from 0 to"),
        ("embedding", [], [[2, 10**6, 3]], "a token id that is not from 0 to"),
        ("embedding", [], [[0, 0]], "a row without a token"),
        ("embedding", [], [[5] * 513], "at most 512 tokens"),
        (NATIVE, [], [[5] * 513], "at most 512 tokens"),
        (NATIVE, [], [[2, -1, 3]], "a token id that is not from 0 to"),
        ("reranking", [{"QUERY": SECOND}], None, "holds no TEXT"),
        ("question-answering", [], [[2, 5, 3]], "INPUT_IDS holds 1 texts; this model takes 2"),
        ("classification", [{"TEXT_PAIR": SECOND}], [[2, 5, 3]], "no TEXT_PAIR is taken"),
        ("zero-shot-classification", [], [[2, 5, 3]], "LABELS"),
    ],
)
def test_what_makes_no_request_is_the_clients_error(served, model, texts, ids, said):
    client, _ = served
    with pytest.raises(InferenceServerException) as caught:
        infer(client, model, texts, ids)
    assert said in str(caught.value)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_token_ids_of_no_text_are_refused_where_the_answer_is_about_a_text(served):
    """The piece of a word alone would be read as a word."""
    from tokenizers import Tokenizer

    client, encoders = served
    vocabulary = Tokenizer.from_file(encoders["token-classification"]._file).get_vocab()
    piece = next(number for token, number in vocabulary.items() if token.startswith("##"))
    infer(client, "embedding", (), [[2, piece, 3]])
    with pytest.raises(InferenceServerException, match="does not make of the text"):
        infer(client, "token-classification", (), [[2, piece, 3]])
