"""One settings file. With an empty environment it boots on SQLite; DATABASE_URL and REDIS_URL scale
it out.

| variable | meaning | default |
|---|---|---|
| SNAPML_HOME | folder of everything that SnapML stores | ./var |
| SNAPML_HOSTS | host names that the site answers to, with commas | localhost, 127.0.0.1, [::1] |
| SNAPML_HTTPS | 1: the site is reached by HTTPS only (secure cookies, HSTS) | 0 |
| SNAPML_DATA_MAX_GIB | largest upload of data, in GiB | 2 |
| SNAPML_MODEL_FOLDERS | folders, with colons, under which admins may register base models | none |
| SNAPML_WEBHOOK_HOSTS | host names in the private network, with commas, that webhooks may reach |
none |
| DATABASE_URL, REDIS_URL | PostgreSQL and Redis instead of SQLite files | none |
| INFERENCE_URL, INFERENCE_TOKEN | the inference program, or one that speaks OpenAI's API | set by
`manage.py up` |
"""

import os
import secrets
from pathlib import Path

import dj_database_url
import plotly
from csp.constants import NONCE, NONE, SELF
from huey import Huey, RedisHuey
from huey.serializer import SignedSerializer

from training.sqlite_queue import BlockingSqliteStorage

BASE_DIR = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("SNAPML_HOME") or BASE_DIR / "var").resolve()
os.umask(0o077)  # databases, models and journals are for this user only
HOME.mkdir(parents=True, exist_ok=True)
HOME.chmod(0o700)
DATABASE_URL = os.environ.get("DATABASE_URL", "")
REDIS_URL = os.environ.get("REDIS_URL", "")


def load_secret(name: str) -> str:
    """A secret that is made at the first start and kept in a file that only its owner reads."""
    path = HOME / name
    if not path.exists():
        temporary_path = HOME / f".{name}.{os.getpid()}"
        temporary_path.touch(mode=0o600)
        temporary_path.write_text(secrets.token_urlsafe(48))
        try:
            path.hardlink_to(temporary_path)  # the first of several processes wins
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
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
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

# IMMEDIATE takes the write lock at BEGIN, so a transaction never fails half-way with "database is
# locked". synchronous=NORMAL in WAL mode loses no commit when a process dies, only (perhaps) the
# last ones when the power does.
SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": HOME / "snapml.sqlite3",
    "OPTIONS": {
        "timeout": 20,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA "
        "foreign_keys=ON;",
    },
    "TEST": {
        "NAME": HOME / "test.sqlite3"
    },  # in memory, threads would share a cache, whose locks wait for nobody
}
DATABASES = {
    "default": dj_database_url.parse(DATABASE_URL, conn_health_checks=True)
    if DATABASE_URL
    else SQLITE
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Huey is only a wake-up: a message holds a run's or a job's id and nothing else, signed because
# Huey unpickles what it reads.
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
# Jobs have a queue and threads of their own, since watching a run occupies a thread for hours.
JOBS_HUEY = make_queue("snapml-jobs", "jobs.sqlite3")
# Without Redis no layer is needed: the web server sees commits of other processes in SQLite itself
# (training/runs/live/change_watcher.py).
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
        # The hash is the stylesheet of the map library inside plotly 7.1, added while it loads;
        # tests/browser sees a change.
        "style-src": [SELF, NONCE, "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"],
        "style-src-attr": [
            "'unsafe-inline'"
        ],  # plotly colours words with style attributes; an attribute cannot load or run
        "img-src": [SELF, "data:", "blob:"],  # blob: is plotly's "download as picture"
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
# plotly.min.js comes from the pip package, so that Python and JavaScript agree and nothing is built
# or copied.
STATICFILES_DIRS = [BASE_DIR / "static", ("plotly", Path(plotly.__file__).parent / "package_data")]
WHITENOISE_USE_FINDERS = True
# revalidated by Last-Modified: a new version is seen at once, an old one costs an empty answer
WHITENOISE_MAX_AGE = 0

DATASET_MAX_BYTES = int(float(os.environ.get("SNAPML_DATA_MAX_GIB", "2")) * 2**30)
DATA_UPLOAD_MAX_MEMORY_SIZE = 2**20
# On the disk where uploads stay, so that taking one over is a rename
FILE_UPLOAD_TEMP_DIR = str(HOME / "incoming")
Path(FILE_UPLOAD_TEMP_DIR).mkdir(exist_ok=True)
FILE_UPLOAD_HANDLERS = ["training.datasets.upload_handler.LimitedUploadHandler"]
MODEL_FOLDERS = [
    Path(p).resolve() for p in os.environ.get("SNAPML_MODEL_FOLDERS", "").split(":") if p
]
BUILTIN_MODEL = os.environ.get("SNAPML_BUILTIN_MODEL", "1") == "1"

# Hosts that webhooks may reach although their addresses are private.
WEBHOOK_HOSTS = [h for h in os.environ.get("SNAPML_WEBHOOK_HOSTS", "").split(",") if h]

# Deaths of an engine in a row without one more checkpoint, before its run is given up as a crash
# loop.
MAX_CRASHES = int(os.environ.get("SNAPML_MAX_CRASHES", "3"))
INFERENCE_URL = os.environ.get("INFERENCE_URL", "").rstrip("/")
INFERENCE_TOKEN = os.environ.get("INFERENCE_TOKEN", "")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"snapml": {"level": "INFO"}, "daphne": {"level": "WARNING"}},
}
