"""Relevance of units, read while a training runs: activations and their gradients, summed over the batches of a step."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gateplug.continual.layers import Availability, ContextGate, HeadGate
from gateplug.core.hook import TrainingHook
from gateplug.core.objective import in_backward
from gateplug.core.processes import world_size


class Listener:
    """Reads (h · ∂ℓ/∂h)² of every gated unit in training.

    The gradient is that of the batch's mean loss; times the number of samples it is that of the sum, so that batches of different
    sizes in one optimizer step count by their samples. A factor that all units share (of a loss scaler) does not matter.

    Args:
        gates: with the modules whose outputs are the activations; None: the gate's own output.
        activity: |h| instead, without any gradient: what the official code does for convolutions.
    """

    def __init__(self, gates: Sequence[tuple[ContextGate, nn.Module | None]], activity: bool = False) -> None:
        self.activity = activity
        self.samples = 0
        """Of the batch that runs; 0: as many as the activations have rows."""
        self.mask: Tensor | None = None
        """(B, T) of the batch that runs, 0 for padding."""
        self.gates = [gate for gate, _ in gates]
        self._sums: dict[ContextGate, Tensor] = {}
        self._rows: dict[ContextGate, Tensor | int] = {}
        self._waiting: dict[nn.Module, deque[ContextGate]] = {}
        self._run = -1
        self._handles: list[RemovableHandle] = []
        self._warned = False
        for gate, reads in gates:
            if reads is None:
                self._handles.append(gate.register_forward_hook(TrainingHook(self._gated)))
            else:
                self._handles.append(gate.register_forward_hook(TrainingHook(partial(self._expect, reads))))
                if reads not in self._waiting:
                    self._waiting[reads] = deque()
                    self._handles.append(reads.register_forward_hook(TrainingHook(self._activated)))

    def remove(self) -> None:
        """Listen no more."""
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """A step begins: nothing was read."""
        self._sums, self._rows = {}, {}
        self._clear()

    def _clear(self) -> None:
        for queue in self._waiting.values():
            queue.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gated(self, gate: ContextGate, args: Any, out: Tensor) -> None:
        self._hear(gate, out)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _expect(self, reads: nn.Module, gate: ContextGate, args: Any, out: Tensor) -> None:
        # one activation module may serve several layers: the gates that have run wait for it in their order
        run = torch._C._current_graph_task_id()
        if run != self._run:  # a backward that ran layers again may have stopped between a gate and its activation
            self._run = run
            self._clear()
        if gate.training:
            self._waiting[reads].append(gate)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _activated(self, activation: nn.Module, args: Any, out: Tensor) -> None:
        queue = self._waiting[activation]
        if queue:
            self._hear(queue.popleft(), out)

    def _hear(self, gate: ContextGate, h: Tensor) -> None:
        # of a layer that activation checkpointing runs twice, one run has no gradient or is not what backward goes through
        if self.activity:
            if gate.training and not in_backward():
                values = h.detach().float().abs()
                if isinstance(gate, HeadGate):
                    values = values.reshape(*values.shape[:-1], gate.units, gate.repeat).mean(-1)
                self._add(gate, h, values, 1)
        elif gate.training and h.requires_grad:
            h.register_hook(partial(self._take, gate, h.detach(), h._version))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _take(self, gate: ContextGate, h: Tensor, version: int, grad: Tensor) -> None:
        if h._version != version and not self._warned:
            self._warned = True
            warnings.warn(
                "GateON: an activation was changed in place after it was read, so the relevance of its units is not exact. Do "
                "without inplace=True and += there",
                stacklevel=2,
            )
        product = h.float() * grad.float()
        if isinstance(gate, HeadGate):
            product = product.reshape(*product.shape[:-1], gate.units, gate.repeat).sum(-1)
        self._add(gate, product, product.square_(), (self.samples or len(h)) ** 2)

    def _add(self, gate: ContextGate, h: Tensor, values: Tensor, factor: int) -> None:
        """Sum values (B, …, n) over samples, tokens and positions."""
        if gate.trailing:
            # (B, n, …), also where positions were flattened into the units: (B, n · …)
            values = values.reshape(len(h), gate.units, -1).movedim(1, -1)
        rows: Tensor | int = values[..., 0].numel()
        if self.mask is not None and not gate.trailing and values.shape[:-1] == self.mask.shape:
            values, rows = values * self.mask[..., None].to(values), self.mask.sum()
        total = values.reshape(-1, gate.units).sum(0) * factor
        self._sums[gate] = self._sums[gate] + total if gate in self._sums else total
        self._rows[gate] = self._rows.get(gate, 0) + rows

    def take(self) -> dict[Availability, Tensor]:
        """Relevance (n,) of the units of each gate over all batches and processes of the step; then nothing is read any more.

        Of gates with one weight, and so one availability, it is the sum.
        """
        parts = [torch.zeros(gate.units + 1, device=gate.origin.device) for gate in self.gates]
        for gate, part in zip(self.gates, parts, strict=True):
            if gate in self._sums:
                part[:-1] = self._sums[gate]
                part[-1] = self._rows[gate]
        if world_size() > 1:
            flat = torch.cat(parts)
            dist.all_reduce(flat)
            parts = list(torch.split(flat, [len(part) for part in parts]))
        self.forget()
        found: dict[Availability, Tensor] = {}
        for gate, part in zip(self.gates, parts, strict=True):
            assert gate.availability is not None
            relevance = part[:-1] / part[-1].clamp_min(1)
            found[gate.availability] = found.get(gate.availability, 0) + relevance
        return found
