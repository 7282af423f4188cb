"""Webhooks and their deliveries in the admin site, read-only."""

from django.contrib import admin

from training.people.admin import ReadOnlyAdmin
from training.webhooks.models import Delivery, Webhook


@admin.register(Webhook)
class WebhookAdmin(ReadOnlyAdmin):
    list_display = ("user", "url", "created_at")
    fields = list_display
    list_select_related = ("user",)


@admin.register(Delivery)
class DeliveryAdmin(ReadOnlyAdmin):
    list_display = ("webhook", "created_at", "tries", "last_result")
    fields = (*list_display, "body")
    list_select_related = ("webhook",)
