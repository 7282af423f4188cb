from django.apps import AppConfig
from django.db.models import Q


class AdaptersConfig(AppConfig):
    name = "adapters"
    label = "adapters"

    def ready(self) -> None:
        """Register the hooks and jobs that runs and workers call. Runs must not import adapters
        (ARCHITECTURE.md), so this app registers itself with them.
        """
        from adapters.evaluation.replies import REPLIES_JOB
        from adapters.evaluation.weight_analysis import WEIGHT_ANALYSIS_JOB
        from adapters.export.gguf import GGUF_JOB
        from adapters.export.hub import PUSH_JOB
        from adapters.export.merge import MERGE_JOB
        from adapters.models import AdapterVersion, Deployment
        from adapters.option_sources import ADAPTER_VERSIONS, PROMPT_SETS
        from adapters.registry import continue_training, services
        from adapters.serving import usage
        from training.jobs.kinds import register_kind
        from training.jobs.services import find_busy_ids
        from training.people import disk_quota
        from training.people.options import register_source
        from training.runs.launch.start_version import register_resolver
        from training.runs.models import Run
        from training.runs.states import UNFINISHED
        from training.runs.worker import main, outcomes

        outcomes.artifact_hooks.append(services.register_run_result)
        register_resolver(continue_training.resolve_start_version)
        main.PERIODIC_TASKS.append((usage.prune_request_logs, 3600.0))
        for kind in (MERGE_JOB, GGUF_JOB, PUSH_JOB, WEIGHT_ANALYSIS_JOB, REPLIES_JOB):
            register_kind(kind)
        for source in (ADAPTER_VERSIONS, PROMPT_SETS):
            register_source(source)
        deployed = Deployment.objects.order_by()
        starting = Run.objects.filter(state__in=UNFINISHED).exclude(start_version=None)
        disk_quota.register_stored_kind(
            disk_quota.StoredKind(
                title="Adapters with exports",
                item_title="Adapter",
                model=AdapterVersion,
                url_name="adapter",
                is_in_use=Q(pk__in=deployed.values("version"))
                | Q(pk__in=deployed.exclude(canary=None).values("canary"))
                | Q(pk__in=starting.values("start_version")),
                in_use_reason="deployed, or a run starts from it",
                has_reservation=Q(pk__in=find_busy_ids(AdapterVersion)),
            )
        )
