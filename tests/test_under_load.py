"""Publishing, rolling back and retention under constant load: no failed request, no answer that mixes two releases.

Every release has a tokenizer and an engine of its own, with other ids for the same tokens, so parts of two of them
together answer as neither would. The clients have a process of their own; how fast they are answered is measured
elsewhere (tests/performance/releases.py).
"""

import os
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from resources.pipelines.tokenization import TextEncoder
from resources.tasks.samples import sample_texts
from resources.triton import retain as retaining
from resources.triton.exam import fleet_steps
from resources.triton.fleet import Fleet
from resources.triton.layout import CONFIG, list_releases
from resources.triton.proof import prove
from resources.triton.publish import Steps, publish
from resources.triton.python_models import aside
from resources.triton.retain import retain
from resources.triton.rollback import roll_back
from resources.triton.server import EmbeddedServer
from tests.clients import Load, Switch, moved, require_answered
from tests.releases import answers_of, exam_of, make_plan, unasked

TEXTS = sample_texts()[:40]
#: Of all clients. The embedded server answers some 500 a second here, when it has both cores to itself.
PER_SECOND = 40.0
#: How long an embedded server that polls may need for a new release here, and no more.
FOLLOW_SECONDS = 8.0
EXAM_TEXTS = 12
#: Of one round: three publishes and two rollbacks.
SWITCHES = 5


def test_a_mixture_would_be_seen(tmp_path):
    """What the whole file rests on: the tokenizer of one release with the engine of another answers as neither."""
    import onnxruntime

    plans = [make_plan(tmp_path, seed=seed, permuted=True) for seed in range(2)]
    known = [answers_of(plan, TEXTS) for plan in plans]
    for front, engine in ((0, 1), (1, 0)):
        encoder = TextEncoder.from_folder(str(plans[front].checkpoint_folder))
        session = onnxruntime.InferenceSession(str(plans[engine].engine_folder / "model.onnx"))
        mixed = np.concatenate([session.run(None, encoder.encode([text]))[0] for text in TEXTS])
        for right in known:
            assert np.abs(mixed - right).max(axis=1).min() > 0.05


class Cycle:
    """The product's own functions, one after the other, on a repository that a server serves."""

    def __init__(self, folder, settings, control, *, told):
        self.folder, self.repository, self.control, self.told = folder, folder / "models" / "cpu", control, told
        self.settings = settings
        self.plans = [make_plan(folder / "plans", seed=0, permuted=True)]
        publish(self.plans[0], self.repository, Steps(prove=unasked))
        self.switches = [Switch(0.0, 0)]

    def attach(self, server):
        if self.told:
            self.settings = replace(
                self.settings, servers=(server.grpc_address,), connection=server.connection, control=self.control
            )

    def publish(self, *, proven=False):
        """The next release; the number of each is that of its plan, counted from 1."""
        plan = make_plan(self.folder / "plans", seed=len(self.plans), permuted=True)
        self.plans.append(plan)
        exam = exam_of(plan, count=EXAM_TEXTS)
        if self.told:
            with Fleet(self.settings) as fleet:
                done = publish(plan, self.repository, fleet_steps(fleet, lambda: exam, self.repository))
        else:

            def prove_embedded(staged, release):
                with EmbeddedServer(staged, self.settings, models=["tiny"], log=self.folder / "proof.log") as server:
                    return prove(exam, "tiny", grpc=server.grpc_address, http=server.http_address)

            done = publish(plan, self.repository, Steps(prove=prove_embedded if proven else unasked))
        assert done.changed
        self._moved(done.release.number)

    def roll_back(self):
        done = roll_back(self.repository, "tiny", self.settings, log=self.folder / "rollback.log")
        self._moved(done.release.number)

    def retain(self, keep):
        """All but the newest and what serves."""
        serves = self.switches[-1].release + 1
        whole = [release.number for release in list_releases(self.repository, "tiny")]
        done = retain(self.repository, "tiny", keep=keep, settings=self.settings)
        assert set(done.kept) == {*whole[-keep:], serves}
        assert set(done.removed) == set(whole) - set(done.kept)

    def followed(self, client):
        """Wait until the server serves what is pointed to."""
        deadline = time.monotonic() + 60
        while client.release_of("tiny") != self.switches[-1].release + 1:
            assert time.monotonic() < deadline, "the server does not follow"
            time.sleep(0.05)

    def _moved(self, number):
        self.switches.append(moved(self.repository / "tiny" / CONFIG, number - 1))


def under_load(cycle, triton_settings, tmp_path, rounds, control, *, proven):
    """proven: rounds whose first release is proven on a server of its own; a server that is told proves all of them."""
    log = tmp_path / "triton.log"
    # What the releases that will be published are going to answer.
    plans = [make_plan(tmp_path / "known", seed=seed, permuted=True) for seed in range(3 * rounds + 1)]
    known = np.stack([answers_of(plan, TEXTS) for plan in plans])
    with (
        EmbeddedServer(cycle.repository, triton_settings, models=["tiny"], log=log, control=control) as server,
        server.client() as client,
    ):
        cycle.attach(server)
        with Load(server.grpc_address, "tiny", TEXTS, known, PER_SECOND) as load:
            time.sleep(1)
            for number in range(rounds):
                cycle.publish(proven=number < proven)
                cycle.followed(client)
                cycle.roll_back()
                cycle.followed(client)
                cycle.publish()
                # At once: nothing but the pointer, and perhaps a server, holds what served a moment ago.
                cycle.retain(keep=1)
                cycle.followed(client)
                cycle.publish()
                cycle.followed(client)
                cycle.roll_back()
                cycle.retain(keep=2)
                cycle.followed(client)
        require_answered(load.requests, cycle.switches, PER_SECOND)


EXPLICIT = pytest.param("explicit", True, id="explicit")
POLL = pytest.param("poll", True, id="poll")
POLL_UNTOLD = pytest.param("poll", False, id="poll, a server nobody tells")


@pytest.mark.parametrize(("control", "told"), [EXPLICIT, POLL_UNTOLD])
def test_some_switches_under_load(triton_settings, tmp_path, monkeypatch, control, told):
    monkeypatch.setattr(retaining, "FOLLOW_SECONDS", FOLLOW_SECONDS)
    cycle = Cycle(tmp_path, triton_settings, control, told=told)
    under_load(cycle, triton_settings, tmp_path, 1, control, proven=0)


@pytest.mark.whole
@pytest.mark.parametrize(("control", "told"), [EXPLICIT, POLL, POLL_UNTOLD])
def test_all_switches_under_load(triton_settings, tmp_path, monkeypatch, control, told):
    """50 in explicit mode; in poll mode 200, half of them with a server that the product is told of."""
    monkeypatch.setattr(retaining, "FOLLOW_SECONDS", FOLLOW_SECONDS)
    cycle = Cycle(tmp_path, triton_settings, control, told=told)
    rounds = (50 if control == "explicit" else 100) // SWITCHES
    under_load(cycle, triton_settings, tmp_path, rounds, control, proven=rounds // 5)


def test_imports_of_a_model_that_loads_have_a_low_priority(tmp_path, monkeypatch):
    """And what it computes then has not: the priority is a thread's own."""
    code = "import os, threading\nseen = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    (tmp_path / "heavy_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    aside.import_aside("heavy_module", "a_module_that_is_not_there")
    assert sys.modules.pop("heavy_module").seen == max(before, aside.NICE)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
