"""The batch scheduler: base model and adapters answer as plain PEFT does."""

import gc
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from adapters.inference import loaded_model, model_cache, request_queue
from adapters.inference import scheduler as scheduler_module
from adapters.inference.batch import Batch
from adapters.inference.model_cache import CapacityExceeded
from adapters.inference.request_queue import RequestQueue
from adapters.inference.sampling import compute_logprobs, pick_token
from adapters.inference.scheduler import BatchScheduler
from adapters.inference.types import AdapterRef, BaseRef, GenerationRequest, QueueFull
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
    return AdapterRef(run / "adapter", "first")


@pytest.fixture
def scheduler(monkeypatch):
    monkeypatch.setattr(loaded_model, "get_fastest_dtype", lambda *_: torch.float32)
    scheduler = BatchScheduler(RequestQueue())
    threading.Thread(target=scheduler.run_forever, daemon=True).start()
    return scheduler


def make_request(tiny_model, adapter=None, **more):
    return GenerationRequest(
        **{
            "base": BaseRef(tiny_model),
            "adapter": adapter,
            "messages": MESSAGES,
            "max_tokens": 12,
            **more,
        }
    )


def read_stream(request, seconds=60):
    text, event = "", {}
    while "done" not in event and "error" not in event:
        event = request.events.get(timeout=seconds)
        text += event.get("text", "")
    return text, event


def peft_answer(tiny_model, adapter):
    """The greedy answer of transformers and PEFT without SnapML."""
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


def test_base_and_adapter_in_one_batch_answer_as_each_does_alone(scheduler, tiny_model, adapter):
    requests = [
        make_request(tiny_model),
        make_request(tiny_model, adapter),
        make_request(tiny_model),
    ]
    for request in requests:
        scheduler.request_queue.submit_request(request)
    base, adapted, again = (read_stream(request)[0] for request in requests)
    assert base == again == peft_answer(tiny_model, None)
    assert adapted == peft_answer(tiny_model, adapter)
    assert adapted != base


def test_the_final_event_has_the_token_counts_and_the_rate(scheduler, tiny_model):
    request = make_request(tiny_model)
    scheduler.request_queue.submit_request(request)
    _, last = read_stream(request)
    assert last["done"] in ("stop", "length")
    assert 0 < last["completion_tokens"] <= 12
    assert last["prompt_tokens"] > 5
    assert last["tokens_per_second"] > 0


def test_the_same_seed_samples_the_same_answer(scheduler, tiny_model):
    answers = []
    for seed in (1, 1, 2):
        request = make_request(tiny_model, temperature=1.5, seed=seed)
        scheduler.request_queue.submit_request(request)
        answers.append(read_stream(request)[0])
    assert answers[0] == answers[1] != answers[2]


def test_a_full_queue_rejects_requests_until_one_is_finished(scheduler, tiny_model, monkeypatch):
    monkeypatch.setattr(request_queue, "MAX_REQUESTS", 2)
    requests = [make_request(tiny_model), make_request(tiny_model)]
    for request in requests:
        scheduler.request_queue.submit_request(request)
    with pytest.raises(QueueFull, match=r"^2 requests"):
        scheduler.request_queue.submit_request(make_request(tiny_model))
    for request in requests:
        read_stream(request)
    scheduler.request_queue.submit_request(make_request(tiny_model))


def test_a_tokenizer_that_panics_ends_only_its_own_requests(scheduler, tiny_model, tmp_path):
    broken = tiny.copy_with_panicking_tokenizer(tiny_model, tmp_path / "broken")
    for base, is_answered in ((broken, False), (tiny_model, True), (broken, False)):
        request = make_request(base)
        scheduler.request_queue.submit_request(request)
        last = read_stream(request)[1]
        assert ("done" in last) is is_answered
        assert is_answered or (last["fault"], last["code"]) == ("client", "library_panic")


