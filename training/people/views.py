"""Sign-in with rate limiting, password change, and the account page."""

from __future__ import annotations

import hashlib
import unicodedata
from itertools import groupby
from typing import Any, cast

from django.contrib import messages
from django.contrib.auth import views as auth
from django.contrib.auth.forms import AuthenticationForm, PasswordChangeForm
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse_lazy
from django.utils.decorators import method_decorator
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from training.errors import to_one_line
from training.people import teams, tokens
from training.people.models import Membership, Role, Scope, Team, User
from training.people.option_sources import SHARING_TEAMS
from training.people.options import MAX_SEARCH_LENGTH, get_source, list_options
from training.people.pagination import paginate
from training.people.requests import (
    AuthenticatedRequest,
    get_client_address,
    parse_int_or_zero,
)
from training.people.sign_in_attempts import (
    WINDOW_SECONDS,
    clear_attempts,
    count_attempt,
    subtract_attempt,
)

MAX_TRIES = 10  # for one username from one address
MAX_TRIES_FROM_ONE_ADDRESS = 100
TOKENS_PER_PAGE = 50
MEMBERS_PER_PAGE = 50
TOKEN_DAYS = (("30", "30 days"), ("90", "90 days"), ("365", "a year"), ("", "never"))
WAIT_MESSAGE = f"Too many failed attempts. Wait {WINDOW_SECONDS // 60} minutes, then try again."


@method_decorator(require_http_methods(["GET", "HEAD", "POST"]), name="dispatch")
class SignIn(auth.LoginView):
    template_name = "people/sign_in.html"
    redirect_authenticated_user = True

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        # Count before the password is checked, so that parallel guesses count too. The list counts
        # under every key; any() on a generator would stop at the first.
        limits = {self.name_key: MAX_TRIES}
        limits |= {self.address_key: MAX_TRIES_FROM_ONE_ADDRESS} if self.address_key else {}
        is_over = [count_attempt(key) > limit for key, limit in limits.items()]
        if any(is_over):
            context = {"form": AuthenticationForm(request), "wait_message": WAIT_MESSAGE}
            return render(request, self.template_name, context, status=429)
        return super().post(request, *args, **kwargs)

    def form_valid(self, form: AuthenticationForm) -> HttpResponse:
        """A success does not clear the count of its address: otherwise any user could guess the
        passwords of others forever.
        """
        clear_attempts([self.name_key])
        if self.address_key:
            subtract_attempt(self.address_key)
        return super().form_valid(form)

    @property
    def name_key(self) -> str:
        """The counter of this name from this address. The name is normalized as in Django's
        form.
        """
        name = unicodedata.normalize("NFKC", self.request.POST.get("username", "").strip())
        return throttle_key(f"{get_client_address(self.request)} {name[:150].lower()}")

    @property
    def address_key(self) -> str:
        """The counter of all names from this address. Empty if the address is unknown: one client
        behind a proxy would lock out all others.
        """
        address = get_client_address(self.request)
        return throttle_key(address) if address else ""


def throttle_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


@method_decorator(require_http_methods(["GET", "HEAD", "POST"]), name="dispatch")
class ChangePassword(auth.PasswordChangeView):
    """The old password is guessed as slowly as at the sign-in, also with a stolen session."""

    template_name = "people/password.html"
    success_url = reverse_lazy("runs")

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if count_attempt(self.attempts_key) > MAX_TRIES:
            # Not bound to the request: its errors would say whether the password is right
            form = PasswordChangeForm(cast(User, request.user))
            context = {"form": form, "wait_message": WAIT_MESSAGE}
            return render(request, self.template_name, context, status=429)
        return super().post(request, *args, **kwargs)

    def form_invalid(self, form: Any) -> HttpResponse:
        if "old_password" not in form.errors:  # it was no wrong guess
            subtract_attempt(self.attempts_key)
        return super().form_invalid(form)

    @property
    def attempts_key(self) -> str:
        return throttle_key(f"password of {self.request.user.pk}")

    def form_valid(self, form: Any) -> HttpResponse:
        clear_attempts([self.attempts_key])
        form.user.must_change_password = False
        response = super().form_valid(form)
        messages.success(self.request, "Your password has been changed.")
        return response


