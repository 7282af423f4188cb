from django.apps import AppConfig


class PeopleConfig(AppConfig):
    name = "training.people"
    label = "people"

    def ready(self) -> None:
        from training.people.option_sources import SHARING_TEAMS
        from training.people.options import register_source

        register_source(SHARING_TEAMS)
