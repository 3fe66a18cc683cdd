"""Small twins of deployed checkpoints: their configuration, files and kinds of tokenizers, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import edit_json, make_checkpoint

NLI = ("contradiction", "neutral", "entailment")
BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@dataclass(frozen=True)
class Twin:
    """One layout. like: who has it. make: writes it into a folder. retokenized: whether transformers by itself cuts
    texts otherwise than tokenizer.json says.
    """

    like: str
    task: str
    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    retokenized: bool = False


def pooled(
    folder: Path,
    pooling: dict[str, Any] | str,
    *,
    normalize: bool = False,
    config: dict[str, Any] | None = None,
    name: str = "",
) -> Path:
    """Write sentence-transformers' files beside a checkpoint: version 6's where the pooling is a word, else older ones.

    config: of config_sentence_transformers.json. name: of the first module's file, with a limit of 48 tokens.
    """
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modern = isinstance(pooling, str)
    said = (
        {"embedding_dimension": 32, "pooling_mode": pooling}
        if isinstance(pooling, str)
        else {"word_embedding_dimension": 32, **pooling}
    )
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    paths = {"Transformer": "", "Pooling": "1_Pooling", **({"Normalize": "2_Normalize"} if normalize else {})}
    places = {
        "Transformer": "sentence_transformers.base.modules.transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling",
        "Normalize": "sentence_transformers.base.modules.normalize",
    }
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"{places[kind] if modern else 'sentence_transformers.models'}.{kind}",
        }
        for number, (kind, path) in enumerate(paths.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if config is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    if name:
        (folder / name).write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    return folder


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def embedder(
    architecture: str,
    pooling: Any = None,
    *,
    tokenizer: str = "",
    head: str = "",
    fields: dict[str, Any] | None = None,
    **said: Any,
) -> Callable[[Path], Path]:
    """Writes an embedder, with sentence-transformers' files where it has a pooling."""

    def make(folder: Path) -> Path:
        made = make_checkpoint(folder, architecture=architecture, tokenizer=tokenizer, head=head, **(fields or {}))
        return pooled(made, pooling, **said) if pooling is not None else made

    return make


def headed(
    architecture: str, head: str, labels: Sequence[str] = (), *, edits: dict[str, Any] | None = None, **said: Any
) -> Callable[[Path], Path]:
    """Writes a checkpoint with a head. edits: fields of config.json that are set afterwards."""

    def make(folder: Path) -> Path:
        made = make_checkpoint(folder, architecture=architecture, head=head, labels=labels, **said)
        edit_json(made / "config.json", **(edits or {}))
        return made

    return make


