"""The threshold of an operating point, fitted once on validation data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from gateplug.core.batches import Call, labels_of, rows_of
from gateplug.core.cost import counted_macs
from gateplug.early_exit.latency import exit_times
from gateplug.early_exit.operating import check_target
from gateplug.early_exit.thresholds import fit_threshold
from gateplug.early_exit.validation import scores_of

if TYPE_CHECKING:
    from gateplug.early_exit.runner import ExitRunner


@torch.inference_mode()
def fitted(runner: ExitRunner, target: Mapping[str, float], validation: Iterable[Any] | None) -> float:
    """The threshold of the runner's rule that meets a target on validation data.

    Args:
        runner: its rule and mode count, its threshold does not.
        target: see :class:`gateplug.early_exit.ExitRunner`.
        validation: batches: mappings with `labels`, or (inputs, labels).

    Raises:
        ValueError: no data, no labels, or a target that cannot be met (says what can).
    """
    check_target(target)
    if validation is None:
        raise ValueError(f"operating_point={dict(target)} needs validation=, batches with labels that the threshold is fitted on")
    scores: list[Tensor] = []
    correct: list[Tensor] = []
    first: tuple[Call, int] | None = None
    for batch in validation:
        labels = labels_of(batch)
        kept = labels != -100
        device = next(runner.net.parameters()).device
        call = move_data_to_device(call_of(runner, batch), device)
        logits, gates = runner.everything(*call[0], **call[1])
        scores.append(scores_of(runner.gate, runner.mode, gates, logits[:, :-1])[kept].cpu())
        correct.append((logits.argmax(-1).cpu() == labels.cpu()[:, None])[kept])
        first = first or (call, len(labels))
    if first is None or not sum(map(len, scores)):
        raise ValueError(f"operating_point={dict(target)}: validation= holds no sample with a label")
    s, right = torch.cat(scores), torch.cat(correct)
    if "accuracy" in target:
        return fit_threshold(s, costs_of(runner, *first), correct=right, target_accuracy=target["accuracy"])
    if "cost" in target:
        return fit_threshold(s, costs_of(runner, *first), target_cost=target["cost"])
    times = exit_times(runner, *first, batch=int(target.get("batch", 1)))
    return fit_threshold(s, times.median.cummax(0).values, target_cost=target["latency"])


def costs_of(runner: ExitRunner, call: Call, samples: int) -> Tensor:
    """Costs of the exits, (L,) float64: as a training has counted them, else counted on one sample."""
    if runner.costs is None:
        args, kwargs = rows_of(call, torch.arange(1), samples)
        at: list[int] = []
        with counted_macs(runner.net) as so_far:
            flow = runner.stages.begin(args, kwargs)
            before = so_far()  # a network of somebody's own is run whole, the first time
            for i in range(runner.stages.blocks):
                flow.block(i)
                if (branch := runner.stages.branches.get(i)) is not None:
                    z = branch.answer(flow.hidden)
                    at.append(so_far() + (len(at) + 1) * (9 * z.shape[-1] + 6))
            flow.end()
            runner.stages.place(None)
            total = so_far() + len(at) * (9 * z.shape[-1] + 6)
        counted = torch.tensor([*at, total], dtype=torch.float64) - before
        runner.costs = (counted / counted[-1]).float()
    return runner.costs.double()


def call_of(runner: ExitRunner, batch: Any) -> Call:
    """Arguments of the network in a batch: of a mapping what its forward takes, labels left out; else all but the last part."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(runner.net.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        named = {key: value for key, value in batch.items() if key not in ("labels", "label")}
        return (), {key: value for key, value in named.items() if takes_any or key in parameters}
    return tuple(batch[:-1]), {}
