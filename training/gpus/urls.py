from django.urls import path

from training.gpus import views

urlpatterns = [
    path("audit", views.audit, name="audit"),
    path("audit.csv", views.audit_file, name="audit-file"),
    path("quotas/report.csv", views.report, name="quota-report"),
    path("gpus/devices/<int:device_id>/offer", views.offer, name="gpu-offer"),
]
