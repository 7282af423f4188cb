from django.apps import AppConfig
from django.db.models import Q


class CatalogConfig(AppConfig):
    name = "training.catalog"
    label = "catalog"

    def ready(self) -> None:
        from training.catalog.models import BaseModel, ModelState
        from training.catalog.option_sources import OFFERED_MODELS, READY_MODELS
        from training.catalog.services import IMPORT_JOB
        from training.jobs.kinds import register_kind
        from training.people import disk_quota
        from training.people.options import register_source

        register_kind(IMPORT_JOB)
        register_source(READY_MODELS)
        register_source(OFFERED_MODELS)
        disk_quota.register_stored_kind(
            disk_quota.StoredKind(
                title="Base models",
                item_title="Base model",
                model=BaseModel,
                url_name="model",
                owner="added_by",
                team=None,
                is_in_use=Q(runs__isnull=False) | Q(adapters__isnull=False),
                in_use_reason="used by runs or adapters",
                has_reservation=Q(state__in=(ModelState.WAITING, ModelState.IMPORTING)),
            )
        )
