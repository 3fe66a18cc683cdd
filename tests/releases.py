"""Releases of tiny real engines: a table of random vectors, pooled over the tokens, in a few kilobytes of ONNX."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from resources.artifacts.records import Checkpoint, Engine, ServingSetting
from resources.checkpoints.tokenizer import frame_of
from resources.pipelines import pipeline_class
from resources.pipelines.tokenization import TextEncoder
from resources.settings.connection import Protocol
from resources.settings.triton import Flavour
from resources.tasks import TASKS
from resources.tasks.samples import sample_texts
from resources.triton.client import Contract, TextClient
from resources.triton.exam import make_exam
from resources.triton.load import ModelStatistics, server_statistics, statistics_since
from resources.triton.proof import Exam, Proof
from resources.triton.release import Release, ReleasePlan
from tests.checkpoints import permute_vocabulary

WIDTH = 24
MAX_TOKENS = 64
LABELS = ("calm", "glad", "very angry")
INPUTS = ("input_ids", "attention_mask")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_plan(
    folder: Path,
    *,
    model: str = "tiny",
    labels: Sequence[str] = (),
    seed: int = 0,
    external_data: bool = False,
    flavour: Flavour = "python",
    max_batch_size: int = 8,
    permuted: bool = False,
    serving: ServingSetting = ServingSetting(),  # noqa: B008 - frozen
) -> ReleasePlan:
    """A plan whose checkpoint and engine lie below `folder`. Another seed is another engine.

    permuted: another seed is another tokenizer too, with other ids for the same tokens. So the tokenizer of one release
    with the engine of another gives an answer that belongs to neither.
    """
    task = "classification" if labels else "embedding"
    tokenizer, engine = folder / (f"checkpoint-{seed}" if permuted else "checkpoint"), folder / f"engine-{seed}"
    vocabulary = _write_tokenizer(tokenizer, permutation=seed if permuted else None)
    width = len(labels) or WIDTH
    output = "probabilities" if labels else "sentence_embedding"
    _write_engine(engine, vocabulary, width, output, seed=seed, external_data=external_data)
    return ReleasePlan(
        model=model,
        target="cpu",
        flavour=flavour,
        checkpoint=Checkpoint(
            digest="c" * 64,
            model=model,
            source="made for a test",
            revision="0123456789abcdef",
            task=task,
            architecture="Table",
            weights_digest="w" * 64,
            weights_bytes=1,
            tokenizer_digest=hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
            labels_digest="l" * 64,
            pipeline_digest="p" * 64,
            output=output,
            settings={"activation": "softmax"} if labels else {},
            labels=tuple(labels),
            max_tokens=MAX_TOKENS,
        ).with_files(tokenizer),
        checkpoint_folder=tokenizer,
        engine=Engine(
            digest=f"{seed:064}",
            model=model,
            name="table",
            target="cpu",
            runtime="onnxruntime",
            precision="fp32",
            status="built",
            entry_file="model.onnx",
            inputs=INPUTS,
            output=output,
            width=width,
        ).with_files(engine),
        engine_folder=engine,
        max_batch_size=max_batch_size,
        serving=serving,
        lineage={"refinery_dagster_run": "a run"},
    )


#: By task: the settings of its pipeline, the width of its engine, and whether that answers every token.
_TASKS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "embedding": ({}, WIDTH, False),
    "classification": ({"activation": "softmax", "labels": list(LABELS)}, 3, False),
    "reranking": ({}, 1, False),
    "token-classification": (
        {
            "labels": ["O", "B-PER", "I-PER"],
            "ignore_labels": ["O"],
            "aggregation_strategy": "simple",
            "unknown_id": 1,
            "windows": 64,
        },
        3,
        True,
    ),
    "question-answering": (
        {"max_answer_tokens": 15, "handle_impossible_answer": False, "align_to_words": True, "windows": 64},
        2,
        True,
    ),
    "zero-shot-classification": (
        {"hypothesis_template": "It is {}.", "multi_label": False, "entailment_id": 2, "contradiction_id": 0},
        3,
        False,
    ),
    "fill-mask": ({"mask_token": "[MASK]", "pad_id": 0, "top_k": 5, "clean_up": True}, 0, False),
}


def make_task_plan(folder: Path, task: str, *, max_tokens: int = 512) -> ReleasePlan:
    """A plan for any task, called as its task is. Its answers mean nothing and cost next to nothing."""
    from tokenizers import Tokenizer, decoders, processors

    plan, (settings, width, per_token) = make_plan(folder, model=task), _TASKS[task]
    file = plan.checkpoint_folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(file))
    if task == "fill-mask":
        width, settings = tokenizer.get_vocab_size(), {**settings, "mask_id": tokenizer.token_to_id("[MASK]")}
    pipeline = pipeline_class(task)
    encoder = {"max_tokens": max_tokens, "inputs": list(INPUTS), "pad_id": 0, "strategy": pipeline.strategy}
    encoder["stride"] = 64 if pipeline.windowed else 0
    encoder |= frame_of(tokenizer)
    (plan.checkpoint_folder / "encoder.json").write_text(json.dumps(encoder))
    (plan.checkpoint_folder / "pipeline.json").write_text(json.dumps({"task": task, "settings": settings}))
    output = "values"
    shutil.rmtree(plan.engine_folder)
    _write_engine(
        plan.engine_folder,
        tokenizer.get_vocab_size(),
        width,
        output,
        seed=0,
        external_data=False,
        per_token=per_token,
    )
    fields = {"task": task, "output": output, "settings": settings, "max_tokens": max_tokens, "content": {}}
    return replace(
        plan,
        checkpoint=plan.checkpoint.model_copy(update=fields).with_files(plan.checkpoint_folder),
        engine=plan.engine.model_copy(update={"output": output, "width": width, "content": {}}).with_files(
            plan.engine_folder
        ),
        max_batch_size=32,
    )


def answers_of(plan: ReleasePlan, texts: Sequence[str]) -> np.ndarray:
    """What ONNX Runtime answers to each text alone, without Triton: fp32 `[texts, width]`."""
    import onnxruntime

    encoder = TextEncoder.from_folder(str(plan.checkpoint_folder))
    session = onnxruntime.InferenceSession(
        str(plan.engine_folder / plan.engine.entry_file), providers=["CPUExecutionProvider"]
    )
    return np.concatenate([session.run([plan.output], encoder.encode([text]))[0] for text in texts])


def exam_of(plan: ReleasePlan, reference_of: ReleasePlan | None = None, *, count: int = 120) -> Exam:
    """So many sample texts with the plan's own answers, or another's, as what is right."""
    texts = sample_texts()[:count]
    baseline = list(answers_of(reference_of or plan, texts))
    return make_exam(plan, TASKS[plan.checkpoint.task].gates(), [{"TEXT": text} for text in texts], baseline)


#: Of the plans made here without labels.
CONTRACT = Contract(("TEXT",), "sentence_embedding", structured=False)


def ask_together(client: TextClient, texts: Sequence[str | bytes], model: str = "tiny") -> np.ndarray:
    """The answers to one request of several rows, fp32 `[texts, width]`."""
    return np.stack(client.ask(model, CONTRACT, [{"TEXT": text} for text in texts]))


def query_texts(address: str, model: str, texts: Sequence[str], protocol: Protocol = "grpc") -> np.ndarray:
    """The answers to one request a text, fp32 `[texts, width]`."""
    with TextClient(address, protocol) as client:
        contract = client.contract(model)
        return np.concatenate([client.ask(model, contract, [{"TEXT": text}]) for text in texts])


def counted(
    address: str, before: Mapping[str, ModelStatistics], requests: int, model: str = "tiny"
) -> dict[str, ModelStatistics]:
    """What the models of `before` did since, once the public one has counted its requests: Triton answers first."""
    end = time.monotonic() + 10
    while True:
        done = statistics_since(before, server_statistics(address, list(before)))
        if done[model].requests >= requests or time.monotonic() > end:
            return done
        time.sleep(0.02)


def unasked(folder: Path, release: Release) -> Proof:
    """A proof that nobody gave, where a test is about files."""
    assert folder.is_dir()
    return Proof(passed=True, server=f"none, release {release.number}", items=0, requests=0, seconds=0.0, metrics={})


def tree_digest(*roots: Path) -> str:
    """Digest of every name and byte below the folders."""
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes() if path.is_file() else b"folder")
    return digest.hexdigest()


def release_digest(repository: Path, model: str, number: int) -> str:
    """Digest of everything that belongs to one release."""
    parts = sorted(repository.glob(f"{model}__r{number}__*"))
    assert parts
    return tree_digest(*parts, repository / model / str(number))


@cache
def _tokenizer() -> str:
    """A WordPiece tokenizer of the sample texts, as JSON."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(tokenizer.to_str(pretty=True))


