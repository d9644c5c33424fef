"""Which regularisers have a meaning for which router, and why others have none."""

from __future__ import annotations

from gateplug.core.errors import listed
from gateplug.moe.layers import DSelectK
from gateplug.moe.routers import Router


def possible(router: Router) -> set[str]:
    """Terms that have a meaning for a router."""
    gate = router.gate
    terms = {"load_balance", "z_loss", "importance", "entropy"}
    if gate is None:
        return terms if router.weighs else terms - {"importance"}
    if not any(True for _ in gate.parameters()):
        return set()
    if isinstance(gate, DSelectK):
        terms -= {"z_loss"}
    if gate.k == gate.experts or gate.couples_samples:
        terms -= {"load_balance"}
    if gate.static and (gate.tasks or 1) < 2:
        terms -= {"load_balance", "importance"}
    return terms | ({"smooth_load"} if getattr(gate, "noise", None) is not None else set())


def kind(router: Router) -> str:
    """The class of a router."""
    return type(router.gate or router.module).__name__


def done(router: Router, factors: dict[str, float]) -> str:
    """What is done to a router, for the table at the start."""
    parts = [f"{name} {value:g}" for name, value in factors.items()]
    if isinstance(router.gate, DSelectK):
        parts += ["its own terms"] * router.gate.has_terms + ["no weight decay"]
    return f"{kind(router)}, {router.experts} experts: {', '.join(parts)}"


_REASONS = {
    "load_balance": "it needs gates that choose k < E experts, row by row or for several tasks",
    "importance": "it needs the weights of the chosen experts (an adapter's third part), and a batch to be balanced over",
    "z_loss": "DSelectK has no logits",
    "smooth_load": "it needs gp.TopKGate(noisy=True)",
    "entropy": "there is no distribution",
}


def reason(term: str, routers: list[Router]) -> str:
    """Why a term has no meaning for any of these."""
    return f"{_REASONS[term]}; here are {named(routers)}"


def named(routers: list[Router]) -> str:
    """Routers with their classes."""
    return listed(f"{r.title} ({kind(r)})" for r in routers)
