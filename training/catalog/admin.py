"""Base models in the admin site, to look at; they are added on the Models page, where their files
are checked.
"""

from django.contrib import admin

from training.catalog.models import BaseModel
from training.people.admin import ReadOnlyAdmin


@admin.register(BaseModel)
class BaseModelAdmin(ReadOnlyAdmin):
    list_display = ("name", "source", "state", "location", "revision")
    list_filter = ("state", "source")
    search_fields = ("name",)
