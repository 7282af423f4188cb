from django.urls import path

from training.webhooks import views

urlpatterns = [
    path("account/webhooks", views.webhook_new, name="webhook-new"),
    path("account/webhooks/<int:webhook_id>/remove", views.webhook_remove, name="webhook-remove"),
]
