from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "training.jobs"
    label = "jobs"
