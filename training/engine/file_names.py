"""Names of the files that a run writes, and how many checkpoints it keeps, for modules that must
not import torch.
"""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
MODEL_FILE = "model.safetensors"  # after full fine-tuning
# The files of a checkpoint besides the weights
STATE_FILES = ("state.safetensors", "state.json", "manifest.json")
MAX_RECENT_CHECKPOINTS = 2  # the best one is kept in addition
