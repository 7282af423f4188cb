"""Prompt tuning (Lester et al. 2021): learned token embeddings stand in front of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import ONE_AT_A_TIME, Method

if TYPE_CHECKING:
    from training.engine.settings import TechniqueSettings


def wrap(model: Any, config: TechniqueSettings) -> Any:
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    text = config.prompt_tuning_init == "text"
    peft_config = PromptTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.RANDOM,
        prompt_tuning_init_text=config.prompt_tuning_init_text if text else None,
        tokenizer_name_or_path=config.model if text else None,
        tokenizer_kwargs={"local_files_only": True} if text else None,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, peft_config)
    # The saved adapter is whole without the text, and must not name a folder of this machine.
    peft_config.prompt_tuning_init = PromptTuningInit.RANDOM
    peft_config.prompt_tuning_init_text = peft_config.tokenizer_name_or_path = (
        peft_config.tokenizer_kwargs
    ) = None
    return wrapped


METHOD = Method(
    title="Prompt tuning",
    words="Learns a few tokens in front of the prompt. The smallest file of all; needs a large "
    "model to shine.",
    paper="https://arxiv.org/abs/2104.08691",
    wrap=wrap,
    settings=("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text"),
    usual={"learning_rate": 1e-2},
    rates="1e-2 to 1e-1",
    highest_rate=0.5,
    never={
        "packing": "the prompt stands in front of a sequence, and only its first row would follow "
        "on it."
    },
    no_merge="A prompt is not an update of weights.",
    no_mix=ONE_AT_A_TIME,
)
