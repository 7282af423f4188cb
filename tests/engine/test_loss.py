"""The loss computed only at labeled positions equals the loss of all positions, without logits
elsewhere. Packed rows are isolated from each other.
"""

import pytest
import torch
from torch.nn import functional

from tests import tiny
from tests.engine import families
from tests.user_errors import raises_user_error
from training.engine.data.conversations import IGNORE_INDEX, encode_row, load_tokenizer
from training.engine.modeling.model import LabeledPositionsHead, load_base
from training.engine.train.evaluate import collate
from training.errors import ConfigError


def test_the_loss_equals_that_of_all_positions_with_an_attention_mask(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    model = load_base(tiny_model, torch.float32, torch.device("cpu"))
    rows = [encode_row(tokenizer, row, max_length=80) for row in (tiny.ROWS[0], tiny.ROWS[-1])]
    ids, labels, _ = collate([(0,), (1,)], rows, tokenizer.pad_token_id, torch.device("cpu"))
    mask = torch.arange(ids.shape[1])[None, :] < torch.tensor([[len(row)] for row in rows])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        expected = functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            labels[:, 1:].reshape(-1),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        logit_shapes = []
        model.lm_head.register_forward_hook(lambda _m, _i, out: logit_shapes.append(out.shape))
        actual = LabeledPositionsHead(model).compute_loss_sum(model, ids, labels)
    assert torch.allclose(expected, actual, atol=1e-4)
    assert logit_shapes == [(sum(row.trained_tokens for row in rows), logits.shape[-1])]


def test_a_forward_after_a_loss_returns_logits_of_all_positions(tiny_model):
    model = load_base(tiny_model, torch.float32, torch.device("cpu"))
    head = LabeledPositionsHead(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        head.compute_loss_sum(model, ids, ids)
        assert model(input_ids=ids).logits.shape[:2] == (1, 4)


def test_packed_rows_have_the_same_loss_as_separate_rows(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    model = load_base(tiny_model, torch.float32, torch.device("cpu"))
    head = LabeledPositionsHead(model)
    rows = [encode_row(tokenizer, row, max_length=80) for row in tiny.ROWS[:6]]
    cpu, pad = torch.device("cpu"), tokenizer.pad_token_id
    with torch.no_grad():
        alone = sum(
            head.compute_loss_sum(model, *collate([(i,)], rows, pad, cpu)).item() for i in range(6)
        )
        packed = head.compute_loss_sum(
            model, *collate([(0, 1, 2), (3, 4), (5,)], rows, pad, cpu)
        ).item()
    assert abs(packed - alone) < 1e-3 * alone


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_packed_row_has_the_same_logits_as_alone(family):
    model = families.make_family_model(family).eval()
    first, second = torch.arange(3, 23), torch.arange(40, 70)
    together = torch.cat([first, second])[None]
    restarted_positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    with torch.no_grad():
        alone = model(input_ids=second[None], use_cache=False).logits[0]
        packed = model(
            input_ids=together, position_ids=restarted_positions, use_cache=False
        ).logits[0, len(first) :]
        leaking = model(input_ids=together, use_cache=False).logits[0, len(first) :]
    assert torch.allclose(packed, alone, atol=1e-5)
    assert (leaking - alone).abs().max() > 1e-3


def test_positions_restart_at_every_packed_row(tiny_model):
    rows = [encode_row(load_tokenizer(tiny_model), row, max_length=80) for row in tiny.ROWS[:3]]
    _, _, positions = collate([(0, 1), (2,)], rows, 1, torch.device("cpu"))
    assert positions[0, : len(rows[0])].tolist() == list(range(len(rows[0])))
    assert positions[0, len(rows[0]) : len(rows[0]) + len(rows[1])].tolist() == list(
        range(len(rows[1]))
    )


def test_packing_is_rejected_for_a_model_that_ignores_positions(tiny_model):
    from transformers import OPTConfig, OPTForCausalLM

    ids = list(range(3, 15))
    llama = load_base(tiny_model, torch.float32, torch.device("cpu"))
    LabeledPositionsHead(llama).check_packing_isolation(llama, ids)
    torch.manual_seed(0)
    small = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    leaking = OPTForCausalLM(small)
    for tokens in (ids, [5, 6]):  # two tokens are enough
        with raises_user_error(ConfigError, field="packing"):
            LabeledPositionsHead(leaking).check_packing_isolation(leaking, tokens)
