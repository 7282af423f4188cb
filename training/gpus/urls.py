from django.urls import path

from training.gpus import audit_views, disk_views

urlpatterns = [
    path("audit", audit_views.show_audit_log, name="audit"),
    path("audit.csv", audit_views.download_audit_log, name="audit-file"),
    path("quotas/report.csv", audit_views.download_report, name="quota-report"),
    path("gpus/devices/<int:device_id>/return", audit_views.return_device, name="gpu-return"),
    path("disk", disk_views.show_disk_usage, name="disk"),
    path("disk/users/<str:username>", disk_views.edit_user_quota, name="disk-user"),
    path("disk/teams/<int:team_id>", disk_views.edit_team_quota, name="disk-team"),
]
