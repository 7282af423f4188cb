from django.apps import AppConfig


class GpusConfig(AppConfig):
    name = "training.gpus"
