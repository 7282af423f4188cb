from django.urls import path

from adapters import views
from adapters.evaluation import benchmark_views
from adapters.evaluation import views as evaluation_views
from adapters.export import views as export_views
from adapters.registry import views as registry_views
from adapters.serving import views as serving_views

urlpatterns = [
    path("adapters", views.list_adapters, name="adapters"),
    path("adapters/compare", evaluation_views.compare_versions, name="adapters-compare"),
    path("adapters/compare/answers", evaluation_views.show_answers, name="adapters-answers"),
    path("adapters/compare/generate", evaluation_views.request_replies, name="adapters-generate"),
    path("adapters/compare/weights", evaluation_views.analyze_weights, name="adapters-weights"),
    path(
        "adapters/compare/prompts/<int:prompts_id>/delete",
        evaluation_views.delete_prompts,
        name="adapters-prompts-delete",
    ),
    path("adapters/vote", evaluation_views.show_next_vote, name="adapters-vote"),
    path("adapters/vote/cast", evaluation_views.cast_vote, name="adapters-vote-cast"),
    path("adapters/import", registry_views.import_adapter, name="adapter-import"),
    path("adapters/<int:adapter_id>/edit", registry_views.edit_adapter, name="adapter-edit"),
    path("adapters/<int:adapter_id>/delete", registry_views.delete_adapter, name="adapter-delete"),
    path(
        "adapters/<int:adapter_id>/continue", registry_views.continue_from, name="adapter-continue"
    ),
    path("adapters/<int:adapter_id>/exports", export_views.show_exports, name="adapter-exports"),
    path("adapters/<int:adapter_id>/merge", export_views.merge_adapter, name="adapter-merge"),
    path("adapters/<int:adapter_id>/push", export_views.push_adapter, name="adapter-push"),
    path(
        "adapters/<int:adapter_id>/merged.zip", export_views.download_merged, name="adapter-merged"
    ),
    path("adapters/<int:adapter_id>/gguf", export_views.export_gguf_file, name="adapter-gguf"),
    path(
        "adapters/<int:adapter_id>/gguf/<slug:quantization>",
        export_views.download_gguf,
        name="adapter-gguf-file",
    ),
    path("runs/<int:run_id>/register", registry_views.register_checkpoint, name="run-register"),
    path("adapters/<int:adapter_id>", views.show_adapter, name="adapter"),
    path("adapters/<int:adapter_id>/download", views.download_adapter, name="adapter-download"),
    path("adapters/<int:adapter_id>/held-out", views.show_held_out_prompt, name="adapter-held-out"),
    path("adapters/<int:adapter_id>/try", views.try_adapter, name="adapter-try"),
    path("benchmarks/new", benchmark_views.new_benchmark, name="benchmark-new"),
    path("benchmarks/<int:sweep_id>", benchmark_views.show_benchmark, name="benchmark"),
    path(
        "benchmarks/<int:sweep_id>/generate",
        benchmark_views.request_replies,
        name="benchmark-generate",
    ),
    path(
        "benchmarks/<int:sweep_id>/export", benchmark_views.export_report, name="benchmark-export"
    ),
    path("deployments", serving_views.list_deployments, name="deployments"),
    path("deployments/new", serving_views.create_deployment, name="deployment-new"),
    path("deployments/<slug:name>", serving_views.show_deployment, name="deployment"),
    path("deployments/<slug:name>/live", serving_views.show_live_status, name="deployment-live"),
    path(
        "deployments/<slug:name>/minutes",
        serving_views.show_usage_by_minute,
        name="deployment-minutes",
    ),
    path(
        "deployments/<slug:name>/switch", serving_views.switch_deployment, name="deployment-switch"
    ),
    path(
        "deployments/<slug:name>/roll-back",
        serving_views.roll_back_deployment,
        name="deployment-roll-back",
    ),
    path(
        "deployments/<slug:name>/delete", serving_views.delete_deployment, name="deployment-delete"
    ),
]
