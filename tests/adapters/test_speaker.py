"""The inference program's heart: base and adapter side by side from one set of weights, as plain
PEFT answers.
"""

import gc
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from adapters.inference import loaded_model, model_cache, request_queue
from adapters.inference import scheduler as speaker_module
from adapters.inference.batch import Batch
from adapters.inference.model_cache import NoRoom
from adapters.inference.request_queue import Desk
from adapters.inference.sampling import logprobs_of, pick_token
from adapters.inference.scheduler import Speaker
from adapters.inference.types import Base, Busy, Question, Weights
from tests import tiny
from tests.engine.in_process import engine_in_process

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "turn on the hall lamp"}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    run = tiny.make_run(
        tmp_path_factory.mktemp("runs") / "run", tiny_model, max_steps=30, learning_rate=0.05
    )
    with engine_in_process() as main:
        assert main([str(run)]) == 0
    return Weights(run / "adapter", "first")


@pytest.fixture
def speaker(monkeypatch):
    monkeypatch.setattr(loaded_model, "get_fastest_dtype", lambda *_: torch.float32)
    made = Speaker(Desk())
    threading.Thread(target=made.speak_for_ever, daemon=True).start()
    return made


def question(tiny_model, adapter=None, **more):
    return Question(
        **{
            "base": Base(tiny_model),
            "adapter": adapter,
            "messages": MESSAGES,
            "max_tokens": 12,
            **more,
        }
    )


def hear(asked, seconds=60):
    text, said = "", {}
    while "done" not in said and "error" not in said:
        said = asked.said.get(timeout=seconds)
        text += said.get("text", "")
    return text, said


