from django.apps import AppConfig


class AdaptersConfig(AppConfig):
    name = "adapters"
    label = "adapters"

    def ready(self) -> None:
        from adapters import shelf
        from training.runs import endings

        endings.keepers.append(shelf.keep)
