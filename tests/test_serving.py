"""How a release is served best, and what it does under load: choosing is pure, the figures are a real server's."""

import itertools
import json
import os
import stat
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from resources.artifacts.records import ServingReport, ServingSetting, ServingTrial, ThreadSetting
from resources.catalog.entries import RateLimiter, ServingSettings
from resources.engines.onnxruntime.cuda import fill, rows_of_a_graph
from resources.errors import ReleaseError, ServerError
from resources.report.plots import load_plot
from resources.report.tables import load_table
from resources.tasks.samples import sample_texts
from resources.tracking.serving import last_of_each
from resources.triton.config import engine_config, front_config
from resources.triton.launch import caching, limited
from resources.triton.limits import require_resources
from resources.triton.load import closed_loop, server_statistics
from resources.triton.mix import mix
from resources.triton.perf_analyzer import find_perf_analyzer, read_report, run_perf_analyzer
from resources.triton.publish import Steps, publish
from resources.triton.search import choose, last_stage, rank, settings_to_try, successive_halving
from resources.triton.server import EmbeddedServer
from resources.triton.serving_report import levels_of, measure_load
from resources.triton.trials import embedded_trials
from tests.releases import CONTRACT, answers_of, ask_together, counted, make_plan, unasked

ITEMS = [{"TEXT": text} for text in sample_texts()[:40]]
#: Lengths that differ.
MIXED = [{"TEXT": "word " * count} for count in (3, 20, 50)]


CPU = {"device": "cpu", "cores": 8, "engine_bytes": 1}


def setting(instances=1, threads=2, delay=0):
    return ServingSetting(instances=instances, threads=threads, queue_delay_us=delay)


def trial(throughput, p99, *, stage=1, reason="", **fields):
    return ServingTrial(
        setting=setting(**fields), stage=stage, throughput_per_s=throughput, p50_ms=p99 / 2, p99_ms=p99, reason=reason
    )


def test_instances_share_the_threads_and_what_is_fixed_is_not_varied():
    found = settings_to_try(ThreadSetting(threads=4, spinning=False), ServingSettings(), **CPU)
    assert found[0] == ServingSetting(instances=1, threads=4, spinning=False, queue_delay_us=0)
    assert {(one.instances, one.threads, one.threads_beside) for one in found} == {(1, 4, 0), (2, 4, 4), (4, 4, 2)}
    assert {one.queue_delay_us for one in found} == {0, 500, 2000}
    assert len(found) == 9
    alone = settings_to_try(ThreadSetting(threads=1), ServingSettings(queue_delay_us=70), **CPU)
    assert {(one.instances, one.queue_delay_us) for one in alone} == {(1, 70), (2, 70), (4, 70)}
    (fixed,) = settings_to_try(ThreadSetting(threads=3), ServingSettings(instances=8, queue_delay_us=0), **CPU)
    assert (fixed.instances, fixed.threads, fixed.threads_beside) == (8, 3, 1)
    on_gpu = settings_to_try(ThreadSetting(threads=1), ServingSettings(queue_delay_us=0), **{**CPU, "device": "cuda"})
    assert [(one.instances, one.threads, one.threads_beside) for one in on_gpu] == [(1, 1, 0), (2, 1, 0), (4, 1, 0)]


def test_throughput_decides_among_those_that_keep_the_limit():
    slow, fast, faster = trial(100, 20), trial(150, 60, instances=2), trial(200, 90, delay=500)
    broken = trial(900, 1, reason="it did not load", instances=4)
    assert rank([broken, slow, faster, fast], None) == [faster, fast, slow, broken]
    assert rank([broken, slow, faster, fast], 70) == [fast, slow, faster, broken]
    assert choose([slow, fast, faster, broken], None)[0] == faster.setting
    assert choose([slow, fast, faster, broken], 70)[0] == fast.setting
    chosen, reason = choose([fast, slow, faster], 10)
    assert chosen == slow.setting
    assert "no setting keeps 10 ms" in reason and "20.0 ms" in reason
    with pytest.raises(ReleaseError, match="no setting could be served: it did not load"):
        choose([broken], None)
    with pytest.raises(ReleaseError, match="none was tried"):
        choose([], None)


def test_of_equals_the_simplest_is_taken():
    assert choose([trial(91, 20), trial(100, 20, instances=2)], None)[0].instances == 1
    assert choose([trial(89, 20), trial(100, 20, instances=2)], None)[0].instances == 2
    assert choose([trial(100, 20, delay=500), trial(99, 20)], None)[0].queue_delay_us == 0
    # Not one that breaks the limit.
    assert choose([trial(99, 40), trial(100, 20, instances=2)], 30)[0].instances == 2


