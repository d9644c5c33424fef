"""What a network costs: multiply-accumulates, parameters, bytes, and time as a comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop


@dataclass(frozen=True)
class Cost:
    """Cost of one forward.

    Attributes:
        macs: multiply-accumulates of matrix products, convolutions and attention, for the example as given.
        parameters: numbers in all parameters, tied ones once.
        bytes: memory of parameters and buffers.
    """

    macs: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward: median and 95th percentile over `runs`."""

    p50: float
    p95: float
    runs: int


def cost(module: nn.Module, example: Any) -> Cost:
    """Count one forward of `module` in eval mode, without gradient; the module is left as it was.

    MACs are half of what torch's FlopCounterMode counts, which gives a multiply-add as 2. The CPU kernel of
    `scaled_dot_product_attention` and grouped products, which that mode does not know, are counted by formulas of the same kind.

    Args:
        module: any network.
        example: what it is called with: a mapping (keyword arguments), a tuple or list (positional), or one value.
    """
    with counted_macs(module) as so_far:
        call(module, example)
        macs = so_far()
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return Cost(
        macs=macs,
        parameters=sum(p.numel() for p in module.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


@contextmanager
def counted_macs(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Count what is run while this lasts, `module` in eval mode and without gradient; gives a function: the MACs so far."""
    # a stand-in for the CPU kernel: its arguments begin with query, key, value as those of the other attention kernels
    mapping: dict[Any, Callable[..., int]] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    if hasattr(torch.ops.aten, "_grouped_mm"):
        mapping[torch.ops.aten._grouped_mm] = _grouped_product
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with still(module), _constant(module), ordinary_attention(), counter:
        yield lambda: counter.get_total_flops() // 2


def latency(module: nn.Module, example: Any, runs: int = 30, warm_up: int = 5) -> Latency:
    """Time the forward of `module` in eval mode, without gradient, after `warm_up` calls that do not count.

    Raises:
        ValueError: `runs` < 1 or `warm_up` < 0.
    """
    return compare_latency({"": (module, example)}, runs, warm_up)[""]


def compare_latency(contenders: Mapping[str, tuple[nn.Module, Any]], runs: int = 30, warm_up: int = 5) -> dict[str, Latency]:
    """Time several networks in turn, one call each per round, so that a machine that slows down slows all of them.

    Args:
        contenders: name -> (module, example).
        runs: rounds that count, ≥ 1.
        warm_up: rounds that do not, ≥ 0.

    Raises:
        ValueError: `runs` < 1, `warm_up` < 0, or nothing to time.
    """
    if runs < 1 or warm_up < 0 or not contenders:
        raise ValueError(f"runs={runs} must be ≥ 1, warm_up={warm_up} ≥ 0, and there must be something to time")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + runs):
        for name, (module, example) in contenders.items():
            with still(module):
                seconds = timed(lambda m=module, e=example: call(m, e))  # type: ignore[misc]
            if turn >= warm_up:
                times[name].append(seconds)
    return {name: Latency(_quantile(t, 0.5), _quantile(t, 0.95), runs) for name, t in times.items()}


def call(module: nn.Module, example: Any) -> Any:
    """Call a module with an example batch: a mapping by keyword, a tuple or list by position, anything else as it is."""
    if isinstance(example, Mapping):
        return module(**example)
    if isinstance(example, tuple | list):
        return module(*example)
    return module(example)


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradient while this lasts; every part then trains or not as it did before."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes.items():
            m.training = training


@contextmanager
def ordinary_attention() -> Iterator[None]:
    """Send `nn.TransformerEncoderLayer` down its ordinary path: the fused one is one operator that nothing looks into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient: torch's counter fails on a layer that is handed one without a graph."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes, until the GPU is done with it."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _grouped_product(rows: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Twice rows · width · out, whichever group a row belongs to."""
    count: int = 2 * rows[-2] * rows[-1] * weights[-1]
    return count


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    count: int = sdpa_flop(query, key, value)
    return count
