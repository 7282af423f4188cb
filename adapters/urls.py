from django.urls import path

from adapters import deploy_views, views

urlpatterns = [
    path("adapters", views.adapters, name="adapters"),
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
