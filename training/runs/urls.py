from django.urls import path

from training.runs import views

urlpatterns = [
    path("", views.runs, name="runs"),
    path("runs/new", views.new, name="run-new"),
    path("runs/<int:run_id>", views.run, name="run"),
    path("runs/<int:run_id>/header", views.header, name="run-header"),
    path("runs/<int:run_id>/stop", views.stop, name="run-stop"),
    path("runs/<int:run_id>/continue", views.go_on, name="run-continue"),
    path("runs/<int:run_id>/log", views.log, name="run-log"),
    path("runs/<int:run_id>/files", views.run_files, name="run-files"),
]
