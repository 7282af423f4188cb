"""Prompt tuning (Lester et al. 2021): learned token embeddings in front of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import MIXED_BATCH_UNSUPPORTED, Method

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


def wrap_model(model: Any, config: MethodSettings) -> Any:
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    is_text_init = config.prompt_tuning_init == "text"
    peft_config = PromptTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if is_text_init else PromptTuningInit.RANDOM,
        prompt_tuning_init_text=config.prompt_tuning_init_text if is_text_init else None,
        tokenizer_name_or_path=config.model if is_text_init else None,
        tokenizer_kwargs={"local_files_only": True} if is_text_init else None,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, peft_config)
    # The saved adapter does not need the text, and must not contain a path of this machine
    peft_config.prompt_tuning_init = PromptTuningInit.RANDOM
    peft_config.prompt_tuning_init_text = peft_config.tokenizer_name_or_path = (
        peft_config.tokenizer_kwargs
    ) = None
    return wrapped


SPEC = Method(
    title="Prompt tuning",
    description="Learns a few tokens in front of the prompt. The smallest files of all; works well "
    "only with large models.",
    paper="https://arxiv.org/abs/2104.08691",
    wrap_model=wrap_model,
    settings=("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text"),
    defaults={"learning_rate": 1e-2},
    learning_rate_range="1e-2 to 1e-1",
    max_learning_rate=0.5,
    incompatible_settings={
        "packing": "the learned tokens are in front of the sequence, so only its first row would "
        "use them."
    },
    merge_unsupported_reason="A prompt is not an update of weights.",
    mixed_batch_unsupported_reason=MIXED_BATCH_UNSUPPORTED,
)
