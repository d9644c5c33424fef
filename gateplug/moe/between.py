"""What stands between the two layers of a feed-forward and acts in training alone: dropouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gateplug.core.cost import ordinary_attention, still
from gateplug.core.feed_forward import FeedForward, examples, same, surroundings
from gateplug.moe.probing import switch_on


@dataclass(frozen=True)
class Between:
    """Modules between activation and second layer that do something in training, by name."""

    modules: list[tuple[str, nn.Module]]

    @property
    def rate(self) -> float | None:
        """Probability, if it is one ordinary dropout or none at all."""
        if not self.modules:
            return 0.0
        one = self.modules[0][1]
        return float(one.p) if len(self.modules) == 1 and type(one) is nn.Dropout else None


def between(root: nn.Module, block: FeedForward) -> Between | str:
    """Find what would have to go into the experts, by running the block; or say why it cannot.

    In eval mode a dropout is seen by what goes into it: what goes into the second layer. One that is called as a function is seen
    by the second layer's input in training mode.
    """
    holder, first, second = (root.get_submodule(n) for n in (block.holder, block.first, block.second))
    activation = getattr(holder, block.attribute)
    around = surroundings(root, holder, block)
    seen: dict[nn.Module, list[Tensor]] = {}
    outs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(module, []).append(args[0].clone())
        if isinstance(out, Tensor):
            outs[module] = out.clone()

    leaves = [m for m in around.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(note) for m in {*leaves, first, second}]
    weight = first.weight
    assert isinstance(weight, Tensor)
    try:
        with still(around), ordinary_attention(), torch.random.fork_rng(devices=[]):
            for example in examples(block.dim, weight):
                seen.clear()
                try:
                    around(*example)
                except Exception:  # whatever a module makes of an input that is not of its kind
                    continue
                if {first, second} <= seen.keys():
                    break
            quiet = [m for m in seen if m not in (first, second, activation) and not _idle(m)]
            mine = [m for m in quiet if any(same(x, seen[second][0]) for x in seen[m]) and same(outs[m], seen[second][0])]
            early = [m for m in quiet if any(same(x, outs[first]) for x in seen[m]) and m not in mine]
            calls = {m: len(seen[m]) for m in mine}
            seen.clear()
            switch_on(around, [m for n, m in root.named_modules() if _holds(n, block) and m in set(around.modules())])
            around(*example)
            steady = same(activation(outs[first].clone()), seen[second][0])
    finally:
        for hook in hooks:
            hook.remove()
    if early:
        return f"a {type(early[0]).__name__} stands before the activation, where experts have none"
    if not steady:
        return "a dropout is called as a function between the activation and the second layer, and would not act on hidden units"
    slots = {m: [f"{n}.{k}".lstrip(".") for n, p in root.named_modules() for k, c in p._modules.items() if c is m] for m in mine}
    if any(len(slots[m]) > 1 or calls[m] > 1 for m in mine):
        shared = next(m for m in mine if len(slots[m]) > 1 or calls[m] > 1)
        return f"{shared} between the activation and the second layer is used elsewhere too ({', '.join(slots[shared])})"
    return Between([(slots[m][0], m) for m in mine])


def _holds(name: str, block: FeedForward) -> bool:
    """Whether a module has a part of the block in it."""
    return any(not name or part.startswith(f"{name}.") for part in (block.first, block.slot, block.second))


def _idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or getattr(module, "p", None) == 0
