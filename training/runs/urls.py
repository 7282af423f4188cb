from django.urls import path

from training.runs import card_views, launch_views, sweep_views, token_views, views

urlpatterns = [
    path("", views.runs, name="runs"),
    path("runs/new", launch_views.new, name="run-new"),
    path("runs/new/card", card_views.card, name="run-card"),
    path("runs/new/settings", launch_views.settings, name="run-settings"),
    path("runs/new/costs", launch_views.costs, name="run-costs"),
    path("runs/new/memory", card_views.memory, name="run-memory"),
    path("runs/new/measured", card_views.measured, name="run-measured"),
    path("runs/new/file", launch_views.from_file, name="run-file"),
    path("runs/compare", views.side_by_side, name="run-compare"),
    path("runs/archive", views.archive_several, name="runs-archive"),
    path("runs/<int:run_id>", views.run, name="run"),
    path("runs/<int:run_id>/header", views.header, name="run-header"),
    path("runs/<int:run_id>/stop", views.stop, name="run-stop"),
    path("runs/<int:run_id>/continue", views.go_on, name="run-continue"),
    path("runs/<int:run_id>/edit", views.edit, name="run-edit"),
    path("runs/<int:run_id>/archive", views.archive, name="run-archive"),
    path("runs/<int:run_id>/delete", views.delete, name="run-delete"),
    path("runs/<int:run_id>/log", views.log, name="run-log"),
    path("runs/<int:run_id>/files", views.run_files, name="run-files"),
    path("runs/<int:run_id>/config.yaml", views.config_file, name="run-config"),
    path("runs/<int:run_id>/metrics.csv", views.metrics_csv, name="run-csv"),
    path("runs/<int:run_id>/metrics.parquet", views.metrics_parquet, name="run-parquet"),
    path("sweeps/<int:sweep_id>", sweep_views.show_sweep, name="sweep"),
    path("sweeps/<int:sweep_id>/stop", sweep_views.stop_sweep, name="sweep-stop"),
    path("data/versions/<int:version_id>/trained", token_views.trained, name="data-trained"),
]
