"""Compare two things on a machine that others use as well: many short rounds, both sides in each, in random order.

A round measures ours and the peer one right after the other and gives one ratio; the result is the median of these ratios, which
a burst of somebody else's load moves little. Times are CPU seconds of this process (of the child, for processes), so that
what others compute does not count; on a quiet machine with one thread they equal wall time.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

Side = Callable[[], float]
"""Runs once and returns its cost: seconds or bytes."""


@dataclass
class Line:
    """One line of the table, and one key of the result."""

    key: str
    what: str
    ours: float
    peer: float
    ratios: list[float]
    goal: str

    @property
    def ratio(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.ratios)


def arguments(what: str) -> argparse.Namespace:
    """`--quick` and `--only KEY`."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: at most 45 s on two free cores")
    parser.add_argument("--only", nargs="*", help="these keys alone")
    return parser.parse_args()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call, the mean over `repeats`."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def compare(key: str, what: str, ours: Side, peer: Side, rounds: int, goal: str, warm_up: int = 1) -> Line:
    """Run both sides `rounds` times in pairs of random order, after `warm_up` rounds that do not count.

    The ratio is ours ÷ peer, or peer ÷ ours where the key ends in `_speedup` or `_saving`.
    """
    order = random.Random(0)
    pairs = []
    for _ in range(rounds + warm_up):
        first_ours = order.random() < 0.5
        results = [side() for side in ((ours, peer) if first_ours else (peer, ours))]
        pairs.append(results if first_ours else results[::-1])
    return line(key, what, [(ours, peer) for ours, peer in pairs[warm_up:]], goal)


def line(key: str, what: str, pairs: Sequence[tuple[float, float]], goal: str) -> Line:
    """The line of a table for (ours, peer) of each round."""
    inverse = key.endswith(("_speedup", "_saving"))
    ratios = [b / a if inverse else a / b for a, b in pairs]
    return Line(key, what, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratios, goal)


def report(lines: list[Line]) -> None:
    """Print the table, the versions, and the result as one JSON object in the last entry."""
    print(f"{'key':<21}{'what':<56}{'ours':>11}{'peer':>11}   {'ratio: median [min … max]':<27}{'rounds':>6}  goal")
    for entry in lines:
        spread = f"{entry.ratio:.3f} [{min(entry.ratios):.3f} … {max(entry.ratios):.3f}]"
        print(
            f"{entry.key:<21}{entry.what:<56}{_amount(entry.ours, entry.key):>11}{_amount(entry.peer, entry.key):>11}   "
            f"{spread:<27}{len(entry.ratios):>6}  {entry.goal}"
        )
    import torch

    names = ("gateplug", "torch", "lightning", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"threads {torch.get_num_threads()}; python {platform.python_version()}, {versions}; CPU seconds, {platform.machine()}")
    sys.stdout.flush()
    print(json.dumps({entry.key: round(entry.ratio, 4) for entry in lines}))


def _amount(value: float, key: str) -> str:
    if key.endswith("_saving"):
        return f"{value / 2**20:.2f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3f} ms"