def rebuilt(make: Callable[[Path], Path], name: str) -> Callable[[Path], Path]:
    """The same with a normalizer that transformers does not take from tokenizer.json for a class of that name."""

    def changed(folder: Path) -> Path:
        made = make(folder)
        content = json.loads((made / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
        (made / "tokenizer.json").write_text(json.dumps(content))
        edit_json(made / "tokenizer_config.json", tokenizer_class=name)
        return made

    return changed


def half(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same with weights in half precision."""

    def changed(folder: Path) -> Path:
        from safetensors.torch import load_file, save_file

        made = make(folder)
        weights = {name: value.half() for name, value in load_file(made / "model.safetensors").items()}
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        edit_json(made / "config.json", dtype="float16")
        return made

    return changed


def left(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same with a tokenizer that keeps the end of a text, and pads in front of it."""

    def changed(folder: Path) -> Path:
        made = make(folder)
        edit_json(made / "tokenizer_config.json", truncation_side="left", padding_side="left")
        return made

    return changed


_CROSS = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
_CROSS_6 = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "6.0.0"}}

TWINS = {
    # Equal before there was a reference from outside.
    "minilm": Twin(
        "sentence-transformers/all-MiniLM-L6-v2",
        "embedding",
        embedder("bert", MEAN, normalize=True, name="sentence_bert_config.json"),
    ),
    "mpnet": Twin("sentence-transformers/all-mpnet-base-v2", "embedding", embedder("mpnet", MEAN, normalize=True)),
    "multilingual": Twin("paraphrase-multilingual-MiniLM-L12-v2", "embedding", embedder("xlm-roberta", MEAN)),
    "bge": Twin("BAAI/bge-small-en-v1.5", "embedding", embedder("bert", CLS, normalize=True)),
    "e5": Twin(
        "intfloat/multilingual-e5-small", "embedding", embedder("bert", MEAN, tokenizer="unigram", normalize=True)
    ),
    "distilroberta": Twin(
        "sentence-transformers/all-distilroberta-v1", "embedding", embedder("roberta", MEAN, normalize=True)
    ),
    "tas-b": Twin("msmarco-distilbert-base-tas-b", "embedding", embedder("distilbert", CLS)),
    "modern": Twin(
        "nomic-ai/modernbert-embed-base",
        "embedding",
        embedder(
            "modernbert",
            "mean",
            normalize=True,
            config={"prompts": {"query": "search_query: "}, "default_prompt_name": None},
        ),
    ),
    "simcse": Twin("princeton-nlp/sup-simcse-bert-base-uncased", "embedding", embedder("bert")),
    "masked": Twin("google-bert/bert-base-uncased, as an embedder", "embedding", embedder("bert", head="mask")),
    "gte": Twin("thenlper/gte-small", "embedding", half(embedder("bert", MEAN, normalize=True))),
    "modern file": Twin(
        "an embedder saved by sentence-transformers 6", "embedding", embedder("bert", "cls", normalize=True)
    ),
    "sst2": Twin(
        "distilbert-base-uncased-finetuned-sst-2-english",
        "classification",
        headed("distilbert", "sequence", ("NEGATIVE", "POSITIVE")),
    ),
    "toxic": Twin(
        "unitary/toxic-bert",
        "classification",
        headed("bert", "sequence", ("toxic", "insult", "threat"), problem_type="multi_label_classification"),
    ),
    "languages": Twin(
        "papluca/xlm-roberta-base-language-detection",
        "classification",
        headed("xlm-roberta", "sequence", ("ja", "nl", "ar", "pl")),
    ),
    "regression": Twin(
        "a regression model of one number",
        "classification",
        headed("bert", "sequence", ("score",), problem_type="regression"),
    ),
    "guard": Twin("ModernBERT guards", "classification", headed("modernbert", "sequence", ("SAFE", "INJECTION"))),
    "roberta-mnli": Twin(
        "FacebookAI/roberta-large-mnli",
        "zero-shot-classification",
        headed("roberta", "sequence", [label.upper() for label in NLI]),
    ),
    "xnli": Twin("joeddav/xlm-roberta-large-xnli", "zero-shot-classification", headed("xlm-roberta", "sequence", NLI)),
    "ms-marco": Twin(
        "cross-encoder/ms-marco-MiniLM-L6-v2", "reranking", headed("bert", "sequence", ("LABEL_0",), edits=_CROSS)
    ),
    "bge-reranker": Twin("BAAI/bge-reranker-base", "reranking", headed("xlm-roberta", "sequence", ("LABEL_0",))),
    "cross-encoder 6": Twin(
        "a cross-encoder saved by sentence-transformers 6",
        "reranking",
        headed("bert", "sequence", ("LABEL_0",), edits=_CROSS_6),
    ),
    "ner": Twin("dslim/bert-base-NER", "token-classification", headed("bert", "tokens", BIO)),
    "conll": Twin(
        "xlm-roberta-large-finetuned-conll03-english", "token-classification", headed("xlm-roberta", "tokens", BIO)
    ),
    "squad2": Twin(
        "deepset/roberta-base-squad2",
        "question-answering",
        headed("roberta", "question"),
        {"handle_impossible_answer": True},
    ),
    "squad": Twin("distilbert-base-cased-distilled-squad", "question-answering", headed("distilbert", "question")),
    "bert": Twin("google-bert/bert-base-uncased", "fill-mask", headed("bert", "mask")),
    "roberta": Twin("FacebookAI/roberta-base", "fill-mask", headed("roberta", "mask")),
    "xlm-roberta": Twin("FacebookAI/xlm-roberta-base", "fill-mask", headed("xlm-roberta", "mask")),
    "albert": Twin("albert/albert-base-v2", "fill-mask", headed("albert", "mask")),
    "modernbert": Twin("answerdotai/ModernBERT-base", "fill-mask", headed("modernbert", "mask")),
    # Refused, failing or different in silence before.
    "truncated": Twin(
        "Matryoshka embedders with truncate_dim",
        "embedding",
        embedder("bert", "mean", normalize=True, config={"truncate_dim": 8}),
    ),
    "last token": Twin(
        "embedders that pool the last token", "embedding", embedder("bert", "lasttoken", normalize=True)
    ),
    "weighted": Twin(
        "embedders that weight tokens by their place",
        "embedding",
        embedder("bert", {"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_sqrt_len_tokens": True}),
    ),
    "no prompt": Twin(
        "embedders with include_prompt: false", "embedding", embedder("bert", {**MEAN, "include_prompt": False})
    ),
    "left": Twin("embedders that keep the end of a text", "embedding", left(embedder("bert", MEAN))),
    "left classifier": Twin(
        "classifiers that keep the end of a text", "classification", left(headed("bert", "sequence", ("no", "yes")))
    ),
    "old name": Twin(
        "embedders of sentence-transformers 1 to 3, with sentence_roberta_config.json",
        "embedding",
        embedder("roberta", MEAN, name="sentence_roberta_config.json"),
    ),
    "chosen": Twin(
        "facebook/contriever, with the models file's pooling",
        "embedding",
        embedder("bert"),
        {"pooling": "cls", "normalize": True},
    ),
    "deberta classifier": Twin(
        "protectai/deberta-v3-base-prompt-injection-v2",
        "classification",
        rebuilt(headed("deberta-v2", "sequence", ("SAFE", "INJECTION")), "DebertaV2TokenizerFast"),
        retokenized=True,
    ),
    "deberta nli": Twin(
        "MoritzLaurer/DeBERTa-v3-base-mnli-fever-anli",
        "zero-shot-classification",
        rebuilt(headed("deberta-v2", "sequence", NLI), "DebertaV2TokenizerFast"),
        retokenized=True,
    ),
    "deberta reranker": Twin(
        "mixedbread-ai/mxbai-rerank-base-v1",
        "reranking",
        rebuilt(headed("deberta-v2", "sequence", ("LABEL_0",)), "DebertaV2TokenizerFast"),
        retokenized=True,
    ),
    "normalizer": Twin(
        "BERTs with a normalizer of their own",
        "embedding",
        rebuilt(embedder("bert", MEAN), "BertTokenizer"),
        retokenized=True,
    ),
    "bart": Twin("facebook/bart-large-mnli", "zero-shot-classification", headed("bart", "sequence", NLI)),
    "bart classifier": Twin("BART sequence classifiers", "classification", headed("bart", "sequence", ("no", "yes"))),
    "plain labels": Twin(
        "part-of-speech taggers, whose labels are punctuation and words",
        "token-classification",
        headed("bert", "tokens", ("NN", ".", ",", "1", "VB")),
        {"ignore_labels": []},
    ),
    "bilou": Twin(
        "taggers with BILOU labels",
        "token-classification",
        headed("bert", "tokens", ("O", "B-PER", "I-PER", "L-PER", "U-PER")),
        {"aggregation_strategy": "first"},
    ),
    "no spaces": Twin(
        "question answering in Japanese and Chinese",
        "question-answering",
        headed("bert", "question"),
        {"align_to_words": False},
    ),
}
