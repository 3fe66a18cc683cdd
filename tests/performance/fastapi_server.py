"""The server that most people write: FastAPI, transformers and PyTorch, one checkpoint, one text a request.

Written to be as fast as it can be without batching: inference mode, rows as long as their own text, the model called
in the event loop (a pool of threads would have several calls fight for the cores), the answer written by `json` itself.
Settings come as variables, since uvicorn's workers get nothing else: SERVED_MODEL, the folder of a
sentence-transformers checkpoint with mean pooling, and SERVED_THREADS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from fastapi import FastAPI, Response
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer

FOLDER = Path(os.environ["SERVED_MODEL"])
torch.set_num_threads(int(os.environ["SERVED_THREADS"]))
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModel.from_pretrained(FOLDER).eval()
max_tokens = json.loads((FOLDER / "sentence_bert_config.json").read_text())["max_seq_length"]
app = FastAPI()


class Question(BaseModel):
    """One request."""

    text: str


@app.post("/embed")
async def embed(question: Question) -> Response:
    """The text's vector, pooled and normalized as the checkpoint's modules.json says."""
    with torch.inference_mode():
        inputs = tokenizer(question.text, truncation=True, max_length=max_tokens, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        vector = torch.nn.functional.normalize(mean, dim=1)[0]
    return Response(json.dumps({"embedding": vector.tolist()}), media_type="application/json")


@app.get("/worker")
async def worker() -> int:
    """Which of uvicorn's workers answers."""
    return os.getpid()
