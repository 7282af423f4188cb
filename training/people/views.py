"""Sign-in with a brake on guessing, password change, and the account page with its API tokens."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.contrib.auth import views as auth
from django.contrib.auth.forms import AuthenticationForm
from django.core.cache import cache
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse_lazy
from django.views.decorators.http import require_POST

from training.people.tokens import create_token, revoke_token

MAX_TRIES = 10  # wrong passwords for one name from one address
TRIES_SECONDS = 300


class SignIn(auth.LoginView):
    template_name = "people/sign_in.html"
    redirect_authenticated_user = True

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if cache.get(self.tries_key(), 0) >= MAX_TRIES:
            form = AuthenticationForm(request)
            wait = f"Too many wrong passwords. Wait {TRIES_SECONDS // 60} minutes, then try again."
            return render(request, self.template_name, {"form": form, "wait": wait}, status=429)
        return super().post(request, *args, **kwargs)

    def form_invalid(self, form: AuthenticationForm) -> HttpResponse:
        key = self.tries_key()
        cache.add(key, 0, TRIES_SECONDS)
        cache.incr(key)
        return super().form_invalid(form)

    def form_valid(self, form: AuthenticationForm) -> HttpResponse:
        cache.delete(self.tries_key())
        return super().form_valid(form)

    def tries_key(self) -> str:
        name = self.request.POST.get("username", "")[:150].lower().encode().hex()
        return f"tries:{self.request.META.get('REMOTE_ADDR')}:{name}"[:240]


class ChangePassword(auth.PasswordChangeView):
    template_name = "people/password.html"
    success_url = reverse_lazy("runs")

    def form_valid(self, form: Any) -> HttpResponse:
        form.user.must_change_password = False
        answer = super().form_valid(form)
        messages.success(self.request, "Your password is changed.")
        return answer


def account(request: HttpRequest) -> HttpResponse:
    tokens = request.user.tokens.order_by("-created_at")
    return render(request, "people/account.html", {"tokens": tokens, "secret": request.session.pop("new_token", None)})


@require_POST
def token_new(request: HttpRequest) -> HttpResponse:
    _, secret = create_token(request.user, request.POST.get("name", ""))
    request.session["new_token"] = secret  # shown once on the page that follows, never in an address
    return redirect("account")


@require_POST
def token_revoke(request: HttpRequest, token_id: int) -> HttpResponse:
    revoke_token(request.user, token_id)
    messages.success(request, "The token is revoked.")
    return redirect("account")
