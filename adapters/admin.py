"""Adapter versions in the admin site, read only: runs and imports create them."""

from django.contrib import admin

from adapters.models import AdapterVersion
from training.people.admin import ReadOnlyAdmin


@admin.register(AdapterVersion)
class AdapterAdmin(ReadOnlyAdmin):
    list_display = ("name", "number", "owner", "team", "base_model", "size_bytes", "created_at")
    list_select_related = ("owner", "team", "base_model")
    search_fields = ("name",)
