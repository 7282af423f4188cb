"""Datasets in the API: upload, map columns, check, save, read, delete."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, cast

from django.core.files.uploadedfile import TemporaryUploadedFile
from django.db.models import Prefetch
from ninja import File, Form, Query, Router, Schema, Status
from ninja.files import UploadedFile
from ninja.pagination import paginate
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from training.datasets import services, uploads
from training.datasets.build import BuildOptions
from training.datasets.column_mapping import ROW_FORMATS, ColumnMapping
from training.datasets.examples import add_example
from training.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from training.datasets.permissions import get_visible_version
from training.datasets.preview import load_rows, preview_rows
from training.datasets.upload_handler import format_upload_limit, save_pasted_rows, was_too_large
from training.errors import TooLarge, UserError
from training.people.pagination import Pagination
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest

router = Router(tags=["datasets"])
MAX_ROWS_PER_REQUEST = 100
MAX_LISTED_VERSIONS = 10
MAPPING_EXAMPLE: JsonDict = {
    "row_format": "pairs",
    "columns": {"prompt": "question", "completion": "answer"},
}


class VersionOut(Schema):
    id: int
    number: int
    digest: str
    rows: int
    train_rows: int
    eval_rows: int
    test_rows: int
    skipped_rows: int
    mapping: dict[str, Any]
    report: dict[str, Any]


class DatasetOut(Schema):
    id: int
    name: str
    source: str
    license: str
    owner: str
    created_at: datetime
    versions: list[VersionOut] = Field(
        description=f"the newest {MAX_LISTED_VERSIONS}; GET /datasets/ID/versions lists all"
    )

    @staticmethod
    def resolve_owner(row: Dataset) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_versions(row: Dataset) -> Any:
        if hasattr(row, "newest_versions"):
            return row.newest_versions
        return list(row.versions.all()[:MAX_LISTED_VERSIONS])


class UploadOut(Schema):
    id: int
    name: str
    state: UploadState
    bytes: int
    files: list[dict[str, Any]]
    mapping: dict[str, Any]
    report: dict[str, Any]
    progress_message: str
    error: str
    dataset_id: int | None


class MappingIn(Schema):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [MAPPING_EXAMPLE]})
    row_format: str = Field(max_length=20, description=f"one of {', '.join(ROW_FORMATS)}")
    columns: dict[str, str] = {}
    split: str = Field("", max_length=200)
    delimiter: str | None = Field(None, max_length=1)
    header: bool | None = None
    unit: str | None = Field(None, max_length=20)


class SaveIn(Schema):
    model_config = ConfigDict(extra="forbid")
    skip_faulty: bool = Field(False, description="save the version without the faulty rows")
    drop_duplicates: bool = False
    drop_near_duplicates: bool = False
    eval_share: float | None = Field(None, gt=0, lt=1)
    seed: int = Field(0, ge=0, le=2**31 - 1)


class HubIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"hub_id": "owner/dataset"}]}
    )
    hub_id: str = Field(max_length=200)
    name: str = Field("", max_length=120)


class NameIn(Schema):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=120)


@router.get("", response=list[DatasetOut])
@paginate(Pagination)
def list_datasets(request: AuthenticatedRequest) -> Any:
    newest_versions = Prefetch(
        "versions",
        queryset=DatasetVersion.objects.all()[:MAX_LISTED_VERSIONS],
        to_attr="newest_versions",
    )
    return (
        Dataset.objects.visible_to(request.user)
        .select_related("owner")
        .prefetch_related(newest_versions)
    )


@router.post("/examples/{key}", response={201: DatasetOut})
def use_example(request: AuthenticatedRequest, key: str) -> Status[Dataset]:
    """Create your own copy of the example `smart_home` or `shell_commands`."""
    return Status(201, add_example(request.user, key).dataset)


@router.get("/uploads", response=list[UploadOut])
@paginate(Pagination)
def list_uploads(request: AuthenticatedRequest) -> Any:
    return Upload.objects.visible_to(request.user)


@router.post("/uploads", response={201: UploadOut})
def create_upload(
    request: AuthenticatedRequest,
    file: File[UploadedFile | None] = None,
    rows: Annotated[str, Form(max_length=2**20)] = "",
    name: Annotated[str, Form(max_length=120)] = "",
    dataset: Annotated[int | None, Form(ge=0, le=2**53)] = None,
) -> Status[Upload]:
    """Upload a file, or send rows as text. The response guesses the column mapping; correct it with
    PATCH, then POST to /check and /save.
    """
    if was_too_large(request):
        raise TooLarge(
            f"The upload is larger than {format_upload_limit()}. Nothing was saved.",
            field="file",
        )
    target_dataset = get_changeable(Dataset, request.user, dataset) if dataset is not None else None
    if file is not None:
        path = Path(cast(TemporaryUploadedFile, file).temporary_file_path())
        files, source = [(path, str(file.name), "")], f"upload: {file.name}"
    elif rows.strip():
        files, source = [save_pasted_rows(rows)], "pasted"
    else:
        raise UserError("Send a `file`, or `rows` as text.", field="file")
    return Status(
        201,
        uploads.receive_files(
            request.user, files, name=name, source=source, dataset=target_dataset
        ),
    )


@router.post("/uploads/hub", response={201: UploadOut})
def fetch_from_hub(request: AuthenticatedRequest, body: HubIn) -> Status[Upload]:
    """Download a public Hugging Face dataset in the background. Poll the upload's `state`."""
    return Status(201, uploads.enqueue_hub_fetch(request.user, body.hub_id, name=body.name))


