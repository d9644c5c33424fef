"""EarlyExit: a network whose easy samples leave early, by learned gates, in the training that somebody already has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from gateplug.core.edit import AddGate, Edit
from gateplug.core.errors import PlugError, nearest, real_numbers, whole_numbers
from gateplug.core.fresh import seeded
from gateplug.core.optim import GroupOptions
from gateplug.core.select import Layers, select
from gateplug.early_exit.branch import ExitBranch, Reading
from gateplug.early_exit.conformal import check_alpha
from gateplug.early_exit.functional import FEATURES, MODES
from gateplug.early_exit.latency import check_sizes
from gateplug.early_exit.layers import ExitGate
from gateplug.early_exit.losses import WEIGHTINGS
from gateplug.early_exit.operating import check_target
from gateplug.early_exit.stacks import chosen_blocks, find_stack
from gateplug.early_exit.training import TrainedExits
from gateplug.early_exit.validation import RULES

Head = str | Callable[[int, int], nn.Module]


class EarlyExit(TrainedExits):
    """Exits after the blocks of a classifier, with gates that decide who leaves (JEI-DNN, arXiv 2310.09163).

    On the output of each chosen block stand a head (the paper's inference module) and a gate. A warm-up trains the heads; then,
    in turn, batches that train the gates towards the exit with the least cross-entropy + λ · cost, and batches that train the
    heads on the samples that the gates would let go there. All of it is a term beside the module's own loss, in one optimization.

    Args:
        at: where exits stand: "auto" for all blocks but the last, a number n for the blocks n − 1, 2n − 1, …, or names, see
            :func:`gateplug.core.select.select`, in the order in which the blocks run.
        gate: who decides: `jei` (learned gates), `confidence`, `entropy` or `patience` (heads alone are trained then).
        cost_weight: λ ≥ 0: nats of cross-entropy that running the whole network is worth.
        mode: how gates become a decision: `official`, `cdf` or `hazard`, see :func:`functional.exit_scores`.
        threshold: a sample leaves at the first exit whose score reaches it; .5 by default, for `entropy` it is −nats, for
            `patience` a number of agreements.
        weighting: of the heads' loss: `exit_prob` (as the paper has it) or `uniform` (what its code computes).
        head: `linear`, or a function `(width, classes) -> module`.
        pool: None for what fits the network (first token, mean, pooler), or a function of a block's output that gives (B, d).
        width: of those rows; needed with `pool`, and where the structure does not tell.
        classes: outputs of the network; None for what its config or its last Linear layer says.
        freeze_backbone: train heads and gates alone, the network in eval mode without gradient.
        warmup_epochs: the most that the warm-up takes, ≥ 0.
        every: batches of a phase, ≥ 1; lowered where an epoch is shorter than two of them.
        features: what gates see, names out of :data:`functional.FEATURES`.
        cumulative: balance a gate by the samples whose best exit is at or before it; False: at it, as the official code.
        lr_scale: factor on the learning rate of heads and gates, ≥ 0.
        operating_point: `{"cost": share}`, `{"accuracy": share}` or `{"latency": seconds, "batch": samples}`: fit the threshold
            to it in each validation after the warm-up.
        latency: sizes of batches at which the exits are timed on this machine at the end of a fit; () for not at all.
        alpha: of the conformal sets that a test reports, in (0, 1): how many may miss the true label.

    Raises:
        ValueError: a number out of its range, an unknown name.
        PlugError: no stack of blocks is found, names that are no blocks or out of order, a network that does not classify.
    """

    room: ClassVar[str] = "early_exit"
    summary: ClassVar[str] = "lets easy samples leave a classifier early, by gates that are trained with it"
    paper: ClassVar[str] = "arXiv 2310.09163"
    injects: ClassVar[bool] = True
    chooser: ClassVar[str] = "at"

    def __init__(
        self,
        at: Layers | int = "auto",
        gate: str = "jei",
        cost_weight: float = 0.7,
        mode: str = "official",
        threshold: float = 0.5,
        weighting: str = "exit_prob",
        head: Head = "linear",
        pool: Callable[[Tensor], Tensor] | None = None,
        width: int | None = None,
        classes: int | None = None,
        freeze_backbone: bool = True,
        warmup_epochs: int = 6,
        every: int = 200,
        features: Sequence[str] = FEATURES,
        cumulative: bool = False,
        lr_scale: float = 1.0,
        operating_point: dict[str, float] | None = None,
        latency: Sequence[int] = (1, 64),
        alpha: float = 0.05,
    ) -> None:
        for name, value, allowed in (("gate", gate, RULES), ("mode", mode, MODES), ("weighting", weighting, WEIGHTINGS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}.{nearest(str(value), allowed)}")
        real_numbers(cost_weight=cost_weight, threshold=threshold)
        whole_numbers(
            warmup_epochs=warmup_epochs,
            every=every,
            **{n: v for n, v in (("width", width), ("classes", classes)) if v is not None},
        )
        if not 0 <= cost_weight < float("inf"):
            raise ValueError(f"cost_weight={cost_weight!r} must be a finite number ≥ 0: nats that the whole network is worth")
        for name, number, least in (("warmup_epochs", warmup_epochs, 0), ("every", every, 1), ("width", width, 1)):
            if number is not None and number < least:
                raise ValueError(f"{name}={number} must be ≥ {least}")
        if isinstance(at, str) and at.isdigit():  # a number from the command line
            at = int(at)
        if isinstance(at, bool) or (isinstance(at, int) and at < 1):
            raise ValueError(f"at={at!r} must be ≥ 1: an exit after each so many blocks")
        if head != "linear" and not callable(head):
            raise ValueError(f"head={head!r} must be 'linear' or a function (width, classes) -> module")
        if not isinstance(freeze_backbone, bool):
            raise TypeError(f"freeze_backbone={freeze_backbone!r} must be True or False")
        if pool is not None and (not callable(pool) or width is None):
            raise ValueError(f"pool={pool!r} must be a function of a block's output that gives rows (B, d), with width=d")
        if classes is not None and classes < 2:
            raise ValueError(f"classes={classes} must be at least 2")
        ExitGate(features)
        check_target(operating_point)
        check_alpha(alpha)
        check_sizes(latency)
        self.at, self.gate, self.cost_weight, self.mode, self.threshold = at, gate, cost_weight, mode, threshold
        self.weighting, self.head, self.pool, self.width, self.classes = weighting, head, pool, width, classes
        self.freeze_backbone = freeze_backbone
        self.warmup_epochs, self.every, self.features, self.cumulative = warmup_epochs, every, features, cumulative
        self.lr_scale, self.operating_point, self.latency, self.alpha = lr_scale, operating_point, latency, alpha
        self.layers: Layers = "auto" if isinstance(at, int) else at
        options = GroupOptions(lr_scale)
        self.group = options if lr_scale != 1 else None
        self._begin()

    # ------------------------------------------------------------------ what is attached

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """Blocks that get an exit."""
        stack = find_stack(module, self.classes)
        names = chosen_blocks(stack, self.at if isinstance(self.at, int) else None)
        if not isinstance(self.at, int):
            names = [name for name in names if self.width or stack.widths[stack.block_of(name)] is not None]
        return {name: module.get_submodule(name) for name in names}

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """An exit on each block."""
        stack = find_stack(module, self.classes)
        # names of a list keep their order, which is checked; `layers` has that of the model
        several = self.at if isinstance(self.at, list | tuple) else []
        asked = [name for text in several for name in select(module, text, {}, self.chooser)] or list(layers)
        edits: list[Edit] = []
        for name in chosen_blocks(stack, asked):
            width = self.width or stack.widths[stack.block_of(name)]
            if width is None:
                raise PlugError(f"EarlyExit cannot tell the width of what {name} gives: give width=…, and pool=… if no mean fits")
            through = module.get_submodule(stack.through) if stack.through else None
            reading: Any = Reading(stack.reads, through) if self.pool is None else self.pool
            with seeded(name, next(module.parameters())):
                head = self.head(width, stack.classes) if callable(self.head) else nn.Linear(width, stack.classes)
                branch = ExitBranch(head, ExitGate(self.features), reading, self.freeze_backbone, self.threshold)
            branch.to(next(module.parameters()).device)
            edits.append(AddGate(name, branch, "exit", f"{type(head).__name__} {width}→{stack.classes}, {self.gate} gate"))
        return edits

    def _settle(self, module: nn.Module) -> None:
        super()._settle(module)
        self._branches = [gate for gate in self.gates(module).values() if isinstance(gate, ExitBranch)]
        stack = find_stack(module, self.classes)
        self._net, self._classes = module.get_submodule(stack.net), stack.classes
