"""The mask on a network's outputs: those that do not count now get a logit that no softmax sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gateplug.core.gate import Gate, Openness


class OutputMask(Gate):
    """Leaves the logits of some outputs as they are and sets all others to half of the least finite number of their type.

    The buffer `allowed`, bool (C,), says which are left. A finite number, because a softmax over minus infinity alone is NaN, and
    half of the least, because people subtract the maximum.

    Args:
        outputs: C ≥ 1; all count at first.
    """

    room: ClassVar[str] = "continual"
    axes: ClassVar[tuple[str, ...]] = ("class",)
    whole: ClassVar[bool] = True

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.register_buffer("allowed", torch.ones(outputs, dtype=torch.bool))
        self.allowed: Tensor

    def allow(self, classes: Sequence[int]) -> None:
        """Let these outputs count, and no others."""
        allowed = torch.zeros(len(self.allowed), dtype=torch.bool)
        allowed[list(classes)] = True
        self.allowed.copy_(allowed)

    def forward(self, out: Any) -> Any:
        """Mask logits (…, C): a tensor, the entry or attribute `logits`, or the first part of a tuple."""
        if isinstance(out, Tensor):
            return self._masked(out)
        if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
            if isinstance(out.get("loss"), Tensor):
                raise ValueError(
                    f"{type(out).__name__} brings a loss, which the network has computed before its outputs were masked: call it "
                    "without labels, and compute the loss of its logits in training_step"
                )
            masked = self._masked(out["logits"])
            if hasattr(out, "to_tuple"):  # an output of Hugging Face: other parts refer to it by name and by place
                out["logits"] = masked  # type: ignore[index]
                return out
            return {**out, "logits": masked}
        if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
            first = self._masked(out[0])
            return type(out)(first, *out[1:]) if hasattr(out, "_fields") else (first, *out[1:])
        if isinstance(getattr(out, "logits", None), Tensor):
            out.logits = self._masked(out.logits)
            return out
        raise TypeError(
            f"HeadMask masks logits: a tensor, the entry or attribute 'logits', or the first part of a tuple. Its layer gives a "
            f"{type(out).__name__}: name the layer that gives logits with layers="
        )

    def _masked(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] != len(self.allowed):
            raise ValueError(
                f"HeadMask is for {len(self.allowed)} outputs, and the network gives logits {tuple(logits.shape)}: give it as "
                "many as the stream needs (TaskStream.num_classes)"
            )
        return logits.masked_fill(~self.allowed, torch.finfo(logits.dtype).min / 2)

    def openness(self) -> Openness:
        """1 for an output that counts, 0 for all others."""
        return Openness(self.allowed.float(), self.axes)

    def before_load(self, state: dict[str, Tensor], name: str) -> None:
        """Take the checkpoint's number of outputs."""
        stored = state.get(f"{name}.allowed")
        if stored is not None and stored.shape != self.allowed.shape:
            self.allowed = torch.ones(stored.shape, dtype=torch.bool, device=self.allowed.device)

    def fold(self, layer: nn.Module) -> nn.Module:
        """The network with the mask behind it; the network alone where all outputs count."""
        return layer if bool(self.allowed.all()) else Masked(layer, self.allowed)


class Masked(nn.Module):
    """A network some of whose outputs are masked for good.

    Args:
        net: returns logits (…, C), see :meth:`OutputMask.forward`.
        allowed: (C,) bool.
    """

    def __init__(self, net: nn.Module, allowed: Tensor) -> None:
        super().__init__()
        self.net, self.mask = net, OutputMask(len(allowed))
        self.mask.allowed = allowed.clone()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives, masked."""
        return self.mask(self.net(*args, **kwargs))


def counted(logits: Tensor) -> Tensor:
    """Which logits count, bool of their shape: those that a mask has not set to −∞ or to half of the least number of their type.

    In float16 that is −32,752, and may have become float32 since.
    """
    return logits > -3e4
