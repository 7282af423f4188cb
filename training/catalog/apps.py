from django.apps import AppConfig


class CatalogConfig(AppConfig):
    name = "training.catalog"
    label = "catalog"

    def ready(self) -> None:
        from training.catalog.services import IMPORT_JOB
        from training.jobs.kinds import register_kind

        register_kind(IMPORT_JOB)
