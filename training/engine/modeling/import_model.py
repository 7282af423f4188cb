"""`python -m training.engine.modeling.import_model KIND SOURCE TARGET [REVISION]` imports a base
model into a folder of safetensors.

KIND is `gguf` (SOURCE is a .gguf file) or `hub` (SOURCE is a Hugging Face Hub id). Progress goes to
standard output, one JSON object per line: `{"done": 0..1, "message": "..."}`. If the import fails,
the last line is `{"error": "..."}`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from training.child_process import emit_message, main
from training.engine.fast_imports import fast_imports
from training.errors import UserError, find_storage_error

HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.txt",
    "LICENSE*",
    "README.md",
]


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantize a GGUF file to bf16. `dequantize=True` leaves no quantization entry in the config;
    with one, transformers would not save the model.
    """
    emit_message(done=0.02, message="loading libraries")
    with fast_imports():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    emit_message(done=0.15, message="reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    emit_message(done=0.3, message="reading the weights (about 20 s)")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    emit_message(done=0.85, message=f"writing {model.num_parameters():,} parameters")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def download_from_hub(source: str, target: Path, revision: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    emit_message(done=0.02, message="connecting to the Hub")
    try:
        file_names = HfApi().list_repo_files(source, revision=revision or None)
        if not any(name.endswith(".safetensors") for name in file_names):
            raise UserError(
                f"{source} has no safetensors files. Pickled weights are not loaded, because they "
                "can run code."
            )
        emit_message(done=0.05, message=f"downloading {source}")
        snapshot_download(
            source, revision=revision or None, allow_patterns=HUB_FILES, local_dir=target
        )
    except HFValidationError as error:
        raise UserError(f"{source!r} is not a Hub id such as `owner/model`: {error}") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"The Hub rejected {source}: {error}. Check the id and the revision. Gated models need "
            "HF_TOKEN."
        ) from error
    except OSError as error:
        if find_storage_error(error):
            raise
        raise UserError(
            f"The Hub is unreachable from this machine ({type(error).__name__}). Copy the model "
            "to a folder instead."
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def import_model(kind: str, source: str, target: str, revision: str = "") -> None:
    temporary = Path(target).with_name(f".{Path(target).name}.importing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if kind == "gguf":
        convert_gguf(Path(source), temporary)
    else:
        download_from_hub(source, temporary, revision)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    emit_message(done=1.0, message="ready")


if __name__ == "__main__":
    sys.exit(main(lambda: import_model(*sys.argv[1:])))
