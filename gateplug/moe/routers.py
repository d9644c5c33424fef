"""Find the routers of a model: gateplug's gates, those of known families, and a user's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gateplug.core.cost import still
from gateplug.core.errors import PlugError, listed, nearest
from gateplug.moe.families import Adapted, Adapters, Read, Seen, llama4, switch, tapped, triple
from gateplug.moe.routing import ExpertGate

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Router:
    """A router of a model."""

    name: str
    """Where to look on; of gateplug's gates their tap."""
    module: nn.Module
    read: Read
    experts: int
    k: int | None
    weighs: bool = True
    """Its output tells the weights of the chosen experts."""
    gate: ExpertGate | None = None
    side: Side = "encoder"
    """`decoder` in the second half of a model that has both; else `encoder`."""

    @property
    def tasks(self) -> int:
        """Choices for each row of the batch."""
        return 1 if self.gate is None else self.gate.tasks or 1

    @property
    def title(self) -> str:
        """The router's own name."""
        return self.name.removesuffix(".tap")

    @property
    def owner(self) -> nn.Module:
        """The router itself."""
        return self.module if self.gate is None else self.gate


def find_routers(module: nn.Module, adapters: Adapters | None = None) -> tuple[dict[str, Router], list[str]]:
    """All routers of `module` by name, in order; and in words what looked like one and was left.

    gateplug's gates; modules of the classes in `adapters`; modules whose class name ends in Router and that return, on a small
    random input, what one of the known families returns.

    Raises:
        PlugError: a class in `adapters` is not in the model, or its adapter does not read what the router returns.
    """
    _check_keys(module, adapters)
    found: dict[str, Router] = {}
    left: list[str] = []
    # a language model that is a decoder alone may be named so (OPT), and has the padding of its inputs
    both = any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in module.modules())
    for name, m in module.named_modules():
        side: Side = "decoder" if both and "decoder" in name.split(".") else "encoder"
        if isinstance(m, ExpertGate):
            place = f"{name}.tap" if name else "tap"
            found[place] = Router(place, m.tap, tapped, m.experts, m.k if m.k < m.experts else None, True, m, side)
        adapter = next((a for cls, a in (adapters or {}).items() if _is_a(m, cls)), None)
        if adapter is not None or re.search("router$", type(m).__name__, re.IGNORECASE):
            reads = [Adapted(adapter, type(m).__name__)] if adapter is not None else [triple, switch, llama4]
            seen = _confirmed(m, reads)
            if isinstance(seen, str) and adapter is not None:
                raise PlugError(f"{name} ({type(m).__name__}) cannot be read with its adapter: {seen}")
            if not isinstance(seen, str) and seen[1] < 2:
                seen = "one expert: there is nothing to choose"
            if isinstance(seen, str):
                left.append(f"{name} ({type(m).__name__}: {seen})")
            else:
                found[name] = Router(name, m, *seen, side=side)
    return found, left


def _check_keys(module: nn.Module, adapters: Adapters | None) -> None:
    if adapters is not None and not isinstance(adapters, Mapping):
        raise PlugError(f"adapters={adapters!r} must be a dict: class of a router, or its name -> function of its output")
    for cls in adapters or {}:
        if not any(_is_a(m, cls) for m in module.modules()):
            here = {type(m).__name__ for m in module.modules()}
            name = cls if isinstance(cls, str) else cls.__name__
            raise PlugError(f"adapters names {name}, and no module here is one.{nearest(name, here)}")


def named_by(layers: Iterable[str], found: Mapping[str, Router], plug: str) -> list[Router]:
    """The routers that are one of `layers` or lie in one.

    Raises:
        PlugError: there is none in one of them.
    """
    layers = list(layers)
    chosen = [r for name, r in found.items() if any(f"{name}.".startswith(f"{layer}.") for layer in layers)]
    lost = [layer for layer in layers if not any(f"{r.name}.".startswith(f"{layer}.") for r in chosen)]
    if lost:
        titles = listed(r.title for r in found.values())
        raise PlugError(f"{plug} finds no router in {listed(lost)}. Routers are: {titles}")
    return chosen


def _is_a(module: nn.Module, cls: type[nn.Module] | str) -> bool:
    names = {name for c in type(module).__mro__ for name in (c.__name__, f"{c.__module__}.{c.__qualname__}")}
    return cls in names if isinstance(cls, str) else isinstance(module, cls)


def _confirmed(router: nn.Module, reads: Sequence[Read]) -> tuple[Read, int, int, bool] | str:
    """How to read a router, its number of experts, k, and whether it tells weights, by running it; or why it is none."""
    matrices = [p for p in router.parameters() if p.dim() == 2]
    if not matrices:
        return "it has no weight matrix"
    if matrices[0].is_meta:
        return "its weights are on the meta device and cannot be run"
    why = ""
    with still(router), torch.random.fork_rng(devices=[]):
        for out in _runs(router, matrices):
            if isinstance(out, Exception):
                why = why or f"it could not be run on rows alone: {type(out).__name__}: {out}"
                continue
            for read in reads:
                try:
                    seen = read(out, None)
                except PlugError:
                    raise
                except Exception as error:  # the output of another family, or an adapter with a fault
                    why = f"the adapter raises {type(error).__name__}: {error}" if isinstance(read, Adapted) else why
                    continue
                if not (lacks := _lacks(seen)):
                    assert seen.assigned is not None
                    return read, seen.scores.shape[-1], seen.assigned.shape[-1], seen.weights is not None
                why = f"the adapter gives {lacks}" if isinstance(read, Adapted) else why
    return why or "what it returns is none of the known forms; give adapters={…}"


def _runs(router: nn.Module, matrices: Sequence[Tensor]) -> Iterator[Any]:
    """What the router makes of rows of each width that one of its matrices may take, or the exception."""
    generator = torch.Generator().manual_seed(0)
    # (experts, dim), but there are those who transpose
    for dim in dict.fromkeys(n for weight in matrices for n in reversed(weight.shape)):
        for shape in ((6, dim), (2, 3, dim)):
            try:
                out = router(torch.randn(shape, generator=generator).to(matrices[0]))
            except Exception as error:  # whatever a module makes of an input that is not of its kind
                out = error
            yield out


def _lacks(seen: Seen) -> str:
    """What does not fit a router that was given 6 rows, or nothing."""
    assigned = seen.assigned
    if assigned is None or seen.scores.dim() != 2:
        return "no choice of experts"
    rows, experts = seen.scores.shape
    if assigned.is_floating_point() or rows != 6 or assigned.dim() != 2 or len(assigned) != rows:
        return f"logits {tuple(seen.scores.shape)} and chosen experts {tuple(assigned.shape)} of {assigned.dtype} for 6 rows"
    if not bool(((assigned >= 0) & (assigned < experts)).all()):
        return f"chosen experts outside of 0 … {experts - 1}"
    if assigned.shape[-1] > experts or (seen.weights is not None and len(seen.weights) != rows):
        return "more choices than experts, or weights for another number of rows"
    return ""


def no_router(module: nn.Module, left: Sequence[str]) -> str:
    """The message for a model without a router."""
    around = [
        f"{name} ({type(m).__name__} {tuple(m.weight.shape)})"
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and m.out_features <= 256 and re.search(r"moe|expert|gate|rout", name, re.IGNORECASE)
    ]
    return (
        "finds no router in this model: none of gateplug's gates, no module whose class name ends in Router and returns what a "
        f"known family returns. Looked at: {listed(left)}. Linear layers that may be one: {listed(around)}. For a router of your "
        "own give adapters={MyRouter: lambda out: (logits, chosen_experts)}"
    )
