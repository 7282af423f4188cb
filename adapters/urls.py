from django.urls import path

from adapters import views
from adapters.evaluation import benchmark_views
from adapters.evaluation import views as evaluation_views
from adapters.export import views as export_views
from adapters.registry import views as registry_views
from adapters.serving import views as serving_views

urlpatterns = [
    path("adapters", views.adapters, name="adapters"),
    path("adapters/compare", evaluation_views.side_by_side, name="adapters-compare"),
    path("adapters/compare/answers", evaluation_views.answer_grid, name="adapters-answers"),
    path("adapters/compare/ask", evaluation_views.ask, name="adapters-ask"),
    path("adapters/compare/weights", evaluation_views.weights, name="adapters-weights"),
    path(
        "adapters/compare/prompts/<int:prompts_id>/delete",
        evaluation_views.forget,
        name="adapters-prompts-delete",
    ),
    path("adapters/vote", evaluation_views.ballot, name="adapters-vote"),
    path("adapters/vote/cast", evaluation_views.vote, name="adapters-vote-cast"),
    path("adapters/import", registry_views.import_page, name="adapter-import"),
    path("adapters/disk", registry_views.disk, name="adapters-disk"),
    path("adapters/<int:adapter_id>/edit", registry_views.edit, name="adapter-edit"),
    path("adapters/<int:adapter_id>/delete", registry_views.delete, name="adapter-delete"),
    path(
        "adapters/<int:adapter_id>/continue", registry_views.continue_from, name="adapter-continue"
    ),
    path("adapters/<int:adapter_id>/exports", export_views.exported, name="adapter-exports"),
    path("adapters/<int:adapter_id>/merge", export_views.merge, name="adapter-merge"),
    path("adapters/<int:adapter_id>/push", export_views.push, name="adapter-push"),
    path(
        "adapters/<int:adapter_id>/merged.zip", export_views.download_merged, name="adapter-merged"
    ),
    path("adapters/<int:adapter_id>/gguf", export_views.gguf, name="adapter-gguf"),
    path(
        "adapters/<int:adapter_id>/gguf/<slug:quantisation>",
        export_views.download_gguf,
        name="adapter-gguf-file",
    ),
    path("runs/<int:run_id>/keep", registry_views.keep_checkpoint, name="run-keep"),
    path("adapters/<int:adapter_id>", views.adapter, name="adapter"),
    path("adapters/<int:adapter_id>/download", views.download, name="adapter-download"),
    path("adapters/<int:adapter_id>/heldout", views.heldout, name="adapter-heldout"),
    path("adapters/<int:adapter_id>/try", views.try_it, name="adapter-try"),
    path("bakeoffs/new", benchmark_views.new, name="bakeoff-new"),
    path("bakeoffs/<int:sweep_id>", benchmark_views.show, name="bakeoff"),
    path("bakeoffs/<int:sweep_id>/ask", benchmark_views.ask, name="bakeoff-ask"),
    path("bakeoffs/<int:sweep_id>/export", benchmark_views.export, name="bakeoff-export"),
    path("deployments", serving_views.deployments, name="deployments"),
    path("deployments/new", serving_views.deploy_new, name="deployment-new"),
    path("deployments/<slug:name>", serving_views.deployment, name="deployment"),
    path("deployments/<slug:name>/live", serving_views.live, name="deployment-live"),
    path("deployments/<slug:name>/minutes", serving_views.minutes, name="deployment-minutes"),
    path("deployments/<slug:name>/switch", serving_views.switch, name="deployment-switch"),
    path("deployments/<slug:name>/back", serving_views.back, name="deployment-back"),
    path("deployments/<slug:name>/down", serving_views.down, name="deployment-down"),
]
