"""GateON in a Trainer, as people use it: pretrained networks, set-ups that would be wrong, copies, exceptions, checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import UserDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import gateplug as gp
from gateplug.continual.guards import Guards
from gateplug.continual.layers import Availability, ContextGate
from gateplug.core.hook import TrainingHook
from tests.continual.gated import Learner, dense, seeded, stream, train
from tests.continual.test_gateon_stream import bits
from tests.continual.test_relevance import tokens, train_on
from tests.continual.test_sites import TEXT
from tests.modules import trainer


def training_hooks(module: nn.Module) -> list[Any]:
    return [h for m in module.modules() for h in m._forward_hooks.values() if isinstance(h, TrainingHook)]


def clean(module: nn.Module) -> None:
    """Nothing of a run is left on it."""
    assert not training_hooks(module)
    assert "_ddp_params_and_buffers_to_ignore" not in module.__dict__
    assert all(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------------- pretrained networks


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(**TEXT, num_labels=3)
    seeded(BertForSequenceClassification, config).save_pretrained(folder)
    return folder


class Text(Learner):
    """Batches as Hugging Face's collators make them: a mapping that is no dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return F.cross_entropy(self.net(**inputs).logits, batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01, weight_decay=0.1)


def text_batches(n: int = 4) -> list[Any]:
    x, y = tokens()
    return [UserDict({**x, "labels": y.roll(i)}) for i in range(n)]


def load(folder: Path, labels: int = 3) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True)


def test_a_pretrained_encoder_keeps_its_embeddings_norms_and_output_projections(pretrained: Path) -> None:
    module = Text(load(pretrained))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    held: list[str] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            held.extend(n for n, p in pl_module.named_parameters() if not p.requires_grad)

    plug = gp.GateON()
    train_on(text_batches(), module, [plug, Watch()])
    assert set(before) <= set(dict(module.named_parameters())), "names are kept"
    moved = {n for n, p in before.items() if not torch.equal(p, module.get_parameter(n))}
    # word and position embeddings are moved by weight decay alone if not frozen
    frozen = {n for n in before if any(part in n for part in ("embeddings", "LayerNorm", "output.dense"))}
    assert set(held) == frozen
    assert moved.isdisjoint(frozen)
    units = {n for n in before if any(p in n for p in ("query", "value", "intermediate", "pooler", "classifier"))}
    assert {n for n in units if "weight" in n} <= moved
    clean(module)


@pytest.mark.parametrize(("others", "what"), [("obstructed", "held"), ("free", "free"), ("frozen", "frozen")])
def test_others_of_a_pretrained_encoder_can_be_chosen(others: Any, what: str, pretrained: Path) -> None:
    module, plug = Text(load(pretrained)), gp.GateON(others=others)
    name = "net.bert.encoder.layer.0.output.dense"
    before = module.get_parameter(f"{name}.weight").detach().clone()
    train_on(text_batches(2), module, [plug])
    said = plug.describe(module).get(name)
    assert said == {"held": "held back weight by weight", "free": None, "frozen": "frozen"}[what]
    assert (f"{name}.weight" in plug.availabilities()) == (what == "held")
    assert torch.equal(before, module.get_parameter(f"{name}.weight")) == (what == "frozen")


