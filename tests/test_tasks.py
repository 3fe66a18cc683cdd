"""The tasks' arithmetic is that of the libraries people trained with, and their gates can be missed."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from resources.checkpoints.validation import validate
from resources.errors import CatalogError, CheckpointError
from resources.tasks import TASKS, CheckpointFiles, SpecialTokens
from resources.tasks.base import broken_answers
from resources.tasks.embedding import Pooling, read_pooling
from resources.tasks.heads import classifier
from resources.tasks.samples import sample_texts
from tests.checkpoints import edit_json
from tests.conftest import entry_for

EMBEDDING = TASKS["embedding"]
CLASSES = TASKS["classification"]
CLASSES_GATED = CLASSES.gate_names({"activation": "softmax"})


def files_of(folder, name="m"):
    return CheckpointFiles(name, folder, json.loads((folder / "config.json").read_text()))


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

    texts = [text for text in sample_texts() if len(text) < 200][:24]
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts, batch_size=24)
    found = run(EMBEDDING.module(files_of(minilm)), minilm, texts)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        {"pooling_mode_lasttoken": True},
        {"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_sqrt_len_tokens": True},
        {},
    ],
)
def test_pooling_is_sentence_transformers_own(own_checkpoint, pooling, normalize):
    from sentence_transformers import SentenceTransformer

    folder = with_pooling(own_checkpoint(), pooling, normalize)
    texts = ["short", "a longer text with several words in it", ""]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    found = run(EMBEDDING.module(files_of(folder)), folder, texts)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modes", ["cls", ["mean", "cls"], ["max", "mean"]])
def test_what_sentence_transformers_writes_today_is_read_as_it_reads_it(own_checkpoint, tmp_path, modes):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(own_checkpoint()))
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode=modes), Normalize()], device="cpu")
    folder = tmp_path / "saved"
    model.save(str(folder))
    texts = ["short", "a longer text with several words in it"]
    EMBEDDING.check(files_of(folder))
    found = run(EMBEDDING.module(files_of(folder)), folder, texts)
    np.testing.assert_allclose(found, model.encode(texts), rtol=1e-4, atol=1e-5)


def test_pooling_without_a_configuration_is_the_mean(own_checkpoint):
    assert read_pooling(files_of(own_checkpoint())) == Pooling(("mean",), normalize=False)


@pytest.mark.parametrize("field", ["cls", "max", "mean"])
def test_newer_configurations_name_the_mode(own_checkpoint, field):
    folder = with_pooling(own_checkpoint(), {"pooling_mode": field})
    assert read_pooling(files_of(folder)).modes == (field,)


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_mean_tokens": True, "pooling_mode_middletoken": True},
        {"pooling_mode": "middletoken"},
        {"pooling_mode": ["mean", "middletoken"]},
        {"pooling_mode": None},
    ],
)
def test_other_pooling_is_refused(own_checkpoint, pooling):
    with pytest.raises(CheckpointError, match="only cls, max, mean, .* are served"):
        read_pooling(files_of(with_pooling(own_checkpoint(), pooling)))


MEAN = {"pooling_mode_mean_tokens": True}


def test_a_pooling_field_that_sentence_transformers_does_not_have_is_refused(own_checkpoint):
    folder = with_pooling(own_checkpoint(), {"pooling_mode_mean_tokens": True, "weights": [1, 2]})
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: .* no field weights"):
        read_pooling(files_of(folder))


def test_weights_of_a_module_are_refused_unless_they_are_allowed(own_checkpoint):
    folder = with_pooling(own_checkpoint(), {})
    (folder / "1_Pooling" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"1_Pooling/model\.safetensors.*unused_weights: allow"):
        validate(entry_for(folder), folder)
    validate(entry_for(folder, unused_weights="allow"), folder)


@pytest.mark.parametrize(
    ("given", "refused"),
    [(["PER"], False), (["B-PER", "O"], False), ([], False), (["PEOPLE"], True), (["O", "per"], True)],
)
def test_labels_to_ignore_are_labels_of_the_model(made_checkpoint, given, refused):
    folder = made_checkpoint(head="tokens", labels=("O", "B-PER", "I-PER"))
    task = TASKS["token-classification"]
    options, tokens = task.options.model_validate({"ignore_labels": given}), SpecialTokens(pad_id=0)
    expectation = pytest.raises(CatalogError, match=r"options\.ignore_labels: '(PEOPLE|per)' is none of")
    with expectation if refused else nullcontext():
        assert task.settings(files_of(folder), options, tokens)["ignore_labels"] == given


def test_the_usual_label_to_ignore_need_not_be_there(made_checkpoint):
    folder = made_checkpoint(head="tokens", labels=("NN", "VB"))
    task = TASKS["token-classification"]
    assert task.settings(files_of(folder), task.options(), SpecialTokens(pad_id=0))["ignore_labels"] == ["O"]


@pytest.mark.parametrize("kind", ["sentence_transformers.models.Dense", "custom_st.Transformer", "Transformer", None])
def test_modules_of_other_kinds_are_refused(own_checkpoint, kind):
    folder = with_pooling(own_checkpoint(), MEAN)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Other", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=f"m: modules.json names a module {kind}, and of"):
        EMBEDDING.check(files_of(folder))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("modules.json", "{", "modules.json cannot be read.*Copy the checkpoint again"),
        ("modules.json", "{}", "modules.json holds no JSON list"),
        ("1_Pooling/config.json", "[]", "1_Pooling/config.json holds no JSON dict"),
        ("config_sentence_transformers.json", '{"truncate_dim": "8"}', "truncate_dim: '8' is not a number"),
        ("config_sentence_transformers.json", '{"model_type": "SparseEncoder"}', "it is a SparseEncoder"),
        ("sentence_bert_config.json", '{"processing_kwargs": {"text": {"padding": "max_length"}}}', "text changes how"),
        ("sentence_bert_config.json", '{"config_args": {"hidden_act": "relu"}}', "config_args: hidden_act changes how"),
        ("sentence_roberta_config.json", '{"do_lower_case": true}', "sentence_roberta_config.json turns every text"),
        (
            "config_sentence_transformers.json",
            '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}',
            "puts the prompt 'query' before every text",
        ),
        ("sentence_bert_config.json", '{"max_seq_length": 64, "do_lower_case": true}', "do_lower_case"),
    ],
)
def test_configurations_that_are_not_served_are_refused(own_checkpoint, name, text, message):
    folder = with_pooling(own_checkpoint(), MEAN)
    EMBEDDING.check(files_of(folder))
    edit_json(folder / "tokenizer.json", normalizer=None)  # else it turns texts into lower case by itself
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        EMBEDDING.check(files_of(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config_sentence_transformers.json", '{"prompts": {"query": "query: "}, "default_prompt_name": null}'),
        ("config_sentence_transformers.json", '{"prompts": {"document": ""}, "default_prompt_name": "document"}'),
        ("1_Pooling/config.json", '{"pooling_mode": "mean", "include_prompt": false}'),
        ("sentence_bert_config.json", '{"model_args": {"torch_dtype": "float16"}, "tokenizer_args": {}}'),
    ],
)
def test_prompts_that_change_nothing_are_no_obstacle(own_checkpoint, name, text):
    folder = with_pooling(own_checkpoint(), MEAN)
    (folder / name).write_text(text)
    EMBEDDING.check(files_of(folder))


def test_a_tokenizer_that_lowers_by_itself_needs_nobody_else_to(own_checkpoint):
    folder = with_pooling(own_checkpoint(), MEAN)
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    edit_json(folder / "tokenizer_config.json", do_lower_case=True)
    EMBEDDING.check(files_of(folder))


@pytest.mark.parametrize(
    "change",
    [{"architectures": ["GPT2LMHeadModel"]}, {"architectures": ["LlamaForCausalLM"]}, {"is_encoder_decoder": True}],
)
def test_decoders_do_not_embed(own_checkpoint, change):
    folder = own_checkpoint()
    edit_json(folder / "config.json", **change)
    with pytest.raises(CheckpointError, match="task 'embedding' needs an encoder"):
        EMBEDDING.check(files_of(folder))


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
    found = run(CLASSES.module(files_of(folder)), folder, texts)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert CLASSES.labels(files_of(folder)) == ("a", "b", "c")


def test_regression_gives_the_logits_and_is_judged_by_their_spread(made_checkpoint):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = made_checkpoint(labels=("score",), problem_type="regression")
    batch = AutoTokenizer.from_pretrained(folder)(["one text", "another"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch).logits
    found = run(CLASSES.module(files_of(folder)), folder, ["one text", "another"])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert CLASSES.output(files_of(folder)) == "values"
    baseline = np.array([[100.0], [102.0], [104.0]])
    assert verdict(CLASSES, baseline, baseline + 0.05, activation="identity") == []
    (missed,) = verdict(CLASSES, baseline, baseline + 0.1, activation="identity")
    assert missed.startswith("value_error")


def test_texts_and_pairs_are_classified_together_by_a_model_that_reads_the_end_token(made_checkpoint):
    """transformers refuses a batch whose rows have unequally many end tokens; alone it classifies each."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = made_checkpoint(architecture="bart", head="sequence", labels=("no", "yes"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [tokenizer("a text"), tokenizer("another, longer text"), tokenizer("a text", "and its pair")]
    batch = tokenizer.pad(
        {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask")}, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = [model(**{name: torch.tensor([value]) for name, value in row.items()}).logits[0] for row in rows]
        with pytest.raises(ValueError, match="same number of <eos> tokens"):
            model(**batch)
        found = classifier(model, "identity")(**batch)
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-4)


def test_a_checkpoint_without_a_head_does_not_classify(own_checkpoint):
    with pytest.raises(CheckpointError, match="classification head, and this one is a BertModel"):
        CLASSES.check(files_of(own_checkpoint()))


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {"10": "k", "2": "c", "0": "a"}, "num_labels": 11}, {0: "a", 2: "c", 3: "LABEL_3", 10: "k"}),
        ({"id2label": {"1": "b", "0": "a"}}, {0: "a", 1: "b"}),
        ({"num_labels": 3}, {0: "LABEL_0", 2: "LABEL_2"}),
        ({}, {0: "LABEL_0", 1: "LABEL_1"}),
    ],
)
def test_labels_are_in_the_order_of_the_columns(tmp_path, config, labels):
    found = CLASSES.labels(CheckpointFiles("m", tmp_path, config))
    assert len(found) == max(labels) + 1
    assert {index: found[index] for index in labels} == labels


