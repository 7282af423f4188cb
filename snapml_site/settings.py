"""Django settings. With an empty environment SnapML runs on SQLite; DATABASE_URL and REDIS_URL are
for larger installations.

| variable | meaning | default |
|---|---|---|
| SNAPML_HOME | folder for everything that SnapML stores | ./var |
| SNAPML_HOSTS | host names of the site, comma-separated | localhost, 127.0.0.1, [::1] |
| SNAPML_HTTPS | 1: the site uses HTTPS only (secure cookies, HSTS) | 0 |
| SNAPML_DATA_MAX_GIB | maximum size of an upload, in GiB | 2 |
| SNAPML_DISK_QUOTA_GIB | default disk quota of a user, in GiB | half the disk |
| SNAPML_MODEL_FOLDERS | folders from which admins may register models, colon-separated | none |
| SNAPML_WEBHOOK_HOSTS | private hosts that webhooks may reach, comma-separated | none |
| SNAPML_PROXIES | addresses and networks of reverse proxies, comma-separated | none |
| SNAPML_MAX_CRASHES | crashes in a row without a new checkpoint until a run fails | 3 |
| SNAPML_MAX_PROGRAMS | child programs on a host at the same time, besides one for pages | cores |
| SNAPML_MAX_PROGRAM_MEMORY_GIB | memory of all child programs of a host, in GiB | half the RAM |
| SNAPML_MAX_QUEUED_RUNS | runs that a user without a limit of their own may queue | 100 |
| DATABASE_URL, REDIS_URL | PostgreSQL and Redis instead of SQLite files | none |
| INFERENCE_URL, INFERENCE_TOKEN | an OpenAI-compatible server | set by `manage.py up` |
"""

import ipaddress
import os
import secrets
from pathlib import Path

import dj_database_url
import plotly
from csp.constants import NONCE, NONE, SELF
from django.core.exceptions import ImproperlyConfigured
from huey import Huey, RedisHuey
from huey.serializer import SignedSerializer

from training.child_slots import ChildSlots
from training.process_identity import get_host_name
from training.sqlite_queue import BlockingSqliteStorage

BASE_DIR = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("SNAPML_HOME") or BASE_DIR / "var").resolve()
os.umask(0o077)  # only this user may read databases, models and journals
HOME.mkdir(parents=True, exist_ok=True)
HOME.chmod(0o700)
DATABASE_URL = os.environ.get("DATABASE_URL", "")
REDIS_URL = os.environ.get("REDIS_URL", "")


def load_secret(name: str) -> str:
    """A secret that is generated at the first start and stored in a file that only its owner can
    read.
    """
    path = HOME / name
    if not path.exists():
        temporary_path = HOME / f".{name}.{os.getpid()}"
        temporary_path.touch(mode=0o600)
        temporary_path.write_text(secrets.token_urlsafe(48))
        try:
            # If several processes start at once, the first one wins
            path.hardlink_to(temporary_path)
        except FileExistsError:
            pass
        temporary_path.unlink()
    return path.read_text()


SECRET_KEY = load_secret("secret_key")
DEBUG = False
HTTPS = os.environ.get("SNAPML_HTTPS") == "1"
ALLOWED_HOSTS = [h for h in os.environ.get("SNAPML_HOSTS", "").split(",") if h] or [
    "localhost",
    "127.0.0.1",
    "[::1]",
]

INSTALLED_APPS = [
    "daphne",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "django_htmx",
    "csp",
    "training.people",
    "training.jobs",
    "training.webhooks",
    "training.catalog",
    "training.datasets",
    "training.gpus",
    "training.runs",
    "adapters",
    "snapml_site",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "snapml_site.middleware.InputMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "snapml_site.middleware.CurrentUserMiddleware",
    "snapml_site.middleware.LoginRequiredMiddleware",
    "snapml_site.middleware.OneTimePasswordMiddleware",
    "snapml_site.middleware.UserErrorMiddleware",
]
ROOT_URLCONF = "snapml_site.urls"
ASGI_APPLICATION = "snapml_site.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "csp.context_processors.nonce",
                "snapml_site.context_processors.layout",
            ],
            "builtins": [
                "snapml_site.templatetags.formatting",
                "django.contrib.humanize.templatetags.humanize",
            ],
        },
    },
]

# IMMEDIATE takes the write lock at BEGIN, so a transaction never fails halfway with "database is
# locked". synchronous=NORMAL in WAL mode loses no commit when a process dies; a power failure may
# lose the last ones.
SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": HOME / "snapml.sqlite3",
    "OPTIONS": {
        "timeout": 20,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA "
        "foreign_keys=ON;",
    },
    # A file: threads would share the cache of an in-memory database, whose locks have no timeout
    "TEST": {"NAME": HOME / "test.sqlite3"},
}
DATABASES = {
    "default": dj_database_url.parse(DATABASE_URL, conn_health_checks=True)
    if DATABASE_URL
    else SQLITE
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Huey only wakes up the worker: a message holds the id of a run or job. It is signed because Huey
# unpickles what it reads.
HUEY_OPTIONS = {
    "immediate": False,
    "results": False,
    "serializer": SignedSerializer(secret=SECRET_KEY),
}


def make_queue(name: str, file_name: str) -> Huey:
    if REDIS_URL:
        return RedisHuey(name, url=REDIS_URL, read_timeout=5, **HUEY_OPTIONS)
    return Huey(
        name,
        storage_class=BlockingSqliteStorage,
        filename=str(HOME / file_name),
        strict_fifo=True,
        **HUEY_OPTIONS,
    )


HUEY = make_queue("snapml", "huey.sqlite3")
# Jobs have their own queue and threads, since supervising a run occupies a thread for hours.
JOBS_HUEY = make_queue("snapml-jobs", "jobs.sqlite3")
# Without Redis no channel layer is needed: the web server polls SQLite for commits of other
# processes (training/runs/live/change_watcher.py).
CHANNEL_LAYERS = (
    {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [REDIS_URL]},
        }
    }
    if REDIS_URL
    else {}
)

