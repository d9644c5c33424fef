"""gp.load and gp.fold beyond the battery: names from files, several parts, plugs on a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.arguments import decode, encode, resolve
from gateplug.core.checkpoint import instantiate
from gateplug.core.gate import Foldable
from tests.modules import Net, UserModule, digits, loader, trainer, vit
from tests.plugs import ToyPlug


def saved(tmp_path: Path, *plugs: gp.Plug, module: UserModule | None = None) -> tuple[UserModule, Path]:
    module = module or UserModule()
    t = trainer(tmp_path, callbacks=list(plugs), max_epochs=1)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    return module, tmp_path / "a.ckpt"


def test_arguments_go_to_plain_python_and_back() -> None:
    class Local(nn.Module):
        pass

    class Forgets(nn.Module):
        def __init__(self, slope: float = 0.1) -> None:
            super().__init__()
            self.a = slope

    sequence = decode(encode(nn.Sequential(nn.Tanh(), nn.Hardtanh(-0.5, 0.5))))
    assert [type(m) for m in sequence] == [nn.Tanh, nn.Hardtanh]
    assert sequence[1].max_val == 0.5
    assert type(encode(np.float64(0.5))) is float
    with pytest.raises(gp.PlugError, match="does not keep its slope"):
        decode(encode(Forgets(0.7)))
    trained = gp.TemperedSigmoid(1.5, trainable=True)
    assert float(decode(encode(trained)).scale) == 1.5
    values = [1, 0.5, "x", None, True, [1, 2], {"a": [3]}, nn.ReLU, gp.TemperedSigmoid, nn.LeakyReLU(0.3), nn.Tanh()]
    for value in values:
        back = decode(encode(value))
        assert repr(back) == repr(value)
    assert isinstance(decode(encode(gp.TemperedSigmoid(1.5, 3.0, 0.2, trainable=True))).scale, nn.Parameter)
    with pytest.raises(gp.PlugError, match="plugs="):
        decode(encode(lambda: 1))
    with pytest.raises(gp.PlugError, match="plugs="):
        decode(encode(Local))


def test_no_name_from_a_file_is_imported() -> None:
    for name in (
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.nn.functional.relu",
        "gateplug.core.load",
        "json.loads",
    ):
        with pytest.raises(gp.PlugError, match="no name from a file is imported"):
            resolve(name)
    assert resolve("torch.optim.adamw.AdamW") is torch.optim.AdamW
    assert resolve("tests.plugs.ToyPlug", [ToyPlug]) is ToyPlug


def test_a_configuration_from_a_file_builds_only_known_things() -> None:
    config = {"class_path": "gateplug.GLU", "init_args": {"dim": 4, "hidden": 8, "activation": "silu"}}
    assert instantiate(config).activation == "silu"
    make = instantiate({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}})
    assert make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.3
    with pytest.raises(gp.PlugError):
        instantiate({"class_path": "os.system", "init_args": {"command": "true"}})


def test_a_plug_of_ones_own_must_be_registered(tmp_path: Path) -> None:
    module, path = saved(tmp_path, ToyPlug(sparsity=0.5))
    with pytest.raises(gp.PlugError, match="register"):
        gp.load(path, UserModule())
    loaded = gp.load(path, UserModule(), register=[ToyPlug])
    assert torch.equal(loaded.net.blocks[1].fc2.gate.logit, module.net.blocks[1].fc2.gate.logit)


def test_a_checkpoint_without_a_stored_module_asks_for_one(tmp_path: Path) -> None:
    _, path = saved(tmp_path, gp.ReplaceFFN())
    with pytest.raises(gp.PlugError, match="give `module`"):
        gp.load(path)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(gp.PlugError, match="read safely"):
        gp.load(tmp_path / "text.ckpt", UserModule())
    torch.save({"weights": 1}, tmp_path / "b.ckpt")
    with pytest.raises(gp.PlugError, match="no Lightning checkpoint"):
        gp.load(tmp_path / "b.ckpt", UserModule())
    with pytest.raises(FileNotFoundError):
        gp.load(tmp_path / "none.ckpt", UserModule())


def test_without_any_plug_the_missing_one_is_named(tmp_path: Path) -> None:
    _, path = saved(tmp_path, gp.ReplaceFFN("swiglu"))
    module = UserModule()
    with pytest.raises(gp.PlugError, match=r"ReplaceFFN\(variant='swiglu'"):
        trainer(tmp_path, callbacks=[gp.ExactResume()]).fit(module, loader(), ckpt_path=path)
    assert "on_load_checkpoint" not in module.__dict__
    task = gp.Classifier(Net(), 10)
    t = trainer(tmp_path, callbacks=[gp.ReplaceFFN("geglu")], max_epochs=1)
    t.fit(task, gp.exact_loader(digits(16), 8))
    t.save_checkpoint(tmp_path / "task.ckpt")
    with pytest.raises(gp.PlugError, match="variant='geglu'"):
        trainer(tmp_path).test(gp.Classifier(Net(), 10), gp.exact_loader(digits(16), 8), ckpt_path=tmp_path / "task.ckpt")


def test_other_arguments_and_missing_weights_are_told_apart(tmp_path: Path) -> None:
    _, path = saved(tmp_path, gp.ReplaceFFN("swiglu"))
    with pytest.raises(gp.PlugError, match="variant='geglu'"):
        trainer(tmp_path, callbacks=[gp.ReplaceFFN("geglu")]).fit(UserModule(), loader(), ckpt_path=path)
    _, plain = saved(tmp_path)
    with pytest.raises(gp.PlugError, match="written without ReplaceFFN"):
        trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu")]).fit(UserModule(), loader(), ckpt_path=plain)
    # a plug without weights of its own may come later
    trainer(tmp_path, callbacks=[gp.ReplaceActivation("relu", nn.Tanh)], max_epochs=1).test(
        UserModule(), loader(), ckpt_path=plain
    )


def test_a_gate_can_take_the_shape_that_a_checkpoint_has(tmp_path: Path) -> None:
    from tests import plugs

    class Growing(plugs.UnitGate):
        def before_load(self, state: dict[str, Tensor], name: str) -> None:
            self.logit = nn.Parameter(torch.zeros_like(state[f"{name}.logit"]))

    class Grows(ToyPlug):
        def plan(self, module: nn.Module, layers: Any) -> Any:
            return [plugs.AddGate(n, Growing(m.out_features, 0.0), what="gate") for n, m in layers.items()]

    module = UserModule()
    plug = Grows()
    plug.attach(module)
    for gate in plug.gates(module).values():
        gate.logit = nn.Parameter(torch.full((1,), 2.0))
    trainer(tmp_path, callbacks=[plug], max_epochs=1).fit(module, loader())
    t = trainer(tmp_path, callbacks=[plug], max_epochs=1)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    loaded = gp.load(tmp_path / "a.ckpt", UserModule(), register=[Grows])
    assert loaded.net.blocks[0].fc2.gate.logit.shape == (1,)


def test_after_the_run_the_trainer_still_writes_the_plugs(tmp_path: Path) -> None:
    _, path = saved(tmp_path, gp.ReplaceFFN("swiglu"))
    entry = torch.load(path, weights_only=True)["gateplug"]["plugs"][0]
    assert entry["class"] == "ReplaceFFN"
    assert entry["arguments"]["variant"] == "swiglu"
    assert list(entry["layers"]) == ["net.blocks.0.fc1", "net.blocks.1.fc1"]


def test_a_plug_attached_by_hand_to_a_part_is_adopted_saved_and_restored(tmp_path: Path) -> None:
    def made() -> UserModule:
        torch.manual_seed(0)
        module = UserModule()
        gp.ReplaceFFN("swiglu").attach(module.net)
        return module

    module, path = saved(tmp_path, gp.ReplaceFFN("swiglu"), module=made())
    assert list(module.state_dict()) == list(made().state_dict())
    assert torch.equal(gp.load(path, UserModule()).net.head.weight, module.net.head.weight)
    trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu")], max_epochs=2).fit(made(), loader(), ckpt_path=path)
    with pytest.raises(gp.PlugError, match="detach"):
        gp.ReplaceFFN("swiglu", recompute=True).attach(module)


class TwoParts(L.LightningModule):
    """Parameters in two sub-modules and a forward that calls a method."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.scale = Net(), nn.Linear(10, 3), 2.0
        self.register_buffer("shift", torch.ones(3))

    def mix(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) + self.shift


