"""Webhooks and their messages in the admin site, to look at."""

from django.contrib import admin

from training.people.admin import ReadOnly
from training.webhooks.models import Delivery, Webhook


@admin.register(Webhook)
class WebhookAdmin(ReadOnly):
    list_display = ("user", "url", "created_at")
    fields = list_display
    list_select_related = ("user",)


@admin.register(Delivery)
class DeliveryAdmin(ReadOnly):
    list_display = ("webhook", "created_at", "tries", "told")
    fields = (*list_display, "body")
    list_select_related = ("webhook",)
