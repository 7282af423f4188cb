"""Every method on every model family: it trains, reloads to the same logits, and works with
gradient checkpointing and with a KV cache.
"""

import pytest
import torch

from tests.engine import families
from tests.engine.wrapped_models import CPU, IDS, compute_logits, make_wrapped_model
from tests.user_errors import raises_user_error
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.engine.modeling.model import LabeledPositionsHead, load_base
from training.engine.modeling.weights import load_adapter, write_weights
from training.errors import ConfigError

CASES = [
    *((name, {}) for name in METHODS),
    ("lora", {"init_lora_weights": "pissa"}),
    ("lora", {"init_lora_weights": "pissa_niter_4"}),
    ("lora", {"init_lora_weights": "olora"}),
    ("lora", {"use_dora": True}),
    ("lora", {"use_rslora": True, "rank_pattern": "k_proj=2"}),
    ("prefix", {"prefix_projection": True}),
    ("bottleneck", {"adapter_placement": "feed-forward", "activation": "gelu"}),
]
CASE_IDS = [f"{name}-{'-'.join(map(str, options.values()))}".strip("-") for name, options in CASES]


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request, tmp_path_factory):
    return families.save_family_model(request.param, tmp_path_factory.mktemp(request.param))


def load_saved_model(config, folder, saved):
    method = METHODS[config.method]
    if method.is_full_finetuning:
        return load_base(saved, torch.float32, CPU).eval()
    return load_adapter(
        load_base(folder, torch.float32, CPU, quantized=method.has_quantized_base), saved, "default"
    )


@pytest.mark.parametrize(("method", "options"), CASES, ids=CASE_IDS)
def test_every_method_trains_and_reloads_to_the_same_logits(family, tmp_path, method, options):
    if family.name.startswith("gpt2") and "rank_pattern" in options:
        options = {**options, "rank_pattern": "c_attn=2"}
    if family.name.startswith("gpt2") and options.get("init_lora_weights") == "olora":
        with raises_user_error(ConfigError, code="transposed_weights"):
            make_wrapped_model(family, method, **options)
        return
    config, model, initial_state, losses = make_wrapped_model(family, method, steps=5, **options)
    assert losses[-1] < losses[0]
    (tmp_path / "saved").mkdir()
    write_weights(model, tmp_path / "saved", initial_state)
    assert all(path.suffix in (".safetensors", ".json") for path in (tmp_path / "saved").iterdir())
    reloaded = load_saved_model(config, family, tmp_path / "saved")
    assert (compute_logits(model) - compute_logits(reloaded)).abs().max() < 2e-5
    assert (
        compute_logits(model) - compute_logits(load_base(family, torch.float32, CPU))
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, spec in METHODS.items()
        if "gradient_checkpointing" not in spec.incompatible_settings
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(family, method):
    gradients = []
    for is_on in (False, True):
        _, model, _, _ = make_wrapped_model(family, method, steps=1, gradient_checkpointing=is_on)
        LabeledPositionsHead(model).compute_loss_sum(model.train(), IDS, IDS).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(
        torch.allclose(plain, again, atol=1e-6) for plain, again in zip(*gradients, strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_gives_the_same_logits_as_without(family, method):
    _, model, _, _ = make_wrapped_model(family, method, steps=3)
    generated = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full_logits = compute_logits(model, generated.sequences)[:, IDS.shape[1] - 1 : -1]
    full_logits[..., 1] = -torch.inf  # min_new_tokens suppresses the end token
    cached = torch.stack(generated.logits, 1)
    cached[..., 1] = -torch.inf
    assert (full_logits - cached).nan_to_num(0).abs().max() < 1e-4
    assert generated.sequences.shape[1] == IDS.shape[1] + 5


def test_every_method_has_a_title_a_paper_complete_sentences_and_known_settings():
    for method in METHODS.values():
        assert (
            method.title
            and method.description.endswith(".")
            and method.paper.startswith("https://arxiv.org/")
        )
        assert all(
            reason.endswith(".")
            for reason in (
                *method.incompatible_settings.values(),
                method.merge_unsupported_reason or ".",
                method.mixed_batch_unsupported_reason or ".",
            )
        )
        assert set(method.settings) <= set(RunConfig.__dataclass_fields__)
