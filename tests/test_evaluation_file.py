"""A user's own evaluation file: what its lines may be, what is wrong with one, and the metrics of right answers."""

import json

import numpy as np
import pytest

from resources.catalog.loading import load_catalog
from resources.checkpoints.requests import evaluation_requests, require_answers, sampled_requests
from resources.errors import CatalogError
from resources.pipelines.numbers import TextPipeline
from resources.pipelines.tokenization import TextEncoder
from resources.tasks import TASKS
from resources.tasks.grading import exact_match, micro_f1, ndcg_at_10, spearman, word_f1
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_job

SOFTMAX = {"activation": "softmax", "labels": ["bad", "good"]}
SIGMOID = {"activation": "sigmoid", "labels": ["bad", "good"]}
VALUES = {"activation": "identity", "labels": ["score"]}
ENTITIES = {
    "labels": ["O", "B-PER", "I-PER", "LOC", "event-x"],
    "aggregation_strategy": "simple",
    "ignore_labels": ["O"],
}
TOKENS = {**ENTITIES, "aggregation_strategy": "none"}
MASK = {"mask_token": "[MASK]"}


@pytest.mark.parametrize(
    ("task", "settings", "line", "items", "right"),
    [
        ("embedding", {}, {"text": "a"}, [{"TEXT": "a"}], [None]),
        ("embedding", {}, {"text": "a", "pair": "b", "score": 3}, [{"TEXT": "a"}, {"TEXT": "b"}], [None, 3.0]),
        ("classification", SOFTMAX, {"text": "a", "label": "good"}, [{"TEXT": "a"}], [["good"]]),
        ("classification", SIGMOID, {"text": "a", "label": []}, [{"TEXT": "a"}], [[]]),
        ("classification", VALUES, {"text": "a", "label": 0.5}, [{"TEXT": "a"}], [0.5]),
        ("reranking", {}, {"query": "q", "text": "a", "relevance": 1}, [{"QUERY": "q", "TEXT": "a"}], [1.0]),
        (
            "token-classification",
            ENTITIES,
            {"text": "Sarah", "entities": [{"start": 0, "end": 5, "label": "PER"}]},
            [{"TEXT": "Sarah"}],
            [[[0, 5, "PER"]]],
        ),
        (
            "token-classification",
            TOKENS,
            {"text": "Sarah", "entities": [{"start": 0, "end": 5, "label": "B-PER"}]},
            [{"TEXT": "Sarah"}],
            [[[0, 5, "B-PER"]]],
        ),
        (
            "question-answering",
            {},
            {"question": "q", "context": "c", "answers": ["c"]},
            [{"QUESTION": "q", "CONTEXT": "c"}],
            [["c"]],
        ),
        (
            "zero-shot-classification",
            {},
            {"text": "a", "labels": ["x", "y"], "label": "y"},
            [{"TEXT": "a", "LABELS": '["x", "y"]'}],
            ["y"],
        ),
        ("fill-mask", MASK, {"text": "a [MASK]", "answer": "b"}, [{"TEXT": "a [MASK]"}], ["b"]),
    ],
)
def test_lines(task, settings, line, items, right):
    read = TASKS[task].read(settings, line)
    assert [item for item, _ in read] == items
    assert [answer for _, answer in read] == right


