"""Webhooks and the messages that are sent to them."""

from __future__ import annotations

from django.db import models

from training.people.models import User


class Webhook(models.Model):
    """A URL that gets a message when one of the user's runs ends, signed with `secret`."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="webhooks")
    url = models.CharField(max_length=500)
    secret = models.CharField(max_length=64)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["created_at"]

    def __str__(self) -> str:
        return self.url


class Delivery(models.Model):
    """One message to a webhook. A job sends it until it is accepted or has failed too often. Each
    try sends the same `body`.
    """

    webhook = models.ForeignKey(Webhook, on_delete=models.CASCADE, related_name="deliveries")
    body = models.TextField()
    tries = models.PositiveIntegerField(default=0)
    last_result = models.CharField(max_length=300, blank=True)  # the outcome of the last try
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]