@pytest.mark.parametrize("table", [{"zero": "a", "one": "b"}, ["a", "b"]])
def test_labels_that_are_not_numbered_are_refused(tmp_path, table):
    with pytest.raises(CheckpointError, match="m: config.json, id2label"):
        CLASSES.labels(CheckpointFiles("m", tmp_path, {"id2label": table}))


def test_missing_weights_are_refused_not_invented(own_checkpoint):
    folder = own_checkpoint()
    edit_json(folder / "config.json", architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b"})
    with pytest.raises(CheckpointError, match=r"m: the checkpoint lacks 2 weights.*classifier"):
        CLASSES.module(files_of(folder))


def without_pooler(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler." not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_pooler_may_be_missing_where_nothing_reads_it(own_checkpoint):
    folder = own_checkpoint()
    texts = ["short", "a longer text"]
    before = run(EMBEDDING.module(files_of(folder)), folder, texts)
    np.testing.assert_array_equal(run(EMBEDDING.module(files_of(without_pooler(folder))), folder, texts), before)


def test_a_pooler_may_not_be_missing_where_the_head_reads_it(own_checkpoint):
    with pytest.raises(CheckpointError, match=r"m: the checkpoint lacks 2 weights.*bert\.pooler\.dense"):
        CLASSES.module(files_of(without_pooler(own_checkpoint(labels=("a", "b")))))


def test_weights_of_another_shape_are_refused(own_checkpoint):
    folder = own_checkpoint()
    edit_json(folder / "config.json", intermediate_size=48)
    message = (
        r"m: 6 weights .* the first being encoder\.layer\.0\.intermediate\.dense\.bias with \[64\] where BertModel"
    )
    with pytest.raises(CheckpointError, match=message):
        EMBEDDING.module(files_of(folder))


def items_of(rows):
    return [{"TEXT": f"text {row}"} for row in range(rows)]


def verdict(task, baseline, answers, **settings):
    """The gates that are missed."""
    items, baseline, answers = items_of(len(baseline)), list(baseline), list(answers)
    broken = broken_answers(baseline, answers)
    if broken:
        return [broken]
    return task.misses(task.gate_names(settings), task.compare(settings, items, baseline, answers), task.gates())


def unit(rows, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda x: x, []),
        (lambda x: x + 1e-4, []),
        (lambda x: x[::-1], ["cosine_mean", "cosine_worst", "neighbours"]),
        (lambda x: np.concatenate([x[:-1], x[:1]]), ["cosine_mean", "cosine_worst"]),
        (lambda x: x * 1.2, ["norm_error"]),
        (lambda x: x[:, :8], ["shape"]),
        (lambda x: x[:5], ["5 answers where PyTorch gives 20"]),
        (lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x), ["NaN or infinity in the answers to 1 of 20"]),
        (lambda x: x * 0, ["cosine_mean", "cosine_worst", "neighbours", "norm_error"]),
    ],
)
def test_embedding_gates(change, missed):
    baseline = unit(20)
    found = verdict(EMBEDDING, baseline, change(baseline).astype(np.float32))
    assert len(found) == len(missed)
    assert all(part in sentence for part, sentence in zip(missed, found, strict=True))