@pytest.mark.parametrize(
    ("task", "settings", "line", "said"),
    [
        ("embedding", {}, {"txt": "a"}, "'text' is not there"),
        ("embedding", {}, {"text": "a", "pair": "b", "score": "high"}, "'score' is no finite number: 'high'"),
        ("classification", SOFTMAX, {"text": "a", "label": "fair"}, "'label' is 'fair', and the labels are bad, good"),
        ("classification", SOFTMAX, {"text": "a", "label": ["good", "bad"]}, "exclude each other"),
        ("classification", VALUES, {"text": "a", "label": True}, "'label' is no finite number"),
        ("reranking", {}, {"text": "a"}, "'query' is not there"),
        ("token-classification", ENTITIES, {"text": "a", "entities": [{"start": 0}]}, "start, end and label"),
        ("token-classification", ENTITIES, {"text": "a", "entities": 3}, "start, end and label"),
        (
            "token-classification",
            ENTITIES,
            {"text": "a", "entities": [{"start": 0, "end": 1, "label": "B-PER"}]},
            "the labels are LOC, PER, x",
        ),
        ("question-answering", {}, {"question": "q", "context": "c", "answers": "c"}, "'answers' is not a list"),
        ("zero-shot-classification", {}, {"text": "a", "labels": []}, "'labels' is not there"),
        ("zero-shot-classification", {}, {"text": "a", "labels": ["x"], "label": "y"}, "the labels are x"),
        ("fill-mask", MASK, {"text": "a"}, r"holds no mask; write [MASK]"),
        ("fill-mask", MASK, {"text": "[MASK] [MASK]", "answer": "b"}, "holds 2 masks"),
        ("fill-mask", MASK, {"text": "[MASK] " * 101}, "holds 101 masks; give at most 100"),
        ("embedding", {}, {"text": "a", "score": 0.5}, "there is no 'pair'"),
        ("embedding", {}, {"text": "a", "pair": "b", "score": float("nan")}, "no finite number"),
        ("embedding", {}, {"text": "half \ud83d"}, "'text' holds half of a surrogate pair"),
        ("reranking", {}, {"query": "q", "text": "a", "relevance": -1}, "'relevance' is -1; the least is 0"),
        ("zero-shot-classification", {}, {"text": "a", "labels": ["x"] * 1001}, "more than 1000 labels"),
        ("zero-shot-classification", {}, {"text": "a", "labels": ["\ud800"]}, "half of a surrogate pair"),
        *(
            (
                "token-classification",
                ENTITIES,
                {"text": "Sarah", "entities": [{"start": start, "end": end, "label": "PER"}]},
                "which are no part of the text",
            )
            for start, end in ((-3, 5), (0, 6), (3, 3), (4, 2), (0.5, 5), (0, float("inf")), (True, 5))
        ),
    ],
)
def test_lines_that_are_wrong(task, settings, line, said):
    with pytest.raises(ValueError) as caught:
        TASKS[task].read(settings, line)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("task", "settings", "items", "right", "answers", "expected"),
    [
        (
            "classification",
            SOFTMAX,
            "aab",
            [["good"], ["bad"], None],
            [[0.1, 0.9], [0.4, 0.6], [1, 0]],
            {"accuracy": 0.5},
        ),
        # Three labels found, two of them right, of three that there are.
        ("classification", SIGMOID, "ab", [["good", "bad"], ["good"]], [[0.9, 0.9], [0.6, 0.2]], {"f1": 2 / 3}),
        ("classification", VALUES, "abc", [1.0, 2.0, 3.0], [[10], [30], [20]], {"spearman": 0.5}),
        (
            "question-answering",
            {},
            "ab",
            [["the Cat"], []],
            [{"answer": "cat!"}, {"answer": ""}],
            {"exact_match": 1, "f1": 1},
        ),
        ("question-answering", {}, "a", [["a black cat"]], [{"answer": "cat"}], {"exact_match": 0, "f1": 2 / 3}),
        ("zero-shot-classification", {}, "ab", ["x", "y"], [{"labels": ["x", "y"]}] * 2, {"accuracy": 0.5}),
        ("fill-mask", MASK, "ab", ["b", None], [[{"token_str": " b"}], [{"token_str": "c"}]], {"accuracy": 1.0}),
        (
            "token-classification",
            ENTITIES,
            "a",
            [[[0, 5, "PER"], [6, 9, "LOC"]]],
            [
                [
                    {"start": 0, "end": 5, "entity_group": "PER", "score": 1},
                    {"start": 6, "end": 8, "entity": "LOC", "score": 1},
                ]
            ],
            {"f1": 0.5},
        ),
    ],
)
def test_grades(task, settings, items, right, answers, expected):
    grades = TASKS[task].grade(settings, [{"TEXT": text} for text in items], right, answers)
    assert grades == pytest.approx(expected)
    nothing = [None] * len(right)
    assert TASKS[task].grade(settings, [{"TEXT": text} for text in items], nothing, answers) == {}


def test_pairs_are_graded_by_their_likeness():
    vectors = [np.array(vector, dtype=np.float32) for vector in ([1, 0], [1, 0], [1, 0], [0, 1], [1, 0], [1, 1])]
    items = [{"TEXT": str(number)} for number in range(6)]
    right = [None, 5.0, None, 1.0, None, 3.0]
    assert TASKS["embedding"].grade({}, items, right, vectors) == pytest.approx({"spearman": 1.0})
    assert TASKS["embedding"].grade({}, items, [None, 1.0, None, 5.0, None, 3.0], vectors)["spearman"] == pytest.approx(
        -1
    )


def test_the_measures_themselves():
    assert micro_f1([set()], [set()]) == 1.0
    assert spearman([1, 2, 3], [2, 4, 9]) == pytest.approx(1.0)
    # One text where it should be, the other second: 1 / log2(3).
    assert ndcg_at_10(["a", "a", "b", "b"], [1, 0, 0, 1], [0.9, 0.1, 0.9, 0.1]) == pytest.approx(
        (1 + 1 / np.log2(3)) / 2
    )
    assert np.isnan(ndcg_at_10(["a", "b"], [1, 0], [1, 1]))
    assert exact_match(["An apple."], "apple")
    assert not exact_match(["An apple."], "apples")
    assert word_f1([""], "") == 1.0


