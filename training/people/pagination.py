"""Pages of long lists: `paginate` for HTML pages, and `Pagination` for the API's lists, with the
parameters `limit` and `offset` and the response `items` and `count`.
"""

from __future__ import annotations

from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import QuerySet
from django.http import HttpRequest, QueryDict
from ninja import Field, Schema
from ninja.pagination import PaginationBase

MAX_PAGE_SIZE = 200


class ListPage(Page[Any]):
    """A page of a list, with the queries of the next and the previous one for `_pager.html`."""

    def __init__(self, page: Page[Any], query: QueryDict, parameter: str) -> None:
        super().__init__(page.object_list, page.number, page.paginator)
        self.query, self.parameter = query, parameter

    @property
    def next_query(self) -> str:
        return self.build_query(self.next_page_number())

    @property
    def previous_query(self) -> str:
        return self.build_query(self.previous_page_number())

    def build_query(self, number: int) -> str:
        """The query of another page. The other parameters of the address are kept."""
        query = QueryDict(mutable=True)
        for name, values in self.query.lists():
            query.setlist(name, [value for value in values if value])
        query[self.parameter] = str(number)
        return f"?{query.urlencode()}"


def order_with_pk(rows: Any) -> Any:
    """The rows with their id as the last key of their order. Equal rows without an order could be
    on two pages, and others on none.
    """
    if not isinstance(rows, QuerySet):
        return rows
    order = rows.query.order_by or rows.model._meta.ordering
    return rows.order_by(*order, "pk")


def paginate(request: HttpRequest, rows: Any, size: int, parameter: str = "page") -> ListPage:
    """The page of `rows` that the address asks for. A number out of range is the last
    page, and text the first."""
    page = Paginator(order_with_pk(rows), size).get_page(request.GET.get(parameter))
    return ListPage(page, request.GET, parameter)


class Pagination(PaginationBase):
    """`@paginate(Pagination)` for every list, with 50 items per page by default."""

    class Input(Schema):
        limit: int = Field(50, ge=1, le=MAX_PAGE_SIZE)
        offset: int = Field(0, ge=0, le=2**53)

    class Output(Schema):
        items: list[Any]
        count: int

    def paginate_queryset(
        self, queryset: QuerySet[Any] | list[Any], pagination: Any, request: Any, **params: Any
    ) -> Any:
        rows = order_with_pk(queryset)[pagination.offset : pagination.offset + pagination.limit]
        count = len(queryset) if isinstance(queryset, list) else queryset.count()
        return {"items": list(rows), "count": count}
