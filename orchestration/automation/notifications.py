"""Notifications of failed runs, in the daemon's log and through a webhook if one is configured."""

from typing import Any

import dagster as dg

from assets.partitions import PARTITION_TAG
from resources.boundary.addresses import Address
from resources.boundary.http import post_json
from resources.errors import NotificationError, first_line

#: The number of characters before the link. Chats cut long messages, or refuse them.
_LONGEST = 3000


def failure_sensor(webhook: Address | None, pages: str | None) -> dg.SensorDefinition:
    """Return the sensor `failed_runs`.

    A webhook that does not answer fails the sensor's tick, which Dagster's page shows. The run stays as it is.

    Args:
        webhook: The address to which the message is sent as JSON, by POST.
        pages: The address of Dagster's pages, for links.
    """

    @dg.run_failure_sensor(
        name="failed_runs",
        description="Reports each run that failed, with its model, step, reason and a link.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=30,
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> None:
        said = message(context, pages)
        context.log.error(said["text"])
        if webhook is not None:
            _post(webhook, said)

    return failed_runs


def message(context: dg.RunFailureSensorContext, pages: str | None) -> dict[str, Any]:
    """Return the message for a webhook.

    Chats (Slack, Mattermost, Teams' workflows) show its `text`. The other fields are the parts of that text.
    """
    run = context.dagster_run
    model = run.tags.get(PARTITION_TAG, "")
    steps = {}
    for event in context.get_step_failure_events():
        error = event.step_failure_data.error
        cause = error.cause if error is not None and error.cause is not None else error
        steps[str(event.step_key).replace("__", "/")] = cause.message.strip() if cause is not None else "failed"
    url = f"{pages.rstrip('/')}/runs/{run.run_id}" if pages else None
    reasons = "; ".join(f"{step}: {reason}" for step, reason in steps.items()) or context.failure_event.message
    text = f"{run.job_name} failed{f' for {model}' if model else ''} (run {run.run_id[:8]}): {reasons}"
    text = text[:_LONGEST] + (f" {url}" if url else "")
    return {"text": text, "job": run.job_name, "model": model, "run_id": run.run_id, "steps": steps, "url": url}


def _post(webhook: Address, said: dict[str, Any]) -> None:
    try:
        post_json(webhook.location, webhook.authorization, said)
    except (OSError, ValueError) as error:
        raise NotificationError(
            f"The failure of run {said['run_id']} was not reported: the webhook at {webhook} did not accept it "
            f"({first_line(webhook.without_secrets(error))}). Check REFINERY_WEBHOOK."
        ) from None
