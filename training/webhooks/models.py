"""Addresses of people that hear of their runs' ends, and the messages to them."""

from __future__ import annotations

from django.db import models

from training.people.models import User


class Webhook(models.Model):
    """An address of a person's own that hears of their runs' ends. `secret` signs what is sent
    there.
    """

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="webhooks")
    url = models.CharField(max_length=500)
    secret = models.CharField(max_length=64)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["created_at"]

    def __str__(self) -> str:
        return self.url


class Delivery(models.Model):
    """One message to a webhook; a job sends it until it arrives or has failed too often. `body` is
    sent byte for byte each time.
    """

    webhook = models.ForeignKey(Webhook, on_delete=models.CASCADE, related_name="deliveries")
    body = models.TextField()
    tries = models.PositiveIntegerField(default=0)
    last_result = models.CharField(max_length=300, blank=True)  # what the last try came to
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]
