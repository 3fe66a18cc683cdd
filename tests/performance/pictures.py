"""The pictures of docs, from the real pages of Dagster: python -m tests.performance.pictures MODEL

While `refinery ui` runs on a home in which the model was optimized, in a headless Chromium: the model's longest run,
the benchmark of its champion, and the champion's plot. The lineage was cropped by hand from `/asset-groups`, its groups
closed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websockets
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
#: Pages ask for their parts one after the other; nothing says when they are done.
LOAD_SECONDS, CLICK_SECONDS = 12.0, 3.0
#: They are looked at over slow lines too. Pages have few colours.
COLOURS = 128
QUERY = """{runsOrError(filter: {pipelineName: "optimize", statuses: [SUCCESS], tags: [{key: "dagster/partition",
value: "MODEL"}]}) {... on Runs {results {runId startTime endTime}}}
assetNodeOrError(assetKey: {path: ["champion", "cpu"]}) {... on AssetNode {assetMaterializations(partitions: ["MODEL"],
limit: 1) {metadataEntries {label ... on TextMetadataEntry {text}}}}}}"""
#: The button left of "Re-execute all" gives the chart all the room that the log had.
MAXIMIZE = """(() => {const all = [...document.querySelectorAll('button')];
all[all.findIndex(one => one.innerText.startsWith('Re-execute')) - 1].click()})()"""
SHOW_PLOT = """[...document.querySelectorAll('tr')].find(row => row.innerText.startsWith('latency'))
.querySelector('a').click()"""


@dataclass(frozen=True)
class Picture:
    """Of a page, after a script. width, height: of the window; box: what of it is shown, left, top, right, bottom."""

    name: str
    path: str
    width: int
    height: int
    box: tuple[int, int, int, int]
    script: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dagster", default="http://127.0.0.1:3000")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--port", type=int, default=9333, help="of Chromium's, on loopback, while it runs")
    options = parser.parse_args()
    run, engine = _longest_run_and_champion(options.dagster, options.model)
    pictures = (
        # Without the column that is on every page.
        Picture("run", f"/runs/{run}", 1800, 1320, (240, 0, 1800, 1080), MAXIMIZE),
        Picture("benchmark", f"/assets/benchmarks/cpu/{engine}", 1960, 900, (240, 0, 1960, 900)),
        Picture("champion", "/assets/champion/cpu", 1500, 760, (180, 0, 1320, 690), SHOW_PLOT),
    )
    with tempfile.TemporaryDirectory() as profile:
        command = [options.chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--remote-debugging-port={options.port}", f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as chromium:
            try:
                asyncio.run(_take(pictures, options.dagster, options.port))
            finally:
                chromium.terminate()


def _longest_run_and_champion(dagster: str, model: str) -> tuple[str, str]:
    body = json.dumps({"query": QUERY.replace("MODEL", model)}).encode()
    request = urllib.request.Request(f"{dagster}/graphql", body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        data = json.load(response)["data"]
    runs = data["runsOrError"]["results"]
    (newest,) = data["assetNodeOrError"]["assetMaterializations"]
    longest = max(runs, key=lambda run: run["endTime"] - run["startTime"])
    return longest["runId"], next(one["text"] for one in newest["metadataEntries"] if one["label"] == "champion")


async def _take(pictures: Sequence[Picture], dagster: str, port: int) -> None:
    async with websockets.connect(await _page(port), max_size=None) as socket:
        number = 0

        async def call(method: str, **given: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            await socket.send(json.dumps({"id": number, "method": method, "params": given}))
            while True:
                answer = json.loads(await socket.recv())
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return dict(answer["result"])

        for picture in pictures:
            window = {"width": picture.width, "height": picture.height, "deviceScaleFactor": 1, "mobile": False}
            await call("Emulation.setDeviceMetricsOverride", **window)
            await call("Page.navigate", url=dagster + picture.path)
            await asyncio.sleep(LOAD_SECONDS)
            if picture.script:
                done = await call("Runtime.evaluate", expression=picture.script)
                assert "exceptionDetails" not in done, done
                await asyncio.sleep(CLICK_SECONDS)
            seen = base64.b64decode((await call("Page.captureScreenshot", format="png"))["data"])
            _save(picture, seen)


async def _page(port: int) -> str:
    """Where Chromium's page is talked to, once there is one."""
    for _ in range(60):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as response:
                return str(next(one["webSocketDebuggerUrl"] for one in json.load(response) if one["type"] == "page"))
        except (OSError, StopIteration):
            await asyncio.sleep(0.5)
    raise SystemExit("Chromium did not start; see --chromium.")


def _save(picture: Picture, png: bytes) -> None:
    image = Image.open(io.BytesIO(png)).convert("RGB").crop(picture.box)
    path = FOLDER / f"{picture.name}.png"
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
