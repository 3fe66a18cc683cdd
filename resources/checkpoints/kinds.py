"""The purpose of a checkpoint, told from its small files: its task, or the true reason why no task here fits.

No weights are read. The names of their tensors are read if config.json does not name the class of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resources.boundary.foreign import MOST_CONFIG_BYTES, ForeignError, is_file_below, parse_json, read_below
from resources.checkpoints.weights import tensor_names

CONFIG = "config.json"
_SETFIT = "a SetFit model: its head is a pickled scikit-learn classifier, and only its embedder is a transformer"
#: Files that only one family of models has, and descriptions of such a model.
_FAMILIES = {
    "gliner_config.json": "a GLiNER model: each request names the kinds of entities that it finds, and transformers "
    "does not have its head",
    "span_marker_config.json": "a SpanMarker model: its head, which marks spans of words, comes from the library "
    "span_marker",
    "config_setfit.json": _SETFIT,
    "model_head.pkl": _SETFIT,
}
#: Beginnings of class names in config.json's architectures, and the file that has the description of their family.
_CLASSES = {
    "SpanMarkerModel": "span_marker_config.json",
    "GLiNER": "gliner_config.json",
}
_COLBERT = (
    "a ColBERT model: it gives a vector for each token, and texts are compared token by token; it was not trained for "
    "the single vector per text that is served here"
)
_SPLADE = "a sparse embedder (SPLADE): its vectors are as long as the vocabulary, and are not served"
#: Beginnings of the model_type of models that are not for text. They are from transformers' mappings for images, video
#: and audio.
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
#: Parts of tensor names that only one head has, and that head.
_HEADS_BY_TENSOR = (
    ("qa_outputs.weight", "ForQuestionAnswering"),
    ("cls.predictions.", "ForMaskedLM"),
    ("lm_head.", "ForMaskedLM"),
    ("vocab_transform.", "ForMaskedLM"),
    ("pre_classifier.weight", "ForSequenceClassification"),
    ("classifier.out_proj.weight", "ForSequenceClassification"),
    ("score.weight", "ForSequenceClassification"),
)
#: Beginnings of the class names of decoders.
_DECODERS = ("Llama", "Mistral", "Qwen", "Gemma", "Phi", "GPT", "OPT", "Falcon", "Bloom", "StableLm", "Olmo")
#: The beginning of transformers' name for a label without a name of its own.
_UNNAMED = "LABEL_"


def why_of_no_use(folder: Path, config: dict[str, Any]) -> str:
    """Say why no task fits a checkpoint.

    Args:
        folder: The checkpoint's folder.
        config: The content of config.json, or an empty table if there is none.

    Returns:
        The reason and the remedy, or an empty text if a task may fit.
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
    """Return the task that a checkpoint was trained for, or None if its files do not tell."""
    config = _read(folder, CONFIG)
    labels = [str(label).lower() for label in (config.get("id2label") or {}).values()] if _is_table(config) else []
    # A config.json that was written by hand or by an old version of transformers may name no class. The names of the
    # tensors then tell the class.
    architecture = _architecture(config) or (head_of(names) if config and (names := tensor_names(folder)) else "")
    saved_by = _read(folder, "config_sentence_transformers.json").get("model_type")
    section = config.get("sentence_transformers")
    cross_encoder = saved_by == "CrossEncoder" or isinstance(section, dict) or _has_cross_encoders_field(config)
    if architecture.endswith("ForSequenceClassification"):
        if any(label.startswith("entail") for label in labels):
            return "zero-shot-classification"
        single = len(labels) == 1 or config.get("num_labels") == 1
        # The single label of many rerankers has no name, BAAI's and Alibaba's among them. Decoders with a single output
        # are reward models, not rerankers.
        unnamed = all(label.startswith(_UNNAMED.lower()) for label in labels)
        scores = config.get("problem_type") != "regression" and not architecture.startswith(_DECODERS)
        return "reranking" if single and (cross_encoder or (unnamed and scores)) else "classification"
    if any(name.endswith(".Pooling") for name in _module_kinds(folder)):
        return "embedding"
    for end, task in (
        ("ForTokenClassification", "token-classification"),
        ("ForQuestionAnswering", "question-answering"),
        ("ForMaskedLM", "fill-mask"),
        # ELECTRA's class is a discriminator of tokens and has no head that predicts words.
        ("ElectraForPreTraining", "embedding"),
        ("ForPreTraining", "fill-mask"),
        ("Model", "embedding"),
    ):
        if architecture.endswith(end):
            return task
    return None


def head_of(names: Iterable[str]) -> str:
    """Tell the head of a checkpoint from the names of its tensors, for a config.json that names no class.

    Returns:
        The end of the class name, such as `ForMaskedLM`. It is `Model` for weights without a known head.
    """
    known = [*names]
    for part, head in _HEADS_BY_TENSOR:
        if any(part in name for name in known):
            return head
    if not any("classifier." in name for name in known):
        return "Model"
    # Classifiers of sequences read the first token through a pooler, and classifiers of tokens have no pooler.
    return "ForSequenceClassification" if any("pooler." in name for name in known) else "ForTokenClassification"


def _has_cross_encoders_field(config: dict[str, Any]) -> bool:
    return any(name.startswith("sbert_ce_") for name in config)


def _is_table(config: dict[str, Any]) -> bool:
    return isinstance(config.get("id2label"), dict)


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _module_kinds(folder: Path) -> list[str]:
    """Return the class names of the modules that sentence-transformers would run."""
    modules = _document(folder, "modules.json")
    return [str(one.get("type", "")) for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json without checking its fields. The result is empty if it cannot be read."""
    return _read(folder, CONFIG)


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object. The result is empty if it cannot be read, because validation reports such files later."""
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
