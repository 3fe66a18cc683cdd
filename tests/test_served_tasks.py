"""Every task through the whole job and the real Triton: what is served is what transformers' own pipeline answers.

Architectures and tasks are paired so that each task and each kind of tokenizer is served once; `make test-all` has all
of them.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from resources.errors import ServerError
from resources.tasks import TASKS
from resources.tasks.samples import sample_texts
from resources.triton.client import TextClient
from resources.triton.layout import CONFIG, called_internals, named_internals
from resources.triton.server import EmbeddedServer
from tests.answers import CHECKPOINTS, assert_same, transformers_answers
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_job

#: Task, architecture, options of ours, and what the same is called in transformers.
SERVED = {
    "reranking": ("xlm-roberta", {}, {}),
    "token-classification": (
        "roberta",
        {"aggregation_strategy": "average"},
        {"aggregation_strategy": "average", "stride": 32},
    ),
    "question-answering": ("electra", {"stride": 16}, {"stride": 16, "max_tokens": 64}),
    "zero-shot-classification": ("deberta-v2", {"multi_label": True}, {"multi_label": True}),
    "fill-mask": ("modernbert", {"top_k": 3}, {"top_k": 3}),
}
MILLION = "All work and no play makes a dull text. " * 25_000
ODD = ["", " ", "🙂🙃", "مرحبا بالعالم, שלום", "nul \x00 inside", "word " * 5000]


@pytest.fixture(scope="module")
def served(tmp_path_factory, made_checkpoint, triton_settings):
    """One server of all tasks, each published by its own run of the job."""
    from resources.processes.isolation import Limits
    from resources.settings.workspace import Workspace

    home = tmp_path_factory.mktemp("served")
    workspace = Workspace(
        home=home / "home",
        catalog_path=home / "models.yaml",
        limits=Limits(timeout_s=240, memory_bytes=6 * 10**9),
        triton=triton_settings,
    )
    folders = {}
    for task, (architecture, options, _) in SERVED.items():
        folders[task] = made_checkpoint(architecture=architecture, **CHECKPOINTS[task])
        fields = {"shapes": ["1x16"], "engines": ["onnxruntime_fp32"]}
        add_entry(workspace, entry_for(folders[task], name=task, task=task, options=options, **fields))
        outcome = run_job(workspace, task)
        assert outcome.success, outcome.messages
    repository = workspace.repository("cpu")
    with EmbeddedServer(repository, triton_settings, models=list(SERVED), log=home / "triton.log") as server:
        yield server, folders, repository, workspace


def items_of(task, repository):
    """Items of many lengths, within what the model takes where transformers would not cut them."""
    if task == "fill-mask":
        # Bytes of other scripts are many tokens.
        texts = [text for text in sample_texts() if text.isascii()][:40]
        return [{"TEXT": f"{text[:14]} [MASK] {text[14:24]}"} for text in texts]
    return TASKS[task].items(settings_of(task, repository), 32)[:60:2]


def settings_of(task, repository):
    (path,) = repository.glob(f"{task}__r1__*/1/pipeline.json")
    return json.loads(path.read_text())["settings"]


@pytest.mark.parametrize("task", SERVED)
def test_served_answers_are_those_of_transformers(served, task):
    server, folders, repository, _ = served
    items = items_of(task, repository)
    expected = transformers_answers(task, folders[task], items, **SERVED[task][2])
    with server.client() as client:
        contract = client.contract(task)
        assert set(contract.inputs) == set(items[0])
        assert_same([client.ask(task, contract, [item])[0] for item in items], expected, 1e-4)
        # Mixed lengths in batches of many sizes, and several at once.
        for size in (2, 5, 8):
            found = []
            for start in range(0, len(items), size):
                found += client.ask(task, contract, items[start : start + size])
            assert_same(found, expected, 1e-4)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda item: client.ask(task, contract, [item])[0], items))
        assert_same(found, expected, 1e-4)
    with TextClient(server.http_address, "http") as client:
        assert_same(client.ask(task, contract, items[:4], as_json=True), expected[:4], 1e-4)


@pytest.mark.parametrize("task", SERVED)
def test_odd_texts_are_answered(served, task):
    server, _, repository, _ = served
    settings = settings_of(task, repository)
    with server.client() as client:
        contract = client.contract(task)
        for text in [*ODD, MILLION]:
            for item in TASKS[task].odd_items(settings, text):
                (answer,) = client.ask(task, contract, [item])
                assert answer is not None


@pytest.mark.parametrize("task", [task for task in SERVED if task != "reranking"])
def test_what_cannot_be_answered_fails_alone(served, task):
    server, _, repository, _ = served
    settings = settings_of(task, repository)
    right = items_of(task, repository)[:8]
    wrong = [dict.fromkeys(right[0], b"\xff\xfe no text"), *TASKS[task].refused_items(settings)]
    with server.client() as client, ThreadPoolExecutor(12) as pool:
        contract = client.contract(task)
        alone = [client.ask(task, contract, [item])[0] for item in right]

        def refused(item):
            with pytest.raises(ServerError) as caught:
                client.ask(task, contract, [item])
            assert caught.value.__cause__.status() == "StatusCode.INVALID_ARGUMENT"
            return str(caught.value)

        futures = [pool.submit(refused, item) for item in wrong * 3]
        asked = [pool.submit(client.ask, task, contract, [item]) for item in right * 2]
        for future, expected in zip(asked, alone * 2, strict=True):
            assert_same(future.result()[0], expected, 1e-4)
        said = [future.result() for future in futures]
    assert "is not valid UTF-8" in said[0]
    for message in said[1 : len(wrong)]:
        assert "LABELS" in message or "[MASK]" in message


def test_labels_beyond_the_batch_are_split(served):
    """A batch of eight rows with forty labels each is three hundred and twenty rows of the engine."""
    server, folders, _, _ = served
    task, labels = "zero-shot-classification", [f"label {number}" for number in range(40)]
    items = [{"TEXT": text, "LABELS": json.dumps(labels)} for text in sample_texts()[:8]]
    expected = transformers_answers(task, folders[task], items[:2], multi_label=True)
    with server.client() as client:
        found = client.ask(task, client.contract(task), items)
    assert [len(answer["labels"]) for answer in found] == [40] * 8
    for answer, right in zip(found, expected, strict=False):
        scores = dict(zip(answer["labels"], answer["scores"], strict=True))
        assert scores == pytest.approx(dict(zip(right["labels"], right["scores"], strict=True)), abs=1e-4)


def test_an_engine_that_answers_nan_is_refused_not_made_an_answer(served, triton_settings, tmp_path):
    _, _, repository, _ = served
    task = "token-classification"
    copy = tmp_path / "cpu"
    for name in (task, f"{task}__r1__pipeline"):
        shutil.copytree(repository / name, copy / name)
    model = copy / f"{task}__r1__pipeline" / "1" / "model.py"
    line = "return self._engine.run("
    assert line in model.read_text()
    model.write_text(model.read_text().replace(line, "return float('nan') * self._engine.run("))
    with (
        EmbeddedServer(copy, triton_settings, models=[task], log=tmp_path / "log") as server,
        server.client() as client,
        pytest.raises(ServerError, match="NaN or infinity"),
    ):
        client.ask(task, client.contract(task), [{"TEXT": "Sarah lives in Berlin"}])


def test_the_public_configuration_names_what_it_calls(served):
    _, _, repository, _ = served
    config = (repository / "question-answering" / CONFIG).read_text()
    assert named_internals(config) == ["question-answering__r1__pipeline"]
    assert called_internals(config) == []
