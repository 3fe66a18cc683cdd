"""What the CUDA engine is worth beside PyTorch on one GPU: `python -m tests.performance.gpu`.

Needs an NVIDIA GPU, onnxruntime-gpu with its CUDA libraries, and neither Dagster nor MLflow. Models have the sizes of
MiniLM, BERT-base and BERT-large with random weights; all of them answer mean-pooled, normalized vectors. Inputs lie on
the GPU; a time is the wall clock of one call with a synchronize, the median of many, everybody in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES: dict[str, dict[str, int]] = {
    "MiniLM-L6-H384": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": {},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
CASES = {
    "MiniLM-L6-H384": ((1, 16), (1, 128), (32, 128), (16, 384)),
    "BERT-base": ((16, 384),),
    "BERT-large": ((16, 384),),
}
#: The engine in bfloat16; all other variants are in fp16.
BF16 = "refinery bf16"
#: How often each is run in one turn.
TURN = 20
#: What kernels are for, by words of their names; the first that fits.
KINDS = {
    "attention": ("fmha", "flash", "attention", "sdpa", "softmax"),
    "normalization": ("layernorm", "layer_norm", "norm"),
    "GELU": ("gelu",),
    "bias and transposition": ("transpose", "addbias", "add_bias"),
    "products": ("gemm", "gemv", "cutlass", "xmma", "nvjet", "cublas", "splitk"),
    "copies": ("memcpy", "memset"),
}


def make_module(size: str) -> Any:
    """The model with its pooling, fp32, on the CPU."""
    import torch
    from transformers import BertConfig, BertModel

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = BertModel(BertConfig(**SIZES[size]), add_pooling_layer=False)

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            hidden = self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state.float()
            mask = attention_mask.unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, dim=-1)

    return Embedding().eval()


def make_batch(rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Random ids, right-padded: each row some tokens shorter than the longest, down to half."""
    generator = np.random.default_rng(0)
    lengths = tokens - (np.arange(rows) * 7) % (tokens // 2 + 1)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    ids = generator.integers(5, 30000, (rows, tokens)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((rows, tokens), np.int64)}


def build(module: Any, folder: Path) -> dict[str, Path]:
    """Export, fuse and convert as the product does; the paths of the fp16 and bf16 graphs."""
    import onnx_ir
    import torch

    from resources.engines.fusion import fuse
    from resources.engines.precision.half_precision import WITHOUT_BF16, to_half

    rows, tokens = (torch.export.Dim(name, min=1, max=512) for name in ("batch", "sequence"))
    example = {name: torch.from_numpy(array) for name, array in make_batch(2, 12).items()}
    program = torch.onnx.export(
        module,
        kwargs=example,
        dynamo=True,
        opset_version=20,
        input_names=list(example),
        output_names=["sentence_embedding"],
        dynamic_shapes={name: {0: rows, 1: tokens} for name in example},
        verbose=False,
    )
    assert program is not None, "the dynamo exporter returns a program"
    program.save(folder / "model.onnx", external_data=True)
    fused, counts = fuse(folder / "model.onnx")
    halves = {"fp16": to_half(fused), "bf16": to_half(fused, kind="bf16", wide=WITHOUT_BF16)}
    for kind, half in halves.items():
        onnx_ir.save(half, folder / f"{kind}.onnx", external_data=f"{kind}.onnx.data")
        print(json.dumps({"kind": kind, "fused": counts, "nodes": len(list(half.graph))}), flush=True)
    return {kind: folder / f"{kind}.onnx" for kind in halves}


def torch_contestants(module: Any, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """PyTorch in every way that a user has: eager, compiled, compiled with CUDA graphs, and a graph of its own."""
    import copy

    import torch

    single = copy.deepcopy(module).to("cuda")
    half = copy.deepcopy(module).to("cuda").half()
    inputs = {name: torch.from_numpy(array).to("cuda") for name, array in batch.items()}

    def caller(function: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return function(**inputs)

        return call

    found = {"torch fp32": caller(single), "torch fp16": caller(half)}
    for name, mode in (("torch.compile fp16", "default"), ("torch.compile graphs fp16", "reduce-overhead")):
        torch._dynamo.reset()
        found[name] = caller(torch.compile(copy.deepcopy(half), mode=mode, dynamic=False))
        for _ in range(5):
            found[name]()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            found["torch fp16"]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = found["torch fp16"]()

    def replay() -> Any:
        graph.replay()
        return answer

    found["torch CUDA graph fp16"] = replay
    return found


def measure(contestants: dict[str, Callable[[], Any]], runs: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    import torch

    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    end = time.monotonic() + seconds
    while min(map(len, samples.values())) < runs and time.monotonic() < end:
        for name, call in contestants.items():
            for _ in range(TURN):
                torch.cuda.synchronize()
                started = time.perf_counter()
                call()
                torch.cuda.synchronize()
                samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: float(np.median(values)) for name, values in samples.items()}


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name as the profiler gives it."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def profile(call: Callable[[], Any], times: int = 20) -> dict[str, dict[str, Any]]:
    """Microseconds and kernels of one call by kind, and the names of the kernels that take longest of each."""
    import torch
    from torch.profiler import ProfilerActivity

    for _ in range(5):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    found: dict[str, dict[str, Any]] = {}
    for event in sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total):
        if event.self_device_time_total:
            part = found.setdefault(kind_of(event.key), {"us": 0.0, "kernels": 0.0, "longest": event.key[:80]})
            part["us"] = round(part["us"] + event.self_device_time_total / times, 1)
            part["kernels"] = round(part["kernels"] + event.count / times, 1)
    return found


def floor(size: str, rows: int, tokens: int, kernels: float) -> dict[str, float]:
    """What the GPU allows: microseconds of the products at the rate of a large one, and of so many empty kernels.

    Both are measured here: a product of 8192 x 8192 x 8192 in fp16 on random numbers, and a CUDA graph of kernels that
    each add to one number and wait for the one before, with its launch and one synchronize.
    """
    import torch
    from transformers import BertConfig

    config = BertConfig(**SIZES[size])
    width, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * width * width + 2 * width * inner)
    attention = config.num_hidden_layers * 4 * rows * tokens * tokens * width
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.half) for _ in range(2))
    seconds = _seconds(lambda: left @ right)
    one, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(max(1, round(kernels))):
            one.add_(1)
    rate = 2 * 8192**3 / seconds
    return {
        "tflops_peak": round(rate / 1e12),
        "products_us": round((2 * weights * rows * tokens + attention) / rate * 1e6, 1),
        "weights_gb": round(weights * 2 / 1e9, 3),
        "empty_kernels_us": round(_seconds(graph.replay) * 1e6, 1),
    }


