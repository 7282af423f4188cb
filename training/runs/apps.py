from django.apps import AppConfig


class RunsConfig(AppConfig):
    name = "training.runs"
    label = "runs"

    def ready(self) -> None:
        from training.runs.live.change_watcher import notify_browsers
        from training.runs.signals import run_changed, run_queued
        from training.runs.worker.tasks import enqueue_supervision

        run_queued.connect(enqueue_supervision)
        run_changed.connect(notify_browsers)