def test_permuted_rows_are_found_even_among_similar_texts():
    baseline = unit(1).repeat(20, axis=0) + unit(20, 1) * 0.2
    swapped = baseline[[1, 0, *range(2, 20)]]
    found = verdict(EMBEDDING, baseline, swapped)
    assert any("cosine_worst" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("metrics", "missed"),
    [
        ({"cosine_mean": 0.995, "cosine_worst": 0.99, "neighbours": 0.95, "norm_error": 0.1}, []),
        ({"cosine_mean": 0.99499, "cosine_worst": 0.99, "neighbours": 0.95, "norm_error": 0.1}, ["cosine_mean"]),
        ({"cosine_mean": 0.995, "cosine_worst": 0.98999, "neighbours": 0.95, "norm_error": 0.1}, ["cosine_worst"]),
        ({"cosine_mean": 0.995, "cosine_worst": 0.99, "neighbours": 0.95, "norm_error": 0.10001}, ["norm_error"]),
        (
            {"cosine_mean": 0.995, "cosine_worst": 0.99, "neighbours": 0.94999, "norm_error": 0.1},
            ["neighbours"],
        ),
        (dict.fromkeys(EMBEDDING.gates.model_fields, np.nan), [*EMBEDDING.gates.model_fields]),
    ],
)
def test_embedding_gates_to_the_last_digit(metrics, missed):
    assert [
        sentence.split()[0] for sentence in EMBEDDING.misses(EMBEDDING.gate_names({}), metrics, EMBEDDING.gates())
    ] == missed


