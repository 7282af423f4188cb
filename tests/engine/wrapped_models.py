"""Models of tests/engine/families.py, wrapped for training, and their logits."""

import torch

from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.engine.modeling.model import LabeledPositionsHead, load_base, wrap_base_model
from training.engine.modeling.optimizers import make_optimizer
from training.engine.modeling.weights import copy_initial_state

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 33, 21, 60, 7, 44, 12], [8, 71, 3, 15, 90, 22, 6, 30]])


def make_wrapped_model(folder, method, *, steps=0, **settings):
    """Wrap a model and train some steps, at a learning rate at which every method changes it."""
    settings = {"prompt_tuning_init": "random"} | settings if method == "prompt" else settings
    config = RunConfig(model=str(folder), method=method, **settings)
    torch.manual_seed(0)
    model = wrap_base_model(
        load_base(folder, torch.float32, CPU, quantized=METHODS[method].has_quantized_base), config
    )
    initial_state = copy_initial_state(model, config)
    head, optimizer = LabeledPositionsHead(model), make_optimizer(model, config, CPU)
    losses = []
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01
        loss = head.compute_loss_sum(model.train(), IDS, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return config, model.eval(), initial_state, losses


def compute_logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
