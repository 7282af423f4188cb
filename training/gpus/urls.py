from django.urls import path

from training.gpus import views

urlpatterns = [
    path("audit", views.show_audit_log, name="audit"),
    path("audit.csv", views.download_audit_log, name="audit-file"),
    path("quotas/report.csv", views.download_report, name="quota-report"),
    path("gpus/devices/<int:device_id>/return", views.return_device, name="gpu-return"),
]
