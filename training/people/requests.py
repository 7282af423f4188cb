"""The type of a request that came through the login door."""

from django.http import HttpRequest

from training.people.models import User


class SignedIn(HttpRequest):
    user: User