def plain_answer(tiny_model, adapter):
    """What transformers and PEFT say by themselves, greedily."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter.folder)
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.eval().generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_base_and_adapter_side_by_side_answer_as_each_does_alone(speaker, tiny_model, adapter):
    asked = [question(tiny_model), question(tiny_model, adapter), question(tiny_model)]
    for one in asked:
        speaker.desk.ask(one)
    base, adapted, again = (hear(one)[0] for one in asked)
    assert base == again == plain_answer(tiny_model, None)
    assert adapted == plain_answer(tiny_model, adapter)
    assert adapted != base


def test_the_last_word_counts_tokens_and_their_rate(speaker, tiny_model):
    asked = question(tiny_model)
    speaker.desk.ask(asked)
    _, last = hear(asked)
    assert last["done"] in ("stop", "length")
    assert 0 < last["completion_tokens"] <= 12
    assert last["prompt_tokens"] > 5
    assert last["tokens_per_second"] > 0


def test_the_same_seed_draws_the_same_answer(speaker, tiny_model):
    answers = []
    for seed in (1, 1, 2):
        asked = question(tiny_model, temperature=1.5, seed=seed)
        speaker.desk.ask(asked)
        answers.append(hear(asked)[0])
    assert answers[0] == answers[1] != answers[2]


def test_one_too_many_is_told_to_come_back_and_places_are_given_back(
    speaker, tiny_model, monkeypatch
):
    monkeypatch.setattr(request_queue, "MAX_QUESTIONS", 2)
    asked = [question(tiny_model), question(tiny_model)]
    for one in asked:
        speaker.desk.ask(one)
    with pytest.raises(Busy, match="2 questions"):
        speaker.desk.ask(question(tiny_model))
    for one in asked:
        hear(one)
    speaker.desk.ask(question(tiny_model))


def test_a_caller_who_hangs_up_frees_the_place(speaker, tiny_model):
    asked = question(tiny_model)
    asked.hung_up.set()
    speaker.desk.ask(asked)
    assert hear(asked)[1] == speaker_module.HUNG_UP
    assert speaker.desk.count == 0


def test_whoever_hangs_up_far_behind_in_the_line_frees_the_place_at_once(monkeypatch, tiny_model):
    def no_room(*_asked):
        raise NoRoom

    made = Speaker(Desk())
    monkeypatch.setattr(made.residents, "get", no_room)  # so the first one waits
    line = [question(tiny_model) for _ in range(3)]
    for one in line:
        made.desk.ask(one)
    made._take_questions()
    line[2].hung_up.set()
    made._take_questions()
    assert hear(line[2], seconds=1)[1] == speaker_module.HUNG_UP
    assert made.desk.count == 2
    assert list(made.waiting) == line[:2]


def test_a_base_that_nobody_asks_for_a_while_leaves_and_comes_back(monkeypatch, tiny_model):
    monkeypatch.setattr(speaker_module, "IDLE_SECONDS", 0.2)
    made = Speaker(Desk())
    threading.Thread(target=made.speak_for_ever, daemon=True).start()
    first = question(tiny_model)
    made.desk.ask(first)
    answer = hear(first)
    for _ in range(100):
        if not made.residents.held:
            break
        time.sleep(0.05)
    assert not made.residents.held
    again = question(tiny_model)
    made.desk.ask(again)
    assert hear(again)[0] == answer[0]


def test_a_base_that_cannot_be_loaded_is_an_error_and_the_next_question_is_answered(
    speaker, tiny_model, tmp_path
):
    broken = Question(base=Base(tmp_path), adapter=None, messages=MESSAGES)
    speaker.desk.ask(broken)
    assert "error" in hear(broken)[1]
    good = question(tiny_model)
    speaker.desk.ask(good)
    assert "done" in hear(good)[1]


def test_other_weights_in_the_same_folder_are_loaded_anew(speaker, tiny_model, adapter, tmp_path):
    folder = shutil.copytree(adapter.folder, tmp_path / "adapter")
    first = question(tiny_model, Weights(folder, "one"))
    speaker.desk.ask(first)
    before = hear(first)[0]
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(
        {name: -value if "lora_B" in name else value for name, value in load_file(path).items()},
        path,
    )
    second = question(tiny_model, Weights(folder, "two"))
    speaker.desk.ask(second)
    assert hear(second)[0] != before


def test_no_more_adapters_stay_loaded_than_there_is_room_for(
    speaker, tiny_model, adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(loaded_model, "MAX_ADAPTERS", 2)
    for number in range(4):
        asked = question(tiny_model, Weights(adapter.folder, f"copy-{number}"))
        speaker.desk.ask(asked)
        assert "done" in hear(asked)[1]
    (kept,) = speaker.residents.held.values()
    assert len(kept.loaded) == 2
    assert len(kept.model.peft_config) == 2


def test_two_bases_are_kept_side_by_side_while_there_is_room(speaker, tiny_model, tmp_path):
    other = tiny.make_model(tmp_path / "other", hidden=16)
    asked = [question(tiny_model), question(other), question(tiny_model)]
    for one in asked:
        speaker.desk.ask(one)
    assert all("done" in hear(one)[1] for one in asked)
    assert list(speaker.residents.held) == [Base(other), Base(tiny_model)]


def test_without_room_the_base_that_nobody_asks_leaves_and_a_busy_one_is_waited_for(
    speaker, tiny_model, tmp_path
):
    other = tiny.make_model(tmp_path / "other", hidden=16)
    speaker.residents.room_bytes = 1
    asked = [question(tiny_model), question(other), question(tiny_model)]
    for one in asked:
        speaker.desk.ask(one)
    assert all("done" in hear(one)[1] for one in asked)
    assert list(speaker.residents.held) == [Base(tiny_model)]


def test_a_base_that_leaves_is_out_of_memory_before_the_next_is_loaded(
    speaker, tiny_model, tmp_path, monkeypatch
):
    speaker.residents.room_bytes = 1
    first = question(tiny_model)
    speaker.desk.ask(first)
    hear(first)
    (kept,) = speaker.residents.held.values()
    weight, there = weakref.ref(next(kept.model.parameters())), []
    del kept, first
    load = model_cache.Held
    monkeypatch.setattr(model_cache, "Held", lambda base: there.append(weight()) or load(base))
    second = question(tiny.make_model(tmp_path / "other", hidden=16))
    gc.disable()
    try:
        speaker.desk.ask(second)
        assert "done" in hear(second)[1]
    finally:
        gc.enable()
    assert there == [None]


def test_answers_whose_caches_have_no_room_wait_for_those_under_way(speaker, tiny_model):
    first = question(tiny_model)
    speaker.desk.ask(first)
    hear(first)
    (kept,) = speaker.residents.held.values()
    assert (
        kept.entry_bytes
        == 2 * 2 * kept.model.config.num_key_value_heads * kept.model.config.head_dim * 4
    )
    # For one answer, not for two
    speaker.residents.cache_bytes = kept.entry_bytes * int(1.5 * (len(first.ids) + 12))
    most = 0
    step = Batch.step

    def counted(batch, held):
        nonlocal most
        most = max(most, len(batch.answers))
        return step(batch, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "step", counted)
        asked = [question(tiny_model) for _ in range(3)]
        for one in asked:
            speaker.desk.ask(one)
        assert len({hear(one)[0] for one in asked}) == 1
    assert most == 1


def test_a_conversation_that_ends_with_an_answer_gets_another(speaker, tiny_model):
    ends = question(tiny_model, messages=[*MESSAGES, {"role": "assistant", "content": "yes"}])
    speaker.desk.ask(ends)
    assert "done" in hear(ends)[1]
    held = next(iter(speaker.residents.held.values()))
    assert held.tokenizer.decode(ends.ids).endswith("assistant\n")


def several(adapter, folder, count):
    """Adapters of their own: the first one's weights, each scaled in its way."""
    from safetensors.torch import load_file, save_file

    made = []
    for number in range(count):
        copy = shutil.copytree(adapter.folder, folder / f"copy-{number}")
        path = copy / "adapter_model.safetensors"
        factor = (-1.5, 0.5, 1.0, 2.0)[number]
        save_file(
            {
                name: value * factor if "lora_B" in name else value
                for name, value in load_file(path).items()
            },
            path,
        )
        made.append(Weights(copy, f"copy-{number}"))
    return made


