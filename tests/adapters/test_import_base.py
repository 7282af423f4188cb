"""Names and shapes in an imported adapter must be those of its base: PEFT ignores a tensor with
another name without a word, and another shape fails at the first answer.
"""

import math

import pytest
import torch

from adapters.registry import imports
from tests import tiny
from tests.adapters.importing import (
    CONFIG,
    WEIGHTS,
    assert_rejected,
    compute_logits,
    compute_version_logits,
    make_upload,
    read_folder,
    replace_config,
)
from training.catalog.models import BaseModel

pytestmark = [pytest.mark.django_db, pytest.mark.once]


def add_base(folder):
    return BaseModel.objects.create(
        name=folder.name, source="folder", location=str(folder), state="ready", metadata={}
    )


@pytest.fixture(params=["", "transformer."])
def gpt2(request, tmp_path):
    """A small GPT-2, stored with and without the prefix that the files on the Hub omit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=400, n_embd=24, n_layer=2, n_head=3, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    replace_prefix(folder, "transformer.", request.param)
    return add_base(folder)


def replace_prefix(folder, old, new):
    """Store a model's weights under names with another prefix."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {new + name.removeprefix(old): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def train_with_peft(base, folder, config, model_class=None):
    """The files of a PEFT adapter with random weights, and its logits if it is for the whole
    model.
    """
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    chosen = model_class or AutoModelForCausalLM
    model = get_peft_model(chosen.from_pretrained(base.folder, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    if model_class:
        return read_folder(folder), None
    again = chosen.from_pretrained(base.folder, dtype=torch.float32)
    return read_folder(folder), compute_logits(PeftModel.from_pretrained(again, folder))


def test_a_name_without_pefts_prefix_is_refused(alice, base_model, peft_folder):
    from safetensors.torch import load, save

    folder, _expected = peft_folder(target_modules=["gate_proj"])
    files = read_folder(folder)
    tensors = load(files[WEIGHTS])
    files[WEIGHTS] = save({name.split(".", 2)[2]: tensor for name, tensor in tensors.items()})
    assert_rejected(alice, base_model, make_upload(files), "missing_prefix", "base_model.model.")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["wte"]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_an_adapter_of_gpt2_has_the_logits_of_peft(alice, gpt2, tmp_path, options):
    from peft import LoraConfig

    config = LoraConfig(r=3, task_type="CAUSAL_LM", **options)
    files, expected = train_with_peft(gpt2, tmp_path / "peft", config)
    version = imports.import_version(alice, make_upload(files), gpt2, "GPT-2")
    torch.testing.assert_close(compute_version_logits(version), expected)


def test_an_adapter_of_a_base_that_is_stored_without_its_prefix_is_imported(alice, tmp_path):
    from peft import LoraConfig

    folder = tiny.make_model(tmp_path / "inner", is_tied=True)
    replace_prefix(folder, "model.", "")
    base = add_base(folder)
    config = LoraConfig(target_modules=["v_proj", "lm_head"], task_type="CAUSAL_LM")
    files, expected = train_with_peft(base, tmp_path / "peft", config)
    version = imports.import_version(alice, make_upload(files), base, "Inner")
    torch.testing.assert_close(compute_version_logits(version), expected)


@pytest.mark.parametrize("module", ["c_attn", "wte"])
def test_an_adapter_of_the_inner_model_is_refused(alice, gpt2, tmp_path, module):
    from peft import LoraConfig
    from transformers import GPT2Model

    config = LoraConfig(r=2, target_modules=[module], fan_in_fan_out=module == "c_attn")
    files, _expected = train_with_peft(gpt2, tmp_path / "peft", config, GPT2Model)
    assert_rejected(alice, gpt2, make_upload(files), "unknown_module", module)


def make_prompt_config(method, **options):
    from peft import PrefixTuningConfig, PromptTuningConfig

    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt", {}),
        (
            "prompt",
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "dim the porch",
                "tokenizer_kwargs": {"local_files_only": True},
            },
        ),
        ("prefix", {}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 12}),
    ],
)
def test_a_prompt_or_prefix_has_the_logits_of_peft(alice, base_model, tmp_path, method, options):
    if "prompt_tuning_init" in options:
        options = {**options, "tokenizer_name_or_path": str(base_model.folder)}
    config = make_prompt_config(method, **options)
    files, expected = train_with_peft(base_model, tmp_path / "peft", config)
    version = imports.import_version(alice, make_upload(files), base_model, "Prompt")
    torch.testing.assert_close(compute_version_logits(version), expected)


@pytest.mark.parametrize(
    ("method", "shape"),
    [("prompt", {"hidden": 48}), ("prefix", {"hidden": 48}), ("prefix", {"layers": 3})],
)
def test_a_prompt_or_prefix_of_another_base_is_refused(alice, base_model, tmp_path, method, shape):
    other = add_base(tiny.make_model(tmp_path / "other", **shape))
    files, _expected = train_with_peft(other, tmp_path / "peft", make_prompt_config(method))
    assert_rejected(alice, base_model, make_upload(files), "wrong_shape", base_model.name)


@pytest.mark.parametrize("changes", [{"num_layers": 4, "token_dim": 8}, {"token_dim": 4}])
def test_a_prefix_with_other_sizes_in_its_config_is_refused(alice, base_model, tmp_path, changes):
    files, _expected = train_with_peft(base_model, tmp_path / "peft", make_prompt_config("prefix"))
    uploads = make_upload(replace_config(files, **changes))
    assert_rejected(alice, base_model, uploads, "wrong_shape", base_model.name)


def test_matrices_with_inputs_and_outputs_exchanged_are_refused(alice, base_model, peft_folder):
    from safetensors.torch import load, save

    folder, _expected = peft_folder(target_modules=["down_proj"])
    files = read_folder(folder)
    exchanged = {}
    for name, tensor in load(files[WEIGHTS]).items():
        other = 64 if max(tensor.shape) == 32 else 32
        shape = [other if size > 3 else size for size in tensor.shape]
        exchanged[name] = torch.ones(math.prod(shape)).reshape(shape)
    files[WEIGHTS] = save(exchanged)
    assert_rejected(alice, base_model, make_upload(files), "wrong_shape", "down_proj", "[3, 64]")


def test_a_rank_that_is_null_is_the_default(alice, base_model, peft_folder):
    folder, expected = peft_folder(target_modules=["up_proj"], r=8)
    files = replace_config(read_folder(folder), r=None)
    version = imports.import_version(alice, make_upload(files), base_model, "Rank")
    torch.testing.assert_close(compute_version_logits(version), expected)


def test_an_empty_layers_pattern_is_none(alice, base_model, peft_folder):
    folder, expected = peft_folder(target_modules=["o_proj"], layers_to_transform=[1])
    files = replace_config(read_folder(folder), layers_pattern="")
    version = imports.import_version(alice, make_upload(files), base_model, "Pattern")
    torch.testing.assert_close(compute_version_logits(version), expected)
    assert (version.folder / CONFIG).exists()