@pytest.mark.parametrize(
    ("metrics", "missed"),
    [
        ({"label_agreement": 0.99, "probability_error": 0.05}, []),
        ({"label_agreement": 0.98999, "probability_error": 0.05}, ["label_agreement"]),
        ({"label_agreement": 0.99, "probability_error": 0.05001}, ["probability_error"]),
        (dict.fromkeys(CLASSES_GATED, np.nan), [*CLASSES_GATED]),
    ],
)
def test_classification_gates_to_the_last_digit(metrics, missed):
    assert [sentence.split()[0] for sentence in CLASSES.misses(CLASSES_GATED, metrics, CLASSES.gates())] == missed


def test_a_part_of_the_items_is_not_held_to_more_than_the_whole():
    # The gate allows 3 of 320 to differ, and all of them may be among the 96 that are asked; a fourth one may not.
    gates = CLASSES.gates()
    part = gates.for_some(96 / 320)
    kept, missed = ({"label_agreement": 1 - wrong / 96, "probability_error": 0.05} for wrong in (3, 4))
    assert CLASSES.misses(CLASSES_GATED, kept, gates)
    assert not CLASSES.misses(CLASSES_GATED, kept, part)
    assert "label_agreement" in CLASSES.misses(CLASSES_GATED, missed, part)[0]
    assert gates.for_some(1.0).label_agreement == pytest.approx(gates.label_agreement)
    one_more = gates.for_some(96 / 320, chance=1 / 320)
    assert not CLASSES.misses(CLASSES_GATED, missed, one_more)
    assert CLASSES.misses(CLASSES_GATED, {**missed, "label_agreement": 1 - 5 / 96}, one_more)
    # The worst item is the worst of any part that it is in.
    assert part.probability_error == gates.probability_error
    embedding = EMBEDDING.gates().for_some(0.5)
    assert (embedding.cosine_worst, embedding.cosine_mean) == (0.99, pytest.approx(0.99))


