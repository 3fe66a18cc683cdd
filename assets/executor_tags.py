"""Where a step runs, told to the executors that have a choice. In one process or on one machine nobody reads it."""

from resources.machine.targets import capability_of, device_of


def placement(target: str = "cpu") -> dict[str, object]:
    """Tags of the op that makes or checks something for a target; the default is for what belongs to none.

    `dagster-celery/queue` is the target's name, since a machine has GPUs of one capability. `dagster-k8s/config` asks
    for one GPU, on a node that NVIDIA's GPU feature discovery has labelled with that capability. Every step of a CUDA
    target is placed so: the champion's and the release's, too, look at the GPU or start a server on it.
    """
    tags: dict[str, object] = {"dagster-celery/queue": target}
    if device_of(target) == "cuda":
        major, minor = capability_of(target).split(".")
        tags["dagster-k8s/config"] = {
            "container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}},
            "pod_spec_config": {
                "node_selector": {"nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor}
            },
        }
    return tags
