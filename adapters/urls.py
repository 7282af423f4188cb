from django.urls import path

from adapters import compare_views, deploy_views, version_views, views

urlpatterns = [
    path("adapters", views.adapters, name="adapters"),
    path("adapters/compare", compare_views.side_by_side, name="adapters-compare"),
    path("adapters/compare/answers", compare_views.answer_grid, name="adapters-answers"),
    path("adapters/compare/ask", compare_views.ask, name="adapters-ask"),
    path("adapters/compare/weights", compare_views.weights, name="adapters-weights"),
    path("adapters/vote", compare_views.ballot, name="adapters-vote"),
    path("adapters/vote/cast", compare_views.vote, name="adapters-vote-cast"),
    path("adapters/import", version_views.import_page, name="adapter-import"),
    path("adapters/disk", version_views.disk, name="adapters-disk"),
    path("adapters/<int:adapter_id>/edit", version_views.edit, name="adapter-edit"),
    path("adapters/<int:adapter_id>/delete", version_views.delete, name="adapter-delete"),
    path("adapters/<int:adapter_id>/continue", version_views.continue_from, name="adapter-continue"),
    path("runs/<int:run_id>/keep", version_views.keep_checkpoint, name="run-keep"),
    path("adapters/<int:adapter_id>", views.adapter, name="adapter"),
    path("adapters/<int:adapter_id>/download", views.download, name="adapter-download"),
    path("adapters/<int:adapter_id>/heldout", views.heldout, name="adapter-heldout"),
    path("adapters/<int:adapter_id>/try", views.try_it, name="adapter-try"),
    path("deployments", deploy_views.deployments, name="deployments"),
    path("deployments/new", deploy_views.deploy_new, name="deployment-new"),
    path("deployments/<slug:name>", deploy_views.deployment, name="deployment"),
    path("deployments/<slug:name>/live", deploy_views.live, name="deployment-live"),
    path("deployments/<slug:name>/minutes", deploy_views.minutes, name="deployment-minutes"),
    path("deployments/<slug:name>/switch", deploy_views.switch, name="deployment-switch"),
    path("deployments/<slug:name>/back", deploy_views.back, name="deployment-back"),
    path("deployments/<slug:name>/down", deploy_views.down, name="deployment-down"),
]
