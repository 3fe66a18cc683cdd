"""Every architecture with every task, from checkpoint to a proven release: `make test-all`."""

from dataclasses import replace

import pytest

from resources.tasks import TASKS
from resources.triton.layout import current_release
from tests.answers import CHECKPOINTS
from tests.checkpoints import ENCODERS
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_job

pytestmark = pytest.mark.whole


PAIRS = [(architecture, task) for architecture in ENCODERS for task in TASKS]
PAIRS += [("bart", "classification"), ("bart", "zero-shot-classification")]


@pytest.mark.parametrize(("architecture", "task"), PAIRS)
def test_from_checkpoint_to_a_proven_release(
    made_checkpoint, workspace, triton_settings, architecture, task, record_property
):
    ready = replace(workspace, triton=triton_settings)
    folder = made_checkpoint(architecture=architecture, **CHECKPOINTS[task])
    settings = {"shapes": ["1x16"], "engines": None}
    add_entry(ready, entry_for(folder, task=task, **settings))
    outcome = run_job(ready, "tiny")
    assert outcome.success, outcome.messages
    release = current_release(ready.repository("cpu"), "tiny")
    assert release is not None
    assert release.proof is not None and release.proof.passed
    # A line of the table of what was tried, for `--junitxml`: what the candidates reached, and by which operators.
    for name in ("onnxruntime_fp32", "onnxruntime_int8", "onnxruntime_int8_static"):
        metadata = outcome.metadata("benchmarks", "cpu", name)
        built = outcome.metadata("engines", "cpu", name)["parameters"]
        record_property(
            "row",
            f"{architecture} | {task} | {name} | {built.get('int8_operators', '–')} | {built.get('ladder', '–')} | "
            f"{metadata.get('accuracy', metadata['reason'])}",
        )
