"""ExitRunner: inference in which samples really leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gateplug.core.errors import PlugError
from gateplug.early_exit.batches import logits_of
from gateplug.early_exit.branch import ExitBranch
from gateplug.early_exit.functional import confidence_scores, entropy_scores, score_at
from gateplug.early_exit.stages import Flow, Stages, stages_of


class ExitOutput(NamedTuple):
    """Answers, in the order of the inputs."""

    logits: Tensor
    """(B, C), of the exit at which each sample left."""
    exit: Tensor
    """(B,) int64: the number of that exit; K for the network's own head."""
    cost: Tensor | None
    """(B,) what was run for each sample, as a share of the whole network; None where costs are not known."""


class ExitRunner(nn.Module):
    """A network with exits, run for each sample no further than it needs: who leaves is no longer in the batch.

    Equal to running everything and picking each sample's exit afterwards. Between two blocks the rows that stay are gathered;
    attention masks and other arguments that belong to single samples go with them.

    Args:
        module: a network or LightningModule to which :class:`EarlyExit` is attached (or was trained with).
        gate: who decides, as in :class:`EarlyExit`; None: as it was trained.
        threshold: a sample leaves at the first exit whose score reaches it, 0: all at the first exit; None: as it was trained, or
            fitted to an operating point.
        mode: how gates become a decision; None: as it was trained.

    Raises:
        PlugError: the module has no exits, or its network cannot be run block by block.
    """

    def __init__(
        self, module: nn.Module, gate: str | None = None, threshold: float | None = None, mode: str | None = None
    ) -> None:
        super().__init__()
        from gateplug.core.record import all_records

        record = next((r for r in all_records(module) if r.plug == "EarlyExit"), None)
        if record is None:
            raise PlugError("ExitRunner needs a module with exits: attach gp.EarlyExit to it, or open a checkpoint with gp.load")
        arguments = record.arguments
        self.gate = str(arguments["gate"] if gate is None else gate)
        self.mode = str(arguments["mode"] if mode is None else mode)
        self.stages: Stages = stages_of(module)
        self.net = self.stages.net
        exits = list(self.stages.branches.values())
        self.threshold = float(exits[0].threshold if threshold is None else threshold)
        costs = torch.tensor([*(float(branch.cost) for branch in exits), 1.0])
        self.costs = None if bool(costs.isnan().any()) else costs
        """(L,) of each exit, as a training has counted them; None before."""
        self.eval()

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Run a batch; arguments as the network takes them.

        Raises:
            RuntimeError: in training mode, in which a batch that shrinks would change what BatchNorm sees.
        """
        if self.training or self.net.training:
            raise RuntimeError("ExitRunner is for inference: call eval() on it")
        flow = self.stages.begin(args, kwargs)
        try:
            return self._run(flow)
        finally:
            self.stages.place(None)

    def _run(self, flow: Flow) -> ExitOutput:
        size = flow.size
        rows = torch.arange(size, device=flow.device)
        logits: Tensor | None = None
        exits = torch.zeros(size, dtype=torch.int64, device=flow.device)
        decide = Decision(self.gate, self.mode, self.threshold)
        number = 0
        for i in range(self.stages.blocks):
            flow.block(i)
            branch = self.stages.branches.get(i)
            if branch is None:
                continue
            z = branch.answer(flow.hidden)
            leave = decide(branch, z)
            if logits is None:
                logits = z.new_empty(size, z.shape[-1])
            count = int(leave.sum())  # the one value that is read, at each exit
            if count:
                gone = rows if count == len(rows) else rows[leave]
                logits[gone] = z if count == len(rows) else z[leave]
                exits[gone] = number
                if count == len(rows):
                    return self._output(logits, exits)
                stay = ~leave
                rows = rows[stay]
                flow.keep(stay)
                decide.keep(stay)
            number += 1
        last = logits_of(flow.end())
        logits = last if logits is None else logits
        logits[rows] = last.to(logits.dtype)
        exits[rows] = number
        return self._output(logits, exits)

    def _output(self, logits: Tensor, exits: Tensor) -> ExitOutput:
        cost = None if self.costs is None else self.costs.to(exits.device)[exits]
        return ExitOutput(logits, exits, cost)


class Decision:
    """Scores of the rows that are still here, and what they carry from exit to exit."""

    def __init__(self, gate: str, mode: str, threshold: float) -> None:
        self.gate, self.mode, self.threshold = gate, mode, threshold
        self.taken: Tensor | None = None
        self.guess: Tensor | None = None
        self.count: Tensor | None = None

    def __call__(self, branch: ExitBranch, logits: Tensor) -> Tensor:
        """Who leaves: (rows,) bool."""
        return self._score(branch, logits) >= self.threshold

    def _score(self, branch: ExitBranch, logits: Tensor) -> Tensor:
        if self.gate == "patience":
            guess = logits.argmax(-1)
            same = torch.zeros_like(guess, dtype=torch.bool) if self.guess is None else guess == self.guess
            self.count = (torch.zeros_like(guess) if self.count is None else self.count + 1) * same
            self.guess = guess
            return self.count.to(logits.dtype)
        rules: dict[str, Callable[[Tensor], Tensor]] = {"confidence": confidence_scores, "entropy": entropy_scores}
        if self.gate in rules:
            return rules[self.gate](logits[:, None])[:, 0]
        g = branch.gate(logits).sigmoid()
        taken = torch.zeros_like(g) if self.taken is None else self.taken
        self.taken = taken + g
        return score_at(g, taken, self.mode)

    def keep(self, stay: Tensor) -> None:
        """Forget who has left."""
        for name in ("taken", "guess", "count"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[stay])
