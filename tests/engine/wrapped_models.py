"""Models of tests/engine/families.py, wrapped for training, and what they answer."""

import torch

from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.engine.modeling.model import TrainedPositions, load_base, wrap
from training.engine.modeling.optimizers import make_optimizer
from training.engine.modeling.weights import start_of

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 33, 21, 60, 7, 44, 12], [8, 71, 3, 15, 90, 22, 6, 30]])


def make(folder, method, *, steps=0, **more):
    """A wrapped model, after some steps at a rate at which every technique moves."""
    more = {"prompt_tuning_init": "random"} | more if method == "prompt" else more
    config = RunConfig(model=str(folder), method=method, **more)
    torch.manual_seed(0)
    model = wrap(load_base(folder, torch.float32, CPU, quantised=TABLE[method].quantised), config)
    start = start_of(model, config)
    head, optimizer = TrainedPositions(model), make_optimizer(model, config, CPU)
    losses = []
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01
        loss = head.loss_sum(model.train(), IDS, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return config, model.eval(), start, losses


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
