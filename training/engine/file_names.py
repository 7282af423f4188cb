"""Names of the files that a run leaves, for rooms that may not import torch."""

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
MODEL = "model.safetensors"  # of a run that trained the whole model
STATE = ("state.safetensors", "state.json", "manifest.json")  # of a checkpoint, besides the weights
