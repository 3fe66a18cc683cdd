"""Write all folders of a release below an empty root, which is then a model repository of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from resources.triton.config import engine_config, front_config, public_config, write_config, write_warm_up
from resources.triton.layout import CONFIG, internal_name
from resources.triton.release import (
    LABELS_FILE,
    Release,
    ReleasePlan,
    check_copies,
    list_files,
    new_release,
    stored,
    write_engine,
    write_pipeline,
)


def stage(plan: ReleasePlan, number: int, root: Path) -> Release:
    """Write the folders of the release below `root`, and return its manifest, which is not written.

    Raises:
        ReleaseError: A file of the engine or tokenizer is damaged in the artifact store.
        OSError: A file cannot be read or written.
    """
    front = internal_name(plan.model, number, "pipeline" if plan.whole or plan.structured else "tokenizer")
    engine = front if plan.whole else internal_name(plan.model, number, "engine")
    write_pipeline(plan, root / front / "1")
    write_engine(plan, root / engine / "1")
    if plan.has_label_file:
        # Triton reads one label per line, so a label must not hold a line break.
        lines = (" ".join(label.splitlines()) for label in plan.checkpoint.labels)
        (root / engine / LABELS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_config(front_config(plan, number), root / front / CONFIG)
    if not plan.whole:
        write_warm_up(root / front / "1" / "encoder.json", root / engine)
        write_config(engine_config(plan, number), root / engine / CONFIG)
    folder = root / plan.model / str(number)
    folder.mkdir(parents=True)
    write_config(public_config(plan, number), folder / CONFIG)
    shutil.copyfile(folder / CONFIG, root / plan.model / CONFIG)
    files = list_files(root, sorted({front, engine}))
    check_copies(plan, files)
    return new_release(plan, number).model_copy(update={"files": files, "pointer": stored(folder / CONFIG)})


def stage_alias(plan: ReleasePlan, number: int, name: str, root: Path) -> Path:
    """Write a second public ensemble of the release, under another name, below `root`, and return its folder."""
    folder = root / name
    (folder / str(number)).mkdir(parents=True)
    (folder / str(number) / "placeholder").touch()
    write_config(public_config(plan, number, name), folder / CONFIG)
    return folder
