from django.urls import path

from training.catalog import views

urlpatterns = [
    path("models", views.models, name="models"),
    path("models/add", views.add, name="model-add"),
    path("models/<int:model_id>", views.model, name="model"),
    path("models/<int:model_id>/retry", views.retry, name="model-retry"),
]
