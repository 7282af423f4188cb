"""What the tests of imports share: files of an adapter, uploads of them, and their logits."""

import io
import json
import zipfile
from pathlib import Path

import torch
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile

from adapters.models import AdapterVersion
from adapters.registry import imports
from tests.engine.wrapped_models import CPU
from tests.user_errors import raises_user_error
from training.engine.modeling.model import load_base
from training.engine.modeling.weights import load_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_upload(files, prefix=""):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name if isinstance(name, zipfile.ZipInfo) else prefix + name, content)
    return [SimpleUploadedFile("adapter.zip", buffer.getvalue())]


def replace_config(files, **changes):
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **changes}).encode()}


def compute_logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(2, 22)[None]).logits


def read_folder(folder):
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}


def assert_rejected(user, base, uploads, code, *facts):
    with raises_user_error(code=code, naming=facts):
        imports.import_version(user, uploads, base, "Lights")
    assert not AdapterVersion.objects.exists()
    assert not list((Path(settings.HOME) / "adapters").glob(".import-*"))


def compute_version_logits(version):
    """The logits of an imported version, as SnapML loads it."""
    base = load_base(version.base_model.folder, torch.float32, CPU)
    return compute_logits(load_adapter(base, version.folder, "default"))
