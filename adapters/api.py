"""API for adapter versions."""

from datetime import datetime
from typing import Annotated, Any, Literal

from django.http import HttpResponseBase
from ninja import File, Form, Query, Router, Schema
from ninja.files import UploadedFile
from ninja.pagination import paginate
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from adapters import views
from adapters.export import gguf, hub, merge
from adapters.models import AdapterVersion
from adapters.registry import actions, continue_training, imports, services
from training.catalog.models import BaseModel
from training.datasets.permissions import get_visible_version
from training.errors import UserError
from training.people.pagination import Pagination
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest
from training.runs.models import Run

router = Router(tags=["adapters"])
PLAYGROUND_EXAMPLE: JsonDict = {
    "who": "adapter",
    "messages": [{"role": "user", "content": "turn on the kitchen lamp"}],
}


class AdapterOut(Schema):
    id: int
    name: str
    number: int
    owner: str
    base_model: str
    run: int | None
    method: str
    step: int
    eval_loss: float | None
    exact_match: float | None
    trainable_parameters: int
    size_bytes: int
    files: dict[str, Any]
    parent: int | None
    tags: list[str]
    notes: str
    provenance: dict[str, Any]
    created_at: datetime

    @staticmethod
    def resolve_owner(row: AdapterVersion) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_base_model(row: AdapterVersion) -> str:
        return row.base_model.name

    @staticmethod
    def resolve_parent(row: AdapterVersion) -> int | None:
        return row.parent_id

    @staticmethod
    def resolve_tags(row: AdapterVersion) -> list[str]:
        return row.tag_list

    @staticmethod
    def resolve_run(row: AdapterVersion) -> int | None:
        return row.run_id


class AdapterUpdateIn(Schema):
    model_config = ConfigDict(extra="forbid")
    tags: str | None = Field(None, max_length=320, description="Comma-separated.")
    notes: str | None = Field(None, max_length=10_000)


class NameIn(Schema):
    model_config = ConfigDict(extra="forbid")
    name: str


class FreedOut(Schema):
    freed_bytes: int


class ContinueIn(Schema):
    model_config = ConfigDict(extra="forbid")
    data: int | None = Field(None, description="Dataset version; by default the adapter's own.")
    settings: dict[str, Any] = {}
    name: str = Field("", max_length=120)


class LaunchedOut(Schema):
    run: int


class RegisterCheckpointIn(Schema):
    model_config = ConfigDict(extra="forbid")
    run: int
    step: int = Field(ge=0, le=2**31)


class GgufIn(Schema):
    model_config = ConfigDict(extra="forbid")
    quantization: str = Field(max_length=10)


class PushIn(Schema):
    model_config = ConfigDict(extra="forbid")
    repository: str = Field(max_length=96, description="`owner/name` on the Hub.")
    token: str = Field(max_length=200, description="A Hub access token with write permission.")
    what: Literal["adapter", "merged"] = "adapter"
    private: bool = True


class JobOut(Schema):
    kind: str
    state: str = Field(alias="state")
    message: str = Field(alias="progress_message")
    done: int = Field(alias="progress_done")
    total: int = Field(alias="progress_total")
    error: str
    result: dict[str, Any]


STREAM_RESPONSE: dict[str, Any] = {"responses": {200: {"content": {"text/event-stream": {}}}}}


class PlaygroundIn(Schema):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [PLAYGROUND_EXAMPLE]})
    who: Literal["base", "adapter"]
    messages: list[dict[str, str]] = Field(min_length=1, max_length=100)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0.01, le=1)
    max_tokens: int = Field(200, ge=1, le=2048)


class EvalPromptOut(Schema):
    messages: list[dict[str, str]]
    expected: str
    split: str


@router.get("", response=list[AdapterOut])
@paginate(Pagination)
def list_adapters(
    request: AuthenticatedRequest,
    run: Annotated[int | None, Query(ge=0, le=2**53, description="id of the run")] = None,
) -> Any:
    """All versions, or those of one run."""
    versions = AdapterVersion.objects.visible_to(request.user).select_related("owner", "base_model")
    return versions if run is None else versions.filter(run=run)


@router.post("/import", response={201: AdapterOut})
def import_adapter(
    request: AuthenticatedRequest, base: Form[int], name: Form[str], file: File[list[UploadedFile]]
) -> Any:
    """Import an adapter trained elsewhere with PEFT: `adapter_config.json` and
    `adapter_model.safetensors`, or a zip of both. `base` is the ID of a model in the catalog.
    """
    model = BaseModel.objects.filter(pk=min(base, 2**53)).first()
    if model is None:
        raise UserError("Choose the base model that the adapter was trained on.", field="base")
    return 201, imports.import_version(request.user, file, model, name)


@router.post("/checkpoints", response={201: AdapterOut})
def register_checkpoint(request: AuthenticatedRequest, body: RegisterCheckpointIn) -> Any:
    """Register a checkpoint of a run as an adapter version."""
    run = get_changeable(
        Run, request.user, body.run, "owner", "team", "base_model", "data__dataset"
    )
    return 201, services.register_checkpoint(request.user, run, body.step)


