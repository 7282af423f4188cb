from django.apps import AppConfig


class WebhooksConfig(AppConfig):
    name = "training.webhooks"
    label = "webhooks"

    def ready(self) -> None:
        from training.jobs.kinds import register_kind
        from training.webhooks.services import WEBHOOK_JOB

        register_kind(WEBHOOK_JOB)
