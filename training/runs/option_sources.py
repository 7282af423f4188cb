"""Options of selects: the values that occur in the runs that a user may see, for filters."""

from collections.abc import Callable
from typing import Any

from training.people.models import User
from training.people.options import OptionSource
from training.runs.models import Run


def find_values(field: str) -> Callable[[User, str], Any]:
    def find_rows(user: User, text: str) -> Any:
        runs = Run.objects.visible_to(user).filter(**{f"{field}__icontains": text})
        return runs.order_by(field).values_list(field, flat=True).distinct()

    return find_rows


def find_tags(user: User, text: str) -> list[str]:
    runs = Run.objects.visible_to(user).order_by().filter(tags__icontains=text).exclude(tags="")
    tags = {
        tag for tags in runs.values_list("tags", flat=True).distinct() for tag in tags.split(",")
    }
    return sorted(tag for tag in tags if tag and text.lower() in tag.lower())


# By the parameter of the list of runs
FILTER_SOURCES = {
    "model": OptionSource("run-models", find_values("base_model__name"), has_ids=False),
    "data": OptionSource("run-data", find_values("data__dataset__name"), has_ids=False),
    "method": OptionSource("run-methods", find_values("method"), has_ids=False),
    "owner": OptionSource("run-owners", find_values("owner__username"), has_ids=False),
    "tag": OptionSource("run-tags", find_tags, has_ids=False),
}
