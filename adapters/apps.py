from django.apps import AppConfig


class AdaptersConfig(AppConfig):
    name = "adapters"
    label = "adapters"

    def ready(self) -> None:
        """Runs do not know adapters (architecture.md), so what they do for runs and workers is hung
        up here.
        """
        from adapters import jobs, kinds  # noqa: F401 kinds fills the table of work
        from adapters.registry import continue_training, services
        from adapters.serving import usage
        from training.runs.launch.start_weights import register_resolver
        from training.runs.worker import main, outcomes

        outcomes.keepers.append(services.keep)
        register_resolver(continue_training.resolve_start_weights)
        main.BESIDE += [
            (jobs.do_next, 0.5, 1),
            (jobs.talk_next, 0.5, 1),
            (usage.forget_old, 3600.0, 1),
        ]
