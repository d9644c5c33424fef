"""The gradient of each sample of a batch by itself, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gateplug.core.answers import Answer
from gateplug.core.batches import logits_of, rows_of

Gradients = dict[str, Tensor]
"""By a parameter's name: (samples, *shape)."""
Value = Callable[[Tensor, Tensor], Tensor]
"""Logits (C,) and label () of one sample -> what is differentiated, a scalar."""

AT_ONCE = 2**26
"""Numbers of per-sample gradients that are held at a time: 256 MB of float32."""


class PerSample:
    """Differentiates a value of each sample with respect to the parameters of a network, in the mode that the network is in.

    All samples of a piece go through `torch.func.vmap`. A network that this cannot run (one that looks at its data to decide what
    to do, as Hugging Face's do with attention masks) is run sample by sample, with equal results.

    Args:
        net: the network.
        parameters: with respect to which, by name; those that are not in `net` are left out.
        value: of one sample.
    """

    def __init__(self, net: nn.Module, parameters: Mapping[str, nn.Parameter], value: Value) -> None:
        self.net, self.value = net, value
        names = {id(p): name for name, p in parameters.items()}
        inside = {own: p for own, p in net.named_parameters() if id(p) in names}
        self._names = {own: names[id(p)] for own, p in inside.items()}
        self._inside = inside
        self.together = True
        """Whether vmap is used; False once it has failed."""
        self.at_once = max(1, AT_ONCE // max(1, sum(p.numel() for p in inside.values())))

    def __call__(self, asked: Answer, labels: Tensor, rows: Tensor) -> Iterator[Gradients]:
        """Yield the gradients of samples, a piece of them at a time.

        Args:
            asked: a call of the network on a batch of B.
            labels: (B,).
            rows: int64, which samples.
        """
        for piece in torch.split(rows, self.at_once):
            found = self._vmapped(asked, labels, piece) if self.together else None
            if found is not None:
                yield found
                continue
            for row in piece:
                yield self._one(asked, labels, row)

    def _vmapped(self, asked: Answer, labels: Tensor, rows: Tensor) -> Gradients | None:
        def of_one(held: dict[str, Tensor], row: Tensor) -> Tensor:
            return self._value(asked, labels, row[None], held)

        held = {name: p.detach() for name, p in self._inside.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operators that vmap runs one by one
                found = vmap(grad(of_one), in_dims=(None, 0))(held, rows)
        except Exception:  # of whatever kind a model's code makes it: if the model is at fault, it will fail again alone
            self.together = False
            return None
        return {self._names[name]: gradient for name, gradient in found.items()}

    def _one(self, asked: Answer, labels: Tensor, row: Tensor) -> Gradients:
        with torch.enable_grad():
            value = self._value(asked, labels, row[None], {})
            found = torch.autograd.grad(value, list(self._inside.values()), allow_unused=True)
        pairs = zip(self._inside.items(), found, strict=True)
        return {self._names[n]: (torch.zeros_like(p) if g is None else g)[None] for (n, p), g in pairs}

    def _value(self, asked: Answer, labels: Tensor, rows: Tensor, held: dict[str, Tensor]) -> Tensor:
        samples = len(asked.logits)
        args, kwargs = (rows_of(part, rows, samples) for part in (asked.args, asked.kwargs))
        out = functional_call(self.net, held, args, kwargs) if held else self.net(*args, **kwargs)
        return self.value(logits_of(out)[0], labels[rows][0])
