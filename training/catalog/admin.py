"""Base models in the admin site, read-only. Add them on the Models page, which checks the files."""

from django.contrib import admin

from training.catalog.models import BaseModel
from training.people.admin import ReadOnlyAdmin


@admin.register(BaseModel)
class BaseModelAdmin(ReadOnlyAdmin):
    list_display = ("name", "source", "state", "location", "revision")
    list_filter = ("state", "source")
    search_fields = ("name",)
