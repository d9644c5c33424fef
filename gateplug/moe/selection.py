"""What routers have come to, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from gateplug.core.errors import listed
from gateplug.moe.layers import DSelectK
from gateplug.moe.routing import ExpertGate


def static_gates(module: nn.Module) -> dict[str, DSelectK]:
    """Static DSelect-k gates that still learn which experts to take, by name."""
    gates = {name: m for name, m in module.named_modules() if isinstance(m, DSelectK) and isinstance(m.z, nn.Parameter)}
    return {name: gate for name, gate in gates.items() if gate.z.requires_grad}


def warn_frozen(module: nn.Module) -> None:
    """Warn of selector bits that start where the smooth step is flat: they have no gradient, and never will."""
    bad = {name: int((gate.frozen() * gate.bits).sum()) for name, gate in static_gates(module).items()}
    if bad := {name: n for name, n in bad.items() if n}:
        rank_zero_warn(
            "selector bits of DSelectK start outside of ± gamma / 2 and are frozen: "
            f"{listed(f'{n} of {name}' for name, n in bad.items())}. Start them closer to 0 (gate.reset_parameters()) or give a "
            "larger gamma; harden() says that they are meant to be fixed"
        )


def warn_ahead(module: nn.Module, gates: Iterable[ExpertGate], capacity_factor: float | None = None) -> None:
    """Warn of choices in a causal language model that depend on what comes later in the text."""
    causal = [type(m).__name__ for m in module.modules() if type(m).__name__.endswith(("ForCausalLM", "LMHeadModel"))]
    if not causal:
        return
    if any(gate.couples_samples for gate in gates):
        rank_zero_warn(f"the gate sees the whole batch: in {causal[0]} that is a look into the future")
    if capacity_factor is not None:
        rank_zero_warn(
            f"with a capacity, later tokens can push out the choices of earlier ones: in {causal[0]} that is a look into the "
            "future. Leave capacity_factor out, or trust no likelihood that is measured so"
        )


def warn_unreached(module: nn.Module, measured: Mapping[str, float]) -> None:
    """Warn of gates that use more than k experts at the end of a training, or fewer.

    Args:
        module: a static gate is read there.
        measured: by the name of a gate that decides for each example, the mean number of experts that it used of late.
    """
    more, fewer = [], []
    for name, mean in measured.items():
        gate = module.get_submodule(name)
        if isinstance(gate, DSelectK) and isinstance(gate.z, nn.Linear) and round(mean, 2) > gate.k:
            more.append(f"{name} (k={gate.k}; {mean:.3g} used in the mean of its last examples)")
    for name, gate in static_gates(module).items():
        used = (gate.weights() != 0).sum(-1).flatten()
        many, few = int((used > gate.k).sum()), int((used < gate.k).sum())
        text = f"{name} (k={gate.k}; {used.float().mean():.3g} used)"
        more += [f"{many} of {len(used)} in {text}" if len(used) > 1 else text] * bool(many)
        fewer += [f"{few} of {len(used)} in {text}" if len(used) > 1 else text] * bool(few)
    if more:
        rank_zero_warn(
            f"DSelectK gates have not come down to k experts: {listed(more)}. Let entropy end higher (a gp.Ramp), train longer, "
            "or round a static one with harden(force=True)"
        )
    if fewer:
        rank_zero_warn(f"selectors of DSelectK gates have chosen the same expert: {listed(fewer)}")


def warn_asleep(modules: Mapping[str, nn.Module]) -> None:
    """Warn of routers in eval mode: `from_pretrained` gives a model so, and Lightning leaves it."""
    asleep = [name for name, module in modules.items() if not module.training]
    if asleep:
        rank_zero_warn(
            f"routers that are in eval mode are not regularised: {listed(asleep)}. Call model.train() on the network before the "
            "fit, if it is meant to be trained"
        )
