"""Build one engine again from its sources, with the script that lies beside the engine.

Every engine holds a `rebuild.py` with a recipe and a call of `main` below. The script needs this project and the
artifact store. It does not need Dagster, MLflow, the models file or a benchmark. The recipe contains the nodes that the
precision search kept, so the search does not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from pprint import pformat
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from resources.artifacts.fingerprint import code_version, library_versions
from resources.artifacts.records import Checkpoint, EvaluationSet, OnnxGraph, Record, sha256_file
from resources.artifacts.store import RECORD_FILE, ArtifactStore
from resources.engines.availability import unsupported_reason
from resources.engines.interface import Built, Goal, Sources, build
from resources.engines.specs import EngineSpec
from resources.engines.tuning import Tuning
from resources.errors import ArtifactError, EngineError, RefineryError
from resources.machine.device import describe_device
from resources.machine.lock import building
from resources.machine.targets import device_of
from resources.processes.isolation import Limits, run_isolated
from resources.tasks import TASKS

R = TypeVar("R", bound=Record)

SCRIPT = "rebuild.py"
EQUAL, DIFFERENT, IMPOSSIBLE = 0, 1, 2
#: The packages of code that an engine's bytes depend on, in addition to its sources.
CODE = ("resources.engines", "resources.tasks")
#: The packages of code that an engine of reduced precision is also judged and calibrated by.
JUDGING = ("resources.accuracy", "-resources.accuracy.reference", "resources.pipelines")
_TEMPLATE = '''"""Build {name} for {target} again: python rebuild.py --artifacts DIR --output DIR

The script needs transformer-refinery. The DIR of --artifacts is the artifact store that holds the sources of the
engine. The exit code is 0 if every file is equal, 1 if a file differs, and 2 if nothing could be built.
"""

import sys

from resources.engines.rebuild import main

RECIPE = {recipe}

if __name__ == "__main__":
    sys.exit(main(__file__, RECIPE))
'''


class EngineRecipe(BaseModel):
    """Everything that an engine was made from.

    It names no path of the machine that built the engine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    model: str
    revision: str
    target: str
    device: str = Field(
        description="GPU that the engine was tried on. Empty for a CPU, because a processor is not part of an engine."
    )
    spec: EngineSpec
    checkpoint: str = Field(description="Digest in the artifact store, as in the two fields that follow.")
    graph: str
    evaluation: str | None = Field(
        description="Evaluation set that the engine was judged on and calibrated with. None: it was not judged."
    )
    goal: dict[str, Any] | None = Field(description="Fields of Goal, with the nodes that the search kept.")
    code: str
    libraries: dict[str, str]
    files: dict[str, str] = Field(description="SHA-256 of each file that is served, by name.")


