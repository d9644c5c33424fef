"""ExpertMonitor: its numbers are those of a literal computation, it is put on and taken off cleanly, it warns when it should."""

from __future__ import annotations

import copy
import io
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import gateplug as gp
from gateplug.moe.expert_figures import by_layer, by_task, evenly, over_time, short_names
from gateplug.moe.expert_history import LIMIT, History
from gateplug.moe.expert_report import Alarm
from gateplug.moe.experts import as_experts
from gateplug.moe.padding import Padding
from gateplug.moe.routers import find_routers
from gateplug.moe.tally import Look, Report, Tally, concentration
from tests.ddp import two_processes
from tests.modules import Plain, UserModule, digits, loader, trainer
from tests.moe.monitored import Notes, Tokens, Witness, close, fit, literal, monitor, of_load
from tests.moe.nets import FAMILIES, MoENet


def gates() -> list[gp.TopKGate]:
    torch.manual_seed(0)
    return [gp.TopKGate(4, 1, 16), gp.TopKGate(6, 2, 16, normalize="all")]


def looks(module: nn.Module) -> list[Look]:
    return [hook for m in module.modules() for hook in m._forward_hooks.values() if isinstance(hook, Look)]


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("kind", [None, "reentrant", "nonreentrant"])
def test_numbers_are_those_of_the_rows_of_the_window(kind: str | None, tmp_path: Path) -> None:
    witness, plug, module = Witness(), monitor(every_n_steps=3), UserModule(MoENet(*gates(), checkpointing=kind))
    notes = fit(module, tmp_path, plug, witness)
    assert list(notes.seen) == [2, 5, 8, 11, 14]
    for step in notes.seen:
        for name in ("net.layers.0.gate", "net.layers.1.gate"):
            rows = witness.rows(name, slice(step - 2, step + 1))
            parts = [torch.cat([getattr(out, part).detach() for out in rows]) for part in ("logits", "assigned", "weights")]
            expected = literal(*parts)
            found = notes.of(name, step)
            close(found, expected)
            assert set(found) == set(expected), "nothing else is logged for a top-k gate without capacity"
    assert [report.choices for report in plug._last.values()] == [3 * 64 * 1, 3 * 64 * 2], "each row once, recomputed or not"


def test_a_capacity_counts_what_was_chosen_and_says_what_was_dropped(tmp_path: Path) -> None:
    witness, module = Witness(), UserModule(MoENet(*gates(), capacity_factor=0.7))
    notes = fit(module, tmp_path, monitor(), witness)
    for name in ("net.layers.0.gate", "net.layers.1.gate"):
        rows = witness.rows(name, slice(12, 16))
        kept = torch.cat([out.kept for out in rows])
        assert 0 < kept.float().mean() < 1
        parts = [torch.cat([getattr(out, part).detach() for out in rows]) for part in ("logits", "assigned", "weights")]
        close(notes.of(name), literal(*parts) | {"dropped": 1 - float(kept.float().mean())})


def test_windows_count_batches_also_under_accumulation(tmp_path: Path) -> None:
    whole = fit(UserModule(MoENet(*gates()), lr=0.0), tmp_path, monitor(every_n_steps=4), batch_size=16)
    parts = fit(UserModule(MoENet(*gates()), lr=0.0), tmp_path, monitor(every_n_steps=8), accumulate_grad_batches=2)
    for name in ("net.layers.0.gate", "net.layers.1.gate"):
        close(parts.of(name), whole.of(name))


def test_the_last_batch_is_looked_at_where_a_run_or_an_epoch_is_short(tmp_path: Path) -> None:
    def steps(**settings: Any) -> list[int]:
        return list(fit(UserModule(MoENet(*gates())), tmp_path, monitor(every_n_steps=1000), **settings).seen)

    assert steps() == [7, 15]
    assert steps(max_steps=3) == [2]
    assert steps(limit_train_batches=0) == []


