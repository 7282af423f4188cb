"""Silent errors of PEFT, bitsandbytes and transformers: every test here fails without its patch."""

import pytest
import torch
from peft import get_peft_model_state_dict

from tests.engine import families
from tests.engine.wrapped_models import CPU, IDS, compute_logits, make_wrapped_model
from tests.user_errors import raises_user_error
from training.engine.methods import METHODS
from training.engine.modeling.merge import merge_adapter
from training.engine.modeling.model import LabeledPositionsHead, load_base
from training.engine.modeling.weights import copy_initial_state, load_adapter, write_weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return families.save_family_model("llama", tmp_path_factory.mktemp("llama"))


def save_adapter(model, folder, initial_state=None):
    folder.mkdir()
    write_weights(model, folder, initial_state)
    return folder


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_inserts_a_prompt_or_prefix_only_once(llama, method):
    _, model, _, _ = make_wrapped_model(llama, method, steps=3, num_virtual_tokens=4)
    forward_kwargs = []
    model.get_base_model().register_forward_pre_hook(
        lambda _m, _a, kw: forward_kwargs.append(kw), with_kwargs=True
    )
    model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=1,
    )
    cache = forward_kwargs[-1].get("cache") or forward_kwargs[-1]["past_key_values"]
    assert cache.get_seq_length() == 4 + IDS.shape[1] + len(forward_kwargs) - 1


def test_evaluation_does_not_change_the_gradients_of_four_bit_weights(llama):
    gradients = []
    for evaluate_first in (False, True):
        _, model, _, _ = make_wrapped_model(llama, "qlora")
        if evaluate_first:
            compute_logits(model)
        LabeledPositionsHead(model).compute_loss_sum(model.train(), IDS, IDS).backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    layers = [
        m
        for m in model.modules()
        if type(m).__name__ == "Linear4bit" and hasattr(m, "support_avx512bf16_for_cpu")
    ]
    # Also checked on CPUs without such kernels
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_merging_a_small_update_into_a_four_bit_base_keeps_it(llama, tmp_path):
    _, model, _, _ = make_wrapped_model(llama, "qlora", steps=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)  # smaller than the rounding of a 4-bit weight
    expected = compute_logits(model)
    adapter = save_adapter(model, tmp_path / "adapter")
    base = load_base(llama, torch.float32, CPU, quantized=True)
    change = (expected - compute_logits(base)).abs().max()
    assert change > 1e-4
    merged_model = merge_adapter(llama, adapter, "qlora", torch.float32)
    assert (compute_logits(merged_model) - expected).abs().max() < 0.02 * change


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_merged_model_has_the_logits_of_base_and_adapter(llama, tmp_path, method):
    _, model, _, _ = make_wrapped_model(llama, method, steps=4)
    adapter = save_adapter(model, tmp_path / "adapter")
    assert (
        compute_logits(merge_adapter(llama, adapter, method, torch.float32)) - compute_logits(model)
    ).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["prefix", "prompt", "bottleneck", "full"])
def test_merging_is_rejected_with_the_methods_reason(llama, tmp_path, method):
    reason = METHODS[method].merge_unsupported_reason
    with raises_user_error(code="merge_unsupported", naming=(reason,)):
        merge_adapter(llama, tmp_path, method)


def load_two_adapters(folder, tmp_path, method, **settings):
    _, model, initial_state, _ = make_wrapped_model(folder, method, steps=3, **settings)
    saved = save_adapter(model, tmp_path / "one", initial_state)
    model_with_two = load_adapter(load_base(folder, torch.float32, CPU), saved, "one")
    model_with_two.load_adapter(saved, adapter_name="two")
    with torch.no_grad():
        for name, p in model_with_two.named_parameters():
            if ".two" in name:
                p.mul_(-2.0)
    return model_with_two.eval()


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_every_row_of_a_batch_uses_its_own_adapter(llama, tmp_path, method):
    model = load_two_adapters(llama, tmp_path, method)
    names = ["one", "two", "__base__"]
    ids = torch.cat([IDS, IDS[:1]])
    with torch.no_grad():
        together = model(input_ids=ids, adapter_names=names, use_cache=False).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = compute_logits(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            alone = compute_logits(model, ids[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ia3", {}),
        ("prefix", {}),
        ("prompt", {"prompt_tuning_init": "random"}),
        ("lora", {"use_dora": True}),
    ],
)
def test_a_mixed_batch_is_rejected_for_other_methods_and_changes_nothing(
    llama, tmp_path, method, options
):
    model = load_two_adapters(llama, tmp_path, method, **options)
    before = compute_logits(model)
    with raises_user_error(code="mixed_batch_unsupported"):
        model(input_ids=IDS, adapter_names=["one", "two"])
    assert torch.equal(compute_logits(model), before)


@pytest.mark.parametrize(
    ("names", "code", "facts"),
    [
        (["one"], "adapter_names_count", (1, 2)),
        (["one", "nobody"], "adapter_not_loaded", ("'nobody'",)),
    ],
)
def test_invalid_adapter_names_are_rejected_and_change_nothing(llama, tmp_path, names, code, facts):
    model = load_two_adapters(llama, tmp_path, "lora")
    before = compute_logits(model)
    with raises_user_error(code=code, naming=facts):
        model(input_ids=IDS, adapter_names=names)
    assert torch.equal(compute_logits(model), before)


def test_a_pissa_adapter_is_saved_as_plain_lora_that_loads_without_an_svd(llama, tmp_path):
    config, model, initial_state, _ = make_wrapped_model(
        llama, "lora", steps=4, init_lora_weights="pissa_niter_4"
    )
    assert initial_state is not None and copy_initial_state(model, config) is not None
    saved = save_adapter(model, tmp_path / "adapter", initial_state)
    torch.manual_seed(99)
    reloaded = load_adapter(load_base(llama, torch.float32, CPU), saved, "default")
    assert (compute_logits(reloaded) - compute_logits(model)).abs().max() < 2e-5
    assert reloaded.peft_config["default"].init_lora_weights is True
    ranks = {
        value.shape[0]
        for name, value in get_peft_model_state_dict(reloaded).items()
        if "lora_A" in name
    }
    assert ranks == {32}