def test_tightened_gates_keep_some_of_the_way_to_perfect_answers():
    gates = EMBEDDING.gates().tightened(0.2)
    assert (gates.cosine_mean, gates.cosine_worst) == (pytest.approx(0.996), pytest.approx(0.992))
    assert gates.norm_error == pytest.approx(0.08)
    assert EMBEDDING.gates(cosine_worst=1.0).tightened(0.2).cosine_worst == 1.0


def test_gates_can_be_changed():
    metrics = {"cosine_mean": 0.9991, "cosine_worst": 0.995, "neighbours": 0.95, "norm_error": 0.01}
    assert EMBEDDING.misses(EMBEDDING.gate_names({}), metrics, EMBEDDING.gates()) == []
    (missed,) = EMBEDDING.misses(EMBEDDING.gate_names({}), metrics, EMBEDDING.gates(cosine_mean=0.9995))
    assert missed == "cosine_mean 0.99910 is below 0.9995"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_nothing_is_accurate_against_a_broken_reference(task):
    answers = unit(3)
    for value in (np.nan, np.inf):
        baseline = np.where(np.arange(3)[:, None] == 1, np.float32(value), answers)
        assert verdict(task, baseline, answers) == ["NaN or infinity in PyTorch's answers to 1 of 3 texts"]
    assert verdict(task, answers[:0], answers[:0]) == ["no answers to compare"]


def test_worst_cosine_is_of_the_worst_text():
    baseline = unit(4)
    answers = baseline.copy()
    answers[2] = baseline[2] * 0.5 + unit(4, 1)[2] * 0.5
    scores = EMBEDDING.scores({}, baseline, answers)
    assert int(scores.argmin()) == 2
    assert EMBEDDING.compare({}, items_of(4), baseline, answers)["cosine_worst"] == pytest.approx(scores[2])


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
    baseline = np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    found = verdict(CLASSES, baseline, np.array(answers, dtype=np.float32), activation="softmax")
    assert [sentence.split()[0] for sentence in found] == missed