def test_the_better_half_is_measured_again_in_both_orders():
    tried = settings_to_try(ThreadSetting(threads=4), ServingSettings(), **CPU)
    asked = []

    def measure(one, seconds, stage):
        asked.append((stage, one, seconds))
        if one.instances == 4:
            return ServingTrial(setting=one, stage=stage, reason="no memory")
        # With two instances it is faster, and in the last stage the second time slower.
        again = sum(known == (stage, one) for known in [(number, which) for number, which, _ in asked]) > 1
        figures = {"throughput_per_s": 100.0 * one.instances - 20 * again, "p50_ms": 1.0, "p99_ms": 2.0 + again}
        return ServingTrial(setting=one, stage=stage, requests=10, **figures)

    trials = successive_halving(tried, measure, 60.0, None)
    stages = [[which for number, which, _ in asked if number == stage] for stage in range(1, 5)]
    # The better half, and the simplest, which stays to the end.
    assert [len(found) for found in stages] == [9, 4, 3, 6]
    assert stages[3] == [*stages[2], *reversed(stages[2])]
    assert [one.instances for one in stages[2]] == [1, 2, 2]
    assert stages[2][0] == tried[0]
    assert max(seconds for _, _, seconds in asked) > 3 * min(seconds for _, _, seconds in asked)
    assert last_stage(trials) == trials[-3:]
    assert [(one.throughput_per_s, one.p99_ms, one.requests) for one in trials[-2:]] == [(190.0, 3.0, 20)] * 2
    assert choose(last_stage(trials), None)[0].instances == 2
    assert len(last_of_each(trials)) == len(tried)
    assert max(one.stage for one in last_of_each(trials)) == max(one.stage for one in trials)
    assert sum(one.stage == 1 for one in trials) == 9
    # A stage in which nothing answered does not decide.
    assert last_stage([*trials, trial(0, 0, stage=9, reason="the server is gone")]) == last_stage(trials)
    assert last_stage([trial(0, 0, reason="no")])[0].reason == "no"
    # What does not come within half of the time is not tried.
    slow = successive_halving(
        tried, lambda one, seconds, stage: time.sleep(0.2) or measure(one, seconds, stage), 1.0, None
    )
    assert {one.setting for one in slow} < set(tried)
    assert slow[0].setting == tried[0]
    # Where nothing can be served, the search ends.
    assert len(successive_halving(tried, lambda one, seconds, stage: trial(0, 0, reason="no"), 60.0, None)) == 9


def test_the_mix_is_that_of_the_profile():
    lengths, buckets = [5, 7, 30, 100], (16, 32, 64, 128)
    chosen = mix(lengths, [(4, 50), (20, 25), (128, 25)], buckets, size=100)
    assert [chosen.count(index) for index in range(4)] == [25, 25, 25, 25]
    # A bucket that no item falls into goes to the nearest; what is rare is there all the same.
    chosen = mix(lengths, [(4, 990), (60, 10)], buckets, size=40)
    assert [chosen.count(index) for index in range(4)] == [20, 20, 1, 0]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(tmp_path_factory.mktemp("serving"), serving=ServingSetting(threads=1))


def test_settings_are_measured_on_a_real_server(plan, triton_settings, tmp_path):
    with embedded_trials(plan, triton_settings, ITEMS, 4, tmp_path / "log") as measure:
        one = measure(ServingSetting(), 1.0, 1)
        two = measure(ServingSetting(instances=2, queue_delay_us=500), 1.5, 1)
        patient = measure(ServingSetting(queue_delay_us=30_000), 1.5, 2)
    assert not one.reason and not two.reason and not patient.reason
    assert min(one.requests, two.requests, patient.requests) > 20
    assert one.p50_ms <= one.p99_ms
    assert (one.stage, patient.stage) == (1, 2)
    # It is that setting which ran: who waits 30 ms for company has it, and answers late.
    assert patient.p50_ms > 30 > one.p50_ms
    assert patient.mean_batch > one.mean_batch


