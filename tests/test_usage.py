"""What is seen of a machine while it builds."""

import subprocess
import time

import pytest

from resources.machine import device, usage
from resources.machine.usage import Watch, gpu_usage, parse_gpus


def test_samples_are_taken_while_work_goes_on_and_end_with_it(monkeypatch):
    monkeypatch.setattr(usage, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(usage, "INTERVAL_SECONDS", 0.02)
    began = time.time()
    with Watch() as watch:
        deadline = time.monotonic() + 10
        while (watch.usage is None or len(watch.usage.samples) < 3) and time.monotonic() < deadline:
            pass  # which keeps a processor busy
    samples = watch.usage.samples
    assert len(samples) >= 3
    assert began <= samples[0].time_s < samples[-1].time_s <= time.time()
    assert max(sample.values["cpu_utilization_percentage"] for sample in samples) > 0
    assert 0 < samples[0].values["system_memory_usage_percentage"] <= 100
    time.sleep(0.1)
    assert watch.usage.samples == samples


def test_work_that_is_shorter_than_a_sample_has_one():
    with Watch() as watch:
        pass
    assert len(watch.usage.samples) == 1


def test_long_work_has_fewer_samples_and_not_more(monkeypatch):
    monkeypatch.setattr(usage, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(usage, "INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr(usage, "MOST_SAMPLES", 4)
    began = time.time()
    with Watch() as watch:
        time.sleep(0.3)
    times = [sample.time_s for sample in watch.usage.samples]
    assert len(times) <= 5
    # The gaps have grown by doubling, and the end is still there.
    assert times[-1] - times[-2] > 0.01
    assert times[-1] > began + 0.1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "35, 1024, 81559, 120.50, 700.00\n",
            {
                "gpu_0_utilization_percentage": 35.0,
                "gpu_0_memory_usage_megabytes": 1073.7,
                "gpu_0_memory_usage_percentage": 1.3,
                "gpu_0_power_usage_watts": 120.5,
                "gpu_0_power_usage_percentage": 17.2,
            },
        ),
        (
            "[N/A], 10, 100, [N/A], [N/A]\n7, 0, 100, [N/A], 300\n",
            {
                "gpu_0_memory_usage_megabytes": 10.5,
                "gpu_0_memory_usage_percentage": 10.0,
                "gpu_1_utilization_percentage": 7.0,
                "gpu_1_memory_usage_megabytes": 0.0,
                "gpu_1_memory_usage_percentage": 0.0,
            },
        ),
        ("NVIDIA-SMI has failed\n", {}),
        ("", {}),
    ],
)
def test_what_the_driver_answers(answer, expected):
    assert parse_gpus(answer) == expected


def test_a_driver_that_does_not_answer_costs_the_sample_alone(monkeypatch):
    def hang(command, **how):
        raise subprocess.TimeoutExpired(command, how["timeout"])

    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(device.subprocess, "run", hang)
    assert gpu_usage() == {}
