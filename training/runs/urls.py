from django.urls import path

from training.runs import views
from training.runs.forecast import views as forecast_views
from training.runs.launch import summary_views
from training.runs.launch import views as launch_views
from training.runs.queue import gpu_views, quota_views

urlpatterns = [
    path("", views.list_runs, name="runs"),
    path("runs/new", launch_views.new_run, name="run-new"),
    path("runs/new/summary", summary_views.show_summary, name="run-summary"),
    path("runs/new/models", launch_views.refresh_model_select, name="run-models"),
    path("runs/new/settings", launch_views.update_settings, name="run-settings"),
    path("runs/new/costs", launch_views.refresh_method_costs, name="run-costs"),
    path("runs/new/memory", summary_views.simulate_memory, name="run-memory"),
    path("runs/new/measured", summary_views.measure_lengths, name="run-measured"),
    path("runs/new/file", launch_views.fill_from_file, name="run-file"),
    path("runs/compare", views.compare_runs, name="run-compare"),
    path("runs/archive", views.archive_runs, name="runs-archive"),
    path("runs/<int:run_id>", views.show_run, name="run"),
    path("runs/<int:run_id>/header", views.show_header, name="run-header"),
    path("runs/<int:run_id>/stop", views.stop_run, name="run-stop"),
    path("runs/<int:run_id>/continue", views.continue_run, name="run-continue"),
    path(
        "runs/<int:run_id>/memory-options",
        views.show_memory_options,
        name="run-memory-options",
    ),
    path(
        "runs/<int:run_id>/memory-option",
        views.apply_memory_option,
        name="run-memory-option",
    ),
    path("runs/<int:run_id>/edit", views.edit_run, name="run-edit"),
    path("runs/<int:run_id>/archive", views.archive_run, name="run-archive"),
    path("runs/<int:run_id>/delete", views.delete_run, name="run-delete"),
    path("runs/<int:run_id>/log", views.show_log, name="run-log"),
    path("runs/<int:run_id>/files", views.show_files, name="run-files"),
    path("runs/<int:run_id>/config.yaml", views.download_config, name="run-config"),
    path("runs/<int:run_id>/metrics.csv", views.download_csv, name="run-csv"),
    path("runs/<int:run_id>/metrics.parquet", views.download_parquet, name="run-parquet"),
    path("sweeps/<int:sweep_id>", views.show_sweep, name="sweep"),
    path("sweeps/<int:sweep_id>/stop", views.stop_sweep, name="sweep-stop"),
    path("gpus", gpu_views.show_gpus, name="gpus"),
    path("gpus/timeline", gpu_views.get_timeline, name="gpu-timeline"),
    path("quotas", gpu_views.show_quotas, name="quotas"),
    path("quotas/<int:pool_id>/<int:team_id>", quota_views.edit_quota, name="quota"),
    path("quotas/pools/<int:pool_id>", quota_views.edit_pool, name="quota-pool"),
    path("quotas/people/<str:username>", quota_views.edit_person, name="quota-person"),
    path("runs/<int:run_id>/up", gpu_views.move_up, name="run-up"),
    path("runs/<int:run_id>/priority", gpu_views.change_priority, name="run-priority"),
    path("runs/<int:run_id>/pool", gpu_views.change_pool, name="run-pool"),
    path(
        "data/versions/<int:version_id>/trained",
        forecast_views.show_training_tokens,
        name="data-trained",
    ),
]
