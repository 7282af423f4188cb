from django.apps import AppConfig


class CatalogConfig(AppConfig):
    name = "training.catalog"
    label = "catalog"
