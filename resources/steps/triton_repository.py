"""The steps `triton_repository/<target>`: the champion as a release that a real server has answered with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import Champion, EvaluationSet, ServingConfiguration
from resources.errors import ReleaseError
from resources.steps.champion import ChampionStep
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.engine import checkpoint_folder
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.serving_configuration import ServingConfigurationStep
from resources.steps.step import Node, Work
from resources.tracking import Tracker
from resources.triton import release as releases
from resources.triton.release import Release, ReleasePlan

if TYPE_CHECKING:
    from resources.triton.proof import Exam, Proof
    from resources.triton.publish import Published


class ReleaseStep(Node):
    """Publish the champion's engine, proven, as the next release of its model.

    A release is not in the artifact store. The repository alone says what is released.
    """

    code = (*releases.CODE, *releases.COPIED, *releases.session_modules())

    def __init__(self, target: str, champion: ChampionStep, configuration: ServingConfigurationStep) -> None:
        super().__init__(f"triton_repository/{target}", [champion, configuration])
        self.target, self.champion, self.configuration = target, champion, configuration

    def plan(self, work: Work, lineage: dict[str, str] | None = None) -> ReleasePlan:
        """Return what the release is to hold. Raises NotYetKnownError in a plan.

        `lineage` is written into the public model's configuration, and names the run and the champion.
        """
        champion = work.get(self.champion)
        configuration, checkpoint = work.get(self.configuration), work.get(CHECKPOINT)
        engine, entry = self.champion.engine(work, champion), work.entry
        return ReleasePlan(
            model=entry.name,
            target=self.target,
            flavour=work.workspace.triton.flavour,
            checkpoint=checkpoint,
            checkpoint_folder=checkpoint_folder(work, checkpoint),
            engine=engine,
            engine_folder=work.folder(engine),
            max_batch_size=entry.max_batch_size,
            serving=configuration.setting,
            response_cache=entry.serving.response_cache,
            rate_limiter=entry.serving.rate_limiter,
            limits=entry.limits,
            lineage=lineage or {},
        )

    def unchanged(self, work: Work, plan: ReleasePlan) -> Published | None:
        """Return the release that is there already; None where the plan would make one."""
        from resources.triton.publish import unchanged_release, waiting_release

        repository, provable = work.workspace.repository(self.target), work.workspace.triton.provable
        return unchanged_release(plan, repository, waiting_release(repository, plan.model), provable=provable)

    def publish(self, work: Work, tracker: Tracker, *, dagster_run: str) -> Published:
        """Publish the champion as the earlier steps left it, and tell MLflow which release serves it.

        If that fails, what served before goes on serving.

        Raises:
            ReleaseError: The champion, its engine and its configuration do not belong together, or the release could
                not be made or proven.
            ServerError: A server could not be started, or did not answer.
            ArtifactError: An earlier step has not been done.
            TrackingError: MLflow could not be written.
        """
        published = self._publish(work, dagster_run)
        if published.current and published.release.status == "published":
            tracker.release(work.get(CHECKPOINT), work.get(self.champion), published.release.number)
        return published

    def _publish(self, work: Work, dagster_run: str) -> Published:
        # Here, because definitions are loaded for every step.
        from resources.triton.exam import fleet_steps, make_exam
        from resources.triton.fleet import Fleet
        from resources.triton.proof import prove
        from resources.triton.publish import Steps, publish
        from resources.triton.server import EmbeddedServer

        champion, evaluation = work.get(self.champion), work.get(EVALUATION_SET)
        self._require_same(work, champion, evaluation, work.get(self.configuration))
        lineage = {"refinery_dagster_run": dagster_run, "refinery_champion": champion.digest}
        plan = self.plan(work, lineage)
        workspace, settings = work.workspace, work.workspace.triton
        repository = workspace.repository(self.target)

        def exam() -> Exam:
            work.store.require_whole(evaluation)
            known = read_evaluation_set(work.folder(evaluation))
            return make_exam(plan, work.entry.accuracy_gates(), known.items, known.baseline)

        def prove_embedded(staged: Path, release: Release) -> Proof:
            log = workspace.log(plan.model, f"triton-{self.target}")
            with EmbeddedServer(staged, settings, models=[release.model], log=log) as server:
                return prove(exam(), release.model, grpc=server.grpc_address, http=server.http_address)

        if settings.driven:
            with Fleet(settings) as fleet:
                return publish(plan, repository, fleet_steps(fleet, exam, repository, http=settings.servers_http))
        # Triton's own backends are not embedded, so there is no server to prove such a release on.
        published = publish(plan, repository, Steps(prove=prove_embedded) if settings.provable else Steps())
        if settings.servers and published.release.status == "published":
            advice = f"{' and '.join(settings.servers)}, without model control, serves it once it is started anew."
            return replace(published, advice=f"{published.advice} {advice}".strip())
        return published

    def _require_same(
        self, work: Work, champion: Champion, evaluation: EvaluationSet, configuration: ServingConfiguration
    ) -> None:
        """Raise ReleaseError if the earlier steps used different engines."""
        model, engine = work.entry.name, self.champion.engine(work, champion)
        if engine.digest != champion.engine_digest or evaluation.digest != champion.evaluation_digest:
            raise ReleaseError(
                f"{model}: {champion.engine} was chosen on {self.target} for another revision or build than is there "
                f"now. Materialize champion/{self.target}, with the benchmarks before it, first."
            )
        if configuration.engine_digest != engine.digest:
            raise ReleaseError(
                f"{model}: how to serve it on {self.target} was found for another engine than {champion.engine}. "
                f"Materialize serving_configuration/{self.target} first."
            )
