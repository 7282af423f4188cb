"""Read-only admin pages of devices, quotas, the ledger and the audit log."""

from django.contrib import admin

from training.gpus.models import Allocation, AuditEntry, Device, Host, PersonalQuota, Pool, Quota
from training.people.admin import ReadOnlyAdmin

for model in (Allocation, AuditEntry, Host, PersonalQuota, Pool, Quota):
    admin.site.register(model, ReadOnlyAdmin)


@admin.register(Device)
class DeviceAdmin(ReadOnlyAdmin):
    list_select_related = ("host",)