def test_a_batch_of_several_adapters_answers_each_row_as_it_is_answered_alone(
    speaker, tiny_model, adapter, tmp_path
):
    rows = [None, *several(adapter, tmp_path, 4)]
    longer = [
        *MESSAGES,
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "is the attic dark"},
    ]
    talks = [MESSAGES, longer, MESSAGES, longer, MESSAGES]
    alone = []
    for row, talk in zip(rows, talks, strict=True):
        asked = question(tiny_model, row, messages=talk)
        speaker.desk.ask(asked)
        alone.append(hear(asked)[0])
    together = [
        question(tiny_model, row, messages=talk) for row, talk in zip(rows, talks, strict=True)
    ]
    for one in together:
        speaker.desk.ask(one)
    assert [hear(one)[0] for one in together] == alone
    assert len(set(alone)) > 2


def test_the_logits_of_a_mixed_batch_are_those_of_each_row_alone(
    monkeypatch, tiny_model, adapter, tmp_path
):
    from adapters.inference.batch import Answer, Batch

    monkeypatch.setattr(loaded_model, "get_fastest_dtype", lambda *_: torch.float32)
    here = loaded_model.Held(Base(tiny_model))
    rows, prompts = (
        [None, *several(adapter, tmp_path, 3)],
        [[5, 6, 7], [9, 8, 7, 6, 5], [11], [3, 4]],
    )
    batch, alone = Batch(), []
    with torch.inference_mode():
        for row, ids in zip(rows, prompts, strict=True):
            here.bring(row, set())
            first = here.first(torch.tensor([ids]), row)
            joined = Answer(
                Question(base=here.base, adapter=row), len(ids), 9, torch.Generator(), token=42
            )
            batch.join(joined, first.cache)
            again = here.first(torch.tensor([[*ids, 42]]), row)
            alone.append(again.logits[0, -1])
        together = batch.step(here)
        assert (together - torch.stack(alone)).abs().max() < 1e-5
        batch.leave(batch.answers[1:3])
        for answer in batch.answers:
            answer.token = 17
        rest = batch.step(here)
        expected = torch.stack(
            [
                here.first(torch.tensor([[*prompts[n], 42, 17]]), rows[n]).logits[0, -1]
                for n in (0, 3)
            ]
        )
    assert (rest - expected).abs().max() < 1e-5


def test_a_stop_word_ends_the_answer_before_it_and_never_shows(speaker, tiny_model, adapter):
    whole = question(tiny_model, adapter)
    speaker.desk.ask(whole)
    text = hear(whole)[0]
    asked = question(tiny_model, adapter, stop=(text[3:6],))
    speaker.desk.ask(asked)
    heard, last = hear(asked)
    assert (heard, last["done"]) == (text[: text.find(text[3:6])], "stop")


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(speaker, tiny_model):
    asked = question(tiny_model, messages=[{"role": "user", "content": "lamp " * 300}])
    speaker.desk.ask(asked)
    last = hear(asked)[1]
    assert "context holds 256 tokens" in last["error"]
    assert last["fault"] == "theirs"


