from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.views import LogoutView
from django.urls import path

from training.people import views

urlpatterns = [
    path("sign-in", views.SignIn.as_view(), name="sign-in"),
    path("sign-out", login_not_required(LogoutView.as_view()), name="sign-out"),
    path("account/password", views.ChangePassword.as_view(), name="password"),
    path("account", views.account_page, name="account"),
    path("account/tokens", views.token_new, name="token-new"),
    path("account/tokens/<int:token_id>/revoke", views.token_revoke, name="token-revoke"),
    path("account/teams", views.team_new, name="team-new"),
    path("account/teams/share", views.team_share, name="team-share"),
    path("account/teams/<int:team_id>", views.team_role, name="team-role"),
    path("account/guide", views.guide_dismiss, name="guide-dismiss"),
]
