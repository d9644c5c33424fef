"""The battery: every registered plug under everything that DESIGN's table names. Each test reads as the claim it checks."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.gate import Gate
from gateplug.core.objective import Objective
from gateplug.core.wrap import Wrapped
from tests.conformance import CASES, Case
from tests.ddp import run_case, run_two_processes
from tests.modules import BACKEND, LateModule, Net, SetupModule, UserModule, answers, digits, loader, trainer, vit

GUARDS = {"on_save_checkpoint", "on_load_checkpoint"}
"""What may stay on an attached module after a run, so that `trainer.save_checkpoint` still names the plugs."""


@pytest.fixture(params=CASES, ids=str)
def case(request: Any) -> Case:
    return CASES[request.param]


def fit(case: Case, tmp: Path, make: Callable[[], UserModule] | None = None, image: bool = False, **kwargs: Any) -> UserModule:
    """Train a module with the plug, both made from the same seed each time."""
    L.seed_everything(1, verbose=False)
    module = UserModule(lr=0.05) if make is None else make()
    batch = kwargs.pop("batch_size", 8)
    callbacks = [*case.make(), gp.ExactResume(), *kwargs.pop("callbacks", [])]
    trainer(tmp, callbacks=callbacks, **kwargs).fit(module, loader(batch, image=image))
    return module


def same(a: nn.Module, b: nn.Module, atol: float = 0.0) -> bool:
    """Same names and same weights, to `atol`."""
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    return all(torch.allclose(x[k], y[k], rtol=0, atol=atol) if atol else torch.equal(x[k], y[k]) for k in x)


def left_behind(module: nn.Module) -> list[str]:
    """What a run has forgotten on the module."""
    found = [k for k, v in module.__dict__.items() if isinstance(v, Wrapped | Objective) and k not in GUARDS]
    for name, m in module.named_modules():
        if isinstance(m, Gate) and (m.recording or m.injection is not None):
            found.append(name)
    return found


def test_trains_a_users_module_and_changes_what_it_attached(case: Case, tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    start = UserModule(lr=0.05)
    plugs = case.make()
    for plug in plugs:
        plug.attach(start)
    trained = fit(case, tmp_path)
    assert list(trained.state_dict()) == list(start.state_dict())
    for plug in plugs:
        for name, parameter in plug.parameters(trained).items():
            assert not torch.equal(parameter, start.state_dict()[name]), f"{name} was not trained"


def test_trains_and_folds_a_hugging_face_model(case: Case, tmp_path: Path) -> None:
    module = fit(case, tmp_path, lambda: UserModule(vit()), image=True)
    x = digits(6, image=True)[:][0]
    plain = gp.fold(module)
    with torch.no_grad():
        assert torch.allclose(answers(plain, x), module.eval()(x), atol=1e-6)


def test_trains_a_plain_sequential_inside_a_module(case: Case, tmp_path: Path) -> None:
    class Sequence(UserModule):
        def __init__(self) -> None:
            super().__init__(nn.Sequential())
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), _residual(), nn.Linear(16, 10))

    module = fit(case, tmp_path, Sequence)
    with torch.no_grad():
        x = digits(4)[:][0]
        assert torch.allclose(answers(gp.fold(module), x), module.eval()(x), atol=1e-6)


def _residual() -> nn.Module:
    block = nn.Sequential()
    block.fc1, block.act, block.fc2 = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)
    return block


@pytest.mark.parametrize("module", [LateModule, SetupModule])
def test_attaches_to_layers_that_are_built_late(case: Case, module: type[UserModule], tmp_path: Path) -> None:
    late = fit(case, tmp_path, module)
    early = UserModule()
    for plug in case.make():
        plug.attach(early)
    assert list(late.state_dict()) == list(early.state_dict())
    assert not left_behind(late)


def test_accumulation_equals_one_large_batch(case: Case, tmp_path: Path) -> None:
    whole = fit(case, tmp_path, batch_size=16)
    parts = fit(case, tmp_path, batch_size=8, accumulate_grad_batches=2)
    # sums of float32 in another order
    assert same(whole, parts, atol=2e-6)


@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
def test_activation_checkpointing_gives_the_same_weights(case: Case, kind: str, tmp_path: Path) -> None:
    assert same(fit(case, tmp_path), fit(case, tmp_path, lambda: UserModule(lr=0.05, checkpointing=kind)), atol=1e-6)


def test_bf16_trains_close_to_float32(case: Case, tmp_path: Path) -> None:
    # bfloat16 has 8 bits: two epochs of small steps stay within a few percent
    assert same(fit(case, tmp_path), fit(case, tmp_path, precision="bf16-mixed"), atol=0.06)


def test_a_grad_scaler_gives_the_weights_of_half_precision_without_one(case: Case, tmp_path: Path) -> None:
    def run(scale: float) -> UserModule:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        return fit(case, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    # a power of two as scale changes no digit, except where a gradient is too small for float16 without it
    assert same(run(2.0**10), run(1.0), atol=2e-3)


def test_gradient_clipping_sees_the_whole_gradient(case: Case, tmp_path: Path) -> None:
    norms = []

    class Norm(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    fit(case, tmp_path, gradient_clip_val=0.05, callbacks=[Norm()])
    assert norms
    assert all(n <= 0.05 + 1e-5 for n in norms)


def test_compiled_network_trains(case: Case, tmp_path: Path) -> None:
    def compiled() -> UserModule:
        module = UserModule(lr=0.05)
        module.net.compile(backend=BACKEND)
        return module

    short = {"max_epochs": 1, "limit_train_batches": 3}
    assert same(fit(case, tmp_path, compiled, **short), fit(case, tmp_path, **short), atol=1e-5)


def test_two_processes_equal_one(case: Case, tmp_path: Path, request: Any) -> None:
    name = next(n for n, c in CASES.items() if c is case)
    run_two_processes(name, tmp_path)
    two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    one = run_case(name, tmp_path, devices=1).state_dict()
    assert list(one) == list(two)
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=0, atol=1e-6), key


def test_killed_at_any_step_and_resumed_gives_the_same_bits(case: Case, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(**kwargs: Any) -> UserModule:
        L.seed_everything(1, verbose=False)
        module = UserModule(lr=0.05, dropout=0.2)
        extra = kwargs.pop("callbacks", [])
        t = trainer(tmp_path, callbacks=[*case.make(), gp.ExactResume(), *extra], **kwargs.pop("settings", {}))
        t.fit(module, loader(), loader(shuffle=False), **kwargs)
        return module

    whole = run(callbacks=[steps], settings={"enable_checkpointing": True})
    for step in random.Random(0).sample(range(1, 16), 3):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert same(whole, resumed), f"killed after step {step}"


class Failure(Exception):
    """Stands for whatever goes wrong in somebody's training."""


