"""Tags that tell the executors of several machines where a step runs. The executors of one machine ignore them."""

from resources.machine.targets import capability_of, device_of


def placement(target: str = "cpu") -> dict[str, object]:
    """Return the tags of an op that makes or checks something for a target. Ops of no target use the default.

    `dagster-celery/queue` is the target's name, because all GPUs of a machine have one capability. `dagster-k8s/config`
    asks for one GPU on a node that NVIDIA's GPU feature discovery has labelled with that capability. Every step of a
    CUDA target has these tags, because the steps of the champion and of the release also look at the GPU or start a
    server on it.
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
