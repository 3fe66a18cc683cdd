"""The typed records that pass from step to step. The files that they describe lie in the store beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from resources.artifacts.fingerprint import is_made_of, is_of_earlier_version
from resources.boundary.foreign import ForeignError, check_name
from resources.machine.usage import Usage

#: NaN and infinity are written as such. pydantic's default is `null`, and such a record cannot be read again.
_CONFIG = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)


def _file_name(name: str) -> str:
    try:
        return check_name(name)
    except ForeignError as error:
        raise ValueError(str(error)) from None


#: A path below the folder that a record or a manifest describes. It is checked, because everybody who can write to a
#: shared store can write such paths.
FileName = Annotated[str, AfterValidator(_file_name)]


class StoredFile(BaseModel):
    """One file of an artifact."""

    model_config = _CONFIG
    sha256: str
    size_bytes: int


class Record(BaseModel):
    """The fields that every record has.

    Args:
        digest: The digest of everything that made the artifact; see resources.artifacts.fingerprint.
    """

    model_config = _CONFIG
    kind: ClassVar[str]
    digest: str
    model: str
    files: dict[FileName, StoredFile] = Field(default_factory=dict)
    build_seconds: float = 0.0
    peak_memory_bytes: int = 0
    usage: Usage | None = Field(default=None, description="None: made by no process of its own, or not watched.")
    made_of: dict[str, Any] = Field(
        default_factory=dict, description="What the digest is of, part by part. Empty: an older version's record."
    )

    @property
    def reusable(self) -> bool:
        """Return whether a request for the same digest may get this record instead of new work."""
        return True

    @property
    def fits_its_digest(self) -> bool:
        """Return whether the digest is that of the parts that the record says it was made of.

        This also holds for records of an earlier version, whose digests cannot be computed again.
        """
        parts = self.made_of
        return not parts or is_made_of(self.kind, self.digest, parts) or is_of_earlier_version(parts)

    @property
    def content(self) -> dict[str, StoredFile]:
        """The files of the artifact itself.

        Kinds of records that keep other files beside them leave those out.
        """
        return self.files

    @property
    def size_bytes(self) -> int:
        """The size of the artifact's own files."""
        return sum(file.size_bytes for file in self.content.values())

    @property
    def content_digest(self) -> str:
        """The digest of the artifact, and not of its inputs: equal files have an equal digest."""
        if not self.content:
            return self.digest
        names = {name: file.sha256 for name, file in self.content.items()}
        return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()

    def with_files(self, folder: Path) -> Self:
        """Return this record with every file below the folder listed and hashed."""
        found = {
            path.relative_to(folder).as_posix(): StoredFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.model_copy(update={"files": found})


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class LengthProfile(BaseModel):
    """The lengths of the engine's rows, in tokens, for a sample of the user's requests, and the cost of padding there.

    Shares of padding are shares of all tokens that the engine gets, with one row at a time, from 0 to 1.
    """

    model_config = _CONFIG
    requests: int
    counts: tuple[tuple[int, int], ...] = Field(description="Length and number of rows, shortest first.")
    buckets: tuple[int, ...] = Field(description="What rows are padded to.")
    padding: float
    padding_of_standard_buckets: float = Field(description="With the buckets that a model has without a sample.")
    padding_of_one_length: float = Field(description="With every row padded to the longest that is served.")

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(count for _, count in self.counts)

    def percentile(self, share: float) -> int:
        """Return the smallest length that this share of the rows does not exceed."""
        seen = 0
        for length, count in self.counts:
            seen += count
            if seen >= share * self.rows:
                return length
        return self.counts[-1][0]

    def bucket(self, tokens: int) -> int:
        """Return the length that a row of this many tokens is padded to."""
        return next(size for size in self.buckets if size >= tokens)


class Checkpoint(Record):
    """A Hugging Face checkpoint, copied and checked.

    Because its parts have digests of their own, a change of a label's name rebuilds the release and nothing before it.
    """

    kind: ClassVar[str] = "checkpoint"
    source: str
    revision: str
    task: str
    architecture: str
    model_type: str = ""
    weights_digest: str
    weights_bytes: int
    tokenizer_digest: str
    labels_digest: str
    pipeline_digest: str = Field(description="Of what makes answers of the engine's numbers: resources.pipelines.")
    ids_digest: str = Field(default="", description="Of which token ids the model gets, how many, in which arrays.")
    labels: tuple[str, ...] = ()
    output: str = Field(description="What the engine's output is called.")
    settings: dict[str, Any] = Field(description="The pipeline's.")
    max_tokens: int = Field(description="Longest text that is served, in tokens, special tokens included.")
    lengths: LengthProfile | None = Field(default=None, description="Of the user's sample, where there is one.")
    allow_pickle: bool = False
    trust_remote_code: bool = False
    assumed: tuple[str, ...] = Field(default=(), description="Answers that neither its files nor the models file give.")


class EvaluationSet(Record):
    """Real requests, and the answers of PyTorch in fp32 to each of their rows alone, without padding.

    `items.json` holds the requests. `baseline.npy` or `baseline.json` holds one answer for each item; see
    resources.accuracy.evaluation_set.
    """

    kind: ClassVar[str] = "evaluation_set"
    items: int
    rows: int = Field(description="Of the engine: windows and labels make several of one request.")
    width: int
    longest_tokens: int


class Reference(Record):
    """The evaluation set's answers from the library that users would otherwise use, end to end from text.

    `answers.json` holds one answer for each item of the evaluation set, or null if the library takes no such request.
    PyTorch's own answers, with which engines are compared, were equal to these. Otherwise there is no record.
    """

    kind: ClassVar[str] = "reference"
    library: str = Field(description="And which of its classes or functions.")
    compared: int = Field(description="Answers that are equal.")
    refused: int = Field(description="Requests that the library does not take or cannot answer.")
    rows: int = Field(description="Rows whose token ids were compared with those of transformers' tokenizer.")
    retokenized: tuple[str, ...] = Field(
        default=(), description="Texts that the library cuts otherwise where it loads the tokenizer by itself."
    )


class ParityCase(BaseModel):
    """One comparison of the exported graph with PyTorch."""

    model_config = _CONFIG
    shape: str
    padded: bool
    max_relative_error: float = Field(description="Largest difference over the largest value of PyTorch's answer.")


class OnnxGraph(Record):
    """The exported graph: `model.onnx`, with `model.onnx.data` beside it if weights are external."""

    kind: ClassVar[str] = "onnx_graph"
    weights_digest: str
    opset: int
    nodes: int
    parameters: int
    inputs: tuple[str, ...]
    output: str
    width: int
    external_data: bool
    parity: tuple[ParityCase, ...]
    checker: str = Field(default="", description="What the ONNX checker found wrong; empty: nothing.")
    parity_misses: tuple[str, ...] = Field(default=(), description="Where it differs from PyTorch, each as a sentence.")

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why no engine may be built from the graph. A sound graph has none."""
        return (self.checker, *self.parity_misses) if self.checker else self.parity_misses

    @property
    def reusable(self) -> bool:
        """Return whether the graph is sound. An unsound one is exported again."""
        return not self.problems


EngineStatus = Literal["built", "unsupported", "failed"]


class Engine(Record):
    """One way to run the model on one target.

    An engine whose status is not `built` has a reason and no files.
    """

    kind: ClassVar[str] = "engine"
    name: str
    target: str
    runtime: str
    precision: str
    status: EngineStatus
    reason: str = ""
    entry_file: FileName | Literal[""] = Field(
        default="", description="What the runtime opens, relative to the artifact."
    )
    inputs: tuple[str, ...] = ()
    output: str = ""
    width: int = 0
    parameters: dict[str, str] = Field(default_factory=dict, description="The knobs it was built with.")
    operators: dict[str, int] = Field(default_factory=dict, description="Nodes by operator type.")
    kept: tuple[str, ...] = Field(
        default=(), description="Operators left in higher precision, by their modules' paths."
    )
    steps: tuple[str, ...] = Field(default=(), description="What was tried to find those, a sentence each.")
    documents: tuple[str, ...] = Field(
        default=(),
        description="Files for people: how to build it again, reports. Never served, nor counted as its size.",
    )

    @property
    def content(self) -> dict[str, StoredFile]:
        """The files that the runtime opens, which are also the files that a release serves."""
        return {name: file for name, file in self.files.items() if name not in self.documents}

    @property
    def reusable(self) -> bool:
        """Return whether the build ended with a result. A failed build is tried again."""
        return self.status != "failed"


class ThreadSetting(BaseModel):
    """The threads of an engine on the CPU.

    Args:
        spinning: Whether threads that wait for the next operator of a run keep their cores. Otherwise they sleep.
            Between runs all threads sleep.
    """

    model_config = _CONFIG
    threads: int
    spinning: bool = True

    def __str__(self) -> str:
        many = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return many if self.spinning else f"{many} that sleep while they wait"


class ThreadTrial(BaseModel):
    """One setting, measured in turns with another.

    The first trial of a sweep has no other setting beside it.
    """

    model_config = _CONFIG
    setting: ThreadSetting
    against: ThreadSetting | None = None
    speedups: dict[str, float] = Field(default_factory=dict, description="Times faster than that one, by shape.")
    score: float = Field(description="Times faster than the first of the sweep, geometric mean over the shapes.")


class Latency(BaseModel):
    """The wall-clock times of one runner at one shape, in milliseconds.

    With fewer than 100 samples, `p99_ms` is None.
    """

    model_config = _CONFIG
    count: int
    mean_ms: float
    std_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    max_ms: float
    throughput_per_s: float = Field(description="Rows a second.")


class ShapeTiming(BaseModel):
    """PyTorch and a candidate, measured in turns at one shape."""

    model_config = _CONFIG
    shape: str
    baseline: Latency
    candidate: Latency
    speedup: float = Field(description="Median over the pairs of baseline time over candidate time.")
    window_speedups: tuple[float, ...]
    agreed: bool = Field(description="The last windows agreed; False: the time bound ended the measuring.")
    pairs: int
    candidate_memory_bytes: int = Field(description="Peak resident memory above the bare process.")
    baseline_memory_bytes: int


class Disagreement(BaseModel):
    """One of the texts whose answers differ most from PyTorch's."""

    model_config = _CONFIG
    text: str
    score: float


class Accuracy(BaseModel):
    """A comparison of a candidate's answers with PyTorch's, by the task's own measure."""

    model_config = _CONFIG
    metrics: dict[str, float]
    gated: tuple[str, ...] = Field(default=(), description="The metrics that have a gate.")
    broken: str = Field(default="", description="Why the answers cannot be compared at all: NaN, wrong shape.")
    texts: int
    worst: tuple[Disagreement, ...] = ()


class BenchmarkReport(Record):
    """Accuracy and speed of one engine.

    `samples.json` holds every raw sample, in milliseconds, by shape.
    """

    kind: ClassVar[str] = "benchmark"
    engine: str
    engine_digest: str
    baseline_digest: str
    evaluation_digest: str = Field(description="Of the evaluation set, and so of the checkpoint, it was measured on.")
    target: str
    status: Literal["measured", "skipped", "failed"]
    reason: str = ""
    accuracy: Accuracy | None = None
    timings: tuple[ShapeTiming, ...] = ()
    threads: int = Field(default=0, description="Of PyTorch, and the most that the engine may use.")
    setting: ThreadSetting | None = Field(default=None, description="What the engine was measured with.")
    baseline_threads: int = Field(default=0, description="PyTorch's.")
    thread_trials: tuple[ThreadTrial, ...] = Field(default=(), description="How that was found; none: no choice.")
    device: str = ""
    engine_size_bytes: int = 0

    @property
    def reusable(self) -> bool:
        """Return whether the benchmark ended with a result. A failed one is run again."""
        return self.status != "failed"


class CandidateVerdict(BaseModel):
    """The reason why a candidate won or lost."""

    model_config = _CONFIG
    engine: str
    score: float | None = Field(description="The objective's geometric mean over the shapes; higher is better.")
    eligible: bool
    verdict: str


class Contest(BaseModel):
    """A comparison of the engine that serves, measured again, with the best engine that was built anew.

    Args:
        margin: The factor by which scores have to differ. Within it they are equal.
        challenger: The best new engine. None: no new engine is accurate.
        served_score: The score of the engine that serves. None: it is not accurate any more, or was not measured.
    """

    model_config = _CONFIG
    release: int
    engine: str = Field(description="The report on what serves.")
    served_score: float | None
    challenger: str | None
    challenger_score: float | None
    margin: float
    outcome: Literal["replaced", "equal", "slower", "inaccurate", "unmeasured"]


class Champion(Record):
    """The engine that is to be served.

    Args:
        contest: The comparison with the engine that serves. None: no other engine of that checkpoint serves.
    """

    kind: ClassVar[str] = "champion"
    target: str
    engine: str
    engine_digest: str
    evaluation_digest: str
    setting: ThreadSetting | None = Field(default=None, description="What it was measured with, and is to run with.")
    objective: str
    score: float
    reason: str
    verdicts: tuple[CandidateVerdict, ...]
    contest: Contest | None = None


class ServingSetting(BaseModel):
    """The setting with which Triton runs a release: its instances, and the wait of requests for a shared batch.

    Args:
        threads: The threads of an engine on the CPU while no other instance computes.
        threads_beside: Its threads while another instance computes. 0: the same number.
    """

    model_config = _CONFIG
    instances: int = 1
    threads: int = 1
    threads_beside: int = 0
    spinning: bool = True
    queue_delay_us: int = Field(default=0, description="How long a request may wait for others to run with.")

    def __str__(self) -> str:
        many = f"{self.instances} instance{'' if self.instances == 1 else 's'}"
        threads = str(ThreadSetting(threads=self.threads, spinning=self.spinning))
        shared = f" ({self.threads_beside} while others compute)" if self.threads_beside else ""
        wait = f", up to {self.queue_delay_us} microseconds of waiting" if self.queue_delay_us else ""
        return f"{many} of {threads}{shared}{wait}"


class ServingTrial(BaseModel):
    """One setting under load on a real server.

    Args:
        reason: Why the trial failed. A failed trial has no figures.
    """

    model_config = _CONFIG
    setting: ServingSetting
    stage: int = Field(description="Of the search; 1 is the first. Later ones are longer, and have fewer settings.")
    reason: str = ""
    requests: int = 0
    throughput_per_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    mean_batch: float = Field(default=0.0, description="Rows that Triton gave to one execution.")


class ServingConfiguration(Record):
    """The setting with which the champion is to be served, and the trials that support it.

    Args:
        reason: The reason for the setting, and for the lack of trials if there are none.
    """

    kind: ClassVar[str] = "serving_configuration"
    target: str
    engine: str
    engine_digest: str
    setting: ServingSetting
    reason: str
    clients: int
    p99_limit_ms: float | None
    device: str
    trials: tuple[ServingTrial, ...] = ()


class LoadLevel(BaseModel):
    """A release under the load of a number of clients.

    Each client sends its next request as soon as it has its answer.
    """

    model_config = _CONFIG
    clients: int
    tool: str = Field(description="Who asked: tritonclient or perf_analyzer.")
    requests: int = Field(description="0: not known.")
    throughput_per_s: float
    p50_ms: float
    p99_ms: float
    mean_batch: float = Field(description="Rows that Triton gave to one execution; 0: not known.")
    batches_per_request: float = Field(description="Of Triton's, for the model's last step; 0: not known.")


class ServingReport(Record):
    """Throughput and latency of a published release on a real server, by the number of clients."""

    kind: ClassVar[str] = "serving_report"
    target: str
    release: int
    engine: str
    status: Literal["measured", "skipped"]
    reason: str = ""
    server: str = ""
    device: str = ""
    levels: tuple[LoadLevel, ...] = ()