class Fail(L.Callback):
    """Raises in the middle of the given batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            raise Failure


def test_an_exception_leaves_the_module_clean_and_fit_for_another_run(case: Case, tmp_path: Path) -> None:
    module = UserModule(lr=0.05)
    with pytest.raises(Failure):
        fit(case, tmp_path, lambda: module, callbacks=[Fail(2)])
    assert not left_behind(module)
    names = list(module.state_dict())
    fit(case, tmp_path, lambda: module)
    assert list(module.state_dict()) == names


def test_fit_test_fit_and_two_trainers_attach_once(case: Case, tmp_path: Path) -> None:
    module = UserModule(lr=0.05)
    callbacks = case.make()
    first = trainer(tmp_path, callbacks=callbacks, num_sanity_val_steps=2)
    first.fit(module, loader(), loader(shuffle=False))
    names = list(module.state_dict())
    first.test(module, loader(shuffle=False))
    first.fit_loop.max_epochs = 3
    first.fit(module, loader(), loader(shuffle=False))
    trainer(tmp_path, callbacks=case.make(), limit_train_batches=2).fit(module, loader())
    assert list(module.state_dict()) == names
    assert not left_behind(module)


def test_fast_dev_run_and_limits(case: Case, tmp_path: Path) -> None:
    for settings in ({"fast_dev_run": True}, {"limit_train_batches": 1, "limit_val_batches": 1}, {"limit_train_batches": 0}):
        module = UserModule()
        trainer(tmp_path, callbacks=case.make(), **settings).fit(module, loader(), loader(shuffle=False))
        assert not left_behind(module)


def test_checkpoint_loads_with_weights_only_and_rebuilds_the_plugs(case: Case, tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    module = UserModule()
    t = trainer(tmp_path, callbacks=case.make(), max_epochs=1)
    t.fit(module, loader())
    path = tmp_path / "run.ckpt"
    t.save_checkpoint(path)
    torch.load(path, weights_only=True)
    loaded = gp.load(path, UserModule(), register=case.register)
    assert same(module, loaded)
    x = digits(4)[:][0]
    with torch.no_grad():
        assert torch.equal(loaded(x), module.eval()(x))
    weights = tmp_path / "weights.ckpt"
    t.save_checkpoint(weights, weights_only=True)
    assert same(module, gp.load(weights, UserModule(), register=case.register))


def test_checkpoint_opened_without_the_plug_names_it(case: Case, tmp_path: Path) -> None:
    module = UserModule()
    t = trainer(tmp_path, callbacks=case.make(), max_epochs=1)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "run.ckpt")
    names = [type(p).__name__ for p in case.make() if p.attaches]
    with pytest.raises(gp.PlugError, match=names[0]):
        trainer(tmp_path, callbacks=[gp.GateMonitor()]).fit(UserModule(), loader(), ckpt_path=tmp_path / "run.ckpt")
    with pytest.raises(gp.PlugError, match=names[0]):
        gp.load(tmp_path / "run.ckpt", UserModule(), plugs=[])


def test_fold_is_plain_and_exports(case: Case, tmp_path: Path) -> None:
    module = fit(case, tmp_path, max_epochs=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    plain = gp.fold(module)
    x = digits(4)[:][0]
    assert type(plain.net if isinstance(plain, gp.ExitRunner) else plain) is Net
    assert not any(isinstance(m, L.LightningModule) or m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    with torch.no_grad():
        expected = module.eval()(x)
        assert torch.allclose(answers(plain, x), expected, atol=1e-6)
        if isinstance(plain, gp.ExitRunner):
            plain.export(tmp_path / "stages", (x,))
            exported = gp.ExitPrograms(tmp_path / "stages", threshold=float("inf"))(x).logits
        else:
            exported = torch.export.export(plain, (x,)).module()(x)
        assert torch.allclose(exported, expected, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "fold changed the module it was given"


def test_names_stay_and_detach_leaves_no_trace(case: Case) -> None:
    torch.manual_seed(0)
    module = UserModule(dropout=0.2)
    x = digits(4)[:][0]
    before, out = {k: v.clone() for k, v in module.state_dict().items()}, module.eval()(x)
    module.train()
    text, attributes = repr(module), set(module.__dict__)
    plugs = case.make()
    stream = torch.get_rng_state()
    for plug in plugs:
        plug.attach(module)
    assert torch.equal(torch.get_rng_state(), stream), "attaching disturbs the random stream"
    slots = [layer for plug in plugs for layer in plug.describe(module)]
    kept = [k for k in before if not any(k.startswith(s) for s in slots)]
    assert set(kept) <= set(module.state_dict())
    for plug in reversed(plugs):
        plug.detach(module)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert repr(module) == text
    assert torch.equal(module.eval()(x), out)
    assert set(module.__dict__) == attributes


def test_attached_module_can_be_copied_and_saved(case: Case, tmp_path: Path) -> None:
    module = fit(case, tmp_path, max_epochs=1)
    x = digits(4)[:][0]
    with torch.no_grad():
        expected = module.eval()(x)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), expected)
        file = io.BytesIO()
        torch.save(module.net, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(module(x), expected), "the copy shares weights with the original"


def test_eval_train_and_no_grad_agree(case: Case) -> None:
    module = UserModule()
    for plug in case.make():
        plug.attach(module)
    x = digits(4)[:][0]
    outs: list[Tensor] = []
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                outs.append(module.train(training)(x).detach())
    assert all(torch.allclose(o, outs[0], atol=1e-6) for o in outs)


def test_arguments_are_kept_and_stored(case: Case) -> None:
    plug = case.plug()
    assert type(plug)(**plug.arguments()).arguments() == plug.arguments()
    assert plug.state_key == case.plug().state_key
    assert plug.room
    assert plug.summary


def test_every_bad_argument_is_refused_and_nothing_is_lost(case: Case) -> None:
    assert case.bad
    for arguments, error, text in case.bad:
        module = UserModule()
        before = repr(module)
        assert set(arguments) <= set(case.plug().arguments()), "not an argument of this plug"
        with pytest.raises(error) as caught:
            type(case.plug())(**arguments).attach(module)
        assert text in str(caught.value), f"{arguments}: {caught.value}"
        assert repr(module) == before


def test_logs_reach_tensorboard(case: Case, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(case, tmp_path, logger=logger, log_every_n_steps=1)
    files = list(Path(logger.log_dir).glob("events*"))
    assert files
    assert sum(f.stat().st_size for f in files) > 500
