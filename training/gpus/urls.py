from django.urls import path

from training.gpus import audit_views

urlpatterns = [
    path("audit", audit_views.show_audit_log, name="audit"),
    path("audit.csv", audit_views.download_audit_log, name="audit-file"),
    path("quotas/report.csv", audit_views.download_report, name="quota-report"),
    path("gpus/devices/<int:device_id>/return", audit_views.return_device, name="gpu-return"),
]