def test_multi_label_agreement_is_by_label():
    baseline = np.array([[0.9, 0.8, 0.1]], dtype=np.float32)
    answers = np.array([[0.9, 0.49, 0.1]], dtype=np.float32)
    assert CLASSES.compare({"activation": "sigmoid"}, items_of(1), baseline, answers)["label_agreement"] == 0.0
    # The best label alone is the same.
    assert CLASSES.compare({"activation": "softmax"}, items_of(1), baseline, answers)["label_agreement"] == 1.0


def entity(start, end, kind="PER", score=0.9):
    return {"entity_group": kind, "score": score, "start": start, "end": end, "word": "x"}


def span(start, end, score=0.9):
    return {"answer": "x", "score": score, "start": start, "end": end}


def candidate(token, score):
    return {"token": token, "score": score, "token_str": "x", "sequence": "x"}


def ranked(*pairs):
    return {"labels": [label for label, _ in pairs], "scores": [score for _, score in pairs]}


#: Of fifty answers the last is changed: into what, and which gates that misses.
CHANGES = {
    "token-classification": (
        [entity(0, 5), entity(8, 12, "LOC")],
        [
            ([entity(0, 5, score=0.86), entity(8, 12, "LOC")], []),
            ([entity(0, 5, score=0.84), entity(8, 12, "LOC")], ["score_error"]),
            ([entity(0, 5), entity(8, 12)], []),  # one kind of a hundred
            ([entity(0, 4), entity(8, 11, "LOC"), entity(13, 14)], ["entity_agreement"]),
            ([], []),  # two of a hundred: .9899
        ],
    ),
    "question-answering": (
        span(3, 9),
        [
            (span(3, 9, 0.86), []),
            (span(3, 9, 0.84), ["score_error"]),
            (span(3, 10), []),  # one of fifty is what the gate allows
        ],
    ),
    "zero-shot-classification": (
        ranked(("a", 0.6), ("b", 0.4)),
        [
            (ranked(("a", 0.57), ("b", 0.43)), []),
            (ranked(("a", 0.54), ("b", 0.46)), ["score_error"]),
            (ranked(("b", 0.51), ("a", 0.49)), ["label_agreement", "score_error"]),
        ],
    ),
    "fill-mask": (
        [candidate(7, 0.6), candidate(8, 0.3)],
        [
            ([candidate(7, 0.56), candidate(8, 0.33)], []),
            ([candidate(7, 0.54), candidate(8, 0.3)], ["score_error"]),
            ([candidate(8, 0.5), candidate(7, 0.4)], ["score_error"]),
            ([candidate(1, 0.6), candidate(2, 0.3)], []),  # one of fifty, and no score that both have
        ],
    ),
}


@pytest.mark.parametrize(
    ("task", "usual", "changed", "missed"),
    [(task, usual, changed, missed) for task, (usual, cases) in CHANGES.items() for changed, missed in cases],
)
def test_gates_of_every_task(task, usual, changed, missed):
    found = verdict(TASKS[task], [usual] * 50, [usual] * 49 + [changed])
    assert [sentence.split()[0] for sentence in found] == missed


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "fill-mask"])
def test_two_wrong_answers_of_fifty_miss_the_agreement(task):
    usual, cases = CHANGES[task]
    wrong = {"token-classification": [], "question-answering": span(0, 1), "fill-mask": [candidate(1, 0.6)]}[task]
    found = verdict(TASKS[task], [usual] * 50, [*[usual] * 48, wrong, wrong])
    assert len(found) == 1 and "agreement 0.9" in found[0], cases


