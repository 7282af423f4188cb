"""The files of datasets in the disk quotas."""

from django.db.models import Q

from training.datasets.models import DatasetVersion, Upload
from training.datasets.uploads import BUSY_STATES
from training.people.disk_quota import StoredKind

STORED_KINDS = (
    StoredKind(
        title="Uploaded files",
        item_title="Upload",
        model=Upload,
        url_name="upload",
        is_in_use=Q(versions__isnull=False),
        in_use_reason="deleted with its dataset",
        has_reservation=Q(state__in=BUSY_STATES),
    ),
    StoredKind(
        title="Datasets",
        item_title="Dataset",
        model=DatasetVersion,
        url_name="dataset",
        url_argument="dataset",
        name="dataset__name",
        owner="dataset__owner",
        team="dataset__team",
        is_in_use=Q(dataset__versions__runs__isnull=False)
        | Q(dataset__uploads__state__in=BUSY_STATES),
        in_use_reason="used by a run or an upload",
    ),
)
