from django.apps import AppConfig


class AdaptersConfig(AppConfig):
    name = "adapters"
    label = "adapters"

    def ready(self) -> None:
        """Runs do not know adapters (architecture.md), so what they do for runs and workers is hung up here."""
        from adapters import kinds, served, shelf, work  # noqa: F401 kinds fills the table of work
        from training.runs import endings, worker

        endings.keepers.append(shelf.keep)
        worker.BESIDE += [(work.do_next, 0.5, 1), (work.talk_next, 0.5, 1), (served.forget_old, 3600.0, 1)]
