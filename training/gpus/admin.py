"""Devices, quotas, ledger and audit log in the admin site: to look at. The pages change them,
through their acts.
"""

from django.contrib import admin

from training.gpus.models import Allocation, AuditEntry, Device, Host, PersonalQuota, Pool, Quota
from training.people.admin import ReadOnlyAdmin

for model in (Allocation, AuditEntry, Device, Host, PersonalQuota, Pool, Quota):
    admin.site.register(model, ReadOnlyAdmin)
