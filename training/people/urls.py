from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.views import LogoutView
from django.urls import path

from training.people import views

urlpatterns = [
    path("sign-in", views.SignIn.as_view(), name="sign-in"),
    path("sign-out", login_not_required(LogoutView.as_view()), name="sign-out"),
    path("account/password", views.ChangePassword.as_view(), name="password"),
    path("account", views.show_account, name="account"),
    path("account/tokens", views.create_token, name="token-new"),
    path("account/tokens/<int:token_id>/revoke", views.revoke_token, name="token-revoke"),
    path("account/teams", views.create_team, name="team-new"),
    path("account/teams/share", views.share_with_team, name="team-share"),
    path("account/teams/<int:team_id>", views.change_role, name="team-role"),
    path("options/<slug:source>", views.show_options, name="options"),
    path("account/guide", views.dismiss_guide, name="guide-dismiss"),
]
