"""Users, teams and tokens in the admin site. Rows that actions or workers change are read-only.

Secrets (token digests, webhook keys) are never shown. Only superusers have `is_staff`, so only they
have access.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.utils import NestedObjects
from django.contrib.auth.admin import UserAdmin
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from training.people.models import ApiToken, Membership, Team, User

MAX_LISTED_PROTECTED = 20


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """For rows that actions and workers write."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class CountingDeleteAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Counts what is deleted with a row, because a list of it has no end. Only superusers have
    access, so no permission can be missing.
    """

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        collector = NestedObjects(using="default")
        collector.collect(list(objs))
        found: dict[Any, set[Any]] = collector.model_objs
        counts = {model._meta.verbose_name_plural: len(rows) for model, rows in found.items()}
        protected = [str(row) for row in list(collector.protected)[:MAX_LISTED_PROTECTED]]
        return [str(row) for row in objs], counts, set(), protected


@admin.register(User)
class PersonAdmin(CountingDeleteAdmin, UserAdmin):  # type: ignore[type-arg]
    list_display = ("username", "is_active", "is_superuser", "must_change_password", "last_login")
    fieldsets = (
        (None, {"fields": ("username", "password")}),
        ("Access", {"fields": ("is_active", "is_superuser", "is_staff", "must_change_password")}),
        ("Dates", {"fields": ("last_login", "date_joined")}),
    )
    readonly_fields = ("last_login", "date_joined")


@admin.register(Team)
class TeamAdmin(CountingDeleteAdmin):
    list_display = ("name",)
    search_fields = ("name",)
    fields = ("name", "max_disk_bytes", "members_page")
    readonly_fields = ("max_disk_bytes", "members_page")  # edited with an audit entry

    @admin.display(description="Members")
    def members_page(self, team: Team) -> str:
        if team.pk is None:
            return "Save the team first."
        page = reverse("admin:people_membership_changelist")
        count = team.memberships.count()
        return format_html('<a href="{}?team__id__exact={}">{} members</a>', page, team.pk, count)


@admin.register(Membership)
class MembershipAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ("user", "team", "role")
    list_select_related = ("user", "team")
    autocomplete_fields = ("user", "team")
    search_fields = ("user__username", "team__name")


@admin.register(ApiToken)
class TokenAdmin(ReadOnlyAdmin):
    list_display = ("user", "name", "scope", "hint", "created_at", "last_used_at", "revoked_at")
    fields = list_display
    list_select_related = ("user",)
