"""A checkpoint's task is told from its small files, and what nothing here serves is refused with the true reason."""

import json

import pytest

from resources.checkpoints.kinds import head_of, read_config, task_of, why_of_no_use

SEQUENCE = "ForSequenceClassification"
ONE = {"0": "LABEL_0"}
POOLED = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]


def write(folder, config, files):
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def labels(*names):
    return {str(number): name for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("task", "config", "files"),
    [
        ("zero-shot-classification", {"architectures": [f"Bart{SEQUENCE}"], "id2label": labels("x", "ENTAILMENT")}, {}),
        ("zero-shot-classification", {"architectures": [f"Bert{SEQUENCE}"], "id2label": labels("entail", "not")}, {}),
        ("classification", {"architectures": [f"Bert{SEQUENCE}"], "id2label": labels("NEGATIVE", "POSITIVE")}, {}),
        # cross-encoder/ms-marco-MiniLM-L6-v2, one saved by sentence-transformers 6, and BAAI/bge-reranker-base.
        ("reranking", {"architectures": [f"Bert{SEQUENCE}"], "id2label": ONE, "sbert_ce_x": "y"}, {}),
        ("reranking", {"architectures": [f"Bert{SEQUENCE}"], "id2label": {"0": "s"}, "sentence_transformers": {}}, {}),
        ("reranking", {"architectures": [f"XLMRoberta{SEQUENCE}"], "id2label": ONE}, {}),
        # HuggingFaceFW/fineweb-edu-classifier, and reward models.
        (
            "classification",
            {"architectures": [f"Bert{SEQUENCE}"], "id2label": ONE, "problem_type": "regression"},
            {},
        ),
        ("classification", {"architectures": [f"Llama{SEQUENCE}"], "num_labels": 1}, {}),
        ("token-classification", {"architectures": ["BertForTokenClassification"]}, {}),
        ("question-answering", {"architectures": ["RobertaForQuestionAnswering"]}, {}),
        ("fill-mask", {"architectures": ["BertForMaskedLM"]}, {}),
        ("fill-mask", {"architectures": ["BertForPreTraining"]}, {}),
        ("embedding", {"architectures": ["ElectraForPreTraining"]}, {}),
        ("embedding", {"architectures": ["BertForMaskedLM"]}, {"modules.json": POOLED}),
        ("embedding", {"architectures": ["MPNetModel"]}, {}),
        (None, {"architectures": ["T5ForConditionalGeneration"]}, {}),
        (None, {"architectures": 1.5, "id2label": "x"}, {"modules.json": 7}),
    ],
)
def test_the_task_is_told(tmp_path, task, config, files):
    assert task_of(write(tmp_path, config, files)) == task


@pytest.mark.parametrize(
    ("names", "head"),
    [
        (["bert.pooler.dense.weight", "classifier.weight"], SEQUENCE),
        (["roberta.x", "classifier.out_proj.weight"], SEQUENCE),
        (["bert.x", "classifier.weight"], "ForTokenClassification"),
        (["qa_outputs.weight"], "ForQuestionAnswering"),
        (["cls.predictions.bias"], "ForMaskedLM"),
        (["embeddings.word_embeddings.weight"], "Model"),
    ],
)
def test_without_architectures_the_weights_tell(tmp_path, names, head):
    import torch
    from safetensors.torch import save_file

    assert head_of(names) == head
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    tasks = {
        SEQUENCE: "classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "ForMaskedLM": "fill-mask",
        "Model": "embedding",
    }
    assert task_of(write(tmp_path, {"model_type": "bert"}, {})) == tasks[head]


@pytest.mark.parametrize(
    ("said", "config", "files"),
    [
        ("GLiNER", {"model_type": "gliner"}, {"gliner_config.json": {}}),
        ("SpanMarker", {"architectures": ["SpanMarkerModel"]}, {}),
        ("SetFit", {"architectures": ["BertModel"]}, {"config_setfit.json": {}}),
        ("ColBERT", {"architectures": ["HF_ColBERT"]}, {}),
        ("SPLADE", {}, {"modules.json": [{"type": "sentence_transformers.sparse_encoder.models.SpladePooling"}]}),
        ("sound", {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, {}),
        ("sound", {"architectures": ["Wav2Vec2ForSequenceClassification"], "model_type": "wav2vec2"}, {}),
        ("pictures", {"architectures": ["Dinov2Model"], "model_type": "dinov2"}, {}),
        ("pictures", {"architectures": ["ViTForImageClassification"], "model_type": "vit"}, {}),
        ("pictures", {"architectures": ["CLIPModel"], "model_type": "clip"}, {}),
    ],
)
def test_what_nothing_serves_is_refused_with_the_reason(tmp_path, said, config, files):
    folder = write(tmp_path, config, files)
    assert said in why_of_no_use(folder, read_config(folder))


def test_models_for_text_are_of_no_other_kind(tmp_path):
    """transformers' own lists: what fills masks or classifies text is not refused for its type."""
    from transformers.models.auto import modeling_auto

    text = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    assert "bert" in text
    refused = {kind for kind in text if why_of_no_use(tmp_path, {"model_type": kind})}
    assert refused <= {"wav2vec2", "perceiver", "layoutlm", "tapas"}, refused