def test_a_new_head_on_a_pretrained_encoder_trains(pretrained: Path) -> None:
    """Frozen is what was loaded; what from_pretrained made anew is held back like any other network."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = load(pretrained).bert
            self.between, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, **x: Tensor) -> Any:
            hidden = self.norm(self.between(self.encoder(**x).pooler_output))
            return UserDictOut(self.head(hidden))

    net, plug = Two(), gp.GateON()
    plug.attach(net)
    said = plug.describe(net)
    assert said["encoder.embeddings.LayerNorm"] == "frozen"
    assert said["norm"] == said["between"] == "held back weight by weight"
    assert "head" not in said


class UserDictOut:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_a_config_alone_is_no_pretrained_network(pretrained: Path) -> None:
    net = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(pretrained))
    plug = gp.GateON()
    plug.attach(net)
    assert "frozen" not in plug.describe(net).values()


def test_what_is_frozen_is_frozen_in_a_loop_of_ones_own(pretrained: Path) -> None:
    net, plug = load(pretrained), gp.GateON()
    plug.attach(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    plug.follow(net, optimizer)
    before = net.bert.embeddings.word_embeddings.weight.detach().clone()
    x, y = tokens()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(**x).logits, y).backward()
        optimizer.step()
    assert torch.equal(before, net.bert.embeddings.word_embeddings.weight)
    plug.unfollow()
    assert all(p.requires_grad for p in net.parameters())


def test_padding_counts_not_in_a_mapping_that_is_no_dict(pretrained: Path) -> None:
    drafts = []
    for kind in (dict, UserDict):
        module, plug = Text(load(pretrained)), gp.GateON()
        L.seed_everything(0, verbose=False)
        train_on([kind(batch.data) for batch in text_batches(3)], module, [plug])
        drafts.append([a.draft for a in plug.availabilities().values()])
    assert all(torch.equal(a, b) for a, b in zip(*drafts, strict=True))


def test_a_checkpoint_of_a_pretrained_run_opens_in_a_network_from_its_config(pretrained: Path, tmp_path: Path) -> None:
    module = Text(load(pretrained))
    t = trainer(tmp_path, callbacks=[gp.GateON()], max_epochs=1)
    t.fit(module, torch.utils.data.DataLoader(text_batches(), batch_size=None))
    t.save_checkpoint(tmp_path / "run.ckpt")
    config = AutoConfig.from_pretrained(pretrained, num_labels=3)
    loaded = gp.load(tmp_path / "run.ckpt", Text(AutoModelForSequenceClassification.from_config(config)))
    bits(module, loaded)


# ---------------------------------------------------------------------- set-ups that would be wrong


def fit(plug: gp.GateON, tmp: Path, module: L.LightningModule | None = None, **kwargs: Any) -> None:
    extra = kwargs.pop("callbacks", [])
    train([plug, *extra], tmp, module, stream(2, 2), **kwargs)


def test_manual_optimization_is_refused_and_told_what_to_call(tmp_path: Path) -> None:
    module = Learner()
    module.automatic_optimization = False
    with pytest.raises(gp.PlugError, match=r"automatic_optimization=False.*plug\.follow\(module, optimizer\)"):
        fit(gp.GateON(), tmp_path, module)
    assert not any(isinstance(m, gp.Gate) for m in module.modules())


def test_a_strategy_that_cuts_parameters_is_refused(tmp_path: Path) -> None:
    plug, module = gp.GateON(), Learner()
    t = trainer(tmp_path, callbacks=[plug])
    t._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(gp.PlugError, match="FSDPStrategy cuts them into pieces"):
        plug.check(t, module)


def test_lbfgs_in_a_trainer_is_refused(tmp_path: Path) -> None:
    class Quasi(Learner):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    module = Quasi()
    with pytest.raises(gp.PlugError, match="LBFGS"):
        fit(gp.GateON(), tmp_path, module)
    clean(module)


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Learner):
        automatic_optimization = True

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[1].parameters(), 0.1), torch.optim.SGD(self.net[3:].parameters(), 0.1)]

    with pytest.raises((gp.PlugError, RuntimeError), match="one optimizer|multiple optimizers"):
        fit(gp.GateON(), tmp_path, Two())


def test_averages_of_weights_need_all_contexts_from_the_start(tmp_path: Path) -> None:
    for callback in (EMAWeightAveraging(), StochasticWeightAveraging(0.01)):
        with pytest.raises(gp.PlugError, match=r"copy of the model, which does not grow: say GateON\(contexts=N\)"):
            fit(gp.GateON(), tmp_path, callbacks=[callback])
        with pytest.raises(gp.PlugError, match=r"average the statistics of net\.2 over contexts"):
            fit(gp.GateON(contexts=2), tmp_path, Learner(dense(bn=True)), callbacks=[callback])


def test_an_average_of_weights_with_all_contexts(tmp_path: Path) -> None:
    module, plug = seeded(Learner), gp.GateON(contexts=2)
    fit(plug, tmp_path, module, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert plug.context == 1
    clean(module)
    rows = plug.gates(module)["net.1.gate"].rows
    assert not torch.equal(rows[0], rows[1])


def test_batch_norms_that_the_trainer_would_replace_are_refused(tmp_path: Path) -> None:
    plug, t = gp.GateON(), trainer(tmp_path, sync_batchnorm=True, strategy="ddp")
    with pytest.raises(gp.PlugError, match="sync_batchnorm=True"):  # a fit would start the processes first
        plug.check(t, Learner(dense(bn=True)))
    plug.check(t, Learner())


def test_two_gateons_in_one_trainer(tmp_path: Path) -> None:
    module = seeded(lambda: Learner(dense(bn=True)))
    first, second = gp.GateON(layers="net.1", others="free"), gp.GateON(layers="net.4", eta=0.02)
    fit(first, tmp_path, module, callbacks=[second])
    assert (first.context, second.context) == (1, 1)
    assert all((a.committed < 1).any() for p in (first, second) for a in p.availabilities().values())
    clean(module)
    for plug in (second, first):
        plug.detach(module)
    assert repr(module.net) == repr(dense(bn=True))


def test_activations_that_another_plug_has_replaced_are_read(tmp_path: Path) -> None:
    module, plug = seeded(Learner), gp.GateON()
    train([gp.ReplaceActivation(nn.ReLU, gp.TemperedSigmoid(trainable=True)), plug], tmp_path, module, stream(2, 2))
    found = plug.availabilities()
    assert {"net.1", "net.3"} <= set(found)
    assert all((found[name].draft < 1).any() for name in ("net.1", "net.3"))
    with pytest.raises(gp.PlugError, match="put ReplaceActivation before GateON"):
        train([gp.GateON(), gp.ReplaceActivation(nn.ReLU, gp.TemperedSigmoid())], tmp_path, Learner(), stream(2, 2))


def test_what_a_user_keeps_from_ddp_stays(tmp_path: Path) -> None:
    module = seeded(Learner)
    module._ddp_params_and_buffers_to_ignore = ["net.5.bias"]
    fit(gp.GateON(), tmp_path, module)
    assert module._ddp_params_and_buffers_to_ignore == ["net.5.bias"]


# ---------------------------------------------------------------------- exceptions, copies, two runs


class Failure(Exception):
    """Whatever goes wrong."""


class At(Callback):
    """Does something in the middle of a batch: after backward, before the update."""

    def __init__(self, batch: int, do: Any) -> None:
        self.batch, self.do = batch, do

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            self.do(pl_module)


def test_an_exception_leaves_nothing_behind_and_a_second_run_works(tmp_path: Path, pretrained: Path) -> None:
    def fail(module: Any) -> None:
        raise Failure

    module, plug = seeded(Learner), gp.GateON(others="frozen")
    with pytest.raises(Failure):
        fit(plug, tmp_path, module, callbacks=[At(3, fail)])
    clean(module)
    assert plug.context == 1
    fit(plug, tmp_path, module)
    clean(module)
    assert {len(g.rows) for g in plug.gates(module).values()} == {2}


def test_a_second_run_with_another_plug_object_goes_on(tmp_path: Path) -> None:
    module, again = seeded(Learner), gp.GateON()
    fit(gp.GateON(), tmp_path, module)
    fit(again, tmp_path, module)
    assert (again.context, again.known) == (1, 2)
    train([gp.GateON()], tmp_path, module, stream(3, 2))
    assert again.known == 3


def test_a_copy_made_in_the_middle_hears_nothing_and_folds(tmp_path: Path) -> None:
    twins: list[nn.Module] = []
    saved = io.BytesIO()

    def copies(module: nn.Module) -> None:
        assert training_hooks(module)
        twins.append(copy.deepcopy(module.net))
        torch.save(module.net, saved)

    module, plug = seeded(lambda: Learner(nn.Sequential(*dense(), nn.Tanh())[:7])), gp.GateON()
    fit(plug, tmp_path, module, callbacks=[At(3, copies)])
    saved.seek(0)
    for twin in (twins[0], torch.load(saved, weights_only=False)):
        assert all(hook._call is None for hook in training_hooks(twin))
        x = torch.rand(4, 1, 8, 8)
        assert torch.allclose(gp.fold(twin)(x), twin.eval()(x), atol=1e-6)
        F.cross_entropy(twin.train()(x), torch.arange(4)).backward()


def test_folding_in_the_middle_of_a_run_leaves_no_trace(tmp_path: Path) -> None:
    folded: list[nn.Module] = []
    runs = []
    for callbacks in ([], [At(2, lambda module: folded.append(gp.fold(module)))]):
        module = seeded(Learner)
        fit(gp.GateON(), tmp_path, module, callbacks=callbacks)
        runs.append(module)
    bits(*runs)
    assert repr(folded[0]) == repr(dense())
    assert not any(m._forward_hooks for m in folded[0].modules())


def test_a_copy_can_be_shown_and_folded_in_another_context_in_the_middle_of_a_run(tmp_path: Path) -> None:
    runs = []
    for look in (False, True):
        module, plug = seeded(Learner), gp.GateON()

        def show(module: nn.Module, plug: gp.GateON = plug) -> None:
            twin = copy.deepcopy(module.net)
            plug.show(twin, 0)
            gp.fold(twin)

        fit(plug, tmp_path, module, callbacks=[At(3, show)] if look else [])
        runs.append(module)
    bits(*runs)


def test_nothing_of_a_step_is_kept(tmp_path: Path) -> None:
    """The activations that were listened to are gone when backward is over."""
    alive: list[Any] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            if batch_idx == 0:
                for layer in pl_module.net[1:3]:
                    layer.register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))

    fit(gp.GateON(), tmp_path, seeded(Learner), callbacks=[Watch()])
    assert len(alive) == 8


def test_validate_and_test_before_a_fit(tmp_path: Path) -> None:
    module, plug = seeded(Learner), gp.GateON()
    t = trainer(tmp_path, callbacks=[plug])
    t.validate(module, datamodule=stream(2, 2))
    clean(module)
    with pytest.raises(gp.PlugError, match="task 1 is unknown at test"):
        t.test(module, datamodule=stream(2, 2))
    fit(plug, tmp_path, module)
    assert plug.known == 2


def test_compiled_network_trains_in_contexts(tmp_path: Path) -> None:
    def run(compiled: bool) -> nn.Module:
        module = seeded(Learner, optimizer="sgd")
        if compiled:
            module.net.compile(backend="eager")
        fit(gp.GateON(), tmp_path, module)
        return module

    one, two = run(False), run(True)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_other_precisions(precision: Any, tmp_path: Path) -> None:
    class Cast(Learner):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.to(self.net[1].weight.dtype)).float()

    module, plug = seeded(Cast), gp.GateON()
    fit(plug, tmp_path, module, precision=precision)
    for a in plug.availabilities().values():
        assert a.draft.dtype == torch.float32
        assert ((a.draft < 1) & (a.draft > 0.9)).any(), "steps of a percent are kept"


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_is_loaded_and_tested(weights_only: bool, tmp_path: Path) -> None:
    module, data = seeded(lambda: Learner(dense(bn=True))), stream(2, 3)
    L.seed_everything(1, verbose=False)
    t = trainer(tmp_path, callbacks=[gp.GateON()], max_epochs=1, limit_val_batches=0)
    t.fit(module, datamodule=data)
    t.save_checkpoint(tmp_path / "run.ckpt", weights_only=weights_only)
    expected = t.test(module, datamodule=data)
    torch.load(tmp_path / "run.ckpt", weights_only=True)
    loaded = gp.load(tmp_path / "run.ckpt", Learner(dense(bn=True)))
    bits(module, loaded)
    assert trainer(tmp_path, callbacks=[gp.GateON()]).test(loaded, datamodule=stream(2, 3)) == expected
    if not weights_only:
        fresh = trainer(tmp_path, callbacks=[gp.GateON()])
        assert fresh.test(Learner(dense(bn=True)), datamodule=stream(2, 3), ckpt_path=tmp_path / "run.ckpt") == expected


def test_best_weights_are_put_back_by_hand(tmp_path: Path) -> None:
    """Without Lightning's hooks: `module.load_state_dict(torch.load(…)["state_dict"])`."""
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module, plug = seeded(lambda: Learner(dense(bn=True))), gp.GateON()
    fit(plug, tmp_path, module, callbacks=[saved], enable_checkpointing=True)
    assert plug.known == 2
    module.load_state_dict(torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"])
    assert (plug.known, plug.context) == (1, 0)
    with torch.no_grad():
        assert torch.isfinite(module.eval()(torch.rand(2, 1, 8, 8))).all()


# ---------------------------------------------------------------------- what is logged


def test_capacity_is_logged_at_each_switch_and_fullness_is_told(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    plug = gp.GateON(eta=50.0, open_share=0.97)
    with pytest.warns(UserWarning, match=r"of net\.[13] is used up"):
        train([plug], tmp_path, seeded(Learner), stream(3, 6), logger=logger, log_every_n_steps=1)
    text = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("continual/net.1/used")
    values = [float(v) for line in text[1:] if (v := line.split(",")[column])]
    assert len(values) == 3
    assert 0 < values[0] <= 1
    used = float((plug.availabilities()["net.1"].draft < 0.05).float().mean())
    assert values[-1] == pytest.approx(used)


def test_device_moves_bring_everything_along() -> None:
    net, plug = dense(bn=True), gp.GateON("parameter", heads="obstructed")
    plug.attach(net)
    plug.switch(net, 1)
    net.to("meta")
    tensors = [*net.parameters(), *net.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert any(isinstance(m, Availability) for m in net.modules())
    assert any(isinstance(m, Guards) for m in net.modules())
    assert any(isinstance(m, ContextGate) for m in net.modules())
