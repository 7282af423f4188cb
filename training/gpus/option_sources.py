"""Options of selects: pools."""

from typing import Any

from training.gpus.models import Pool
from training.people.models import User
from training.people.options import Option, OptionSource


def find_pools(_user: User, text: str) -> Any:
    return Pool.objects.filter(name__icontains=text)


def to_option(pool: Pool) -> Option:
    return Option(str(pool.pk), pool.name)


POOLS = OptionSource("pools", find_pools, to_option)