def test_fold_of_a_module_with_several_parts_keeps_its_forward() -> None:
    module = TwoParts()
    gp.ReplaceFFN().attach(module)
    plain = gp.fold(module)
    x = digits(2)[:][0]
    assert not isinstance(plain, L.LightningModule)
    assert torch.equal(plain(x), module.eval()(x))
    assert list(plain.state_dict()) == list(module.state_dict())
    torch.export.export(plain, (x,))
    blind = type("Blind", (L.LightningModule,), {})()
    blind.a, blind.b = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(gp.PlugError, match="fold the part"):
        gp.fold(blind)


class Base(L.LightningModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.hparams.k


class Normalised(Base):
    """A forward with a buffer, `super()`, the device and hyperparameters, around one network that is a LightningModule."""

    def __init__(self, k: float = 3.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = UserModule()
        self.register_buffer("mean", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean.to(self.device)).softmax(-1)


def test_fold_keeps_a_forward_that_is_more_than_its_network(tmp_path: Path) -> None:
    module = Normalised()
    gp.ReplaceFFN().attach(module)
    plain = gp.fold(module)
    x = digits(3)[:][0]
    assert torch.allclose(plain(x), module.eval()(x), atol=1e-6)
    assert not any(isinstance(m, L.LightningModule) for m in plain.modules())
    torch.save(plain, tmp_path / "plain.pt")
    assert torch.equal(torch.load(tmp_path / "plain.pt", weights_only=False)(x), plain(x))
    torch.export.export(plain, (x,))


def test_a_module_built_in_configure_model_is_opened(tmp_path: Path) -> None:
    from tests.modules import LateModule

    module, path = saved(tmp_path, gp.ReplaceFFN("swiglu"), module=LateModule())
    loaded = gp.load(path, LateModule())
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_a_plug_attached_by_hand_is_named_by_a_trainer_without_callbacks(tmp_path: Path) -> None:
    module = UserModule()
    gp.ReplaceFFN("swiglu").attach(module)
    _, path = saved(tmp_path, module=module)
    assert torch.equal(gp.load(path, UserModule()).net.head.weight, module.net.head.weight)


def test_saving_a_folded_hugging_face_model_warns(tmp_path: Path) -> None:
    net = vit()
    gp.ReplaceFFN().attach(net)
    plain = gp.fold(net)
    with pytest.warns(UserWarning, match="does not know the layers"):
        plain.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    assert "save_pretrained" not in gp.fold(vit()).__dict__


def test_fold_of_a_bare_net_and_of_a_net_without_plugs() -> None:
    net = Net()
    assert torch.equal(gp.fold(net)(digits(2)[:][0]), net(digits(2)[:][0]))
    plug = ToyPlug()
    plug.attach(net)
    plain = gp.fold(net)
    assert not any(m._forward_hooks for m in plain.modules())
    assert torch.equal(plain(digits(2)[:][0]), net(digits(2)[:][0]))
    assert plug.gates(net)


class Halving(Foldable):
    """Multiplies by a half; folded it is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def folded(self) -> nn.Module:
        plain = nn.Linear(3, 3, bias=False)
        plain.weight.data.copy_(self.factor * torch.eye(3))
        return plain


def test_layers_with_a_plainer_form_are_folded_wherever_they_stand() -> None:
    shared = Halving()
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Tanh()), "c": Halving()})
    folded = gp.fold(net)
    assert not any(isinstance(m, Halving) for m in folded.modules())
    assert folded["a"] is folded["b"][0]
    assert folded["a"] is not folded["c"]
    x = torch.randn(2, 3)
    assert torch.allclose(folded["b"](x), net["b"](x))
    assert isinstance(gp.fold(Halving()), nn.Linear)
    assert isinstance(net["a"], Halving), "fold changed what it was given"


def test_a_class_as_a_key_of_an_argument_is_written_by_its_name() -> None:
    assert encode({nn.Linear: 1, "x": 2}) == {"torch.nn.modules.linear.Linear": 1, "x": 2}