def test_validation_and_what_runs_between_batches_are_not_counted(tmp_path: Path) -> None:
    class Probe(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module(torch.randn(5, 8, 8))

    def run(*validation: Any) -> Notes:
        notes, plug = Notes(), monitor()
        t = trainer(
            tmp_path, callbacks=[plug, *[Probe()] * bool(validation)], logger=notes, val_check_interval=2 if validation else None
        )
        t.fit(UserModule(MoENet(*gates()), lr=0.0), loader(), *validation)
        return notes

    assert run(loader(shuffle=False)).seen == run().seen


def test_rows_that_the_mixture_masks_and_rows_of_the_batchs_mask_are_left_out(tmp_path: Path) -> None:
    class Masked(UserModule):
        tell = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.net.embed(batch["x"])
            mask = batch["attention_mask"].bool()
            for layer in self.net.layers:
                x = x + layer(x, mask=mask if self.tell else None)
            return x.square().mean()

    class Told(Masked):
        tell = False

    generator = torch.Generator().manual_seed(0)
    items = [{"x": torch.randn(6, 8, generator=generator), "attention_mask": torch.arange(6) < 1 + i % 6} for i in range(48)]
    data = torch.utils.data.DataLoader(items, batch_size=6)
    results = []
    for kind in (Masked, Told):
        notes, witness = Notes(), Witness()
        module = kind(MoENet(*gates()), lr=0.0)
        trainer(tmp_path, callbacks=[monitor(), witness], logger=notes, max_epochs=1).fit(module, data)
        rows = witness.rows("net.layers.1.gate", slice(4, 8))
        keep = torch.cat([items[i]["attention_mask"] for i in range(24, 48)]) if kind is Told else torch.ones(84).bool()
        parts = [torch.cat([getattr(out, part).detach() for out in rows]) for part in ("logits", "assigned", "weights")]
        close(notes.of("net.layers.1.gate"), literal(*(part[keep] for part in parts)))
        results.append(notes.of("net.layers.0.gate"))
    close(results[0], results[1])


def test_mixtral_is_counted_without_its_padding(tmp_path: Path) -> None:
    notes, witness, module = Notes(), Witness("MixtralTopKRouter"), Tokens(FAMILIES["Mixtral"][0]())
    masks: list[Tensor] = []
    keep = L.Callback()
    keep.on_train_batch_start = lambda t, m, batch, i: masks.append(batch["attention_mask"].flatten().bool())  # type: ignore[method-assign]
    trainer(tmp_path, callbacks=[witness, keep, monitor(every_n_steps=3)], logger=notes, max_epochs=1).fit(module)
    mask = torch.cat(masks[3:6])
    assert int((~mask).sum()) > 0
    for name in ("net.model.layers.0.mlp.gate", "net.model.layers.1.mlp.gate"):
        logits, weights, chosen = (torch.cat(t).detach()[mask] for t in zip(*witness.rows(name, slice(3, 6)), strict=True))
        q = torch.zeros_like(logits).scatter(-1, chosen, weights)
        close(notes.of(name), literal(logits, chosen, q))


def test_switch_is_counted_on_both_sides_with_what_it_drops(tmp_path: Path) -> None:
    notes, witness = Notes(), Witness("SwitchTransformersTop1Router")
    module = Tokens(FAMILIES["Switch"][0](expert_capacity=2))
    trainer(tmp_path, callbacks=[witness, monitor(every_n_steps=6)], logger=notes, max_epochs=1).fit(module)
    batch = next(iter(torch.utils.data.DataLoader(list(module.train_dataloader().dataset), batch_size=24)))
    masks = {"encoder": batch["attention_mask"].flatten().bool(), "decoder": batch["labels"].flatten() != -100}
    assert len(witness.batches[0]) == 2
    for name in witness.batches[0]:
        mask = masks["decoder" if "decoder" in name else "encoder"]
        outs = witness.rows(name, slice(0, 6))
        dispatch, top, logits = (torch.cat([t.flatten(0, -2) for t in part]).detach()[mask] for part in zip(*outs, strict=True))
        kept = dispatch.sum(-1) > 0
        assert not kept.all()
        expected = literal(logits, logits.argmax(-1, keepdim=True), dispatch * top)
        close(notes.of(name), expected | {"dropped": 1 - float(kept.float().mean())})


def test_dselectk_by_example_says_how_many_experts_and_frozen_bits_it_has(tmp_path: Path) -> None:
    gate = gp.DSelectK(6, 2, 16, gamma=0.05, reachability=0.0)
    torch.manual_seed(0)
    nn.init.normal_(gate.z.weight, std=0.03)
    witness = Witness()
    notes = fit(UserModule(MoENet(gate), lr=0.0), tmp_path, monitor(), witness)
    rows = witness.rows("net.layers.0.gate", slice(12, 16))
    q, z = (torch.cat([getattr(out, part).detach() for out in rows]) for part in ("weights", "z"))
    p = q / q.sum(-1, keepdim=True)
    found = notes.of("net.layers.0.gate")
    close(found, of_load(q.double().sum(0).tolist()))
    close(found, {
        "experts_used": float((q != 0).sum(-1).float().mean()), "unserved": float((q == 0).all(-1).float().mean()),
        "frozen_bits": float((z.abs() >= 0.025).float().mean()), "confidence": float(p.nan_to_num().max(-1).values.mean()),
    })  # fmt: skip
    assert 0 < found["frozen_bits"] < 1
    assert "importance_cv" not in found, "its load is the weight already"


def test_expert_choice_has_no_collapse_and_says_whom_no_expert_takes(tmp_path: Path) -> None:
    witness = Witness()
    notes = fit(UserModule(MoENet(gp.ExpertChoiceGate(4, 16, capacity_factor=1.0))), tmp_path, monitor(), witness)
    q = torch.cat([out.weights.detach() for out in witness.rows("net.layers.0.gate", slice(12, 16))])
    found = notes.of("net.layers.0.gate")
    close(found, {
        "experts_used": float((q != 0).sum(-1).float().mean()), "unserved": float((q == 0).all(-1).float().mean()),
        "load_cv": 0.0, "importance_cv": of_load(q.double().sum(0).tolist())["load_cv"],
    })  # fmt: skip
    assert found["unserved"] > 0
    assert "collapse" not in found


@pytest.mark.parametrize(
    "gate", [gp.TopKGate(4, 2, 16), gp.DSelectK(6, 2, 16), gp.ExpertChoiceGate(4, 16), gp.SoftmaxGate(4, 16)], ids=repr
)
def test_no_value_is_read_from_the_device_before_the_end_of_a_window(gate: Any) -> None:
    # a meta tensor has no values: whatever would read one raises
    router, padding = next(iter(find_routers(nn.Sequential(gate))[0].values())), Padding()
    padding.masks, padding.samples = {"encoder": torch.ones(12, dtype=torch.bool, device="meta")}, 3
    tally = Tally(router, padding)
    out = gate.route(torch.randn(12, 16), 1.0 if gate.limits else None)
    for _ in range(2):
        tally.add(type(out)(*(part.to("meta") if isinstance(part, Tensor) else part for part in out)))
    assert len(tally._calls) == 2
    assert len(tally.take(torch.device("meta"))) == len(tally.take(torch.device("cpu")))
    assert tally.report(tally.take(torch.device("cpu"))) is None, "no row was seen"


class Tasks(nn.Module):
    """Digits to three outputs of shared experts, the mean of which is the answer."""

    def __init__(self, *gates: Any) -> None:
        super().__init__()
        self.moe = gp.MultiGateMoE([nn.Linear(64, 10) for _ in range(8)], gates[0] if len(gates) == 1 else gates)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x).mean(1)


