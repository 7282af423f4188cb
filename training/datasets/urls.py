from django.urls import path

from training.datasets import views

urlpatterns = [
    path("data", views.datasets, name="datasets"),
    path("data/new", views.new, name="dataset-new"),
    path("data/example/<slug:key>", views.use_example, name="dataset-example"),
    path("data/<int:dataset_id>", views.dataset, name="dataset"),
]