@require_safe
def show_account(request: AuthenticatedRequest) -> HttpResponse:
    return render(request, "people/account.html", build_account_context(request))


def build_account_context(request: AuthenticatedRequest) -> dict[str, Any]:
    team_query = to_one_line(request.GET.get("team", ""))[:MAX_SEARCH_LENGTH]
    page = paginate(
        request, teams.find_members(request.user, team_query), MEMBERS_PER_PAGE, "members"
    )
    return {
        "tokens": paginate(request, tokens.list_tokens(request.user), TOKENS_PER_PAGE, "tokens"),
        "days_choices": TOKEN_DAYS,
        "sharing_teams": list_options(request.user, SHARING_TEAMS, request.user.default_team_id),
        "members_page": page,
        "team_query": team_query,
        "teams": load_teams(request.user, list(page)),
        "roles": Role.choices,
        "scopes": Scope.choices,
    }


def load_teams(
    user: User, pairs: list[tuple[int, int | None]]
) -> list[tuple[Team, list[Membership], bool]]:
    """The teams and members of these ids, and whether the user may change the members."""
    teams_by_id = Team.objects.in_bulk({team_id for team_id, _ in pairs})
    members = Membership.objects.select_related("user").in_bulk([pk for _, pk in pairs if pk])
    managed = teams.find_managed_team_ids(user, set(teams_by_id))
    return [
        (teams_by_id[team_id], [members[pk] for _, pk in group if pk], team_id in managed)
        for team_id, group in groupby(pairs, key=lambda pair: pair[0])
    ]


@require_safe
def show_options(request: AuthenticatedRequest, source: str) -> HttpResponse:
    """The options of a select that match `?q=`. `select` is its name, and the parameter of that
    name its current value.
    """
    options = list_options(
        request.user,
        get_source(source),
        request.GET.get(request.GET.get("select", ""), ""),
        to_one_line(request.GET.get("q", ""))[:MAX_SEARCH_LENGTH],
    )
    context = {"options": options, "empty": request.GET.get("empty", "")[:MAX_SEARCH_LENGTH]}
    return render(request, "_options.html", context)


@require_POST
@never_cache
def create_token(request: AuthenticatedRequest) -> HttpResponse:
    """Only this response contains the secret: it is in no URL, session or cache."""
    _, secret = tokens.create_token(
        request.user,
        request.POST.get("name", ""),
        request.POST.get("scope", Scope.READ),
        days=parse_int_or_zero(days) if (days := request.POST.get("days", "")) else None,
    )
    return render(
        request, "people/account.html", {**build_account_context(request), "secret": secret}
    )


@require_POST
def revoke_token(request: AuthenticatedRequest, token_id: int) -> HttpResponse:
    tokens.revoke_token(request.user, token_id)
    messages.success(request, "Token revoked.")
    return redirect("account")


@require_POST
def create_team(request: AuthenticatedRequest) -> HttpResponse:
    team = teams.create_team(request.user, request.POST.get("name", ""))
    messages.success(request, f"Team {team} created. Add its members.")
    return redirect("account")


@require_POST
def share_with_team(request: AuthenticatedRequest) -> HttpResponse:
    """Choose the team that new items are shared with."""
    teams.set_sharing_team(request.user, parse_int_or_zero(request.POST.get("team", "")) or None)
    return redirect("account")


@require_POST
def change_role(request: AuthenticatedRequest, team_id: int) -> HttpResponse:
    """Add a user to a team, change their role, or (role `remove`) remove them."""
    team, name, role = (
        teams.get_team(request.user, team_id),
        request.POST.get("username", ""),
        request.POST.get("role", ""),
    )
    if role == "remove":
        teams.remove_member(request.user, team, name)
        messages.success(request, f"{name} is no longer in {team}.")
    else:
        member = teams.set_role(request.user, team, name, role)
        messages.success(request, f"{member}.")
    return redirect("account")


@require_POST
def dismiss_guide(request: AuthenticatedRequest) -> HttpResponse:
    request.user.guide_dismissed = True
    request.user.save(update_fields=["guide_dismissed"])
    return redirect("runs")