def test_a_tokenizer_that_panics_on_one_answer_ends_only_that_request(
    scheduler, tiny_model, monkeypatch
):
    class PanicException(BaseException):
        """As PyO3's own, which cannot be imported."""

    original = scheduler_module.send_text

    def send_text(loaded, sequence, *, is_final):
        if sequence.request.seed == 13 and len(sequence.ids) > 2:
            raise PanicException("byte index 1 is not a char boundary")
        return original(loaded, sequence, is_final=is_final)

    monkeypatch.setattr(scheduler_module, "send_text", send_text)
    requests = [make_request(tiny_model, seed=seed) for seed in (1, 13, 2)]
    for request in requests:
        scheduler.request_queue.submit_request(request)
    results = [read_stream(request)[1] for request in requests]
    assert ["done" in result for result in results] == [True, False, True]
    assert results[1]["code"] == "library_panic"


def test_a_cancelled_request_frees_its_slot(scheduler, tiny_model):
    request = make_request(tiny_model)
    request.cancelled.set()
    scheduler.request_queue.submit_request(request)
    assert read_stream(request)[1] == scheduler_module.CANCELLED
    assert scheduler.request_queue.count == 0


def test_a_cancelled_waiting_request_frees_its_slot_at_once(monkeypatch, tiny_model):
    def raise_capacity(*_args):
        raise CapacityExceeded

    scheduler = BatchScheduler(RequestQueue())
    # So that the first request waits
    monkeypatch.setattr(scheduler.model_cache, "get_model", raise_capacity)
    waiting = [make_request(tiny_model) for _ in range(3)]
    for request in waiting:
        scheduler.request_queue.submit_request(request)
    scheduler._admit_waiting()
    waiting[2].cancelled.set()
    scheduler._admit_waiting()
    assert read_stream(waiting[2], seconds=1)[1] == scheduler_module.CANCELLED
    assert scheduler.request_queue.count == 2
    assert list(scheduler.waiting) == waiting[:2]


def test_an_idle_model_is_unloaded_and_loaded_again_on_request(monkeypatch, tiny_model):
    monkeypatch.setattr(scheduler_module, "IDLE_SECONDS", 0.2)
    scheduler = BatchScheduler(RequestQueue())
    threading.Thread(target=scheduler.run_forever, daemon=True).start()
    first = make_request(tiny_model)
    scheduler.request_queue.submit_request(first)
    answer = read_stream(first)
    for _ in range(100):
        if not scheduler.model_cache.models:
            break
        time.sleep(0.05)
    assert not scheduler.model_cache.models
    again = make_request(tiny_model)
    scheduler.request_queue.submit_request(again)
    assert read_stream(again)[0] == answer[0]


def test_a_model_that_cannot_be_loaded_fails_its_request_only(scheduler, tiny_model, tmp_path):
    broken = GenerationRequest(base=BaseRef(tmp_path), adapter=None, messages=MESSAGES)
    scheduler.request_queue.submit_request(broken)
    assert "error" in read_stream(broken)[1]
    good = make_request(tiny_model)
    scheduler.request_queue.submit_request(good)
    assert "done" in read_stream(good)[1]


def test_changed_weights_in_the_same_folder_are_loaded_again(
    scheduler, tiny_model, adapter, tmp_path
):
    folder = shutil.copytree(adapter.folder, tmp_path / "adapter")
    first = make_request(tiny_model, AdapterRef(folder, "one"))
    scheduler.request_queue.submit_request(first)
    before = read_stream(first)[0]
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(
        {name: -value if "lora_B" in name else value for name, value in load_file(path).items()},
        path,
    )
    second = make_request(tiny_model, AdapterRef(folder, "two"))
    scheduler.request_queue.submit_request(second)
    assert read_stream(second)[0] != before


