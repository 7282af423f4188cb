from django.urls import path

from training.datasets import upload_views, views

urlpatterns = [
    path("data", views.list_datasets, name="datasets"),
    path("data/new", upload_views.new_dataset, name="dataset-new"),
    path("data/example/<slug:key>", views.use_example, name="dataset-example"),
    path("data/<int:dataset_id>", views.show_dataset, name="dataset"),
    path("data/<int:dataset_id>/rename", views.rename_dataset, name="dataset-rename"),
    path("data/<int:dataset_id>/delete", views.delete_dataset, name="dataset-delete"),
    path("data/uploads/<int:upload_id>", upload_views.show_upload, name="upload"),
    path("data/uploads/<int:upload_id>/map", upload_views.map_columns, name="upload-map"),
    path("data/uploads/<int:upload_id>/save", upload_views.save_upload, name="upload-save"),
    path("data/uploads/<int:upload_id>/remap", upload_views.reset_mapping, name="upload-remap"),
    path("data/uploads/<int:upload_id>/discard", upload_views.delete_upload, name="upload-discard"),
]
