from django.apps import AppConfig


class GpusConfig(AppConfig):
    name = "training.gpus"

    def ready(self) -> None:
        from training.gpus.option_sources import POOLS
        from training.people.options import register_source

        register_source(POOLS)
