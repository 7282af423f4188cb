"""Adapters in the admin site, to look at; they come from runs."""

from django.contrib import admin

from adapters.models import AdapterVersion
from training.people.admin import ReadOnlyAdmin


@admin.register(AdapterVersion)
class AdapterAdmin(ReadOnlyAdmin):
    list_display = ("name", "number", "owner", "team", "base_model", "size_bytes", "created_at")
    list_select_related = ("owner", "team", "base_model")
    search_fields = ("name",)
