"""ExitRunner: inference in which samples really leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gateplug.core.batches import logits_of
from gateplug.core.errors import PlugError, nearest, real_numbers
from gateplug.early_exit.branch import ExitBranch
from gateplug.early_exit.decision import Decision
from gateplug.early_exit.flow import Flow
from gateplug.early_exit.functional import MODES
from gateplug.early_exit.stages import Stages, stages_of
from gateplug.early_exit.validation import RULES


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
    attention masks and other arguments that belong to single samples go with them. One value is read back at each exit (whether
    anybody leaves), which on a GPU is a synchronization. The module is put into eval mode and stays in it.

    Args:
        module: a network or LightningModule to which :class:`EarlyExit` is attached (or was trained with); or another runner, as
            a folded one is.
        gate: who decides, as in :class:`EarlyExit`; None: as it was trained.
        threshold: a sample leaves at the first exit whose score reaches it, 0: all at the first exit; None: as it was trained, or
            fitted to an operating point.
        mode: how gates become a decision; None: as it was trained.
        operating_point: fit the threshold, once, on `validation`: `{"cost": share of the network's multiply-adds}`, `{"accuracy":
            share of right answers}`, or `{"latency": seconds of a batch, "batch": samples in it}`, measured on this machine.
        validation: batches with labels, as the training had them.

    Raises:
        PlugError: the module has no exits, or its network cannot be run block by block.
        ValueError: an unknown gate or mode, an operating point without validation data, or one that cannot be met.
    """

    threshold: float
    """In use."""
    stages: Stages

    def __init__(
        self,
        module: nn.Module,
        gate: str | None = None,
        threshold: float | None = None,
        mode: str | None = None,
        operating_point: Mapping[str, float] | None = None,
        validation: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        stages: Stages
        trained: tuple[str, str, float]
        if isinstance(module, ExitRunner):
            stages, trained = module.stages, (module.gate, module.mode, module.threshold)
        else:
            from gateplug.core.record import all_records

            record = next((r for r in all_records(module) if r.plug == "EarlyExit"), None)
            if record is None:
                raise PlugError("ExitRunner needs a module with exits: attach gp.EarlyExit, or open a checkpoint with gp.load")
            arguments = record.arguments
            stages = stages_of(module, arguments["classes"])
            trained = (arguments["gate"], arguments["mode"], float(next(iter(stages.branches.values())).threshold))
        self._begin(stages, trained[0] if gate is None else gate, trained[1] if mode is None else mode, trained[2])
        if threshold is not None:
            real_numbers(threshold=threshold)
            self.threshold = float(threshold)
        if operating_point is not None:
            from gateplug.early_exit.fitting import fitted

            if threshold is not None:
                raise ValueError(f"give threshold={threshold} or operating_point={operating_point}, not both")
            self.threshold = fitted(self, operating_point, validation)

    def _begin(self, stages: Stages, gate: str, mode: str, threshold: float) -> None:
        for name, value, allowed in (("gate", gate, RULES), ("mode", mode, MODES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}.{nearest(str(value), allowed)}")
        self.gate, self.mode = gate, mode
        self.threshold = threshold
        self.stages = stages
        self.net = stages.net
        # exits that stand on no block any more are this module's own
        inside = set(stages.net.modules())
        loose = [branch for branch in self.branches if branch not in inside]
        if loose:
            self.exits = nn.ModuleList(loose)
        costs = torch.tensor([*(float(branch.cost) for branch in self.branches), 1.0])
        self.costs = None if bool(costs.isnan().any()) else costs
        """(L,) of each exit, as a training has counted them; None before."""
        self.eval()

    @classmethod
    def of_stages(cls, stages: Stages, gate: str, mode: str) -> ExitRunner:
        """A runner of stages that stand alone; the threshold is that of the exits."""
        runner = cls.__new__(cls)
        nn.Module.__init__(runner)
        runner._begin(stages, gate, mode, float(next(iter(stages.branches.values())).threshold))
        return runner

    @property
    def branches(self) -> list[ExitBranch]:
        """The exits, in order."""
        return list(self.stages.branches.values())

    @property
    def config(self) -> Any:
        """Of a Hugging Face network."""
        return self.net.config

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Run a batch; arguments as the network takes them.

        Raises:
            RuntimeError: in training mode, in which a batch that shrinks would change what BatchNorm sees.
        """
        return self.run(Decision(self.gate, self.mode, self.threshold), args, kwargs)

    def run(self, decide: Decision, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExitOutput:
        """Run a batch with a rule of one's own."""
        flow = self._begun(args, kwargs)
        try:
            return self._run(flow, decide)
        finally:
            self.stages.place(None)

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        if self.training or self.net.training:
            raise RuntimeError("ExitRunner is for inference: call eval() on it")
        return self.stages.begin(args, kwargs)

    def _run(self, flow: Flow, decide: Decision) -> ExitOutput:
        size = flow.size
        rows = torch.arange(size, device=flow.device)
        logits: Tensor | None = None
        exits = torch.zeros(size, dtype=torch.int64, device=flow.device)
        number = 0
        for i in range(self.stages.blocks):
            flow.block(i)
            branch = self.stages.branches.get(i)
            if branch is None:
                continue
            z = branch.answer(flow.hidden)
            leave = decide(z, branch.gate)
            count = int(leave.sum())  # the one value that is read, at each exit
            if count:
                if logits is None:
                    logits = z.new_empty(size, z.shape[-1])
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
        if len(rows) == size or logits is None:  # nobody has left
            return self._output(last, exits.fill_(number))
        logits[rows] = last.to(logits.dtype)
        exits[rows] = number
        return self._output(logits, exits)

    def _output(self, logits: Tensor, exits: Tensor) -> ExitOutput:
        cost = None if self.costs is None else self.costs.to(exits.device)[exits]
        return ExitOutput(logits, exits, cost)

    @torch.inference_mode()
    def everything(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run all of it for all samples: logits of every exit (B, L, C), and gates (B, K) in (0, 1)."""
        flow = self._begun(args, kwargs)
        try:
            heads = []
            for i in range(self.stages.blocks):
                flow.block(i)
                if (branch := self.stages.branches.get(i)) is not None:
                    heads.append(branch.answer(flow.hidden))
            gates = torch.stack([b.gate(z).sigmoid() for b, z in zip(self.branches, heads, strict=True)], 1)
            return torch.stack([*heads, logits_of(flow.end()).to(heads[0].dtype)], 1), gates
        finally:
            self.stages.place(None)

    def alone(self) -> ExitRunner:
        """This runner without hooks and plugs, as `gp.fold` makes it; itself if it stands alone."""
        if hasattr(self, "exits"):
            return self
        from gateplug.core.fold import fold

        plain = fold(self.net)
        assert isinstance(plain, ExitRunner)
        return ExitRunner(plain, self.gate, self.threshold, self.mode)

    def export(
        self, folder: str | Path, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, form: str = "pt2"
    ) -> None:
        """Write a program for each stage, see :func:`gateplug.early_exit.programs.export_stages`."""
        from gateplug.early_exit.programs import export_stages

        export_stages(self, Path(folder), args, dict(kwargs or {}), form)
