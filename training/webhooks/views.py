"""The webhook forms of the account page."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from training.people.requests import AuthenticatedRequest
from training.webhooks import services


@require_POST
def create_webhook(request: AuthenticatedRequest) -> HttpResponse:
    services.add_webhook(request.user, request.POST.get("url", ""))
    messages.success(request, "Webhook added. It gets a signed message when one of your runs ends.")
    return redirect("account")


@require_POST
def remove_webhook(request: AuthenticatedRequest, webhook_id: int) -> HttpResponse:
    services.remove_webhook(request.user, webhook_id)
    return redirect("account")