def _write_tokenizer(folder: Path, permutation: int | None = None) -> int:
    """The tokenizer, once a folder; its number of tokens. permutation: a seed for who gets which id."""
    from tokenizers import Tokenizer

    if not folder.is_dir():
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
        if permutation is not None:
            permute_vocabulary(folder / "tokenizer.json", permutation)
        settings = {"max_tokens": MAX_TOKENS, "inputs": list(INPUTS), "pad_id": 0}
        (folder / "encoder.json").write_text(json.dumps(settings))
        (folder / "pipeline.json").write_text(json.dumps({"task": "embedding", "settings": {}}))
    return int(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())


def _write_engine(
    folder: Path, vocabulary: int, width: int, output: str, *, seed: int, external_data: bool, per_token: bool = False
) -> None:
    """The masked mean of the tokens' vectors; normalized, or, for classification, through a softmax. per_token: the
    vectors themselves, through a softmax.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    scale = 6.0 if output == "probabilities" else 1.0
    constants: dict[str, Any] = {
        "table": (scale * random.standard_normal((vocabulary, width))).astype(np.float32),
        "tokens_axis": np.array([1], dtype=np.int64),
        "vector_axis": np.array([2], dtype=np.int64),
    }
    last = (
        helper.make_node("Softmax", ["mean"], [output], axis=1)
        if output == "probabilities"
        else helper.make_node("LpNormalization", ["mean"], [output], axis=1, p=2)
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "vector_axis"], ["weights"]),
            helper.make_node("Mul", ["vectors", "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "tokens_axis"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "tokens_axis"], ["count"], keepdims=1),
            helper.make_node("Div", ["sum", "count"], ["mean"]),
            last if not per_token else helper.make_node("Softmax", ["weighted"], [output], axis=2),
        ],
        "table",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS],
        [
            helper.make_tensor_value_info(
                output, TensorProto.FLOAT, ["batch", "sequence", width] if per_token else ["batch", width]
            )
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=external_data,
        location="model.onnx.data" if external_data else None,
        size_threshold=1024,
    )
