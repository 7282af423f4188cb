from django.apps import AppConfig


class DatasetsConfig(AppConfig):
    name = "training.datasets"
    label = "datasets"