@router.get("/uploads/{int:upload_id}", response=UploadOut)
def read_upload(request: AuthenticatedRequest, upload_id: int) -> Upload:
    return get_visible(Upload, request.user, upload_id)


@router.delete("/uploads/{int:upload_id}", response={204: None})
def delete_upload(request: AuthenticatedRequest, upload_id: int) -> Status[None]:
    services.discard_upload(request.user, get_visible(Upload, request.user, upload_id))
    return Status(204, None)


@router.patch("/uploads/{int:upload_id}", response=UploadOut)
def update_mapping(request: AuthenticatedRequest, upload_id: int, body: MappingIn) -> Upload:
    """Set the column mapping. The results of earlier checks are discarded."""
    upload = get_changeable(Upload, request.user, upload_id)
    values = body.dict()
    read_options = {name: values.pop(name) for name in ("delimiter", "header", "unit")}
    read_options = {name: value for name, value in read_options.items() if value is not None}
    if read_options:
        uploads.set_read_options(upload, read_options)
    return uploads.set_mapping(upload, values)


@router.get("/uploads/{int:upload_id}/preview", response=list[dict[str, Any]])
def preview_upload(request: AuthenticatedRequest, upload_id: int) -> Any:
    """The first records as rows under the current mapping, or the reason why one is invalid."""
    upload = get_visible(Upload, request.user, upload_id)
    uploads.get_file_format(upload)
    mapping = ColumnMapping(**upload.mapping)
    return preview_rows(upload, mapping) if mapping.is_complete else []


@router.post("/uploads/{int:upload_id}/check", response=UploadOut)
def check_upload(request: AuthenticatedRequest, upload_id: int) -> Upload:
    """Check every row in the background. `state` becomes `checked`; `report` holds the results."""
    upload = get_changeable(Upload, request.user, upload_id)
    uploads.request_check(upload)
    return upload


@router.post("/uploads/{int:upload_id}/save", response=UploadOut)
def save_upload(request: AuthenticatedRequest, upload_id: int, body: SaveIn) -> Upload:
    """Save a checked upload as a new version, in the background. `state` becomes `done`."""
    upload = get_changeable(Upload, request.user, upload_id, "dataset", "owner")
    values = body.dict()
    skip_faulty = values.pop("skip_faulty")
    uploads.request_save(upload, BuildOptions(**values), skip_faulty=skip_faulty)
    return upload


@router.get("/versions/{int:version_id}/rows", response=list[dict[str, Any]])
def read_rows(
    request: AuthenticatedRequest,
    version_id: int,
    split: Annotated[str, Query(pattern="^(train|eval|test)$")] = "train",
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS_PER_REQUEST)] = 20,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> Any:
    """Rows as they are used for training."""
    return load_rows(get_visible_version(request.user, version_id), split, offset, limit)


@router.get("/{int:dataset_id}", response=DatasetOut)
def read_dataset(request: AuthenticatedRequest, dataset_id: int) -> Dataset:
    return get_visible(Dataset, request.user, dataset_id, "owner")


@router.get("/{int:dataset_id}/versions", response=list[VersionOut])
@paginate(Pagination)
def list_versions(request: AuthenticatedRequest, dataset_id: int) -> Any:
    """All versions, the newest first."""
    return get_visible(Dataset, request.user, dataset_id).versions.all()


@router.patch("/{int:dataset_id}", response=DatasetOut)
def rename_dataset(request: AuthenticatedRequest, dataset_id: int, body: NameIn) -> Dataset:
    dataset = get_visible(Dataset, request.user, dataset_id, "owner")
    services.rename_dataset(request.user, dataset, body.name)
    return dataset


@router.delete("/{int:dataset_id}", response={204: None})
def delete_dataset(request: AuthenticatedRequest, dataset_id: int, body: NameIn) -> Status[None]:
    """Delete a dataset with all its versions and free the disk space. `name` must match its
    name.
    """
    services.delete_dataset(request.user, get_visible(Dataset, request.user, dataset_id), body.name)
    return Status(204, None)