@pytest.mark.parametrize("together", [True, False])
def test_static_gates_show_the_weights_of_their_tasks(together: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = [gp.DSelectK(8, 2, entropy=1e-3, tasks=3)] if together else [gp.DSelectK(8, 2, entropy=1e-3) for _ in range(3)]
    for gate in made:
        nn.init.uniform_(gate.z, -0.6, 0.6)
    module = UserModule(Plain(Tasks(*made)))
    notes, logger = Notes(), TensorBoardLogger(tmp_path, name="run")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module, tmp_path, gp.RegulateRouters(), monitor(), logger=[logger, notes])
    name = "net.net.moe.gates.0" if together else "net.net.moe.gates"
    assert {key.rsplit("/", 1)[0] for key in notes.seen[15]} == {f"moe/{name}"}, "one router, a row a task"
    q = torch.cat([gate.weights() for gate in made])
    found = notes.of(name)
    close(found, of_load(q.double().sum(0).tolist()))
    close(
        found,
        {
            "experts_used": float((q != 0).sum(-1).float().mean()),
            "confidence": float((q / q.sum(-1, keepdim=True)).max(-1).values.mean()),
        },
    )
    close(found, {"frozen_bits": float(torch.cat([g.frozen().flatten() for g in made]).mean())})
    tags = _events(logger)
    assert {"moe/tasks", "moe/experts", "moe/experts_over_time"} <= set(tags["images"])
    assert f"moe/{name}/experts_used_by_task" in tags["histograms"]
    assert (Path(logger.log_dir) / "figures/moe_tasks.png").stat().st_size > 5000
    texts = [str(w.message) for w in said]
    assert sum("start outside" in text for text in texts) == 1, "RegulateRouters says it, once"
    assert not [text for text in texts if "collapsed" in text]


