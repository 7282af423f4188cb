"""Pagination of the API's lists: parameters `limit` and `offset`, response `items` and `count`."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet
from ninja import Field, Schema
from ninja.pagination import PaginationBase

MAX_PAGE_SIZE = 200


class Pagination(PaginationBase):
    """`@paginate(Pagination)` for every list, with 50 items per page by default."""

    class Input(Schema):
        limit: int = Field(50, ge=1, le=MAX_PAGE_SIZE)
        offset: int = Field(0, ge=0, le=2**53)

    class Output(Schema):
        items: list[Any]
        count: int

    def paginate_queryset(
        self, queryset: QuerySet[Any], pagination: Any, request: Any, **params: Any
    ) -> Any:
        rows = queryset[pagination.offset : pagination.offset + pagination.limit]
        return {"items": list(rows), "count": queryset.count()}