def test_adapters_above_the_limit_are_evicted(
    scheduler, tiny_model, adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(loaded_model, "MAX_ADAPTERS", 2)
    for number in range(4):
        request = make_request(tiny_model, AdapterRef(adapter.folder, f"copy-{number}"))
        scheduler.request_queue.submit_request(request)
        assert "done" in read_stream(request)[1]
    (loaded,) = scheduler.model_cache.models.values()
    assert len(loaded.adapter_names) == 2
    assert len(loaded.model.peft_config) == 2


def test_two_models_stay_loaded_while_both_fit(scheduler, tiny_model, tmp_path):
    other = tiny.make_model(tmp_path / "other", hidden=16)
    requests = [make_request(tiny_model), make_request(other), make_request(tiny_model)]
    for request in requests:
        scheduler.request_queue.submit_request(request)
    assert all("done" in read_stream(request)[1] for request in requests)
    assert list(scheduler.model_cache.models) == [BaseRef(other), BaseRef(tiny_model)]


def test_without_capacity_an_idle_model_is_evicted_and_a_busy_one_is_waited_for(
    scheduler, tiny_model, tmp_path
):
    other = tiny.make_model(tmp_path / "other", hidden=16)
    scheduler.model_cache.capacity_bytes = 1
    requests = [make_request(tiny_model), make_request(other), make_request(tiny_model)]
    for request in requests:
        scheduler.request_queue.submit_request(request)
    assert all("done" in read_stream(request)[1] for request in requests)
    assert list(scheduler.model_cache.models) == [BaseRef(tiny_model)]


def test_an_evicted_model_is_freed_before_the_next_one_is_loaded(
    scheduler, tiny_model, tmp_path, monkeypatch
):
    scheduler.model_cache.capacity_bytes = 1
    first = make_request(tiny_model)
    scheduler.request_queue.submit_request(first)
    read_stream(first)
    (loaded,) = scheduler.model_cache.models.values()
    weight, alive_weights = weakref.ref(next(loaded.model.parameters())), []
    del loaded, first
    load = model_cache.LoadedModel
    monkeypatch.setattr(
        model_cache, "LoadedModel", lambda base: alive_weights.append(weight()) or load(base)
    )
    second = make_request(tiny.make_model(tmp_path / "other", hidden=16))
    gc.disable()
    try:
        scheduler.request_queue.submit_request(second)
        assert "done" in read_stream(second)[1]
    finally:
        gc.enable()
    assert alive_weights == [None]


def test_requests_whose_caches_do_not_fit_wait_for_active_ones(scheduler, tiny_model):
    first = make_request(tiny_model)
    scheduler.request_queue.submit_request(first)
    read_stream(first)
    (loaded,) = scheduler.model_cache.models.values()
    assert (
        loaded.cache_bytes_per_token
        == 2 * 2 * loaded.model.config.num_key_value_heads * loaded.model.config.head_dim * 4
    )
    # Room for one answer, not for two
    scheduler.model_cache.kv_cache_bytes = loaded.cache_bytes_per_token * int(
        1.5 * (len(first.prompt_ids) + 12)
    )
    max_rows = 0
    step = Batch.decode_step

    def count_step(batch, loaded):
        nonlocal max_rows
        max_rows = max(max_rows, len(batch.sequences))
        return step(batch, loaded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "decode_step", count_step)
        requests = [make_request(tiny_model) for _ in range(3)]
        for request in requests:
            scheduler.request_queue.submit_request(request)
        assert len({read_stream(request)[0] for request in requests}) == 1
    assert max_rows == 1


def test_a_conversation_that_ends_with_an_answer_gets_another_answer(scheduler, tiny_model):
    ending = make_request(tiny_model, messages=[*MESSAGES, {"role": "assistant", "content": "yes"}])
    scheduler.request_queue.submit_request(ending)
    assert "done" in read_stream(ending)[1]
    loaded = next(iter(scheduler.model_cache.models.values()))
    assert loaded.tokenizer.decode(ending.prompt_ids).endswith("assistant\n")


def make_adapters(adapter, folder, count):
    """Copies of the adapter, each with its B matrices scaled by another factor."""
    from safetensors.torch import load_file, save_file

    adapters = []
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
        adapters.append(AdapterRef(copy, f"copy-{number}"))
    return adapters


def test_a_mixed_batch_answers_each_row_as_it_is_answered_alone(
    scheduler, tiny_model, adapter, tmp_path
):
    rows = [None, *make_adapters(adapter, tmp_path, 4)]
    longer = [
        *MESSAGES,
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "is the attic dark"},
    ]
    conversations = [MESSAGES, longer, MESSAGES, longer, MESSAGES]
    alone = []
    for row, conversation in zip(rows, conversations, strict=True):
        request = make_request(tiny_model, row, messages=conversation)
        scheduler.request_queue.submit_request(request)
        alone.append(read_stream(request)[0])
    together = [
        make_request(tiny_model, row, messages=conversation)
        for row, conversation in zip(rows, conversations, strict=True)
    ]
    for request in together:
        scheduler.request_queue.submit_request(request)
    assert [read_stream(request)[0] for request in together] == alone
    assert len(set(alone)) > 2