AUTH_USER_MODEL = "people.User"
LOGIN_URL = "sign-in"
LOGIN_REDIRECT_URL = "runs"
LOGOUT_REDIRECT_URL = "sign-in"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
SESSION_COOKIE_NAME = "snapml_session"
CSRF_COOKIE_NAME = "snapml_csrf"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SECURE_SSL_REDIRECT = HTTPS
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if HTTPS else None
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF, NONCE],
        # The hash is of a stylesheet that plotly 7.1 adds while it loads (its map library);
        # tests/browser fails if it changes.
        "style-src": [SELF, NONCE, "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"],
        # plotly colors text with style attributes; attributes cannot load or execute anything
        "style-src-attr": ["'unsafe-inline'"],
        "img-src": [SELF, "data:", "blob:"],  # blob: for plotly's image download
        "font-src": [SELF],
        "connect-src": [SELF],
        "form-action": [SELF],
        "base-uri": [NONE],
        "frame-ancestors": [NONE],
    }
}

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False

STATIC_URL = "static/"
# plotly.min.js comes from the pip package: the versions of Python and JavaScript agree, and nothing
# is built or copied.
STATICFILES_DIRS = [BASE_DIR / "static", ("plotly", Path(plotly.__file__).parent / "package_data")]
WHITENOISE_USE_FINDERS = True
# revalidated by Last-Modified: a new version is used at once, an unchanged file costs a 304
WHITENOISE_MAX_AGE = 0

DATASET_MAX_BYTES = int(float(os.environ.get("SNAPML_DATA_MAX_GIB", "2")) * 2**30)
DATA_UPLOAD_MAX_MEMORY_SIZE = 2**20
# On the disk of the uploads, so that moving a file there is a rename
FILE_UPLOAD_TEMP_DIR = str(HOME / "incoming")
Path(FILE_UPLOAD_TEMP_DIR).mkdir(exist_ok=True)
FILE_UPLOAD_HANDLERS = ["training.datasets.upload_handler.LimitedUploadHandler"]
MODEL_FOLDERS = [
    Path(p).resolve() for p in os.environ.get("SNAPML_MODEL_FOLDERS", "").split(":") if p
]
BUILTIN_MODEL = os.environ.get("SNAPML_BUILTIN_MODEL", "1") == "1"

# Hosts with private addresses that webhooks may reach
WEBHOOK_HOSTS = [h for h in os.environ.get("SNAPML_WEBHOOK_HOSTS", "").split(",") if h]


def parse_networks(name: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The addresses and networks in a variable of the environment."""
    parts = [part.strip() for part in os.environ.get(name, "").split(",")]
    try:
        return [ipaddress.ip_network(part) for part in parts if part]
    except ValueError as error:
        raise ImproperlyConfigured(
            f"{name}: {error}. Write addresses or networks, separated by commas: "
            "127.0.0.1, 10.0.0.0/8."
        ) from error


PROXIES = parse_networks("SNAPML_PROXIES")  # Only their X-Forwarded-For is trusted

# Crashes of an engine in a row without a new checkpoint until its run fails as a crash loop
MAX_CRASHES = int(os.environ.get("SNAPML_MAX_CRASHES", "3"))
MAX_PROGRAMS = int(os.environ.get("SNAPML_MAX_PROGRAMS", "0")) or os.cpu_count() or 1
MAX_PROGRAM_MEMORY = int(float(os.environ.get("SNAPML_MAX_PROGRAM_MEMORY_GIB", "0")) * 2**30) or (
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
)
CHILD_SLOTS = ChildSlots(HOME / "slots" / get_host_name(), MAX_PROGRAMS, MAX_PROGRAM_MEMORY)
DISK_QUOTA_BYTES = int(float(os.environ.get("SNAPML_DISK_QUOTA_GIB", "0")) * 2**30)
MAX_QUEUED_RUNS = int(os.environ.get("SNAPML_MAX_QUEUED_RUNS", "100"))
INFERENCE_URL = os.environ.get("INFERENCE_URL", "").rstrip("/")
INFERENCE_TOKEN = os.environ.get("INFERENCE_TOKEN", "")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"shorten": {"()": "snapml_site.log_filter.ShorteningFilter"}},
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {
        "snapml": {"level": "INFO"},
        "daphne": {"level": "WARNING"},
        **{
            name: {"filters": ["shorten"]}
            for name in ("django.request", "django.security.csrf", "snapml.api")
        },
    },
}
