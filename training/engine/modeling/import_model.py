"""`python -m training.engine.modeling.import_model KIND SOURCE TARGET [REVISION]`: bring a base
model to a folder of safetensors.

KIND is `gguf` (SOURCE is a .gguf file) or `hub` (SOURCE is a hub id). Progress goes to standard
output, a JSON object a line:
`{"done": 0..1, "words": "..."}`; an error for the person is the last one: `{"error": "..."}` with
exit code 65.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from training.engine.fast_imports import quick_imports

HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.txt",
    "LICENSE*",
    "README.md",
]


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise to bf16. `dequantize=True` leaves no quantisation entry behind, without which
    saving is refused.
    """
    say(done=0.02, words="loading libraries")
    with quick_imports():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(done=0.15, words="reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    say(done=0.3, words="reading the weights (about 20 s)")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    say(done=0.85, words=f"writing {model.num_parameters():,} parameters")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def download(source: str, target: Path, revision: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    say(done=0.02, words="asking the hub")
    try:
        names = HfApi().list_repo_files(source, revision=revision or None)
        if not any(name.endswith(".safetensors") for name in names):
            fail(
                f"{source} has no safetensors; pickled weights are not loaded, since they can run "
                "code."
            )
        say(done=0.05, words=f"downloading {source}")
        snapshot_download(
            source, revision=revision or None, allow_patterns=HUB_FILES, local_dir=target
        )
    except HFValidationError as error:
        fail(f"{source!r} is not a hub id such as `owner/model`: {error}")
    except HfHubHTTPError as error:
        fail(
            f"The hub refused {source}: {error}. Check the id and the revision; gated models need "
            "HF_TOKEN."
        )
    except (OSError, ConnectionError) as error:
        fail(
            f"The hub cannot be reached from this machine ({type(error).__name__}). Copy the "
            "model to a folder instead."
        )
    shutil.rmtree(target / ".cache", ignore_errors=True)


def fail(message: str) -> None:
    say(error=message)
    sys.exit(65)


def main(kind: str, source: str, target: str, revision: str = "") -> None:
    aside = Path(target).with_name(f".{Path(target).name}.importing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if kind == "gguf":
        convert_gguf(Path(source), aside)
    else:
        download(source, aside, revision)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    say(done=1.0, words="ready")


if __name__ == "__main__":
    main(*sys.argv[1:])
