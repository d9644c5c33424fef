"""What comes after each layer of a network, read off its graph (torch.fx); nothing is run."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchmetrics import Metric

from gateplug.core.activations import is_activation
from gateplug.core.feed_forward import is_linear
from gateplug.core.gate import Gate
from gateplug.core.record import join

HOMOGENEOUS = {F.relu, torch.relu, torch.relu_, F.leaky_relu, F.prelu, "relu", "relu_"}
"""Functions f with f(z) · ∂ℓ/∂f = z · ∂ℓ/∂z: relevance can be read before them."""
OTHERS = {F.gelu, F.silu, F.elu, F.selu, F.celu, F.softplus, F.hardswish, F.hardtanh, F.mish, torch.tanh, torch.sigmoid, F.tanh,
          F.sigmoid, F.logsigmoid, F.relu6, F.hardsigmoid, "tanh", "sigmoid"}  # fmt: skip
NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
THROUGH = (*NORMS, nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten, Gate, nn.modules.pooling._MaxPoolNd,
           nn.modules.pooling._AvgPoolNd)  # fmt: skip
_NOT_HIDDEN = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
_PRODUCTS = {operator.mul, torch.mul, "mul"}


@dataclass(frozen=True)
class Followed:
    """A layer with an activation behind it."""

    layer: str
    reads: str | None
    activation: str
    rows: tuple[str, ...]


@dataclass
class Trace:
    """What the graph of a module tells."""

    followed: list[Followed] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    """Layers from which the output is reached without another layer."""


class _Tracer(fx.Tracer):
    """Looks not into activations and gates. Which modules are activations is found by calling them, so before it traces."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Gate) or m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, closed: Iterable[nn.Module] = ()) -> Trace | None:
    """Follow the layers of a module, or None where its forward cannot be followed without running it.

    Args:
        module: whose forward.
        closed: modules in it that are not looked into.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _untouched(module):
        activations = {m for m in module.modules() if is_activation(m) or _elementwise(m)}
        try:
            graph = _Tracer({*activations, *closed}).trace(module)
        except Exception:  # whatever a forward makes of stand-ins for tensors
            return None
    parts = dict(module.named_modules())
    seen = Trace()
    done: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_module" or not _layer(parts[str(node.target)]) or node.target in done:
            continue
        done.add(str(node.target))
        found = _after(node, parts, activations)
        if found is not None:
            seen.followed.append(found)
    seen.last = _last(graph, parts)
    return seen


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """A forward may keep what it saw in an attribute, or count in a buffer: afterwards all is as it was."""
    kept = [(m, dict(m.__dict__), dict(m._buffers)) for m in module.modules()]
    values = [(b, b._version, b.clone()) for m in module.modules() for b in m._buffers.values() if b is not None]
    try:
        yield
    finally:
        for m, attributes, buffers in kept:
            for name in set(m.__dict__) - set(attributes):
                del m.__dict__[name]
            m.__dict__.update(attributes)
            m._buffers.update(buffers)
        for buffer, version, value in values:
            if buffer._version != version:
                buffer.copy_(value)


def _elementwise(module: nn.Module) -> bool:
    """Whether somebody's own module computes a function of each number by itself, and no linear one: an activation."""
    numbers = [*module.parameters(), *module.buffers()]
    if list(module.children()) or isinstance(module, Metric) or any(t.numel() != 1 or t.is_meta for t in numbers):
        return False
    like = next((t for t in numbers if t.is_floating_point()), torch.zeros(1))
    x = torch.linspace(-4.0, 4.5, 65).to(like)
    try:
        y, turned = module(x.clone()), module(x.flip(0))
    except Exception:  # whatever a module makes of a vector of numbers
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y.flip(0), turned, atol=1e-6):
        return False
    return not torch.allclose(y.float().diff(n=2), torch.zeros(63, device=y.device), atol=1e-5)


def _layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.modules.conv._ConvNd)


def _after(node: fx.Node, parts: dict[str, nn.Module], activations: set[nn.Module]) -> Followed | None:
    """The activation behind a layer, with what stands between them."""
    layer, reads = str(node.target), str(node.target)
    rows: list[str] = []
    while len(node.users) == 1:
        (user,) = node.users
        module = parts.get(str(user.target)) if user.op == "call_module" else None
        if module is not None and isinstance(module, _NOT_HIDDEN):
            return None
        if module in activations:
            return Followed(layer, str(user.target), type(module).__name__, (*rows, *_partner(user, parts)))
        if module is not None and isinstance(module, THROUGH):
            if isinstance(module, NORMS):
                rows.append(str(user.target))
            if not isinstance(module, nn.Flatten):
                reads = str(user.target)
        elif user.target in HOMOGENEOUS or user.target in OTHERS:
            name = str(getattr(user.target, "__name__", user.target))
            heard = reads if user.target in HOMOGENEOUS else None
            return Followed(layer, heard, name, (*rows, *_partner(user, parts)))
        elif not _reshapes(user):
            return None
        node = user
    return None


def _reshapes(user: fx.Node) -> bool:
    return user.target in {F.dropout, torch.flatten, F.max_pool2d, F.avg_pool2d, F.max_pool1d, "flatten", "float"}


def _partner(activation: fx.Node, parts: dict[str, nn.Module]) -> tuple[str, ...]:
    """The layer whose output is multiplied by the activation: the other branch of a gated feed-forward."""
    if len(activation.users) != 1:
        return ()
    (user,) = activation.users
    others: list[Any] = [a for a in user.args if isinstance(a, fx.Node) and a is not activation]
    if user.target not in _PRODUCTS or len(others) != 1:
        return ()
    other = others[0]
    if other.op == "call_module" and is_linear(parts[str(other.target)]) and len(other.users) == 1:
        return (str(other.target),)
    return ()


def _last(graph: fx.Graph, parts: dict[str, nn.Module]) -> list[str]:
    output = next(node for node in graph.nodes if node.op == "output")
    found: dict[str, None] = {}
    waiting, visited = list(output.all_input_nodes), set()
    while waiting:
        node = waiting.pop()
        if node in visited:
            continue
        visited.add(node)
        name = str(node.target)
        inside = [n for n, m in parts[name].named_modules() if _layer(m)] if node.op == "call_module" else []
        if inside:  # of what is not looked into, the layer that was built last
            found[join(name, inside[-1])] = None
        else:
            waiting += node.all_input_nodes
    return list(found)