def test_the_chosen_configuration_is_in_the_release(plan, triton_settings, tmp_path):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    chosen = replace(
        plan,
        serving=ServingSetting(instances=3, threads=1, queue_delay_us=700),
        response_cache=True,
        rate_limiter=RateLimiter(priority=2),
    )
    repository = tmp_path / "cpu"
    release = publish(chosen, repository, Steps(prove=unasked)).release
    assert release.serving == chosen.serving
    config = ModelConfig()
    text_format.Parse((repository / "tiny__r1__pipeline" / "config.pbtxt").read_text(), config)
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert [(group.count, group.rate_limiter.priority) for group in config.instance_group] == [(1, 2), (2, 20_000)]
    options = caching(triton_settings.environment, 8)
    names = ["tiny", "tiny__r1__pipeline"]
    with (
        EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "log", options=options) as server,
        server.client() as client,
    ):
        before = server_statistics(server.grpc_address, names)
        answers = [ask_together(client, ["the same text"]) for _ in range(5)]
        done = counted(server.grpc_address, before, 5)
    # The engine ran once; what the cache gave is the same.
    assert (done["tiny"].requests, done["tiny__r1__pipeline"].executions) == (5, 1)
    assert all(np.array_equal(answers[0], other) for other in answers)
    np.testing.assert_allclose(answers[0], answers_of(plan, ["the same text"]), rtol=0, atol=1e-6)


#: Put at the end of an engine's model.py: it writes one line a run, with the shape that it was given, or its process
#: and when it began and ended.
SHAPE = "'x'.join(map(str, feed['input_ids'].shape))"
PROCESS = "os.getpid()} {started} {time.monotonic()"
COUNTING = """
import os, time

_initialize = TritonPythonModel.initialize


def _initialize_and_count(self, args):
    _initialize(self, args)
    run = self._engine.run

    def counted(feed):
        started = time.monotonic()
        found = run(feed)
        time.sleep({pause})
        with open({path!r}, "a") as log:
            log.write(f"{{{what}}}\\n")
        return found

    self._engine.run = counted


TritonPythonModel.initialize = _initialize_and_count
"""


def test_length_buckets_let_the_engine_run_less_often(plan, triton_settings, tmp_path):
    """Counted by the engine itself and by the server; without buckets hardly two of these requests are of one shape."""
    texts = [{"TEXT": "word " * count} for count in range(1, 60)]
    ran = {}
    for name, buckets in (("buckets", ()), ("own_lengths", tuple(range(1, 65)))):
        folder = tmp_path / name
        repository = folder / "cpu"
        # Batches as large as there are clients, however fast the machine is.
        made = make_plan(folder / "plan", max_batch_size=32, serving=ServingSetting(queue_delay_us=20_000))
        if buckets:
            encoder = made.checkpoint_folder / "encoder.json"
            encoder.write_text(json.dumps({**json.loads(encoder.read_text()), "buckets": buckets}))
            made = replace(made, checkpoint=made.checkpoint.with_files(made.checkpoint_folder))
        publish(made, repository, Steps(prove=unasked))
        code, log = repository / "tiny__r1__pipeline" / "1" / "model.py", folder / "runs"
        code.write_text(code.read_text() + COUNTING.format(path=str(log), what=SHAPE, pause=0))
        with EmbeddedServer(repository, triton_settings, models=["tiny"], log=folder / "log") as server:
            log.write_text("")
            before = server_statistics(server.grpc_address, ["tiny", "tiny__r1__pipeline"])
            result = closed_loop(
                server.grpc_address, "tiny", CONTRACT, texts, concurrency=32, seconds=1.5, warm_up_seconds=0
            )
            done = counted(server.grpc_address, before, result.requests)
        runs = log.read_text().splitlines()
        assert result.failures == 0
        engine, asked = done["tiny__r1__pipeline"], done["tiny"].requests
        # All rows of all batches that the server made went through the engine, those of one length together.
        assert sum(int(shape.split("x")[0]) for shape in runs) == engine.rows == asked
        assert engine.executions < len(runs) < asked
        assert engine.mean_batch > 2
        ran[name] = len(runs) / asked
        if not buckets:
            assert {int(shape.split("x")[1]) for shape in runs} <= set(range(8, 65, 8))
    assert ran["buckets"] < 0.6 * ran["own_lengths"]


