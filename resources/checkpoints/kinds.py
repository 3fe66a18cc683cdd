"""What a checkpoint is for, told from its small files: the task, or the true reason why no task here fits.

Reads no weights, but the names of their tensors where config.json does not say which class they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resources.boundary.foreign import MOST_CONFIG_BYTES, ForeignError, is_file_below, parse_json, read_below
from resources.checkpoints.weights import tensor_names

CONFIG = "config.json"
_SETFIT = "a SetFit model: its head is a pickle of scikit-learn's, and only its embedder is a transformer"
#: Files that only one family of models has, and what such a model is.
_FAMILIES = {
    "gliner_config.json": "a GLiNER model: it finds entities whose kinds come with the request, by a head that "
    "transformers does not have",
    "span_marker_config.json": "a SpanMarker model: its head, which marks spans of words, is the library span_marker's",
    "config_setfit.json": _SETFIT,
    "model_head.pkl": _SETFIT,
}
#: Classes of config.json's architectures whose names begin so.
_CLASSES = {
    "SpanMarkerModel": "span_marker_config.json",
    "GLiNER": "gliner_config.json",
}
_COLBERT = (
    "a ColBERT model: it has a vector for each token, and they are compared token by token; a single vector a text, "
    "which is served here, is not what it was trained for"
)
_SPLADE = "a sparse embedder (SPLADE): its vectors are as long as the vocabulary, and are not served"
#: config.json's model_type of transformers' models for something else than text (its mappings for images, video and
#: audio), by their beginnings.
_OTHERS = {
    "a model for pictures or video": (
        *("align", "beit", "blip", "chameleon", "clipseg", "conditional_detr", "convnext", "cvt", "data2vec-vision"),
        *("deformable_detr", "deit", "depth", "detr", "dinat", "dino", "dpt", "edgetam", "efficientformer"),
        *(
            "efficientnet",
            "eomt",
            "flava",
            "focalnet",
            "glpn",
            "grounding-dino",
            "groupvit",
            "hgnet",
            "hiera",
            "idefics",
        ),
        *("ijepa", "imagegpt", "janus", "kosmos", "levit", "llava", "mask2former", "maskformer", "metaclip", "mgp-str"),
        *("mlcd", "mobilenet", "mobilevit", "nat", "oneformer", "owlv", "paligemma", "pix2struct"),
        *("pixtral", "poolformer", "prompt_depth", "pvt", "regnet", "resnet", "rt_detr", "sam", "segformer", "seggpt"),
        *("siglip", "smolvlm", "superglue", "superpoint", "swiftformer", "swin", "table-transformer", "textnet"),
        *("timesformer", "timm", "trocr", "tvlt", "tvp", "upernet", "videomae", "vilt", "vipllava", "vision", "vit"),
        *("vivit", "vjepa", "xclip", "yolos", "zoedepth"),
    ),
    "a model for sound": (
        *("audio-spectrogram", "bark", "clap", "clvp", "dac", "data2vec-audio", "encodec", "granite_speech", "hubert"),
        *("jukebox", "mctct", "mimi", "moonshine", "moshi", "musicgen", "parakeet", "pop2piano", "seamless", "sew"),
        *("speech", "unispeech", "univnet", "vits", "wav2vec2", "wavlm", "whisper"),
    ),
}
_OTHER_REMEDY = "Give a checkpoint for text"
#: By the name of a tensor of its own, the head that the weights belong to.
_HEADS_BY_TENSOR = (
    ("qa_outputs.weight", "ForQuestionAnswering"),
    ("cls.predictions.", "ForMaskedLM"),
    ("lm_head.", "ForMaskedLM"),
    ("vocab_transform.", "ForMaskedLM"),
    ("pre_classifier.weight", "ForSequenceClassification"),
    ("classifier.out_proj.weight", "ForSequenceClassification"),
    ("score.weight", "ForSequenceClassification"),
)
#: Beginnings of the names of decoders' classes.
_DECODERS = ("Llama", "Mistral", "Qwen", "Gemma", "Phi", "GPT", "OPT", "Falcon", "Bloom", "StableLm", "Olmo")
#: How transformers calls a label that nobody has named.
_UNNAMED = "LABEL_"


def why_of_no_use(folder: Path, config: dict[str, Any]) -> str:
    """Say why no task fits a checkpoint.

    Args:
        config: what config.json holds; empty where there is none.

    Returns:
        The reason and the remedy; an empty text where a task may fit.
    """
    kind = next((said for file, said in _FAMILIES.items() if _has(folder, file)), "")
    architecture = _architecture(config)
    for beginning, file in _CLASSES.items():
        kind = kind or (_FAMILIES[file] if architecture.startswith(beginning) else "")
    modules = _module_kinds(folder)
    if architecture == "HF_ColBERT" or any(name.startswith("pylate.") for name in modules) or "ColBERT" in architecture:
        kind = kind or _COLBERT
    if any(name.endswith((".SpladePooling", ".SparseAutoEncoder")) for name in modules):
        kind = kind or _SPLADE
    if architecture.endswith("CLIPModel"):
        return f"it is a model for pictures and text ({architecture:.60}). {_OTHER_REMEDY}"
    if kind:
        return f"it is {kind}. Give a checkpoint of one of transformers' own classes for a task"
    model_type = str(config.get("model_type", ""))
    for said, beginnings in _OTHERS.items():
        if model_type.startswith(beginnings):
            return f"it is {said} (model_type {model_type:.60}). {_OTHER_REMEDY}"
    return ""


def task_of(folder: Path) -> str | None:
    """The task that a checkpoint was trained for; None where its files do not tell."""
    config = _read(folder, CONFIG)
    labels = [str(label).lower() for label in (config.get("id2label") or {}).values()] if _is_table(config) else []
    # Saved by hand, or by an old version of transformers: the weights say which class they belong to.
    architecture = _architecture(config) or (head_of(names) if config and (names := tensor_names(folder)) else "")
    saved_by = _read(folder, "config_sentence_transformers.json").get("model_type")
    section = config.get("sentence_transformers")
    cross_encoder = saved_by == "CrossEncoder" or isinstance(section, dict) or _has_cross_encoders_field(config)
    if architecture.endswith("ForSequenceClassification"):
        if any(label.startswith("entail") for label in labels):
            return "zero-shot-classification"
        single = len(labels) == 1 or config.get("num_labels") == 1
        # Rerankers that nobody has named the label of, BAAI's and Alibaba's among them. Decoders with one number are
        # reward models.
        unnamed = all(label.startswith(_UNNAMED.lower()) for label in labels)
        scores = config.get("problem_type") != "regression" and not architecture.startswith(_DECODERS)
        return "reranking" if single and (cross_encoder or (unnamed and scores)) else "classification"
    if any(name.endswith(".Pooling") for name in _module_kinds(folder)):
        return "embedding"
    for end, task in (
        ("ForTokenClassification", "token-classification"),
        ("ForQuestionAnswering", "question-answering"),
        ("ForMaskedLM", "fill-mask"),
        # ELECTRA's is a discriminator of tokens, and has no head for words.
        ("ElectraForPreTraining", "embedding"),
        ("ForPreTraining", "fill-mask"),
        ("Model", "embedding"),
    ):
        if architecture.endswith(end):
            return task
    return None


def head_of(names: Iterable[str]) -> str:
    """The head that weights belong to, by the names of their tensors; empty: none, or one that they do not tell.

    For checkpoints whose config.json names no class.
    """
    known = [*names]
    for part, head in _HEADS_BY_TENSOR:
        if any(part in name for name in known):
            return head
    if not any("classifier." in name for name in known):
        return "Model"
    # Sequences are classified by what the pooler makes of the first token, and tokens without one.
    return "ForSequenceClassification" if any("pooler." in name for name in known) else "ForTokenClassification"


def _has_cross_encoders_field(config: dict[str, Any]) -> bool:
    return any(name.startswith("sbert_ce_") for name in config)


def _is_table(config: dict[str, Any]) -> bool:
    return isinstance(config.get("id2label"), dict)


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _module_kinds(folder: Path) -> list[str]:
    """The classes of the modules that sentence-transformers would run."""
    modules = _document(folder, "modules.json")
    return [str(one.get("type", "")) for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json without judging it; empty where it cannot be read."""
    return _read(folder, CONFIG)


def _read(folder: Path, name: str) -> dict[str, Any]:
    """An object; empty where it cannot be read, which whoever needs it says."""
    data = _document(folder, name)
    return data if isinstance(data, dict) else {}


def _document(folder: Path, name: str) -> Any:
    try:
        return parse_json(read_below(folder, name, MOST_CONFIG_BYTES))
    except (OSError, ValueError, ForeignError):
        return None


def _has(folder: Path, name: str) -> bool:
    try:
        return is_file_below(folder, name)
    except ForeignError:
        return False