def test_dselectk_is_warned_of_without_regulate_routers(tmp_path: Path) -> None:
    gate = gp.DSelectK(8, 2, tasks=3)
    nn.init.constant_(gate.z, 0.7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(UserModule(Plain(Tasks(gate))), tmp_path, monitor(), max_epochs=1)
    assert sum("start outside" in str(w.message) for w in said) == 1
    assert sum("have chosen the same expert" in str(w.message) for w in said) == 1


@pytest.mark.parametrize("plugs", [[monitor], [gp.RegulateRouters], [gp.RegulateRouters, monitor]])
@pytest.mark.parametrize(("value", "many"), [(0.0, True), (0.7, False)])
def test_a_gate_that_decides_by_example_and_uses_more_than_k_experts_is_warned_of(
    value: float, many: bool, plugs: list[Any], tmp_path: Path
) -> None:
    gate = gp.DSelectK(8, 2, 16)
    nn.init.constant_(gate.z.weight, 0.0)
    nn.init.constant_(gate.z.bias, value)  # 0: amid the smooth step, all experts; 0.7: beyond it, one
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(UserModule(MoENet(gate)), tmp_path, *(plug() for plug in plugs), max_epochs=1)
    texts = [str(w.message) for w in said if "have not come down" in str(w.message)]
    assert len(texts) == many
    assert all("(k=2; 8 used in the mean" in text for text in texts)


def test_tasks_of_gates_that_look_at_the_rows_are_counted_task_by_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, witness, plug = UserModule(Plain(Tasks(gp.TopKGate(8, 2, 64, tasks=3)))), Witness(), monitor()
    notes = fit(module, tmp_path, plug, witness)
    rows = witness.rows("net.net.moe.gates.0", slice(12, 16))
    parts = [torch.cat([getattr(out, part).detach() for out in rows]) for part in ("logits", "assigned", "weights")]
    close(notes.of("net.net.moe.gates.0"), literal(*parts))
    q = parts[2].view(-1, 3, 8).mean(0)
    assert torch.allclose(plug._last["net.net.moe.gates.0"].tasks.float(), q, atol=1e-6)


@pytest.mark.parametrize("together", [1, 10**4, 10**9])
@pytest.mark.parametrize(
    "gate", [gp.TopKGate(4, 2, 16), gp.DSelectK(6, 2, 16), gp.ExpertChoiceGate(4, 16)], ids=lambda g: type(g).__name__
)
def test_calls_that_are_added_together_count_as_one_by_one(gate: Any, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    router, padding = next(iter(find_routers(nn.Sequential(gate))[0].values())), Padding()
    kept, sums = Tally(router, padding), Tally(router, padding)
    rows = 0
    for i in range(7):
        # padding in some of the batches, capacity in others of the gates that have one
        mask = torch.rand(12) > 0.4 if i % 2 else None
        padding.masks, padding.samples = ({} if mask is None else {"encoder": mask}), 3
        out = gate.route(torch.randn(12, 16), 0.8 if gate.limits else None)
        monkeypatch.setattr("gateplug.moe.tally._TOGETHER", together)
        kept.add(out)
        monkeypatch.setattr("gateplug.moe.tally._TOGETHER", 0)
        sums.add(out)
        out.weights.detach().fill_(7.0)  # the model may write where it likes afterwards
        rows += 12 if mask is None else int(mask.sum())
    assert not sums._calls
    assert bool(kept._calls) == (together > 1)
    cpu = torch.device("cpu")
    a, b = kept.report(kept.take(cpu)), sums.report(sums.take(cpu))
    assert a is not None
    assert b is not None
    assert a.choices == rows * gate.k if gate.limits else True
    close(a.numbers, b.numbers)
    assert torch.allclose(a.load, b.load, atol=1e-6)


def test_padding_of_a_gate_for_several_tasks_is_left_out_of_every_task() -> None:
    torch.manual_seed(0)
    gate, padding, mask = gp.TopKGate(8, 2, 16, tasks=3), Padding(), torch.arange(12) % 4 < 3
    padding.masks, padding.samples = {"encoder": mask}, 3
    tally = Tally(next(iter(find_routers(nn.Sequential(gate))[0].values())), padding, "tasks")
    out = gate.route(torch.randn(12, 16))
    tally.add(out)
    keep = mask.repeat_interleave(3)
    report = tally.report(tally.take(torch.device("cpu")))
    assert report is not None
    close(report.numbers, literal(*(part.detach()[keep] for part in (out.logits, out.assigned, out.weights))))
    assert report.tasks is not None
    assert torch.allclose(report.tasks.float(), out.weights.detach().view(12, 3, 8)[mask].mean(0), atol=1e-6)


class Cosine(nn.Module):
    """A router of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(5, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.keys, dim=-1).T
        return {"scores": scores, "best": scores.argmax(-1, keepdim=True)}


class Own(nn.Module):
    """A mixture with it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Cosine(), nn.ModuleList([nn.Linear(64, 10) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.router(x)
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return (y * (out["scores"].softmax(-1) * torch.zeros_like(out["scores"]).scatter(1, out["best"], 1.0))[..., None]).sum(1)


def test_a_users_own_router_is_watched_by_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    witness = Witness("Cosine")
    plug = monitor(adapters={"Cosine": lambda out: (out["scores"], out["best"])})
    notes = fit(UserModule(Plain(Own())), tmp_path, plug, witness)
    outs = witness.rows("net.net.router", slice(12, 16))
    scores, best = (torch.cat([out[key].detach() for out in outs]) for key in ("scores", "best"))
    expected = literal(scores, best, torch.ones_like(scores))
    expected.pop("importance_cv")
    close(notes.of("net.net.router"), expected)
    assert set(notes.of("net.net.router")) == set(expected), "an adapter without weights has no importance"


# ---------------------------------------------------------------------- beside others


def test_the_numbers_do_not_depend_on_other_plugs_or_their_order(tmp_path: Path) -> None:
    alone = fit(UserModule(MoENet(*gates())), tmp_path, monitor()).seen
    for order in (1, -1):
        plugs = [gp.RegulateRouters(z_loss=1e-30), gp.GateMonitor(4), monitor()][::order]
        seen = fit(UserModule(MoENet(*gates())), tmp_path, *plugs).seen
        mine = {k: v for k, v in seen[15].items() if k in alone[15]}
        assert mine == pytest.approx(alone[15], rel=1e-5)


def _train(tmp: Path, devices: int) -> None:
    torch.manual_seed(0)
    module = UserModule(MoENet(*gates(), capacity_factor=None), lr=0.05)
    module.extra = gp.TopKGate(4, 1, 8)
    module.extra.requires_grad_(False)
    notes, plug = Notes(), monitor()

    def step(batch: Any, batch_idx: int) -> Any:
        if module.global_rank == devices - 1:  # a router that runs on the last process alone
            module.extra(batch[0])
        return UserModule.training_step(module, batch, batch_idx)

    module.training_step = step
    data = gp.exact_loader(digits(), 16 // devices, shuffle=True, seed=3)
    t = trainer(tmp, callbacks=[plug], devices=devices, strategy="ddp" if devices > 1 else "auto", logger=notes)
    t.fit(module, data)
    if t.is_global_zero:
        torch.save({"seen": notes.seen, "loads": {n: r.load for n, r in plug._last.items()}}, tmp / f"{devices}.pt")


def test_two_processes_tell_of_the_global_batch(tmp_path: Path) -> None:
    two_processes(_train, tmp_path)
    _train(tmp_path, 1)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert list(one["seen"]) == list(two["seen"])
    for step in one["seen"]:
        mine = {k: v for k, v in one["seen"][step].items() if "extra" not in k}
        # the weights of the two runs differ by 1e-6
        assert {k: two["seen"][step][k] for k in mine} == pytest.approx(mine, rel=1e-4, abs=1e-5)
    assert two["loads"]["extra"].sum() == pytest.approx(1.0), "it ran on one process only, and is told of"


def test_a_compiled_network_is_looked_at_and_works_afterwards(tmp_path: Path) -> None:
    def made() -> UserModule:
        module = UserModule(MoENet(gates()[1]))
        for layer in module.net.layers:  # grouped products in float32 are not traced on a CPU
            layer.experts = as_experts([nn.Linear(16, 16) for _ in range(len(layer.experts))])
        return module

    short = {"limit_train_batches": 2, "max_epochs": 1}
    module = made()
    module.net.compile(backend="eager")
    plain = fit(made(), tmp_path, monitor(), **short)
    found = fit(module, tmp_path, monitor(), **short)
    assert found.seen[1] == pytest.approx(plain.seen[1], rel=1e-4)
    again = fit(module, tmp_path, monitor(), **short)
    assert len(again.seen) == 1
    module.eval()(torch.randn(2, 8, 8))


# ---------------------------------------------------------------------- on and off


def test_hooks_are_gone_after_a_fit_and_after_an_exception(tmp_path: Path) -> None:
    class Fail(L.Callback):
        def on_after_backward(self, *args: Any) -> None:
            assert len(looks(module)) == 2
            if self.armed:
                raise KeyError

    module, fail = UserModule(MoENet(*gates())), Fail()
    fail.armed = True
    with pytest.raises(KeyError):
        fit(module, tmp_path, monitor(), fail)
    assert not looks(module)
    fail.armed = False
    fit(module, tmp_path, monitor(), fail)
    assert not looks(module)
    assert [layer.gate.label for layer in module.net.layers] == ["net.layers.0.gate", "net.layers.1.gate"]


def test_copies_and_pickles_of_a_model_in_training_work_and_count_nothing(tmp_path: Path) -> None:
    class Copy(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            plug = next(c for c in trainer.callbacks if isinstance(c, gp.ExpertMonitor))
            x, twin = torch.randn(2, 8, 8), copy.deepcopy(pl_module.net)
            file = io.BytesIO()
            torch.save(pl_module.net, file)
            file.seek(0)
            for net in (twin, torch.load(file, weights_only=False)):
                before = [len(t._calls) for t in plug._tallies]
                assert [look.tally for look in looks(net)] == [None, None], "a copy carries no sums about"
                assert torch.allclose(net(x), pl_module.net.eval()(x), atol=1e-6)
                assert all(before)
                assert before == [len(t._calls) for t in plug._tallies]
            pl_module.net.train()

    notes = fit(UserModule(MoENet(*gates())), tmp_path, monitor(), Copy(), EMAWeightAveraging())
    assert notes.seen[15] == pytest.approx(fit(UserModule(MoENet(*gates())), tmp_path, monitor()).seen[15], rel=1e-5)


def test_a_model_without_routers_and_a_name_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gp.PlugError, match="ExpertMonitor finds no router in this model"):
        fit(UserModule(), tmp_path, monitor())
    for routers, text in (("decoder.*", "ExpertMonitor: .*finds no layer"), ("net.head", "finds no router in net.head")):
        module = UserModule(MoENet(*gates()))
        with pytest.raises(gp.PlugError, match=text):
            fit(module, tmp_path, monitor(routers=routers))
        assert not looks(module)
    notes = fit(UserModule(MoENet(*gates())), tmp_path, monitor(routers="net.layers.1"))
    assert {key.rsplit("/", 1)[0] for key in notes.seen[15]} == {"moe/net.layers.1.gate"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every_n_steps": 0}, "≥ 1"),
        ({"every_n_steps": 2.5}, "whole number"),
        ({"collapse": 0.0}, r"\(0, 1\]"),
        ({"collapse": 2}, "0, 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gp.ExpertMonitor(**arguments)


# ---------------------------------------------------------------------- warnings


def _said(module: UserModule, tmp_path: Path, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, tmp_path, monitor(every_n_steps=2, **kwargs), max_epochs=1)
    return [
        str(w.message)
        for w in caught
        if "collapsed" in str(w.message) or "finite" in str(w.message) or "no row" in str(w.message)
    ]


def _collapsed() -> UserModule:
    """Layer 0 sends every row to expert 3: its input has a constant unit."""
    module = UserModule(MoENet(*gates()), lr=0.0)
    with torch.no_grad():
        module.net.embed.weight[0], module.net.embed.bias[0] = 0.0, 1.0
        module.net.layers[0].gate.logits.weight[3, 0] = 50.0
    return module


def test_a_collapsed_router_is_named_once_and_a_healthy_one_not(tmp_path: Path) -> None:
    said = _said(_collapsed(), tmp_path)
    assert len(said) == 1, "four windows, one warning"
    assert "net.layers.0.gate (100% of its load went to 1 of 4 experts, 3 got nothing)" in said[0]
    assert "net.layers.1.gate" not in said[0]
    assert not _said(_collapsed(), tmp_path, collapse=None)
    torch.manual_seed(0)
    assert not _said(
        UserModule(
            MoENet(*gates(), gp.DSelectK(4, 2, 16, reachability=0.0), gp.SoftmaxGate(4, 16), gp.SigmoidGate(4, 2, 16)), lr=0.0
        ),
        tmp_path,
    )


def test_gates_that_are_meant_to_use_few_experts_are_not_said_to_collapse(tmp_path: Path) -> None:
    static = gp.DSelectK(8, 1)
    nn.init.constant_(static.z, 1.0)
    assert not _said(UserModule(MoENet(static, gp.ExpertChoiceGate(8, 16, 1.0), gp.TopKGate(8, 1))), tmp_path)


def test_a_router_has_collapsed_when_two_windows_running_with_enough_choices_are_bad() -> None:
    tally = Tally(next(iter(find_routers(nn.Sequential(gp.TopKGate(4, 1, 16)))[0].values())), Padding())

    def report(collapse: float, dead: float, choices: float = 32) -> Report:
        return Report(torch.full((4,), 0.25), {"collapse": collapse, "dead": dead, "confidence": 1.0}, choices=choices)

    def said(*reports: Report) -> int:
        alarm = Alarm(0.9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for window in reports:
                alarm.check([tally], {tally.title: window}, 2)
        return len(caught)

    bad, good = report(0.9, 0), report(0.89, 2)
    assert said(bad) == said(good, bad) == said(bad, good, bad) == said(good, good) == 0
    assert said(bad, bad) == said(bad, bad, bad) == said(bad, bad, good, bad, bad) == 1
    assert said(report(0.5, 3), report(0.5, 3)) == 1, "more than half of the experts are dead"
    assert said(*[report(1.0, 3, choices=31)] * 3) == 0, "fewer than 8 choices an expert say nothing"


def test_concentration_is_0_at_balance_and_1_when_k_experts_get_all() -> None:
    assert concentration(torch.ones(8), 2) == pytest.approx(0.0)
    assert concentration(torch.tensor([0.0, 5.0, 0.0, 5.0]), 2) == pytest.approx(1.0)
    assert concentration(torch.tensor([9.0, 1.0, 0.0, 0.0]), 1) == pytest.approx((0.9 - 0.25) / 0.75)
    assert concentration(torch.ones(4), 4) == 0.0


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    module = Tokens(FAMILIES["Mixtral"][0]())
    with torch.no_grad():
        module.net.model.layers[1].mlp.gate.weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite .*: net.model.layers.1.mlp.gate. Lower"):
        trainer(tmp_path, callbacks=[monitor(every_n_steps=1)], max_epochs=1).fit(module)


def test_a_model_in_eval_mode_is_said(tmp_path: Path) -> None:
    module = UserModule(MoENet(*gates()))
    module.net.layers[0].eval()
    said = _said(module, tmp_path)
    assert len(said) == 1
    assert "no row was counted at net.layers.0.gate in 2 training batches" in said[0]


# ---------------------------------------------------------------------- pictures, history, resume


def _events(logger: TensorBoardLogger) -> Any:
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return events.Tags()


def test_scalars_histograms_and_pictures_reach_tensorboard_and_the_folder(tmp_path: Path, capsys: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(UserModule(MoENet(*gates())), tmp_path, monitor(), logger=logger)
    tags = _events(logger)
    assert "moe/net.layers.0.gate/load_cv" in tags["scalars"]
    assert "moe/net.layers.1.gate/load" in tags["histograms"]
    assert set(tags["images"]) == {"moe/experts", "moe/experts_over_time"}
    files = {path.name: path.stat().st_size for path in (Path(logger.log_dir) / "figures").iterdir()}
    assert set(files) == {"moe_experts.png", "moe_experts_over_time.png"}
    assert min(files.values()) > 5000
    printed = capsys.readouterr().out
    assert "Routers at the end of the training" in printed
    assert "net.layers.0.gate" in printed


def test_a_fast_dev_run_writes_no_figure(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[monitor()], fast_dev_run=True).fit(UserModule(MoENet(*gates())), loader())
    assert not list(tmp_path.rglob("*.png"))


def test_pictures_hold_what_they_say() -> None:
    loads = {f"layers.{i}.gate": torch.rand(4 + i % 2).softmax(0) for i in range(20)}
    loads["layers.3.gate"] = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0])
    figure = by_layer(loads, "t")
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (20, 5)
    assert image[3].tolist() == [-1.0, 2.5, 1.25, 1.25, -1.0], "share × experts; black below 0"
    assert image.mask[0].tolist() == [False] * 4 + [True]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [str(i) for i in range(20)]
    history = History()
    for step in (3, 7, 11):
        history.add(step, torch.tensor([0.5, 0.3, 0.2]))
    figure = over_time({f"layers.{i}.gate": history for i in range(20)}, "t")
    assert "8 of 20 layers; layers.*.gate" in figure.get_suptitle()
    assert [a.get_title() for a in figure.axes[:8]] == [f"* = {i}" for i in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert figure.axes[0].collections[0].get_array().shape == (3, 3)
    figure = by_task({"moe.gates": torch.eye(128, 16)}, "t")
    assert figure.axes[0].images[0].get_array().shape == (128, 16)
    assert len(figure.axes[0].get_yticks()) == 32


def test_names_are_shortened_to_what_differs() -> None:
    assert short_names(["a.0.gate", "a.1.gate"]) == (["0", "1"], "a.*.gate")
    assert short_names(["enc.0.r", "dec.0.r"]) == (["enc", "dec"], "*.0.r")
    assert short_names(["a.b"]) == (["a.b"], "router")
    assert short_names(["a", "a.b"]) == (["a", "a.b"], "router")
    assert evenly([str(i) for i in range(5)], 8) == ["0", "1", "2", "3", "4"]


def test_the_history_is_bounded_and_keeps_first_and_last() -> None:
    history = History()
    for step in range(1000):
        history.add(step, torch.tensor([float(step)]))
        assert len(history) <= LIMIT
        assert history.steps[0] == 0
        assert history.steps[-1] == step
    gaps = {b - a for a, b in zip(history.steps[:-2], history.steps[1:-1], strict=True)}
    assert gaps == {8}, "evenly thinned"
    assert [int(load) for load in history.loads] == history.steps
    again = History.of(history.state_dict())
    again.add(1000, torch.tensor([1000.0]))
    history.add(1000, torch.tensor([1000.0]))
    assert again.steps == history.steps


def test_a_resumed_run_has_the_whole_history_and_a_new_one_starts_anew(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    whole = monitor()
    fit(UserModule(MoENet(*gates())), tmp_path, whole, saved, gp.ExactResume(), enable_checkpointing=True)
    torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    resumed = monitor()
    t = trainer(tmp_path, callbacks=[resumed, gp.ExactResume()])
    t.fit(UserModule(MoENet(*gates())), loader(), ckpt_path=tmp_path / "step=10.ckpt", weights_only=True)
    for name, history in whole._history.items():
        assert history.steps == [3, 7, 11, 15]
        assert resumed._history[name].steps == history.steps
        for i in (0, 1, 3):  # the window that was cut through counts from the resume on
            assert torch.equal(resumed._history[name].loads[i], history.loads[i])
    fit(UserModule(MoENet(*gates())), tmp_path, resumed, max_epochs=1)
    assert resumed._history["net.layers.0.gate"].steps == [3, 7]
    assert math.isclose(float(resumed._history["net.layers.0.gate"].loads[0].sum()), 1.0, rel_tol=1e-6)
