"""Short attention in bf16 on a CPU is as accurate as torch's kernel, which computes all other
cases.
"""

import pytest
import torch
from torch.nn import functional

from training.engine import memory_estimator
from training.engine.memory_estimator import MAX_SHORT_LENGTH
from training.engine.modeling.short_attention import ShortAttention, short_attention_forward


class Layer(torch.nn.Module):
    is_causal, num_key_value_groups = True, 3


SHAPES = [(8, 9, 3, 66, 64), (1, 4, 4, 2, 16), (3, 8, 1, 33, 32), (5, 6, 2, 128, 64)]


def make_random_tensors(rows, heads, groups, length, width, dtype=torch.bfloat16, spread=1.0):
    torch.manual_seed(1)
    shapes = [
        (rows, length, heads, width),
        (rows, length, groups, width),
        (rows, length, groups, width),
    ]
    factors = (spread, spread, 1.0)
    return [
        (f * torch.randn(s)).to(dtype).transpose(1, 2).requires_grad_()
        for s, f in zip(shapes, factors, strict=True)
    ]


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def compute_gradients(output, tensors, grad):
    return torch.autograd.grad(output, tensors, grad)


# Scores around 1 and around 16; bf16, with 8 bits, would round the latter too much
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_accurate_as_those_of_torch(shape, spread):
    tensors = make_random_tensors(*shape, spread=spread)
    repeats = shape[1] // shape[2]
    grad = torch.randn(shape[0], shape[3], shape[1], shape[4])
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = functional.scaled_dot_product_attention(
        *exact, is_causal=True, enable_gqa=repeats > 1, scale=0.1
    ).transpose(1, 2)
    expected_gradients = compute_gradients(expected, exact, grad.double())
    output = ShortAttention.apply(*tensors, 0.1)
    torch_output = functional.scaled_dot_product_attention(
        *tensors, is_causal=True, enable_gqa=repeats > 1, scale=0.1
    ).transpose(1, 2)
    assert output.dtype == torch.bfloat16 and relative_error(
        output, expected
    ) < 0.0005 + 1.2 * relative_error(torch_output, expected)
    actual_gradients = compute_gradients(output, tensors, grad.bfloat16())
    torch_gradients = compute_gradients(torch_output, tensors, grad.bfloat16())
    for actual, other, expected_gradient in zip(
        actual_gradients, torch_gradients, expected_gradients, strict=True
    ):
        assert relative_error(actual, expected_gradient) < 0.0005 + 1.2 * relative_error(
            other, expected_gradient
        )


def test_chunks_of_rows_give_bit_identical_results(monkeypatch):
    tensors = make_random_tensors(5, 6, 2, 40, 16)
    full_output = ShortAttention.apply(*tensors, 0.25)
    grads = compute_gradients(full_output, tensors, torch.ones_like(full_output))
    monkeypatch.setattr(memory_estimator, "MAX_SCORE_BYTES", 4 * 6 * 40 * 40 * 2)  # two rows
    chunked_output = ShortAttention.apply(*tensors, 0.25)
    assert torch.equal(chunked_output, full_output)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            compute_gradients(chunked_output, tensors, torch.ones_like(chunked_output)),
            grads,
            strict=True,
        )
    )


def test_autocast_does_not_round_the_scores():
    tensors = make_random_tensors(2, 4, 2, 30, 16, spread=4.0)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = short_attention_forward(
            Layer(), *(tensor.float() for tensor in tensors), None, scaling=0.25
        )
    assert torch.equal(output, ShortAttention.apply(*tensors, 0.25))


def test_later_tokens_do_not_change_earlier_outputs():
    query, key, value = make_random_tensors(2, 4, 2, 30, 16)
    before = ShortAttention.apply(query, key, value, 0.25)
    with torch.no_grad():
        key[:, :, 20:] = 9.0
        value[:, :, 20:] = 9.0
    assert torch.equal(before[:, :20], ShortAttention.apply(query, key, value, 0.25)[:, :20])


@pytest.mark.parametrize(
    "other",
    [
        "fp32",
        "a mask",
        "a cache before it",
        "too long",
        "not causal",
        "dropout",
    ],
)
def test_unsupported_inputs_use_torchs_kernel(other, monkeypatch):
    monkeypatch.setattr(ShortAttention, "apply", lambda *_: pytest.fail("must not be called"))
    length = MAX_SHORT_LENGTH + 1 if other == "too long" else 12
    query, key, value = make_random_tensors(
        2, 9, 3, length, 16, torch.float32 if other == "fp32" else torch.bfloat16
    )
    kwargs = (
        {"attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool)}
        if other == "a mask"
        else {"attention_mask": None}
    )
    kwargs |= (
        {"is_causal": False}
        if other == "not causal"
        else {"dropout": 0.5}
        if other == "dropout"
        else {}
    )
    if other == "a cache before it":
        query = query[:, :, -2:]
    output, _ = short_attention_forward(Layer(), query, key, value, **kwargs)
    assert output.shape == (2, query.shape[2], 9, 16)


def test_models_loaded_on_a_cpu_use_short_attention(tiny_model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from training.engine.modeling.model import load_base

    model = load_base(tiny_model, torch.bfloat16, torch.device("cpu"))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is short_attention_forward
    logits = model(input_ids=torch.arange(20)[None], use_cache=False).logits
    assert any("ShortAttention" in name for name in collect_grad_functions(logits.grad_fn))


def collect_grad_functions(node):
    pending, names = [node], set()
    while pending:
        one = pending.pop()
        if one is not None and one not in names:
            names.add(one)
            pending += [parent for parent, _ in one.next_functions]
    return {one.name() for one in names}
