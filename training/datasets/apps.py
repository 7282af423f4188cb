from django.apps import AppConfig


class DatasetsConfig(AppConfig):
    name = "training.datasets"
    label = "datasets"

    def ready(self) -> None:
        from training.datasets.upload_job import UPLOAD_JOB
        from training.jobs.kinds import register_kind

        register_kind(UPLOAD_JOB)
