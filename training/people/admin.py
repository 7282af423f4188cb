"""Users, teams and tokens in the admin site. Rows that actions or workers change are read-only.

Secrets (token digests, webhook keys) are never shown. Only superusers have `is_staff`, so only they
have access.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin
from django.http import HttpRequest

from training.people.models import ApiToken, Membership, Team, User


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """For rows that actions and workers write."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class MembershipInline(admin.TabularInline):  # type: ignore[type-arg]
    model = Membership
    extra = 1
    autocomplete_fields = ("user",)


@admin.register(User)
class PersonAdmin(UserAdmin):  # type: ignore[type-arg]
    list_display = ("username", "is_active", "is_superuser", "must_change_password", "last_login")
    fieldsets = (
        (None, {"fields": ("username", "password")}),
        ("Access", {"fields": ("is_active", "is_superuser", "is_staff", "must_change_password")}),
        ("Dates", {"fields": ("last_login", "date_joined")}),
    )
    readonly_fields = ("last_login", "date_joined")


@admin.register(Team)
class TeamAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ("name",)
    search_fields = ("name",)
    inlines = (MembershipInline,)


@admin.register(ApiToken)
class TokenAdmin(ReadOnlyAdmin):
    list_display = ("user", "name", "scope", "hint", "created_at", "last_used_at", "revoked_at")
    fields = list_display
    list_select_related = ("user",)
