from django.urls import path

from training.webhooks import views

urlpatterns = [
    path("account/webhooks", views.create_webhook, name="webhook-new"),
    path("account/webhooks/<int:webhook_id>/remove", views.remove_webhook, name="webhook-remove"),
]
