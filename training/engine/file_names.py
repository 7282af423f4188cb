"""Names of the files that a run leaves, for rooms that may not import torch."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
MODEL_FILE = "model.safetensors"  # of a run that trained the whole model
STATE_FILES = (
    "state.safetensors",
    "state.json",
    "manifest.json",
)  # of a checkpoint, besides the weights