def test_the_first_instance_has_what_is_alone_and_others_help(triton_settings, tmp_path):
    made = make_plan(tmp_path / "plan", serving=ServingSetting(instances=2, threads=1))
    publish(made, tmp_path / "cpu", Steps(prove=unasked))
    code, log = tmp_path / "cpu" / "tiny__r1__pipeline" / "1" / "model.py", tmp_path / "runs"
    code.write_text(code.read_text() + COUNTING.format(path=str(log), what=PROCESS, pause=0.002))
    with EmbeddedServer(tmp_path / "cpu", triton_settings, models=["tiny"], log=tmp_path / "log") as server:
        log.write_text("")
        with server.client() as client:
            for _ in range(50):
                ask_together(client, ["one"])
                time.sleep(0.01)  # an instance is free a moment after its answer
        alone = Counter(line.split()[0] for line in log.read_text().splitlines())
        log.write_text("")
        assert not closed_loop(
            server.grpc_address, "tiny", CONTRACT, ITEMS, concurrency=16, seconds=1.5, warm_up_seconds=0
        ).failures
        together = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert list(alone.values()) == [50]
    assert len(together) == 2
    assert min(together.values()) > 0.2 * max(together.values())


def test_instances_that_share_a_resource_never_run_together(triton_settings, tmp_path):
    limiter = RateLimiter(resources={"cores": 1})
    made = make_plan(tmp_path / "plan", max_batch_size=4, serving=ServingSetting(instances=2, threads=1))
    made = replace(made, rate_limiter=limiter)
    publish(made, tmp_path / "cpu", Steps(prove=unasked))
    code, log = tmp_path / "cpu" / "tiny__r1__pipeline" / "1" / "model.py", tmp_path / "runs"
    code.write_text(code.read_text() + COUNTING.format(path=str(log), what=PROCESS, pause=0.002))
    names = ["tiny", "tiny__r1__pipeline"]
    spans = {}
    for there in (1, 2):
        options = limited({"cores": there})
        server = EmbeddedServer(
            tmp_path / "cpu", triton_settings, models=["tiny"], log=tmp_path / "log", options=options
        )
        with server:
            log.write_text("")
            before = server_statistics(server.grpc_address, names)
            result = closed_loop(
                server.grpc_address, "tiny", CONTRACT, ITEMS, concurrency=16, seconds=1.0, warm_up_seconds=0
            )
            counted(server.grpc_address, before, result.requests)
        assert not result.failures
        runs = [line.split() for line in log.read_text().splitlines()]
        assert len({process for process, _, _ in runs}) == 2, "both take part"
        spans[there] = sorted((float(start), float(end)) for _, start, end in runs)

    def overlapping(found):
        return sum(later < end for (_, end), (later, _) in itertools.pairwise(found))

    assert overlapping(spans[1]) == 0
    assert overlapping(spans[2]) > 10


def test_resources_that_are_too_few_or_misspelled_are_said_before_the_server_starts(tmp_path):
    limiter = RateLimiter(resources={"cores": 2, "lanes": 1})
    for name, taken in (("tiny", limiter), ("other", None)):
        made = make_plan(tmp_path / name, model=name)
        publish(replace(made, rate_limiter=taken), tmp_path / "cpu", Steps(prove=unasked))

    def check(given, control="explicit"):
        return require_resources(tmp_path / "cpu", given, control)

    assert check({}) == []
    assert check({"cores": 2, "lanes": 4, "spare": 1}) == ["spare"]
    with pytest.raises(
        ServerError, match=r"tiny__r1__pipeline takes 2 of 'cores', and there are 1\. .*cores=2 .*lanes=3"
    ):
        check({"cores": 1, "lanes": 3})
    with pytest.raises(
        ServerError, match=r"takes 2 of 'cores', and there are 0; .* --resource cores=2 --resource lanes=1,"
    ):
        check({"core": 4})
    # A release of before is loaded too, but where the server is told what to load.
    publish(make_plan(tmp_path / "tiny", seed=1), tmp_path / "cpu", Steps(prove=unasked))
    assert check({"cores": 1}) == ["cores"]
    with pytest.raises(ServerError, match="tiny__r1__pipeline takes 2"):
        check({"cores": 1}, "poll")


def test_a_server_that_lacks_resources_says_what_to_do(triton_settings, tmp_path):
    made = replace(make_plan(tmp_path / "plan"), rate_limiter=RateLimiter(resources={"cores": 2}))
    publish(made, tmp_path / "cpu", Steps(prove=unasked))
    options = limited({"core": 4})
    server = EmbeddedServer(tmp_path / "cpu", triton_settings, models=[], log=tmp_path / "log", options=options)
    with (
        server,
        server.client() as client,
        pytest.raises(ServerError, match=r"limited to 0.*--resource NAME"),
    ):
        client.load("tiny")