def test_the_likelihood_of_an_expected_answer_is_what_the_model_says_of_it(speaker, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    talk = [*MESSAGES, {"role": "assistant", "content": "yes"}]
    asked = question(tiny_model, messages=talk, max_tokens=1, score=True)
    speaker.desk.ask(asked)
    told = asked.said.get(timeout=60)
    while "logprobs" not in told:
        told = asked.said.get(timeout=60)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tiny_model),
        AutoModelForCausalLM.from_pretrained(tiny_model),
    )
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
    assert told["ids"] == ids[0].tolist()
    assert told["logprobs"] == pytest.approx(
        logprobs_of(model.eval()(ids).logits[0], ids[0].tolist()), abs=1e-4
    )
    assert told["logprobs"][0] is None


def test_nucleus_sampling_keeps_the_smallest_set_that_reaches_p():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draw = torch.Generator().manual_seed(0)
    drawn = {pick_token(logits, temperature=1.0, top_p=0.7, draw=draw) for _ in range(200)}
    assert drawn == {0, 1}
    assert {pick_token(logits, temperature=1.0, top_p=0.01, draw=draw) for _ in range(20)} == {0}
    assert pick_token(logits, temperature=0.0, top_p=1.0, draw=draw) == 0


@pytest.mark.parametrize("method", ["prefix", "prompt", "bottleneck", "qlora", "full"])
def test_adapters_of_every_technique_answer_as_plain_peft_does(
    speaker, tiny_model, adapter, tmp_path, method, engine_here
):
    from training.engine.methods import METHODS

    run = tiny.make_run(
        tmp_path / "run",
        tiny_model,
        method=method,
        rank=16,
        alpha=32,
        max_steps=12,
        learning_rate=0.02,
    )
    assert engine_here([str(run)]) == 0
    if method == "full":
        asked = Question(
            base=Base(run / "adapter", sha256="x"), adapter=None, messages=MESSAGES, max_tokens=12
        )
        expected = plain_answer(run / "adapter", None)
    else:
        base = Base(tiny_model, METHODS[method].has_quantized_base)
        asked = Question(
            base=base, adapter=Weights(run / "adapter", "x"), messages=MESSAGES, max_tokens=12
        )
        expected = (
            None
            if METHODS[method].has_quantized_base
            else plain_answer(tiny_model, Weights(run / "adapter", "x"))
        )
    alone = question(tiny_model)
    # Another type waits until this one has answered
    for one in (
        asked,
        alone,
        question(tiny_model, adapter),
    ):
        speaker.desk.ask(one)
    text, last = hear(asked)
    assert "done" in last, last
    assert expected is None or text == expected
    assert hear(alone)[0] == plain_answer(tiny_model, None)


def test_an_adapter_that_cannot_be_loaded_leaves_the_base_as_it_was(
    speaker, tiny_model, adapter, tmp_path
):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(adapter.folder, tmp_path / "broken")
    held_ = load_file(broken / "adapter_model.safetensors")
    last = max(name for name in held_ if "lora_B" in name)
    held_[last] = torch.ones(3, held_[last].shape[1])  # all others are read before this one fails
    save_file(
        {name: value * 50 if name != last else value for name, value in held_.items()},
        broken / "adapter_model.safetensors",
    )
    asked = question(tiny_model, Weights(broken, "broken"))
    speaker.desk.ask(asked)
    assert "error" in hear(asked)[1]
    plain = question(tiny_model)
    speaker.desk.ask(plain)
    assert hear(plain)[0] == plain_answer(tiny_model, None)


def test_one_row_whose_numbers_are_not_finite_fails_alone(speaker, tiny_model, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    diverged = shutil.copytree(adapter.folder, tmp_path / "diverged")
    path = diverged / "adapter_model.safetensors"
    save_file(
        {
            name: value * float("nan") if "lora_B" in name else value
            for name, value in load_file(path).items()
        },
        path,
    )
    asked = [
        question(tiny_model, adapter),
        question(tiny_model, Weights(diverged, "nan")),
        question(tiny_model),
    ]
    for one in asked:
        speaker.desk.ask(one)
    texts = [hear(one) for one in asked]
    assert texts[0][0] == plain_answer(tiny_model, adapter)
    assert "has diverged" in texts[1][1]["error"]
    assert texts[2][0] == plain_answer(tiny_model, None)
    assert speaker.desk.count == 0


def test_a_nucleus_of_nothing_is_the_likeliest_token():
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.1, 3.0, 1.0])
    assert pick_token(logits, temperature=1.0, top_p=0.0, draw=draw) == 1
    assert pick_token(logits, temperature=1e-40, top_p=1.0, draw=draw) == 1
