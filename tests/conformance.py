"""What every plug must survive, as one battery. A room registers its plug with one line in `CASES`.

DESIGN: the table "What works means". The checks themselves are in `test_conformance.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import gateplug as gp
from tests.continual.streamed import Streamed
from tests.plugs import Switch, ToyPlug


@dataclass(frozen=True)
class Case:
    """A plug in the battery.

    Attributes:
        make: fresh callbacks; the last one is the plug under test, those before it what it needs to have something to do.
        bad: constructor arguments that must be refused: (arguments, error, text that its message must contain).
        register: classes that `gp.load` must be told of.
    """

    make: Callable[[], list[Any]]
    bad: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)
    register: tuple[type, ...] = ()

    def plug(self) -> gp.Plug:
        """The plug under test."""
        return self.make()[-1]


CASES: dict[str, Case] = {
    "ReplaceFFN": Case(
        lambda: [gp.ReplaceFFN("swiglu")],
        bad=[
            ({"variant": "swiglo"}, ValueError, "Did you mean 'swiglu'"),
            ({"match": "size"}, ValueError, "'parameters'"),
            ({"warm_start": True}, ValueError, "match='width'"),
            ({"warm_start": "exact", "match": "width"}, ValueError, "'nearest'"),
            ({"warm_start": True, "match": "width", "variant": "ffn"}, ValueError, "plain block"),
            ({"multiple_of": 0}, ValueError, "≥ 1"),
            ({"multiple_of": 8.0}, ValueError, "whole number"),
            ({"lr_scale": -1.0}, ValueError, "≥ 0"),
            ({"lr_scale": "0.5"}, ValueError, "must be a finite number"),
            ({"bias": "no"}, TypeError, "bias='no'"),
            ({"recompute": "no"}, TypeError, "recompute='no'"),
            ({"variant": None}, ValueError, "not known"),
            ({"layers": "decoder.*"}, gp.PlugError, "finds no layer"),
            ({"layers": 3}, TypeError, "way to name layers"),
        ],
    ),
    "ReplaceActivation": Case(
        lambda: [gp.ReplaceActivation(nn.ReLU, gp.TemperedSigmoid(trainable=True))],
        bad=[
            ({"old": "relo"}, ValueError, "allowed are"),
            ({"old": nn.ReLU()}, TypeError, "nn.ReLU"),
            ({"new": "tanh"}, TypeError, "gp.TemperedSigmoid"),
            ({"new": lambda: 3}, TypeError, "no module"),
            ({"old": nn.GELU}, gp.PlugError, "finds no GELU"),
            ({"layers": "decoder.*"}, gp.PlugError, "finds no layer"),
        ],
    ),
    "Upcycle": Case(
        lambda: [gp.Upcycle(experts=4, k=2)],
        bad=[
            ({"experts": 1}, ValueError, "at least 2"),
            ({"experts": 4.0}, TypeError, "whole number"),
            ({"experts": True}, TypeError, "whole number"),
            ({"k": 0}, ValueError, "1 … 8"),
            ({"k": 9}, ValueError, "1 … 8"),
            ({"gate": "topk"}, ValueError, "Did you mean 'top_k'"),
            ({"gate": 3}, TypeError, "function (experts, dim)"),
            ({"gate": "expert_choice"}, ValueError, "sum to 1"),
            ({"gate_args": {"normalize": "all"}}, ValueError, "normalize='selected'"),
            ({"gate_args": {"normalise": "all"}}, ValueError, "do not fit TopKGate"),
            ({"gate": "dselect_k", "experts": 5}, ValueError, "renormalize=True"),
            ({"noise": -1.0}, ValueError, "≥ 0"),
            ({"capacity_factor": 0.0}, ValueError, "> 0"),
            ({"capacity_factor": 1.0, "gate": "softmax"}, ValueError, "exactly k experts"),
            ({"drop": "random"}, ValueError, "'score'"),
            ({"lr_scale": -1.0}, ValueError, "≥ 0"),
            ({"layers": "decoder.*"}, gp.PlugError, "finds no layer"),
            ({"layers": "net.embed"}, gp.PlugError, "no feed-forward in net.embed"),
            ({"layers": 3}, TypeError, "way to name layers"),
        ],
    ),
    "RegulateRouters": Case(
        # terms that are means over the rows: load_balance is a product of means, and of one batch alone. All experts: in half
        # precision a token between two of the k largest goes one way in one run and another way in the next. Both: tests/moe
        lambda: [gp.Upcycle(experts=4, gate="softmax"), gp.RegulateRouters(z_loss=0.05, entropy=-0.02)],
        bad=[
            ({"load_balance": -0.1}, ValueError, "≥ 0"),
            ({"z_loss": float("nan")}, ValueError, "finite"),
            ({"entropy": float("inf")}, ValueError, "finite"),
            ({"bias_rate": "fast"}, ValueError, "finite"),
            ({"scope": "all"}, ValueError, "'global'"),
            ({"load_balance": 0.1}, gp.PlugError, "finds no router"),
            ({"load_balance": 0.1, "routers": "decoder.*"}, gp.PlugError, "finds no layer"),
            ({"load_balance": 0.1, "routers": "net.head"}, gp.PlugError, "finds no router in net.head"),
            ({"routers": 3}, TypeError, "way to name layers"),
        ],
    ),
    "ExpertMonitor": Case(
        lambda: [gp.Upcycle(experts=4, k=2), gp.ExpertMonitor(every_n_steps=3)],
        bad=[
            ({"every_n_steps": 0}, ValueError, "≥ 1"),
            ({"every_n_steps": 2.5}, ValueError, "whole number"),
            ({"collapse": 0.0}, ValueError, "(0, 1]"),
        ],
    ),
    "EarlyExit": Case(
        # both phases within the first batches; one head has no warm-up, which would keep the weights of a validation
        lambda: [gp.EarlyExit(cost_weight=0.1, freeze_backbone=False, warmup_epochs=0, every=1, latency=())],
        bad=[
            ({"cost_weight": -1.0}, ValueError, "≥ 0"),
            ({"cost_weight": "much"}, TypeError, "must be a number"),
            ({"gate": "jay"}, ValueError, "confidence"),
            ({"mode": "oficial"}, ValueError, "Did you mean 'official'"),
            ({"weighting": "none"}, ValueError, "uniform"),
            ({"every": 0}, ValueError, "≥ 1"),
            ({"warmup_epochs": -1}, ValueError, "≥ 0"),
            ({"warmup_epochs": 1.5}, TypeError, "whole number"),
            ({"head": "mlp"}, ValueError, "function (width, classes)"),
            ({"pool": lambda h: h[:, 0]}, ValueError, "width=d"),
            ({"features": ["margins"]}, ValueError, "Did you mean 'margin'"),
            ({"freeze_backbone": "no"}, TypeError, "True or False"),
            ({"lr_scale": -1.0}, ValueError, "≥ 0"),
            ({"operating_point": {"macs": 0.5}}, ValueError, "'cost'"),
            ({"operating_point": {"cost": 1.5}}, ValueError, "[0, 1]"),
            ({"operating_point": {"latency": -1}}, ValueError, "seconds of a batch"),
            ({"latency": "1"}, TypeError, "list of batch sizes"),
            ({"latency": [0]}, ValueError, "≥ 1"),
            ({"latency": [1.5]}, TypeError, "whole number"),
            ({"alpha": 0.0}, ValueError, "alpha"),
            ({"at": 0}, ValueError, "≥ 1"),
            ({"at": 5}, gp.PlugError, "there are 2 blocks"),
            ({"at": "5"}, gp.PlugError, "there are 2 blocks"),
            ({"at": "decoder.*"}, gp.PlugError, "at='decoder.*' finds no layer"),
            ({"at": ["net.blocks.1"]}, gp.PlugError, "the last block"),
            ({"at": 2.5}, TypeError, "way to name layers"),
        ],
    ),
    "GateON": Case(
        # with a change of context every few steps, so that something is held back; availability of single weights is made of
        # squares of small numbers, which half precision does not keep to the tolerance that is asked here: tests/continual
        lambda: [Switch(), gp.GateON(contexts=3, others="free")],
        bad=[
            ({"relevance": "neurons"}, ValueError, "Did you mean 'neuron'"),
            ({"obstruct": "gradient"}, ValueError, "Did you mean 'grad'"),
            ({"obstruct": "none"}, ValueError, "relevance='none' as well"),
            ({"relevance": "none"}, ValueError, "obstruct='none' as well"),
            ({"contexts": 0}, ValueError, "≥ 1"),
            ({"contexts": 2.5}, TypeError, "whole number"),
            ({"eta": 0.0}, ValueError, "> 0"),
            ({"eta": "fast"}, TypeError, "must be a number"),
            ({"open_share": 1.0}, ValueError, "(0, 1)"),
            ({"reactivation": -1.0}, ValueError, "≥ 0"),
            ({"heads": "frozen"}, ValueError, "obstructed"),
            ({"others": "held"}, ValueError, "frozen"),
            ({"bn": "own"}, ValueError, "per_context"),
            ({"lr_scale": -1.0}, ValueError, "≥ 0"),
            ({"layers": "net.head"}, gp.PlugError, "is the read-out"),
            ({"layers": "decoder.*"}, gp.PlugError, "finds no layer"),
            ({"layers": "net.blocks.0.norm"}, gp.PlugError, "nothing to gate in net.blocks.0.norm"),
            ({"layers": 3}, TypeError, "way to name layers"),
        ],
        register=(Switch,),
    ),
    "ContextDetector": Case(
        lambda: [gp.GateON(others="free"), gp.ContextDetector()],
        bad=[
            ({"window": 1}, ValueError, "≥ 2"),
            ({"window": 2.5}, TypeError, "whole number"),
            ({"threshold": 1.0}, ValueError, "> 1"),
            ({"threshold": "high"}, TypeError, "must be a number"),
            ({"confidence": 1.0}, ValueError, "[0, 1)"),
            ({"rate": 0.0}, ValueError, "(0, 1]"),
            ({"patience": 0}, ValueError, "≥ 1"),
            ({"tolerance": 0}, ValueError, "≥ 1"),
            ({"score": "margin"}, ValueError, "function of logits"),
            ({"labelled": -1}, ValueError, "≥ 0"),
        ],
    ),
    "ContinualMetrics": Case(
        lambda: [gp.ReplaceFFN("swiglu"), Streamed(validate=True), gp.ContinualMetrics()],
        bad=[
            ({"every_task": 0}, ValueError, "≥ 1"),
            ({"every_task": 1.5}, TypeError, "whole number"),
            ({"joint": [0.9, 90.0]}, ValueError, "[0, 1]"),
            ({"predict": "logits"}, TypeError, "function (module, batch)"),
        ],
    ),
    "HeadMask": Case(
        lambda: [Streamed(), gp.HeadMask()],
        bad=[({"layers": "decoder.*"}, gp.PlugError, "finds no layer"), ({"layers": 3}, TypeError, "way to name layers")],
    ),
    "EWC": Case(
        lambda: [gp.ReplaceFFN("swiglu"), Streamed(), gp.EWC(weight=10.0, samples=20)],
        bad=[
            ({"weight": -1.0}, ValueError, "≥ 0"),
            ({"weight": "much"}, TypeError, "must be a number"),
            ({"samples": 0}, ValueError, "≥ 1"),
            ({"samples": 1.5}, TypeError, "whole number"),
            ({"online": 1}, TypeError, "True or False"),
            ({"online": True, "decay": 1.5}, ValueError, "[0, 1]"),
            ({"decay": 0.5}, ValueError, "online=True"),
            ({"fisher": "sample"}, ValueError, "Did you mean 'sampled'"),
            ({"seed": 0.5}, TypeError, "whole number"),
        ],
    ),
    "SynapticIntelligence": Case(
        lambda: [gp.ReplaceFFN("swiglu"), Streamed(), gp.SynapticIntelligence(weight=1.0)],
        bad=[
            ({"weight": float("nan")}, ValueError, "finite"),
            ({"xi": 0.0}, ValueError, "> 0"),
            ({"xi": "small"}, TypeError, "must be a number"),
        ],
    ),
    "MAS": Case(
        lambda: [gp.ReplaceFFN("swiglu"), Streamed(), gp.MAS(weight=1.0, samples=20)],
        bad=[
            ({"weight": -1.0}, ValueError, "≥ 0"),
            ({"samples": 0}, ValueError, "≥ 1"),
            ({"accumulate": "means"}, ValueError, "Did you mean 'mean'"),
        ],
    ),
    "Replay": Case(
        # without a stream it waits: each micro-batch has a draw of its own, so accumulation is no large batch (tests/continual)
        lambda: [gp.ReplaceFFN("swiglu"), gp.Replay(samples=40, kind="der++")],
        bad=[
            ({"samples": 0}, ValueError, "≥ 1"),
            ({"samples": 2.5}, TypeError, "whole number"),
            ({"samples": 10, "batch_size": 11}, ValueError, "samples=10"),
            ({"batch_size": 0}, ValueError, "1 …"),
            ({"kind": "der"}, ValueError, "Did you mean"),
            ({"alpha": -0.1}, ValueError, "≥ 0"),
            ({"beta": float("inf")}, ValueError, "finite"),
            ({"seed": None}, TypeError, "whole number"),
        ],
    ),
    "GateMonitor": Case(
        lambda: [gp.ReplaceFFN("geglu"), gp.GateMonitor(every_n_steps=3)],
        bad=[({"every_n_steps": 0}, ValueError, "≥ 1"), ({"every_n_steps": 2.5}, ValueError, "whole number")],
    ),
    "ToyPlug": Case(
        lambda: [ToyPlug()],
        bad=[
            ({"sparsity": -0.1}, ValueError, "≥ 0"),
            ({"lr_scale": float("nan")}, ValueError, "finite"),
            ({"layers": "nothing"}, gp.PlugError, "finds no layer"),
        ],
        register=(ToyPlug,),
    ),
}
