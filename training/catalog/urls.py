from django.urls import path

from training.catalog import views

urlpatterns = [
    path("models", views.show_models, name="models"),
    path("models/add", views.add_model, name="model-add"),
    path("models/<int:model_id>", views.show_model, name="model"),
    path("models/<int:model_id>/retry", views.retry_import, name="model-retry"),
]