@pytest.mark.parametrize(
    ("instances", "limiter", "groups"),
    [
        (1, None, [(1, 0)]),
        (2, None, [(1, 1), (1, 10_000)]),
        (4, RateLimiter(priority=3), [(1, 3), (3, 30_000)]),
        (4, RateLimiter(resources={"cores": 1}, priority=3), [(4, 3)]),  # a helper would wait for ever longer
    ],
)
def test_the_first_instance_comes_first(plan, instances, limiter, groups):
    given = replace(plan, serving=ServingSetting(instances=instances), rate_limiter=limiter)
    found = front_config(given, 1).instance_group
    assert [(group.count, group.rate_limiter.priority) for group in found] == groups
    assert {group.kind for group in found} == {found[0].kind}
    assert [group.count for group in engine_config(replace(given, flavour="native"), 1).instance_group] == [instances]


def test_a_release_under_load(plan, triton_settings, tmp_path):
    publish(plan, tmp_path / "cpu", Steps(prove=unasked))
    with EmbeddedServer(tmp_path / "cpu", triton_settings, models=["tiny"], log=tmp_path / "log") as server:
        levels = measure_load(server.grpc_address, "tiny", ITEMS, [1, 8], 2.0)
    assert [level.clients for level in levels] == [1, 8]
    assert levels[0].batches_per_request == pytest.approx(1, abs=0.01)
    assert levels[1].batches_per_request < 1 < levels[1].mean_batch
    assert all(level.requests > 20 and level.p50_ms <= level.p99_ms for level in levels)
    assert levels[1].p50_ms > levels[0].p50_ms
    report = ServingReport(
        digest="d", model="tiny", target="cpu", release=1, engine="table", status="measured", levels=tuple(levels)
    )
    assert load_plot(report, "tiny").startswith(b"\x89PNG")
    assert [row[:2] for row in load_table(levels)[1]] == [["1", "tritonclient"], ["8", "tritonclient"]]


def test_rows_of_cuda_graphs():
    assert [rows_of_a_graph(rows) for rows in (1, 3, 9, 33, 128, 129)] == [1, 4, 12, 48, 128, 129]
    filled = fill({"ids": np.array([[1, 2], [3, 4], [5, 6]])}, 4)
    assert filled["ids"].tolist() == [[1, 2], [3, 4], [5, 6], [1, 2]]
    assert fill(filled, 4)["ids"] is filled["ids"]


def test_levels():
    assert levels_of(16) == (1, 4, 16)
    assert levels_of(1) == (1,)
    assert levels_of(64) == (1, 8, 64)


REPORT = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
    "16,4054.35,9,404,1012,50,2309,31,2,3801,4422,4702,5408\n"
)


def test_perf_analyzers_report_is_read():
    (level,) = read_report(REPORT)
    assert (level.clients, level.tool) == (16, "perf_analyzer")
    assert (level.throughput_per_s, level.p50_ms, level.p99_ms) == (4054.35, 3.801, 5.408)
    with pytest.raises(ServerError, match=r"not what its version 2\.60 writes .*'some,other'"):
        read_report("some,other\n1,2\n")


def test_perf_analyzer_is_called_and_its_troubles_are_said(tmp_path, monkeypatch):
    """By a stand-in: the real program needs a newer C library than every machine has that runs these tests."""
    program = tmp_path / "perf_analyzer"
    program.write_text(
        "#!/bin/sh\n"
        'for word in "$@"; do case "$last" in -f) out="$word";; '
        f'--input-data) cp "$word" {tmp_path}/data;; -m|-u) echo "$word" >> {tmp_path}/asked;; '
        f'--concurrency-range) echo "$word" >> {tmp_path}/levels;; esac; last="$word"; done\n'
        f"cat > \"$out\" <<'E'\n{REPORT}E\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_perf_analyzer() == program
    levels = run_perf_analyzer(program, "127.0.0.1:9", "tiny", MIXED, [4, 16], 1.0)
    assert len(levels) == 2
    assert (tmp_path / "levels").read_text().split() == ["4:4", "16:16"]
    assert (tmp_path / "asked").read_text().split() == ["tiny", "127.0.0.1:9"] * 2
    data = json.loads((tmp_path / "data").read_text())["data"]
    assert data[0] == {"TEXT": {"content": [MIXED[0]["TEXT"]], "shape": [1]}}
    program.write_text("#!/bin/sh\necho 'error: no such model' >&2\nexit 1\n")
    with pytest.raises(ServerError, match="perf_analyzer could not measure tiny at 127.0.0.1:9: error: no such model"):
        run_perf_analyzer(program, "127.0.0.1:9", "tiny", MIXED, [4], 1.0)
