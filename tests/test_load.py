"""Load on a server: what is counted, from when, and what Triton says that it did."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from resources.artifacts.records import ServingSetting
from resources.errors import ServerError
from resources.tasks.samples import sample_texts
from resources.triton.load import (
    LoadResult,
    ModelStatistics,
    closed,
    closed_loop,
    read_statistics,
    server_statistics,
    shuffled_rounds,
    statistics_since,
)
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from tests.releases import CONTRACT, answers_of, counted, make_plan, query_texts, unasked

ITEMS = [{"TEXT": text} for text in sample_texts()[:40]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """One that two instances of the engine serve."""
    return make_plan(tmp_path_factory.mktemp("plan"), serving=ServingSetting(instances=2, threads=2, threads_beside=1))


@pytest.fixture(scope="module")
def served(tmp_path_factory, plan, triton_settings):
    folder = tmp_path_factory.mktemp("load")
    publish(plan, folder / "cpu", Steps(prove=unasked))
    with EmbeddedServer(folder / "cpu", triton_settings, models=["tiny"], log=folder / "triton.log") as server:
        yield server.grpc_address


def test_percentiles_are_of_what_was_answered():
    result = LoadResult(2, 2.0, 101, tuple(float(value) for value in range(101)), failures=0, first_error="")
    assert (result.requests, result.throughput) == (101, 50.5)
    assert (result.p50_ms, result.p90_ms, result.p99_ms) == (50, 90, 99)
    nothing = LoadResult(2, 2.0, 0, (), failures=3, first_error="no")
    assert nothing.throughput == 0
    assert math.isnan(nothing.p99_ms)


def test_every_round_holds_the_same_mix_in_another_order():
    numbers = shuffled_rounds(5, seed=1)
    rounds = [[next(numbers) for _ in range(5)] for _ in range(4)]
    assert all(sorted(found) == [0, 1, 2, 3, 4] for found in rounds)
    assert len({tuple(found) for found in rounds}) > 1
    again = shuffled_rounds(5, seed=1)
    assert [next(again) for _ in range(5)] == rounds[0]
    with pytest.raises(ValueError, match="no requests"):
        shuffled_rounds(0, seed=0)


def test_clients_wait_for_their_answers():
    under_way = most = 0

    async def ask(number: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1

    result = asyncio.run(closed(ask, 3, concurrency=4, seconds=0.3, warm_up_seconds=0.1))
    assert most == 4
    assert result.p50_ms >= 20
    # Four clients for .3 seconds at .02 a request; a busy machine is slower, none is faster.
    assert 4 <= result.requests <= 64
    with pytest.raises(ValueError, match="at least one client"):
        asyncio.run(closed(ask, 3, concurrency=0, seconds=1))


def test_a_request_that_fails_costs_itself_alone():
    async def ask(number: int) -> None:
        if number == 1:
            raise ServerError("it does not like the second")
        await asyncio.sleep(0.001)

    result = asyncio.run(closed(ask, 2, concurrency=1, seconds=0.2))
    assert result.first_error == "it does not like the second"
    assert abs(result.requests - result.failures) <= 1
    assert result.failures > 1


def duration(count, ns):
    return SimpleNamespace(count=count, ns=ns)


def response(**batches):
    """Triton's answer for one version that ran these batches, by size."""
    rows = {int(size[1:]): count for size, count in batches.items()}
    executions, requests = sum(rows.values()), sum(size * count for size, count in rows.items())
    stats = SimpleNamespace(
        success=duration(requests, 9),
        fail=duration(1, 9),
        queue=duration(requests, 10 * requests),
        compute_input=duration(requests, 1 * requests),
        compute_infer=duration(requests, 100 * requests),
        compute_output=duration(requests, 2 * requests),
    )
    batch_stats = [SimpleNamespace(batch_size=size, compute_infer=duration(count, 5)) for size, count in rows.items()]
    version = SimpleNamespace(
        inference_count=requests, execution_count=executions, inference_stats=stats, batch_stats=batch_stats
    )
    return SimpleNamespace(model_stats=[version])


def test_what_a_model_did_between_two_readings():
    before, after = read_statistics(response(x1=2, x4=1)), read_statistics(response(x1=2, x4=4, x8=1))
    done = statistics_since({"engine": before}, {"engine": after, "new": after})
    assert done["new"] == after
    assert done["engine"] == ModelStatistics(
        requests=20,
        rows=20,
        executions=4,
        failures=0,
        queue_ns=200,
        input_ns=20,
        compute_ns=2000,
        output_ns=40,
        batches={4: 3, 8: 1},
    )
    assert done["engine"].mean_batch == 5
    assert before.since(after) == before, "it was loaded anew"
    assert ModelStatistics().mean_batch == 0


def test_a_real_server_under_load(served):
    names = ["tiny", "tiny__r1__pipeline"]
    before = server_statistics(served, names)
    together = closed_loop(served, "tiny", CONTRACT, ITEMS, concurrency=8, seconds=1.0, warm_up_seconds=0.2)
    assert together.failures == 0, together.first_error
    assert together.requests > 20
    assert together.p50_ms <= together.p90_ms <= together.p99_ms
    done = counted(served, before, together.requests)
    for found in done.values():
        assert found.requests >= together.requests
        assert found.failures == 0
    engine = done["tiny__r1__pipeline"]
    assert engine.rows == sum(size * count for size, count in engine.batches.items())
    assert 0 < engine.executions <= engine.rows
    assert min(engine.queue_ns, engine.compute_ns) > 0


def test_two_instances_answer_as_one(served, plan):
    texts = sample_texts()[:40]
    expected = answers_of(plan, texts)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: query_texts(served, "tiny", [text])[0], texts))
    assert np.allclose(found, expected, atol=1e-6)


def test_a_server_that_answers_nothing_is_said(served):
    with pytest.raises(ServerError, match="answered no request to nobody: .*unknown model"):
        closed_loop(served, "nobody", CONTRACT, ITEMS, concurrency=2, seconds=0.1, warm_up_seconds=0)
    with pytest.raises(ServerError, match="does not say what its models did: .*nobody"):
        server_statistics(served, ["nobody"])
    with pytest.raises(ServerError, match="answered no request"):
        closed_loop("127.0.0.1:9", "tiny", CONTRACT, ITEMS, concurrency=1, seconds=0.3, warm_up_seconds=0)