def test_the_logits_of_a_mixed_batch_equal_those_of_each_row_alone(
    monkeypatch, tiny_model, adapter, tmp_path
):
    from adapters.inference.batch import ActiveSequence, Batch

    monkeypatch.setattr(loaded_model, "get_fastest_dtype", lambda *_: torch.float32)
    loaded = loaded_model.LoadedModel(BaseRef(tiny_model))
    rows, prompts = (
        [None, *make_adapters(adapter, tmp_path, 3)],
        [[5, 6, 7], [9, 8, 7, 6, 5], [11], [3, 4]],
    )
    batch, alone = Batch(), []
    with torch.inference_mode():
        for row, ids in zip(rows, prompts, strict=True):
            loaded.ensure_adapter(row, set())
            prefill = loaded.run_prefill(torch.tensor([ids]), row)
            sequence = ActiveSequence(
                GenerationRequest(base=loaded.base, adapter=row),
                len(ids),
                9,
                torch.Generator(),
                token=42,
            )
            batch.add_sequence(sequence, prefill.cache)
            again = loaded.run_prefill(torch.tensor([[*ids, 42]]), row)
            alone.append(again.logits[0, -1])
        together = batch.decode_step(loaded)
        assert (together - torch.stack(alone)).abs().max() < 1e-5
        batch.remove_sequences(batch.sequences[1:3])
        for sequence in batch.sequences:
            sequence.token = 17
        remaining_logits = batch.decode_step(loaded)
        expected = torch.stack(
            [
                loaded.run_prefill(torch.tensor([[*prompts[n], 42, 17]]), rows[n]).logits[0, -1]
                for n in (0, 3)
            ]
        )
    assert (remaining_logits - expected).abs().max() < 1e-5


def test_a_stop_sequence_ends_the_answer_and_is_not_sent(scheduler, tiny_model, adapter):
    full_request = make_request(tiny_model, adapter)
    scheduler.request_queue.submit_request(full_request)
    text = read_stream(full_request)[0]
    request = make_request(tiny_model, adapter, stop=(text[3:6],))
    scheduler.request_queue.submit_request(request)
    text_before, last = read_stream(request)
    assert (text_before, last["done"]) == (text[: text.find(text[3:6])], "stop")


def test_a_prompt_longer_than_the_context_is_rejected(scheduler, tiny_model):
    request = make_request(tiny_model, messages=[{"role": "user", "content": "lamp " * 300}])
    scheduler.request_queue.submit_request(request)
    last = read_stream(request)[1]
    assert "context length is 256 tokens" in last["error"]
    assert last["fault"] == "client"


def test_prompt_logprobs_equal_those_of_transformers(scheduler, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversation = [*MESSAGES, {"role": "assistant", "content": "yes"}]
    request = make_request(tiny_model, messages=conversation, max_tokens=1, needs_logprobs=True)
    scheduler.request_queue.submit_request(request)
    event = request.events.get(timeout=60)
    while "logprobs" not in event:
        event = request.events.get(timeout=60)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tiny_model),
        AutoModelForCausalLM.from_pretrained(tiny_model),
    )
    ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    assert event["ids"] == ids[0].tolist()
    assert event["logprobs"] == pytest.approx(
        compute_logprobs(model.eval()(ids).logits[0], ids[0].tolist()), abs=1e-4
    )
    assert event["logprobs"][0] is None