READERS = {
    "evaluation": lambda entry: evaluation_requests(entry, {}, 32),
    "sample": lambda entry: sampled_requests(entry, {}, most=1000),
}


@pytest.mark.parametrize("field", READERS)
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a"}', '{"text": '], "line 2: Expecting value"),
        (['{"text": "a"}', "", '["a"]'], "line 3: it is not a JSON object"),
        (['{"text": 3}'], "line 1: 'text' is not there, or is no text"),
        (
            ['{"text": "a", "lable": "b"}'],
            "line 1: 'lable' is not a field of embedding; its fields are text, pair, score",
        ),
        (['{"text": "a"}'] * 19, "holds 19 requests, but needs at least 20"),
        ([], "holds 0 requests"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path, lines, said, field):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(CatalogError) as caught:
        READERS[field](entry_for("/x", name="m", **{field: str(path)}))
    assert str(caught.value).startswith(f"m: {field}: {path}")
    assert said in str(caught.value)


@pytest.mark.parametrize("field", READERS)
def test_a_file_that_cannot_be_read(tmp_path, field):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n' * 30)
    for name in ("absent.jsonl", "latin.jsonl"):
        entry = entry_for("/x", name="m", **{field: str(tmp_path / name)})
        with pytest.raises(CatalogError, match=rf"m: {field}: .*{name} cannot be read"):
            READERS[field](entry)


def test_a_line_may_hold_unicode_s_line_separators(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} \u2028 \x85 end"}, ensure_ascii=False) for n in range(20)))
    items, _ = evaluation_requests(entry_for("/x", evaluation=str(path)), {}, 32)
    assert items[3] == {"TEXT": "3 \u2028 \x85 end"}


def test_the_file_lies_beside_the_models_file(tmp_path):
    (tmp_path / "models.yaml").write_text(
        "models:\n  - {name: m, source: org/model, task: embedding, evaluation: texts.jsonl}\n"
    )
    assert load_catalog(tmp_path / "models.yaml").get("m").evaluation == str(tmp_path / "texts.jsonl")


def test_right_answers_are_measured_for_every_engine(made_checkpoint, workspace, triton_settings, tmp_path):
    from dataclasses import replace

    ready = replace(workspace, triton=triton_settings)
    path = tmp_path / "mine.jsonl"
    lines = [{"text": f"text number {number} of {number * 7 % 11}", "label": "ab"[number % 2]} for number in range(24)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    # The same file says how long requests are: what is benchmarked and what serves follows from it.
    files = {"evaluation": str(path), "sample": str(path)}
    fields = {"task": "classification", "shapes": None, "engines": ["onnxruntime_fp32"], **files}
    add_entry(ready, entry_for(made_checkpoint(labels=("a", "b")), **fields))
    outcome = run_job(ready, "tiny")
    assert outcome.success, outcome.messages
    for asset in (("checkpoint",), ("champion", "cpu")):
        shown = outcome.metadata(*asset)
        assert shown["lengths"].startswith("![rows by tokens](data:image/png;base64,")
        assert "its own buckets: 16, 64 |" in shown["padding"]
    timed = {name for name in outcome.metadata("benchmarks", "cpu", "onnxruntime_fp32") if name.startswith("speedup_")}
    assert timed == {"speedup_1x16", "speedup_8x16"}
    own = outcome.metadata("benchmarks", "cpu", "torch")["accuracy"]
    assert 0 < own["accuracy"] < 1
    assert outcome.metadata("benchmarks", "cpu", "onnxruntime_fp32")["accuracy"]["accuracy"] == own["accuracy"]
    assert outcome.metadata("evaluation_set")["requests"] == 24
    from mlflow import MlflowClient

    client = MlflowClient(ready.mlflow_uri())
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.data.metrics.get("accuracy.accuracy") for run in runs if "mlflow.parentRunId" in run.data.tags} == {
        own["accuracy"]
    }


def test_a_request_that_a_release_would_refuse_is_said_before_anything_is_built(minilm):
    encoder = TextEncoder(str(minilm / "tokenizer.json"), max_tokens=64, inputs=["input_ids"], pad_id=0)
    with pytest.raises(
        CatalogError, match=r"m: evaluation: request 2 would be refused: the first 32768 of .*shorten it"
    ):
        require_answers("m", "evaluation", TextPipeline(encoder, {}), [{"TEXT": "fine"}, {"TEXT": "a" * 50_000}])
