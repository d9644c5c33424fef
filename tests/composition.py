"""Which plugs go together: one cell per pair of the plugs in the battery. The docs show this table as it stands here."""

from __future__ import annotations

TOGETHER = "together"

_SAME_BLOCK = "both change the activation of a feed-forward: give them different layers"

CELLS: dict[frozenset[str], str] = {
    frozenset({"ReplaceFFN", "ReplaceActivation"}): _SAME_BLOCK,
    frozenset({"ReplaceFFN", "GateMonitor"}): TOGETHER,
    frozenset({"ReplaceFFN", "ToyPlug"}): f"{TOGETHER}, ReplaceFFN first",
    frozenset({"ReplaceActivation", "GateMonitor"}): TOGETHER,
    frozenset({"ReplaceActivation", "ToyPlug"}): TOGETHER,
    frozenset({"GateMonitor", "ToyPlug"}): TOGETHER,
    frozenset({"EarlyExit", "ReplaceFFN"}): TOGETHER,
    frozenset({"EarlyExit", "ReplaceActivation"}): TOGETHER,
    frozenset({"EarlyExit", "Upcycle"}): TOGETHER,
    frozenset({"EarlyExit", "RegulateRouters"}): TOGETHER,
    frozenset({"EarlyExit", "ExpertMonitor"}): TOGETHER,
    frozenset({"EarlyExit", "GateMonitor"}): TOGETHER,
    frozenset({"EarlyExit", "ToyPlug"}): TOGETHER,
    frozenset({"Upcycle", "ReplaceFFN"}): "both take over a feed-forward: give them different layers",
    frozenset({"Upcycle", "ReplaceActivation"}): _SAME_BLOCK,
    frozenset({"Upcycle", "GateMonitor"}): TOGETHER,
    frozenset({"Upcycle", "ToyPlug"}): f"{TOGETHER}, Upcycle first",
    frozenset({"Upcycle", "RegulateRouters"}): f"{TOGETHER}, Upcycle first",
    frozenset({"Upcycle", "ExpertMonitor"}): TOGETHER,
    **{
        frozenset({"RegulateRouters", other}): TOGETHER for other in ("ReplaceFFN", "ReplaceActivation", "GateMonitor", "ToyPlug")
    },
    **{frozenset({"ExpertMonitor", other}): TOGETHER for other in ("ReplaceFFN", "ReplaceActivation", "GateMonitor", "ToyPlug")},
    frozenset({"RegulateRouters", "ExpertMonitor"}): TOGETHER,
}
"""A pair of names -> `TOGETHER`, `together, NAME first` where the order in the callbacks matters, or why it is refused."""

TEST_ONLY = {"ToyPlug"}
"""Plugs that exist for the tests; the docs leave them out."""
