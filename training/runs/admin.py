"""Read-only pages of runs and sweeps in the admin site. Only actions and workers change their
states.
"""

from django.contrib import admin

from training.people.admin import ReadOnlyAdmin
from training.runs.models import Run, Sweep


@admin.register(Run)
class RunAdmin(ReadOnlyAdmin):
    list_display = ("name", "owner", "team", "state", "method", "base_model", "step", "created_at")
    list_filter = ("state", "method")
    list_select_related = ("owner", "team", "base_model")
    search_fields = ("name",)
    exclude = ("lease_token",)


@admin.register(Sweep)
class SweepAdmin(ReadOnlyAdmin):
    list_display = ("name", "owner", "team", "created_at")
    list_select_related = ("owner", "team")
