from django.apps import AppConfig


class DatasetsConfig(AppConfig):
    name = "training.datasets"
    label = "datasets"

    def ready(self) -> None:
        from training.datasets.option_sources import DATASET_VERSIONS
        from training.datasets.stored_kinds import STORED_KINDS
        from training.datasets.upload_job import UPLOAD_JOB
        from training.jobs.kinds import register_kind
        from training.people import disk_quota
        from training.people.options import register_source

        register_kind(UPLOAD_JOB)
        register_source(DATASET_VERSIONS)
        for kind in STORED_KINDS:
            disk_quota.register_stored_kind(kind)
