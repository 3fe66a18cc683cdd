"""The steps `serving_configuration/<target>`: how the champion is served best, found under load on a real server."""

from __future__ import annotations

from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import ServingConfiguration, ThreadSetting
from resources.machine.device import describe_device
from resources.machine.targets import device_of
from resources.steps.champion import ChampionStep
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.step import Recipe, Step, Work


class ServingConfigurationStep(Step[ServingConfiguration]):
    """Find instances and queue delay for the champion.

    ReleaseError says that no setting works, and ServerError that there is no server.
    """

    record = ServingConfiguration
    code = (
        "resources.triton.search",
        "resources.triton.trials",
        "resources.triton.load",
        "resources.triton.mix",
        "resources.triton.config",
        "resources.triton.launch",
        "resources.triton.python_models",
        "resources.pipelines",
        "resources.engines.onnxruntime.sessions",
        "resources.engines.onnxruntime.cuda",
        "resources.steps.serving_configuration",
    )

    def __init__(self, target: str, champion: ChampionStep) -> None:
        super().__init__(f"serving_configuration/{target}", [champion])
        self.target, self.champion = target, champion

    def recipe(self, work: Work) -> Recipe[ServingConfiguration]:
        """See Step."""
        # Here, because definitions are loaded for every step.
        from resources.triton.environment import requirements
        from resources.triton.mix import load_of
        from resources.triton.search import find_setting, settings_to_try, why_not_measured

        entry, workspace = work.entry, work.workspace
        champion, checkpoint, evaluation = work.get(self.champion), work.get(CHECKPOINT), work.get(EVALUATION_SET)
        engine = self.champion.engine(work, champion)
        serving, triton, device = entry.serving, workspace.triton, describe_device(self.target)
        tried = settings_to_try(
            champion.setting or ThreadSetting(threads=workspace.threads(entry)),
            serving,
            device=device_of(self.target),
            cores=workspace.threads(entry),
            engine_bytes=engine.size_bytes,
            flavour=triton.flavour,
        )
        why_not = why_not_measured(triton, serving, tried)
        searched = ("p99_ms", "clients", "search_seconds", "rate_limiter")
        made_of = Fingerprint.of(
            "serving_configuration",
            model=entry.name,
            target=self.target,
            engine=[engine.digest, engine.content_digest],
            checkpoint=[checkpoint.tokenizer_digest, checkpoint.pipeline_digest],
            settings=[setting.model_dump() for setting in tried],
            batch=entry.max_batch_size,
            serving=None if why_not else serving.model_dump(include={*searched}),
            server=None if why_not else requirements() if triton.flavour == "python" else "configured",
            load=None if why_not else load_of(evaluation, checkpoint),
            device=device,
            flavour=triton.flavour,
            code=code_versions(*self.code),
        )
        record = ServingConfiguration(
            digest=made_of.digest,
            model=entry.name,
            target=self.target,
            engine=engine.name,
            engine_digest=engine.digest,
            setting=tried[0],
            reason="",
            clients=serving.clients,
            p99_limit_ms=serving.p99_ms,
            device=device,
        )
        if why_not:
            return Recipe.of_ready(made_of, record.model_copy(update={"reason": f"{tried[0]}: {why_not}"}))

        def make(folder: Path) -> ServingConfiguration:
            del folder
            work.store.require_whole(engine, checkpoint, evaluation)
            return find_setting(workspace, entry, checkpoint, engine, evaluation, tried, record)

        return Recipe(made_of, make)