def test_nucleus_sampling_keeps_the_smallest_set_that_reaches_p():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    tokens = {
        pick_token(logits, temperature=1.0, top_p=0.7, generator=generator) for _ in range(200)
    }
    assert tokens == {0, 1}
    assert {
        pick_token(logits, temperature=1.0, top_p=0.01, generator=generator) for _ in range(20)
    } == {0}
    assert pick_token(logits, temperature=0.0, top_p=1.0, generator=generator) == 0


@pytest.mark.parametrize("method", ["prefix", "prompt", "bottleneck", "qlora", "full"])
def test_adapters_of_every_method_answer_as_plain_peft_does(
    scheduler, tiny_model, adapter, tmp_path, method, engine_here
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
        adapter_request = GenerationRequest(
            base=BaseRef(run / "adapter", sha256="x"),
            adapter=None,
            messages=MESSAGES,
            max_tokens=12,
        )
        expected = peft_answer(run / "adapter", None)
    else:
        base = BaseRef(tiny_model, METHODS[method].has_quantized_base)
        adapter_request = GenerationRequest(
            base=base, adapter=AdapterRef(run / "adapter", "x"), messages=MESSAGES, max_tokens=12
        )
        expected = (
            None
            if METHODS[method].has_quantized_base
            else peft_answer(tiny_model, AdapterRef(run / "adapter", "x"))
        )
    alone = make_request(tiny_model)
    # An adapter of another type waits until this request is finished.
    for request in (
        adapter_request,
        alone,
        make_request(tiny_model, adapter),
    ):
        scheduler.request_queue.submit_request(request)
    text, last = read_stream(adapter_request)
    assert "done" in last, last
    assert expected is None or text == expected
    assert read_stream(alone)[0] == peft_answer(tiny_model, None)


def test_an_adapter_that_cannot_be_loaded_is_tried_once_and_leaves_the_base_unchanged(
    scheduler, tiny_model, adapter, tmp_path
):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(adapter.folder, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    last = max(name for name in tensors if "lora_B" in name)
    # The last one, so that loading fails after the others
    tensors[last] = torch.ones(3, tensors[last].shape[1])
    save_file(
        {name: value * 50 if name != last else value for name, value in tensors.items()},
        broken / "adapter_model.safetensors",
    )
    loads = []
    load_adapter = loaded_model.LoadedModel.ensure_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loaded_model.LoadedModel,
            "ensure_adapter",
            lambda *arguments: (loads.append(1), load_adapter(*arguments)),
        )
        for _ in range(3):
            request = make_request(tiny_model, AdapterRef(broken, "broken"))
            scheduler.request_queue.submit_request(request)
            assert "error" in read_stream(request)[1]
    assert len(loads) == 1  # the failure is remembered
    plain = make_request(tiny_model)
    scheduler.request_queue.submit_request(plain)
    assert read_stream(plain)[0] == peft_answer(tiny_model, None)


def test_a_row_with_logits_that_are_not_finite_fails_alone(
    scheduler, tiny_model, adapter, tmp_path
):
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
    requests = [
        make_request(tiny_model, adapter),
        make_request(tiny_model, AdapterRef(diverged, "nan")),
        make_request(tiny_model),
    ]
    for request in requests:
        scheduler.request_queue.submit_request(request)
    texts = [read_stream(request) for request in requests]
    assert texts[0][0] == peft_answer(tiny_model, adapter)
    assert "has diverged" in texts[1][1]["error"]
    assert texts[2][0] == peft_answer(tiny_model, None)
    assert scheduler.request_queue.count == 0


def test_top_p_zero_and_tiny_temperatures_choose_the_likeliest_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.1, 3.0, 1.0])
    assert pick_token(logits, temperature=1.0, top_p=0.0, generator=generator) == 1
    assert pick_token(logits, temperature=1e-40, top_p=1.0, generator=generator) == 1
