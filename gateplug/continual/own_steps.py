"""A module's own step on a batch that is not the one that is being trained, without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn import functional as F

from gateplug.core.answers import Answer, Answers, loss_of, muted, own_step
from gateplug.core.batches import labels_of, logits_of
from gateplug.core.cost import call, still
from gateplug.core.gate import Gate


def own_loss(module: nn.Module, batch: Any, number: int = 0) -> Tensor | None:
    """The module's own loss of a batch: of its `training_step`, which logs nothing and leaves its metrics as they were.

    A plain nn.Module has no loss of its own: cross-entropy of its logits then.

    Args:
        module: a LightningModule, or any network that takes a batch without its labels.
        batch: as `training_step` takes it.
        number: of the batch, for a step that wants it.
    """
    if not hasattr(module, "training_step"):
        return F.cross_entropy(logits_of(call(module, inputs_of(batch))), labels_of(batch))
    with muted(module):
        return loss_of(run_step(module, batch, number))


def answer(module: nn.Module, batch: Any) -> Answer:
    """What the network in a module is asked and answers on a batch, in eval mode and without gradient.

    Raises:
        PlugError: the network is not called as a whole in the module's step, or gives no logits.
    """
    with still(module), muted(module), Answers(module) as answers:
        if hasattr(module, "training_step"):
            run_step(module, batch, 0)
        else:
            call(module, inputs_of(batch))
        return answers.last


def inputs_of(batch: Any) -> Any:
    """A batch without its labels."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return tuple(batch[:-1])
    return batch


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """For measurements between two steps: gates count nothing, nothing is compiled, and random streams stay where they are.

    Gates must not keep what they see: within `torch.func.vmap` that is no ordinary tensor.
    """
    gates = [(m, m.recording, m.injection) for m in module.modules() if isinstance(m, Gate)]
    for gate, _, _ in gates:
        gate.recording, gate.injection = False, None
    device = next(module.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for gate, recording, injection in gates:
            gate.recording, gate.injection = recording, injection


def run_step(module: nn.Module, batch: Any, number: int, name: str = "training_step") -> Any:
    """Call a step of a LightningModule as the user wrote it, with the batch's number if it takes one."""
    step = own_step(module, name)
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(batch, number) if numbered else step(batch)