def test_order_agreement_is_of_pairs_of_one_query():
    from resources.tasks.reranking import order_agreement

    expected = np.array([0.9, 0.5, 0.1, 0.2, 0.8])
    queries = ["a", "a", "a", "b", "b"]
    assert order_agreement(queries, expected, expected) == 1.0
    assert order_agreement(queries, expected, np.array([0.5, 0.9, 0.1, 0.2, 0.8])) == pytest.approx(3 / 4)
    task, items = TASKS["reranking"], [{"QUERY": query, "TEXT": "t"} for query in queries]
    for moved, missed in ((0.03, []), (0.05, ["score_error"])):
        found = expected + np.array([moved, 0, 0, 0, 0])
        metrics = task.compare({}, items, list(expected[:, None]), list(found[:, None]))
        assert [said.split()[0] for said in task.misses(task.gate_names({}), metrics, task.gates())] == missed
    # Across queries nothing is compared.
    assert order_agreement(queries, expected, expected + np.array([0, 0, 0, 5, 5])) == 1.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", CHANGES)
def test_numbers_inside_of_documents_have_to_be_finite(task, number):
    usual = CHANGES[task][0]
    text = json.dumps(usual).replace("0.9", "1e999").replace("0.6", "1e999")
    broken = json.loads(text, parse_float=lambda digits: number if digits == "1e999" else float(digits))
    assert verdict(TASKS[task], [usual] * 3, [usual, broken, usual]) == [
        "NaN or infinity in the answers to 1 of 3 texts"
    ]


def test_each_column_of_a_regression_is_judged_by_its_own_spread():
    rng = np.random.default_rng(0)
    baseline = rng.normal(size=(100, 2)).astype(np.float32) * [200, 1]
    answers = baseline * [1, -1]
    (missed,) = verdict(CLASSES, baseline, answers, activation="identity")
    assert missed.startswith("value_error")


def test_too_few_entities_judge_nothing():
    task = TASKS["token-classification"]
    assert task.too_little({}, [[entity(0, 5)]] * 20) == ""
    said = task.too_little({}, [[]] * 300 + [[entity(0, 5)]] * 19)
    assert said == "PyTorch finds 19 entities in all of the 319 texts, and 20 are needed"


@pytest.mark.parametrize("template", ["no label", "{{}}", "{} {name}", "{} {}", "{{}} {", "{0.x}"])
def test_templates_that_take_no_label_are_refused(template):
    from pydantic import ValidationError

    options = TASKS["zero-shot-classification"].options
    with pytest.raises(ValidationError, match="hypothesis_template"):
        options(hypothesis_template=template)
    assert options(hypothesis_template="Es geht um {}.").hypothesis_template == "Es geht um {}."


@pytest.mark.parametrize("activation", ["Identity", "Sigmoid"])
def test_a_cross_encoder_saved_by_its_own_library_keeps_its_activation(made_checkpoint, tmp_path, activation):
    from sentence_transformers import CrossEncoder

    from resources.tasks.reranking import activation as activation_of

    source = made_checkpoint(head="sequence", labels=("x",))
    saved = CrossEncoder(str(source), device="cpu", activation_fn=getattr(torch.nn, activation)())
    saved.save_pretrained(str(tmp_path / "saved"))
    TASKS["reranking"].check(files_of(tmp_path / "saved"))
    assert activation_of(files_of(tmp_path / "saved")) == activation.lower()
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(again.activation_fn).__name__ == activation


def test_a_cross_encoder_with_a_prompt_or_two_outputs_is_refused(own_checkpoint):
    folder = own_checkpoint(head="sequence", labels=("x",))
    task = TASKS["reranking"]
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "ask: "}, "default_prompt_name": "query"})
    )
    with pytest.raises(CheckpointError, match="puts the prompt 'query' before every text"):
        task.check(files_of(folder))
    (folder / "config_sentence_transformers.json").unlink()
    task.check(files_of(folder))
    edit_json(folder / "config.json", id2label=None, label2id=None, num_labels=None)
    with pytest.raises(CheckpointError, match="one output, and this checkpoint has 2"):
        task.check(files_of(folder))


def test_every_masked_text_has_words_beside_its_masks():
    from resources.tasks.samples import masked_items

    texts = [item["TEXT"] for item in masked_items("[MASK]", 32)]
    assert len(texts) > 140
    assert all(text.replace("[MASK]", "").strip() for text in texts)
