"""Names of the files of an adapter, for rooms that may not import torch."""

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
