"""Options of selects: versions of datasets."""

from typing import Any

from training.datasets.models import Dataset, DatasetVersion
from training.people.models import User
from training.people.options import Option, OptionSource


def find_versions(user: User, text: str) -> Any:
    datasets = Dataset.objects.visible_to(user).filter(name__icontains=text)
    versions = DatasetVersion.objects.filter(dataset__in=datasets.order_by().values("pk"))
    return versions.select_related("dataset").defer("report").order_by("-pk")


def to_option(version: DatasetVersion) -> Option:
    return Option(str(version.pk), f"{version} ({version.train_rows:,} rows)")


DATASET_VERSIONS = OptionSource("dataset-versions", find_versions, to_option)
