"""Which plugs go together: one cell per pair of the plugs in the battery. The docs show this table as it stands here."""

from __future__ import annotations

TOGETHER = "together"

_SAME_BLOCK = "both change the activation of a feed-forward: give them different layers"

_BESIDE = (
    "ReplaceFFN",
    "ReplaceActivation",
    "Upcycle",
    "RegulateRouters",
    "ExpertMonitor",
    "EarlyExit",
    "GateMonitor",
    "ToyPlug",
)
_HOLDING = ("EWC", "SynapticIntelligence", "MAS")
_FOLLOWING = (*_HOLDING, "Replay", "ContinualMetrics", "HeadMask")
_TWO_WAYS = "both hold back what earlier tasks need, each in its way: take one"

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
    **{frozenset({a, b}): TOGETHER for a in (*_FOLLOWING, "GateON", "ContextDetector") for b in _BESIDE},
    **{frozenset({a, b}): TOGETHER for i, a in enumerate(_FOLLOWING) for b in _FOLLOWING[:i]},
    **{frozenset({a, b}): TOGETHER for a in ("GateON", "ContextDetector") for b in ("ContinualMetrics", "HeadMask")},
    **{frozenset({a, b}): _TWO_WAYS for a in ("GateON", "ContextDetector") for b in _HOLDING},
    **{
        frozenset({a, "Replay"}): "samples of earlier tasks would run through the gates of the running one"
        for a in ("GateON", "ContextDetector")
    },
    frozenset({"GateON", "ContextDetector"}): f"{TOGETHER}, GateON first",
    frozenset({"GateON", "ReplaceFFN"}): f"{TOGETHER}, ReplaceFFN first",
    frozenset({"GateON", "ReplaceActivation"}): f"{TOGETHER}, ReplaceActivation first",
    frozenset({"GateON", "Upcycle"}): "both take over a feed-forward: give them different layers",
    frozenset({"Replay", "EarlyExit"}): "exits listen to one forward a step",
}
"""A pair of names -> `TOGETHER`, `together, NAME first` where the order in the callbacks matters, or why it is refused."""

TEST_ONLY = {"ToyPlug"}
"""Plugs that exist for the tests; the docs leave them out."""