@router.patch("/{int:adapter_id}", response=AdapterOut)
def update_adapter(
    request: AuthenticatedRequest, adapter_id: int, body: AdapterUpdateIn
) -> AdapterVersion:
    version = get_changeable(AdapterVersion, request.user, adapter_id, "owner", "base_model")
    return actions.update_version(request.user, version, tags=body.tags, notes=body.notes)


@router.delete("/{int:adapter_id}", response=FreedOut)
def delete_adapter(request: AuthenticatedRequest, adapter_id: int, body: NameIn) -> Any:
    """Delete a version that no deployment uses. `name` is its name with its number, such as `Lights
    v2`.
    """
    version = get_changeable(AdapterVersion, request.user, adapter_id)
    return {"freed_bytes": actions.delete_version(request.user, version, body.name)}


@router.post("/{int:adapter_id}/continue", response={201: LaunchedOut})
def continue_from(request: AuthenticatedRequest, adapter_id: int, body: ContinueIn) -> Any:
    """Start a run from this version's weights; `settings` lists only the settings to change."""
    version = get_visible(
        AdapterVersion, request.user, adapter_id, "base_model", "data__dataset__team"
    )
    data = get_visible_version(request.user, body.data) if body.data is not None else None
    run = continue_training.continue_from(
        request.user, version, data=data, changes=body.settings, name=body.name
    )
    return 201, {"run": run.pk}


@router.post("/{int:adapter_id}/merge", response={202: JobOut})
def merge_adapter(request: AuthenticatedRequest, adapter_id: int) -> Any:
    """Merge the adapter into its base model in the background and compare the outputs of both. A
    GET of the same address shows how far it is. A merge that failed starts again.
    """
    return 202, merge.merge_version(
        request.user, get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    )


@router.get("/{int:adapter_id}/merge", response=JobOut)
def read_merge(request: AuthenticatedRequest, adapter_id: int) -> Any:
    """The state of the merge, with its error if it failed. It starts nothing."""
    return merge.get_merge_job(get_visible(AdapterVersion, request.user, adapter_id))


@router.post("/{int:adapter_id}/gguf", response={202: JobOut})
def export_gguf(request: AuthenticatedRequest, adapter_id: int, body: GgufIn) -> Any:
    """Export the merged model as a GGUF file in the background and check it with llama.cpp."""
    version = get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    return 202, gguf.export_gguf(request.user, version, body.quantization)


@router.get("/{int:adapter_id}/gguf", response=JobOut)
def read_gguf_export(request: AuthenticatedRequest, adapter_id: int, quantization: str) -> Any:
    """The state of the GGUF export with this quantization. It starts nothing."""
    version = get_visible(AdapterVersion, request.user, adapter_id)
    return gguf.get_gguf_job(version, quantization)


@router.post("/{int:adapter_id}/push", response={202: JobOut})
def push_adapter(request: AuthenticatedRequest, adapter_id: int, body: PushIn) -> Any:
    """Push the adapter or its merged model to the Hugging Face Hub in the background. The token is
    deleted when the push starts.
    """
    return 202, hub.push_to_hub(
        request.user,
        get_changeable(AdapterVersion, request.user, adapter_id, "base_model"),
        **body.dict(),
    )


@router.get("/{int:adapter_id}/push", response=JobOut)
def read_push(
    request: AuthenticatedRequest, adapter_id: int, repository: str, what: str = "adapter"
) -> Any:
    """The state of the last push to this repository. It starts nothing."""
    version = get_visible(AdapterVersion, request.user, adapter_id)
    return hub.get_push_job(version, repository, what)


@router.get("/{int:adapter_id}", response=AdapterOut)
def read_adapter(request: AuthenticatedRequest, adapter_id: int) -> AdapterVersion:
    return get_visible(AdapterVersion, request.user, adapter_id, "owner", "base_model")


@router.get("/{int:adapter_id}/held-out", response=EvalPromptOut)
def read_held_out_prompt(request: AuthenticatedRequest, adapter_id: int) -> Any:
    """A random held-out prompt of this adapter's data, with its expected answer."""
    return views.get_held_out_prompt(request, adapter_id)


@router.post("/{int:adapter_id}/try", openapi_extra=STREAM_RESPONSE)
def try_adapter(
    request: AuthenticatedRequest, adapter_id: int, body: PlaygroundIn
) -> HttpResponseBase:
    """Stream a reply of the base model or the adapter as server-sent events in OpenAI's format."""
    return views.stream_playground(request, adapter_id, body.dict())


ZIP_RESPONSE: dict[str, Any] = {"responses": {200: {"content": {"application/zip": {}}}}}


@router.get("/{int:adapter_id}/download", openapi_extra=ZIP_RESPONSE)
def download_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponseBase:
    """Download a zip of the adapter as PEFT loads it, or of the full model."""
    return views.download_adapter(request, adapter_id)