def recipe_of(
    sources: Sources,
    spec: EngineSpec,
    target: str,
    built: Built,
    folder: Path,
    libraries: Mapping[str, str],
    evaluation: EvaluationSet | None,
    goal: Goal | None,
) -> EngineRecipe:
    """Return the recipe of an engine that has just been built into the folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return EngineRecipe(
        model=sources.checkpoint.model,
        revision=sources.checkpoint.revision,
        target=target,
        device=describe_device(target) if device_of(target) == "cuda" else "",
        spec=spec,
        checkpoint=sources.checkpoint.digest,
        graph=sources.graph.digest,
        evaluation=evaluation.digest if evaluation is not None and goal is not None else None,
        goal=None if goal is None else _written(goal, built.kept_nodes),
        code=_code(judged=goal is not None),
        libraries=dict(libraries),
        files={name: sha256_file(path) for name, path in names.items() if name not in built.documents},
    )


def write_script(recipe: EngineRecipe, folder: Path) -> None:
    """Write the recipe as a script.

    The same recipe always gives the same bytes.
    """
    text = pformat(recipe.model_dump(), width=110, sort_dicts=False)
    script = _TEMPLATE.format(name=recipe.spec.name, target=recipe.target, recipe=text)
    (folder / SCRIPT).write_text(script, encoding="utf-8")


def rebuild(recipe: EngineRecipe, store: ArtifactStore, output: Path, seconds: float | None = None) -> None:
    """Build the engine into an empty or new folder.

    Args:
        recipe: The recipe of the engine.
        store: The artifact store that holds the engine's sources.
        output: The folder, which must be empty or not exist.
        seconds: How long the build may take. The default is the limit of a step, or more if the builder was given more.

    Raises:
        ArtifactError: A source of the engine is missing from the store or damaged.
        EngineError: The engine cannot be built here, or the folder is not empty.
    """
    checkpoint = _stored(store, Checkpoint, recipe.checkpoint, recipe)
    graph = _stored(store, OnnxGraph, recipe.graph, recipe)
    sources = Sources(checkpoint, store.folder(checkpoint), graph, store.folder(graph))
    goal = None
    if recipe.goal is not None and recipe.evaluation is not None:
        evaluation = _stored(store, EvaluationSet, recipe.evaluation, recipe)
        goal = _read_goal(recipe, checkpoint.task, store.folder(evaluation), store.caches)
    reason = unsupported_reason(recipe.spec, recipe.target)
    if reason is not None:
        raise EngineError(reason)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EngineError(f"{output} exists and is not an empty folder. Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    log = output.with_name(f"{output.name}.log")
    tuned = goal.tuning.seconds * 1.2 if goal is not None and goal.tuning is not None else 0.0
    limits = replace(Limits(), timeout_s=seconds or max(Limits().timeout_s, tuned))
    what = f"{recipe.model}: building {recipe.spec.name} for {recipe.target} again"
    try:
        with building():
            run_isolated(
                build, sources, recipe.spec, output, goal, device_of(recipe.target), limits=limits, what=what, log=log
            )
    except EngineError as error:
        raise EngineError(f"{error} The output of its libraries is in {log}.") from error
    log.unlink(missing_ok=True)


def differing_files(recipe: EngineRecipe, rebuilt: Path, artifact: Path) -> list[str]:
    """Return a sentence for each file that is not what was built.

    The function compares the rebuilt files, and the files that the artifact holds today, with the digests in the
    recipe.
    """
    found = []
    for name, sha256 in recipe.files.items():
        # A script without the artifact's record beside it has been copied elsewhere, so there is no artifact to
        # compare.
        if (artifact / RECORD_FILE).is_file() and _sha256(artifact / name) != sha256:
            found.append(f"{name} beside this script is not the file that was built: it was changed or removed.")
        again = _sha256(rebuilt / name)
        if again is None:
            found.append(f"{name} was not built again.")
        elif again != sha256:
            found.append(f"{name} differs: its sha256 is {again}, and that of the original file is {sha256}.")
    return found


def changes(recipe: EngineRecipe) -> list[str]:
    """Return a sentence for each thing that has changed since the engine was built and may explain a difference."""
    now = library_versions(*recipe.libraries)
    found = [
        f"{name} is {now[name]} here; the engine was built with {version}."
        for name, version in recipe.libraries.items()
        if now[name] != version
    ]
    if _code(judged=recipe.goal is not None) != recipe.code:
        found.append("The builders of transformer-refinery have changed since the engine was built.")
    if recipe.device and describe_device(recipe.target) != recipe.device:
        found.append(f"The device here is {describe_device(recipe.target)}; the engine was built on {recipe.device}.")
    return found


def main(script: str, recipe: Mapping[str, Any], arguments: Sequence[str] | None = None) -> int:
    """Run the script: build the engine, compare its files and print the result.

    Returns:
        The exit code: 0 if all files are equal, 1 if one differs, 2 if nothing could be built, 130 if the user
        interrupts.
    """
    name = recipe.get("spec", {}).get("name", "engine")
    parser = argparse.ArgumentParser(prog=SCRIPT, description=f"Build {name} of {recipe.get('model')} again.")
    parser.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="the artifact store (default: the store that holds this script)"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a new or empty folder for the engine"
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="the time limit of the build in seconds")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    try:
        known = _read_recipe(recipe)
        for change in changes(known):
            print(f"note: {change}")
        # The script's path is <store>/<kind>/<digest>/rebuild.py.
        artifacts = Path(script).resolve().parents[2] if options.artifacts is None else options.artifacts.resolve()
        rebuild(known, ArtifactStore(artifacts), output, options.seconds)
    except (RefineryError, OSError) as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return IMPOSSIBLE
    except KeyboardInterrupt:
        print(f"{SCRIPT}: interrupted", file=sys.stderr)
        return 130
    found = differing_files(known, output, Path(script).resolve().parent)
    for difference in found:
        print(difference)
    if found and known.spec.tuned:
        print("TensorRT chooses kernels by timing them, so two builds rarely give the same bytes.")
    if not found:
        print(f"Equal: {', '.join(known.files)} in {output} have the same bytes as the original files.")
    return DIFFERENT if found else EQUAL


def _code(*, judged: bool) -> str:
    """Return the version of the code that builds engines.

    For engines that were judged, it covers the code that judges them too.
    """
    return code_version(*CODE, *(JUDGING if judged else ()))


def _written(goal: Goal, kept_nodes: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a goal as plain values, without its folders."""
    values = {field.name: getattr(goal, field.name) for field in fields(goal) if field.name != "evaluation_folder"}
    tuning = None if goal.tuning is None else TypeAdapter(Tuning).dump_python(goal.tuning, exclude={"caches"})
    return {**values, "gates": goal.gates.model_dump(), "kept_nodes": tuple(kept_nodes), "tuning": tuning}