def _seconds(call: Callable[[], Any], runs: int = 50) -> float:
    import torch

    samples = []
    for _ in range(runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - started)
    return float(np.median(samples))


def run(
    size: str,
    options: dict[str, dict[str, str]],
    runs: int,
    seconds: float,
    *,
    rivals: bool,
    profiled: bool,
) -> list[dict]:
    """All shapes of one model. options: of the CUDA provider, by the name of a variant."""
    import torch

    from resources.engines.onnxruntime.cuda import CudaSession

    module = make_module(size)
    results = []
    with tempfile.TemporaryDirectory() as place:
        paths = build(module, Path(place))
        sessions = {
            name: CudaSession(paths["bf16" if name == BF16 else "fp16"], "sentence_embedding", options=given)
            for name, given in options.items()
        }
        for rows, tokens in CASES[size]:
            batch = make_batch(rows, tokens)
            with torch.inference_mode():
                on_gpu = {name: torch.from_numpy(array).to("cuda") for name, array in batch.items()}
                expected = module.to("cuda")(**on_gpu).cpu().numpy()
            contestants = torch_contestants(module, batch) if rivals else {}
            row: dict[str, Any] = {"model": size, "shape": f"{rows}x{tokens}"}
            for name, session in sessions.items():
                answer = session.run(batch)
                row[f"cosine worst {name}"] = float((answer * expected).sum(axis=1).min())
                slot = session.slot({key: array for key, array in batch.items() if key in session.inputs})
                if slot is None:
                    row[f"no graph {name}"] = session.why_no_graphs
                    continue
                contestants[name] = slot.run
            row |= {name: round(value, 4) for name, value in measure(contestants, runs, seconds).items()}
            if profiled:
                parts = profile(contestants["refinery"])
                row["profile"] = parts
                row["floor"] = floor(size, rows, tokens, sum(part["kernels"] for part in parts.values()))
            print(json.dumps(row), flush=True)
            results.append(row)
    return results


def main() -> int:
    """Measure, print one JSON line a shape, and say where the engine is slower than PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60.0, help="bound for one shape")
    parser.add_argument("--variant", action="append", default=[], help="name:option=value,... of the CUDA provider")
    parser.add_argument("--no-rivals", action="store_true", help="the engine alone")
    parser.add_argument("--profile", action="store_true", help="where the engine's time goes, and what the GPU allows")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    options: dict[str, dict[str, str]] = {"refinery": {}, BF16: {}}
    for text in given.variant:
        name, _, pairs = text.partition(":")
        options[name] = dict(pair.split("=", 1) for pair in pairs.split(",") if pair)
    results, slower = [], []
    for size in given.models:
        try:
            results += run(size, options, given.runs, given.seconds, rivals=not given.no_rivals, profiled=given.profile)
        except Exception:  # the other sizes are worth having all the same
            traceback.print_exc()
            slower.append(f"{size} failed")
    for row in results:
        times = {name: value for name, value in row.items() if name.startswith("torch")}
        slower += [
            f"{row['model']} {row['shape']}: {name} takes {value} ms, the engine {row['refinery']}"
            for name, value in times.items()
            if value < row.get("refinery", float("inf"))
        ]
    if given.save:
        given.save.write_text(json.dumps(results, indent=2))
    print("\n".join(slower) or "nowhere slower than PyTorch")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
