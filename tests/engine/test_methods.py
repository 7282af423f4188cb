"""Every technique on every family: it trains, comes back to the same logits, checkpoints its
activations, answers with a cache.
"""

import pytest
import torch

from tests.engine import families
from tests.engine.wrapped_models import CPU, IDS, logits, make
from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.engine.modeling.model import TrainedPositions, load_base
from training.engine.modeling.weights import attach, write_weights
from training.errors import ConfigError

CASES = [
    *((name, {}) for name in TABLE),
    ("lora", {"init_lora_weights": "pissa"}),
    ("lora", {"init_lora_weights": "pissa_niter_4"}),
    ("lora", {"init_lora_weights": "olora"}),
    ("lora", {"use_dora": True}),
    ("lora", {"use_rslora": True, "rank_pattern": "k_proj=2"}),
    ("prefix", {"prefix_projection": True}),
    ("bottleneck", {"adapter_placement": "feed-forward", "activation": "gelu"}),
]
NAMES = [f"{name}-{'-'.join(map(str, more.values()))}".strip("-") for name, more in CASES]


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request, tmp_path_factory):
    return families.save(request.param, tmp_path_factory.mktemp(request.param))


def read_back(config, folder, saved):
    method = TABLE[config.method]
    if method.whole_model:
        return load_base(saved, torch.float32, CPU).eval()
    return attach(
        load_base(folder, torch.float32, CPU, quantised=method.quantised), saved, "default"
    )


@pytest.mark.parametrize(("method", "more"), CASES, ids=NAMES)
def test_it_learns_and_comes_back_to_the_same_logits(family, tmp_path, method, more):
    if family.name.startswith("gpt2") and "rank_pattern" in more:
        more = {**more, "rank_pattern": "c_attn=2"}
    if family.name.startswith("gpt2") and more.get("init_lora_weights") == "olora":
        with pytest.raises(ConfigError, match="take pissa"):
            make(family, method, **more)
        return
    config, model, start, losses = make(family, method, steps=5, **more)
    assert losses[-1] < losses[0]
    (tmp_path / "saved").mkdir()
    write_weights(model, tmp_path / "saved", start)
    assert all(path.suffix in (".safetensors", ".json") for path in (tmp_path / "saved").iterdir())
    again = read_back(config, family, tmp_path / "saved")
    assert (logits(model) - logits(again)).abs().max() < 2e-5
    assert (logits(model) - logits(load_base(family, torch.float32, CPU))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "method", [name for name, row in TABLE.items() if "gradient_checkpointing" not in row.never]
)
def test_gradient_checkpointing_gives_the_same_gradients(family, method):
    found = []
    for on in (False, True):
        _, model, _, _ = make(family, method, steps=1, gradient_checkpointing=on)
        TrainedPositions(model).loss_sum(model.train(), IDS, IDS).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(plain, again, atol=1e-6) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("method", TABLE)
def test_answers_with_a_cache_are_those_without(family, method):
    _, model, _, _ = make(family, method, steps=3)
    made = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = logits(model, made.sequences)[:, IDS.shape[1] - 1 : -1]
    whole[..., 1] = -torch.inf  # the end is forbidden for the first five tokens
    cached = torch.stack(made.logits, 1)
    cached[..., 1] = -torch.inf
    assert (whole - cached).nan_to_num(0).abs().max() < 1e-4
    assert made.sequences.shape[1] == IDS.shape[1] + 5


def test_every_row_of_the_table_says_what_people_need():
    for method in TABLE.values():
        assert (
            method.title
            and method.words.endswith(".")
            and method.paper.startswith("https://arxiv.org/")
        )
        assert all(
            why.endswith(".")
            for why in (*method.never.values(), method.no_merge or ".", method.no_mix or ".")
        )
        assert {f"{name}" for name in method.settings} <= set(RunConfig.__dataclass_fields__)
