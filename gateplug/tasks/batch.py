"""From a batch to a call: which part of it are inputs, which are labels, and what the network returned."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LABEL_KEYS = ("labels", "label")
LOGITS_IN = "a tensor, a dict with the key 'logits', or an object with the attribute 'logits' (any Hugging Face output)"


class Batch(NamedTuple):
    """A batch taken apart.

    Attributes:
        args: Positional inputs of the network.
        kwargs: Inputs of the network by name; keys that its ``forward`` does not know are still in it.
        labels: The labels, or None where the batch has none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any


def split_batch(batch: Any) -> Batch:
    """Take a batch apart into the network's inputs and the labels.

    Args:
        batch: A mapping with the key ``labels`` (or ``label``), ``(inputs, labels)`` whose inputs are a tensor, a tuple
            of tensors or a mapping, or a tensor alone (for prediction).

    Raises:
        TypeError: If the batch has none of these forms.
    """
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        found = [inputs.pop(key) for key in LABEL_KEYS if key in inputs]
        return Batch((), inputs, found[0] if found else None)
    if isinstance(batch, Tensor):
        return Batch((batch,), {}, None)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), labels)
        return Batch(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, labels)
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise TypeError(
        f"The batch is a {what}; allowed are a dict with the key 'labels', (inputs, labels), or a tensor of inputs."
        " Give your data set or `collate_fn` one of these forms."
    )


def call_net(net: nn.Module, batch: Batch) -> Any:
    """Call ``net`` with the inputs of a batch, and only with names that its ``forward`` accepts.

    A network with one positional input (``forward(self, x)``) takes the only input of a dict batch, whatever its name.

    Raises:
        TypeError: If the network accepts none of several inputs by name.
    """
    if not batch.kwargs:
        return net(*batch.args)
    accepted = _accepted_names(net)
    kwargs = batch.kwargs if accepted is None else {k: v for k, v in batch.kwargs.items() if k in accepted}
    if kwargs:
        return net(*batch.args, **kwargs)
    if len(batch.kwargs) == 1:
        return net(*batch.args, *batch.kwargs.values())
    raise TypeError(
        f"{type(net).__name__}.forward accepts {sorted(accepted or ())} but the batch has {sorted(batch.kwargs)}."
        " Rename the columns of the data set, or the arguments of `forward`."
    )


def _accepted_names(net: nn.Module) -> frozenset[str] | None:
    """Names that ``net.forward`` accepts; None where it takes any."""
    net = getattr(net, "_orig_mod", net)  # torch.compile(net) hides the signature
    # Hugging Face models end in **kwargs for options of theirs, and would swallow any column of a data set.
    return _signature_names(type(net).forward, named_only=hasattr(net, "main_input_name"))


@functools.lru_cache(maxsize=256)
def _signature_names(forward: Callable[..., Any], named_only: bool) -> frozenset[str] | None:
    parameters = list(inspect.signature(forward).parameters.values())[1:]  # without self
    if not named_only and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned.

    Raises:
        TypeError: If there are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    found = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(f"The network returned a {type(output).__name__}{found}, without logits; allowed: {LOGITS_IN}.")


def batch_size(batch: Batch) -> int:
    """Number of samples: the first dimension of the first tensor."""
    for value in (batch.labels, *batch.args, *batch.kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise TypeError("The batch holds no tensor; inputs and labels must be tensors when they reach the task.")


def check_integer_labels(labels: Any, classes: int, ignore: int | None = None) -> None:
    """Refuse labels that are no class indices; reads the values, so it costs a synchronisation on a GPU.

    Args:
        labels: What the batch calls labels.
        classes: Labels must lie in ``0 … classes - 1``.
        ignore: A value that is allowed besides, for positions without a target.

    Raises:
        TypeError: If labels are missing or are not integers.
        ValueError: If a label is out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"Labels are {'missing' if labels is None else 'a ' + type(labels).__name__}; they must be an integer"
            " tensor under the batch's key 'labels', or the second part of (inputs, labels)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"Labels have dtype {labels.dtype} and shape {tuple(labels.shape)}; they must be class indices"
            " (torch.long). One-hot labels become indices with `labels.argmax(-1)`; multi-label and regression targets"
            " need a LightningModule of your own."
        )
    values = labels if ignore is None else labels[labels != ignore]
    if values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"Labels go from {low} to {high}, but must lie in 0 … {classes - 1} (there are {classes} classes)."
            " Correct the number of classes, or map the labels to 0 … n-1."
        )
