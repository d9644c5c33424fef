"""An exit of a network: what stands on the output of a block and answers from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gateplug.core.gate import Folded, Gate
from gateplug.core.objective import in_backward
from gateplug.early_exit.ends import first_token, token_at
from gateplug.early_exit.layers import ExitGate


class Reading:
    """What an exit reads of a block's output: rows (B, d).

    Args:
        reads: `token`: the first token of (B, T, d); `last`: the last one that is no padding; `maps`: through the model's pooler,
            flattened; `any`: rows as they are, the mean over tokens, the mean over height and width.
        through: a module of the network's own before that (its last norm) or instead (its pooler). It stays the network's.
    """

    def __init__(self, reads: str, through: nn.Module | None = None) -> None:
        self.reads, self.through = reads, through
        self.places: Tensor | None = None
        """(B,) of the last tokens of the running batch, see :func:`last_places`; set by whoever runs the network."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Read."""
        if self.reads == "maps":
            assert self.through is not None
            maps: Tensor = self.through(hidden)
            return maps.flatten(1)
        if self.reads in ("token", "last"):
            if self.reads == "token":
                return first_token(self.through, hidden)
            assert self.places is not None
            return token_at(self.through, hidden, self.places)
        if hidden.dim() == 2:
            return hidden
        return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))


def last_places(args: tuple[Any, ...], kwargs: Mapping[str, Any], pad: int | None) -> Tensor:
    """(B,) place of the last token of each text that is not `pad`, from the arguments of a language model.

    Raises:
        ValueError: the call has no input_ids.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        raise ValueError(
            "EarlyExit needs input_ids to find the last token of each text: inputs_embeds do not tell what is padding"
        )
    if pad is None:
        return torch.full((ids.shape[0],), ids.shape[1] - 1, device=ids.device)
    return ((ids != pad) * torch.arange(ids.shape[1], device=ids.device)).argmax(-1)


class ExitBranch(Gate):
    """A head (the inference module of JEI-DNN) and a gate on the output of a block, which it passes on as it is.

    Parameters: `head.…`, `gate.linear.…`; buffers `cost` and `threshold`, so that a runner finds them in a checkpoint.

    Args:
        head: rows (B, d) -> logits (B, C).
        gate: see :class:`ExitGate`.
        reading: what is read of the block's output.
        detached: whether the block gets no gradient from here.
        threshold: of the rule that decides who leaves.
    """

    room: ClassVar[str] = "early_exit"
    axes: ClassVar[tuple[str, ...]] = ("exit",)
    whole: ClassVar[bool] = True

    def __init__(
        self,
        head: nn.Module,
        gate: ExitGate,
        reading: Callable[[Tensor], Tensor],
        detached: bool = True,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.head, self.gate, self.detached = head, gate, detached
        self.reading = reading
        self.register_buffer("cost", torch.full((), torch.nan))
        """What leaving here costs, as a share of the whole network; NaN until it is counted."""
        self.register_buffer("threshold", torch.full((), float(threshold)))
        """Of the rule in use."""
        self.cost: Tensor
        self.threshold: Tensor
        self.listening = False
        """Whether the block's output in the running forward is wanted."""
        self.hidden: Tensor | None = None
        """That output, cut off from the block: the head is run on it after the forward, outside of any checkpoint."""
        self.gradient: Tensor | None = None
        """What the exit's term sends back into the block, not yet times the factor of the running backward."""

    # keeps a value beside the graph that a compiled model does not hold
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, out: Any) -> Any:
        """The block's output, unchanged; in backward the gradient of the exit joins that of the network here."""
        if not self.listening:
            return out
        hidden: Tensor = out if isinstance(out, Tensor) else out[0]
        sends = self.training and not self.detached
        if not in_backward():  # a block that is recomputed was seen already
            self.hidden = hidden.detach().requires_grad_(sends)
        # reentrant checkpointing runs the block first without a graph, and then again in backward: that run takes the gradient
        if not sends or not torch.is_grad_enabled():
            return out
        joined: Tensor = _Join.apply(hidden, self)  # type: ignore[no-untyped-call]
        if isinstance(out, Tensor):
            return joined
        return type(out)(joined, *out[1:]) if hasattr(out, "_fields") else type(out)((joined, *out[1:]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExitBranch:
        """As any module; cost and threshold stay in float32 where the model goes into half precision."""
        exact = {"cost": self.cost, "threshold": self.threshold}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != value.dtype and not moved.is_meta:
                self._buffers[name] = value.to(moved.device)
        return self

    @property
    def logits(self) -> Tensor | None:
        """What the head says of the output that was heard; None if nothing was."""
        return None if self.hidden is None else self.answer(self.hidden)

    def forget(self) -> None:
        """The batch is over."""
        self.hidden, self.gradient = None, None

    def answer(self, hidden: Tensor) -> Tensor:
        """Logits (B, C) in float32 or wider, from the output of the block.

        Raises:
            ValueError: the head does not take what is read here.
        """
        rows = self.reading(hidden)
        try:
            logits: Tensor = self.head(rows)
        except RuntimeError as error:
            raise ValueError(
                f"the head of this exit does not take rows of shape {tuple(rows.shape)}, read of {tuple(hidden.shape)}: {error}. "
                "Give EarlyExit a pool=… that makes the rows, or other blocks with at=…"
            ) from error
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @classmethod
    def finish(cls, network: nn.Module, original: nn.Module, gates: Sequence[Folded]) -> nn.Module:
        """A runner that stands alone."""
        from gateplug.early_exit.plain import plain_runner

        return plain_runner(network, original, gates)

    def fold(self, layer: nn.Module) -> nn.Module:
        """The block without its exit."""
        return layer


class _Join(torch.autograd.Function):
    """The identity; in backward adds the branch's own gradient, times the factor by which the loss was multiplied."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, branch: ExitBranch) -> Tensor:
        ctx.branch = branch
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        own = ctx.branch.gradient
        if own is None:
            return gradient, None
        injection = ctx.branch.injection
        if injection is not None and injection.scale is not None:
            own = own * injection.scale.to(own)
        return own if gradient is None else gradient + own.to(gradient), None
