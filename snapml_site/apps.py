from django.apps import AppConfig


class SiteConfig(AppConfig):
    name = "snapml_site"

    def ready(self) -> None:
        from snapml_site import checks  # noqa: F401 registers the system checks
