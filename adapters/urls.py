from django.urls import path

from adapters import views

urlpatterns = [
    path("adapters", views.adapters, name="adapters"),
    path("adapters/<int:adapter_id>", views.adapter, name="adapter"),
    path("adapters/<int:adapter_id>/download", views.download, name="adapter-download"),
    path("adapters/<int:adapter_id>/heldout", views.heldout, name="adapter-heldout"),
    path("adapters/<int:adapter_id>/try", views.try_it, name="adapter-try"),
]
