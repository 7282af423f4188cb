"""Weight deltas and similarities of versions, read from their files and checked against merging."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.programs import weight_analysis
from adapters.programs.output_similarity import linear_cka
from adapters.programs.weight_deltas import WeightDelta, load_deltas
from tests import tiny
from tests.engine import families
from tests.engine.wrapped_models import CPU, make_wrapped_model
from training.engine.modeling.merge import merge_adapter
from training.engine.modeling.model import load_base
from training.engine.modeling.weights import write_weights
from training.errors import UserError


def save_adapter(folder, method, target, **more):
    _, model, start, _ = make_wrapped_model(folder, method, steps=4, **more)
    target.mkdir()
    write_weights(model, target, start)
    return target


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        ("llama", "lora", {}),
        ("llama", "lora", {"use_rslora": True}),
        ("llama", "lora", {"use_dora": True}),
        ("llama", "lora", {"rank_pattern": "q_proj=2", "alpha_pattern": "q_proj=8"}),
        ("llama", "ia3", {}),
        ("gpt2", "lora", {}),
        ("llama", "full", {}),
    ],
)
def test_deltas_read_from_files_equal_what_merging_adds(tmp_path, family, method, more):
    base = families.save_family_model(family, tmp_path / "base")
    folder = save_adapter(base, method, tmp_path / "adapter", **more)
    before = load_base(base, torch.float32, CPU).state_dict()
    after = (
        load_base(folder, torch.float32, CPU)
        if method == "full"
        else merge_adapter(base, folder, method, torch.float32)
    ).state_dict()
    count = 0
    for module, make_update in load_deltas(folder, method):
        weight = before[f"{module}.weight"]
        update, true = make_update(weight), after[f"{module}.weight"] - weight
        assert update.norm() == pytest.approx(float(true.norm()), rel=1e-3, abs=1e-6)
        full = update.up if update.down is None else update.up @ update.down
        assert (full - true).abs().max() < 1e-5
        count += 1
    assert count >= 4


def test_the_left_singular_vectors_are_those_of_the_svd():
    torch.manual_seed(0)
    up, down = torch.randn(40, 4), torch.randn(4, 30)
    true = torch.linalg.svd(up @ down)[0][:, :3]
    for update in (WeightDelta(up, down), WeightDelta(up @ down)):
        directions = update.left_singular_vectors(3)
        assert torch.linalg.matrix_norm(true.T @ directions) ** 2 / 3 == pytest.approx(
            1.0, abs=1e-4
        )
    assert WeightDelta(torch.zeros(40, 4), down).left_singular_vectors(3).shape[1] == 0


def test_a_version_has_similarity_1_to_itself_and_less_to_another(tmp_path):
    base = families.save_family_model("llama", tmp_path / "base")
    one = save_adapter(base, "lora", tmp_path / "one")
    other = save_adapter(base, "lora", tmp_path / "other", rank=4, alpha=8)
    members = [
        {"key": key, "method": "lora", "base": str(base), "folder": str(f)}
        for key, f in (("1", one), ("2", one), ("3", other))
    ]
    result = weight_analysis.compare_versions({"members": members, "prompts": []})
    assert all(
        value == pytest.approx(1.0, abs=1e-4) for value in result["similarities"]["1,2"].values()
    )
    assert all(0 <= value < 0.999 for value in result["similarities"]["1,3"].values())
    assert result["relative_change"]["1"] == result["relative_change"]["2"]
    assert result["outputs"] == {}
    assert {tuple(axes) for axes in result["layers"].values()} >= {(0, "q_proj"), (1, "down_proj")}


def test_methods_without_weight_deltas_are_compared_by_their_outputs(
    tmp_path, tiny_model, engine_here, monkeypatch
):
    runs = {}
    for method in ("lora", "prompt", "prefix", "bottleneck"):
        rank = {"rank": 4, "alpha": 8} if method == "lora" else {}
        settings = {
            name: value for name, value in tiny.SETTINGS.items() if name not in ("rank", "alpha")
        }
        monkeypatch.setattr(tiny, "SETTINGS", settings)
        runs[method] = tiny.make_run(
            tmp_path / method, tiny_model, max_steps=2, exact_match_rows=0, method=method, **rank
        )
        assert engine_here([str(runs[method])]) == 0
    members = [
        {"key": method, "method": method, "base": str(tiny_model), "folder": str(run / "adapter")}
        for method, run in runs.items()
    ]
    with torch.no_grad():
        result = weight_analysis.compare_versions(
            {"members": members, "prompts": [row["messages"][:1] for row in tiny.ROWS[:4]]}
        )
    assert set(result["relative_change"]) == {"lora"}
    assert len(result["outputs"]) == 6
    assert all(0 < value <= 1.0001 for value in result["outputs"].values())
    json.dumps(result)


def test_cka_ignores_rotation_and_scale_and_is_low_for_unrelated_outputs():
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1.0, abs=1e-4)
    assert linear_cka(x, torch.randn(200, 8)) < 0.2


def rename_tensors(base, change):
    """Rename the tensors in the base's file, as files on the Hub may have other names."""
    path = next(base.glob("*.safetensors"))
    save_file(
        {change(name): value for name, value in load_file(path).items()}, path, {"format": "pt"}
    )


def test_gpt2_files_without_the_prefix_give_the_same_deltas(tmp_path):
    base = families.save_family_model("gpt2", tmp_path / "base")
    folder = save_adapter(base, "lora", tmp_path / "adapter")
    members = [{"key": "1", "method": "lora", "base": str(base), "folder": str(folder)}]
    before = weight_analysis.compare_versions({"members": members, "prompts": []})[
        "relative_change"
    ]["1"]
    rename_tensors(base, lambda name: name.removeprefix("transformer."))
    assert (
        weight_analysis.compare_versions({"members": members, "prompts": []})["relative_change"][
            "1"
        ]
        == before
    )
    assert before and all(before.values())


def test_a_base_without_the_changed_weights_is_an_error(tmp_path):
    base = families.save_family_model("llama", tmp_path / "base")
    folder = save_adapter(base, "lora", tmp_path / "adapter")
    rename_tensors(base, lambda name: name.replace("q_proj", "query"))
    with pytest.raises(UserError, match="has no weight 'model"):
        weight_analysis.compare_versions(
            {
                "members": [
                    {"key": "1", "method": "lora", "base": str(base), "folder": str(folder)}
                ],
                "prompts": [],
            }
        )