def _read_recipe(recipe: Mapping[str, Any]) -> EngineRecipe:
    try:
        return EngineRecipe.model_validate(recipe)
    except ValidationError as error:
        raise EngineError(f"This script was written by another version of transformer-refinery: {error}") from None


def _read_goal(recipe: EngineRecipe, task: str, evaluation_folder: Path, caches: Path) -> Goal:
    assert recipe.goal is not None, "the recipe has a goal"
    values = dict(recipe.goal)
    try:
        gates, tuning = TASKS[task].gates.model_validate(values.pop("gates")), values.pop("tuning")
        if tuning is not None:
            tuning = TypeAdapter(Tuning).validate_python({**tuning, "caches": caches})
        return Goal(evaluation_folder=evaluation_folder, gates=gates, tuning=tuning, **values)
    except (KeyError, TypeError, ValidationError) as error:
        raise EngineError(f"This script was written by another version of transformer-refinery: {error}") from None


def _stored(store: ArtifactStore, kind: type[R], digest: str, recipe: EngineRecipe) -> R:
    """Return the record of one source of the engine.

    Raises:
        ArtifactError: The store does not hold the source, or one of its bytes has changed.
    """
    what = f"{recipe.model}: the {kind.kind.replace('_', ' ')} {digest[:32]} (revision {recipe.revision})"
    record, damaged = store.look(kind, digest)
    if record is not None:
        damaged = tuple(store.damaged(record, every_byte=True))
    if damaged:
        raise ArtifactError(
            f"{what} in {store.root} is damaged. These files have changed: {', '.join(damaged)}. Remove "
            f"{store.root / kind.kind / digest[:32]} and optimize {recipe.model} again."
        )
    if record is None:
        raise ArtifactError(
            f"{what} is missing from {store.root} or incomplete. Set --artifacts to the store in which the engine was "
            f"built ($REFINERY_HOME/artifacts). If it is missing there too, run `refinery optimize {recipe.model}` to "
            "build it again."
        )
    return record


def _sha256(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None
