from django.apps import AppConfig
from django.db.models import Q


class RunsConfig(AppConfig):
    name = "training.runs"
    label = "runs"

    def ready(self) -> None:
        from training.people import disk_quota
        from training.people.options import register_source
        from training.runs.live.change_watcher import notify_browsers
        from training.runs.models import Run
        from training.runs.option_sources import FILTER_SOURCES
        from training.runs.signals import run_changed, run_queued
        from training.runs.states import UNFINISHED
        from training.runs.worker.tasks import enqueue_supervision

        run_queued.connect(enqueue_supervision)
        run_changed.connect(notify_browsers)
        for source in FILTER_SOURCES.values():
            register_source(source)
        disk_quota.register_stored_kind(
            disk_quota.StoredKind(
                title="Runs with checkpoints",
                item_title="Run",
                model=Run,
                url_name="run",
                is_in_use=Q(state__in=UNFINISHED),
                in_use_reason="has not ended",
                has_reservation=Q(state__in=UNFINISHED),
            )
        )
