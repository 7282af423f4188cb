"""The fast LoRA forward gives PEFT's logits and gradients in fp32 and similar ones in bf16, and
leaves other variants to PEFT.
"""

import pytest
import torch

from tests.engine import families
from tests.engine.wrapped_models import IDS, compute_logits, make_wrapped_model
from training.engine.methods.fast_lora import use_fast_forward
from training.engine.modeling.model import LabeledPositionsHead


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, tmp_path_factory):
    return families.save_family_model(request.param, tmp_path_factory.mktemp(request.param))


def use_peft_forward(model):
    for layer in model.modules():
        layer.__dict__.pop("forward", None)
    return model


def compute_gradients(model):
    model.zero_grad()
    LabeledPositionsHead(model).compute_loss_sum(model.train(), IDS, IDS).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_fast_forward_gives_pefts_logits_and_gradients(family, method):
    _, model, _, _ = make_wrapped_model(family, method, steps=3)
    assert any("forward" in layer.__dict__ for layer in model.modules())
    fast_logits, fast_gradients = compute_logits(model), compute_gradients(model)
    peft_model = use_peft_forward(model.eval())
    assert torch.allclose(fast_logits, compute_logits(peft_model), atol=1e-5)
    assert all(
        torch.allclose(actual, expected, atol=1e-4)
        for actual, expected in zip(fast_gradients, compute_gradients(peft_model), strict=True)
    )


def test_on_a_bf16_base_gradients_are_close_to_fp32_and_stored_in_fp32(family):
    _, model, _, _ = make_wrapped_model(family, "lora", steps=3)
    exact = compute_gradients(model)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16()
    near = compute_gradients(model)
    assert all(grad.dtype == torch.float32 for grad in near)
    assert all((a - b).norm() < 0.1 * a.norm() + 1e-3 for a, b in zip(exact, near, strict=True))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.5}])
def test_dora_and_dropout_use_pefts_forward(family, options):
    torch.manual_seed(5)
    _, model, _, _ = make_wrapped_model(family, "lora", steps=2, **options)
    before = compute_logits(model)
    assert torch.allclose(before, compute_logits(use_peft_forward(model)), atol=1e-6)


def test_a_disabled_adapter_gives_the_base_models_logits(family):
    _, model, _, _ = make_wrapped_model(family, "lora", steps=3)
    use_fast_forward(model, dropout=0)
    with model.disable_adapter():
        off = compute_logits(model)
    assert (off - compute_logits(model)).abs().max() > 1e-3
    assert torch.allclose(off, compute_logits(model.unload()), atol=1e-6)
