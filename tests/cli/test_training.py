"""fit, validate, test and predict, called as a person calls them: what runs, and what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

import gateplug as gp
from gateplug.cli import main
from tests.cli.shared import BASE, LAST, RUNS, callbacks, fit


def test_fit_trains_tests_and_says_what_came_out_and_where_it_lies(here, capsys):
    assert fit() == 0
    said = capsys.readouterr().out
    for part in ("test/accuracy", "val/calibration_error", "parameters", "multiply-adds per sample", "seconds, fit", LAST):
        assert part in said
    assert sorted(p.name for p in (here / "runs/base/version_0").iterdir() if p.name != "hparams.yaml")[:2] == [
        "checkpoints",
        "config.yaml",
    ]


def test_a_checkpoint_is_opened_without_yaml_and_data(here):
    assert fit("--trainer.callbacks+=ReplaceFFN") == 0
    stored = torch.load(LAST, weights_only=True)
    assert stored["gateplug_model"]["class_path"] == "gateplug.Classifier"
    assert stored["gateplug_example"]["kwargs"] == {"pixel_values": {"shape": [64, 1, 8, 8], "dtype": "float32"}}
    module = gp.load(LAST)
    x = torch.rand(3, 1, 8, 8)
    trained = RUNS[0].trainer.lightning_module.eval()
    assert torch.equal(module(pixel_values=x), trained(pixel_values=x))


def test_a_run_that_breaks_off_leaves_its_last_epoch_and_goes_on_from_there(here, capsys):
    with pytest.raises(RuntimeError, match="the machine is lost"):
        fit("--trainer.max_epochs=2", "--trainer.callbacks+=tests.cli.shared.Stops")
    assert torch.load(LAST, weights_only=True)["epoch"] == 0
    assert fit("--trainer.max_epochs=2", "--ckpt_path", LAST) == 0
    assert "checkpoint (last)" in capsys.readouterr().out
    assert RUNS[-1].trainer.global_step == 4


def test_files_merge_and_callbacks_are_appended(here):
    (here / "more.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: GateMonitor\n  max_epochs: 2\n")
    assert fit("-c", "more.yaml", "--trainer.callbacks+=ReplaceFFN", "--trainer.callbacks.variant=reglu") == 0
    names = callbacks(RUNS[0].trainer)
    assert {"Counted", "GateMonitor", "ReplaceFFN", "ExactResume", "Record", "ModelCheckpoint"} <= set(names)
    assert [c.variant for c in RUNS[0].trainer.callbacks if isinstance(c, gp.ReplaceFFN)] == ["reglu"]
    assert RUNS[0].trainer.max_epochs == 2


def test_an_inner_value_of_the_config_is_overridden_from_the_command_line(here):
    assert fit("--model.init_args.net.init_args.config.hidden_size", "32", "--trainer.fast_dev_run=true") == 0
    config = RUNS[0].trainer.lightning_module.net.config
    assert (config.hidden_size, config.num_hidden_layers) == (32, 1)


def test_a_default_steps_back_for_the_persons_own(here):
    own = "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"
    assert fit(*own, "--trainer.callbacks+=ExactResume", "--trainer.callbacks.seed=3") == 0
    names = callbacks(RUNS[0].trainer)
    assert (names.count("ModelCheckpoint"), names.count("ExactResume")) == (1, 1)


def test_the_best_checkpoint_is_tested_where_a_metric_chooses_it(here, capsys, monkeypatch):
    tested = []
    monkeypatch.setattr(L.Trainer, "test", lambda self, **kwargs: tested.append(kwargs["ckpt_path"]))
    assert fit("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss") == 0
    assert fit() == 0
    assert Path(tested[0]).name == "epoch=0-step=2.ckpt"
    assert tested[1] is None


def test_testing_after_fit_can_be_switched_off(here, capsys):
    assert fit("--test_after_fit=false") == 0
    said = capsys.readouterr().out
    assert "val/accuracy" in said
    assert "test/accuracy" not in said


def test_data_without_a_test_set_is_not_tested(here, capsys):
    assert fit("--data.init_args.test_fraction=0") == 0
    assert "test/accuracy" not in capsys.readouterr().out


def test_validate_test_and_predict_from_a_checkpoint(here, capsys):
    assert fit() == 0
    for stage, part in (("validate", "val/accuracy"), ("test", "test/accuracy"), ("predict", "predictions.pt")):
        capsys.readouterr()
        assert main([stage, "-c", "base.yaml", "--ckpt_path", LAST]) == 0
        assert part in capsys.readouterr().out
    (written,) = here.glob("runs/base/*/predictions.pt")
    predicted = torch.load(written, weights_only=True)
    assert sum(len(p["labels"]) for p in predicted) > 0


def test_a_run_repeats_from_its_own_config_under_its_own_name(here):
    assert fit() == 0
    first = RUNS[0].trainer.lightning_module.state_dict()
    assert main(["fit", "-c", "runs/base/version_0/config.yaml"]) == 0
    assert (here / "runs/base/version_1").is_dir()
    again = RUNS[-1].trainer.lightning_module.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_module_of_the_user_runs_and_folds_when_it_is_registered(here, capsys):
    assert main(["fit", "--model=tests.cli.shared.Mine", "--data=Digits", "--trainer.fast_dev_run=false",
                 "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]) == 0  # fmt: skip
    checkpoint = "runs/gateplug/version_0/checkpoints/last.ckpt"
    assert main(["fold", checkpoint, "out/net.safetensors"]) == 2
    assert "--register PACKAGE.NAME" in capsys.readouterr().err
    assert main(["fold", checkpoint, "out/net.safetensors", "--register", "tests.cli.shared.Mine"]) == 0
    assert sorted(load_file("out/net.safetensors")) == ["1.bias", "1.weight", "3.bias", "3.weight"]


def test_a_network_from_a_folder_is_described_without_the_folder(here):
    settings = yaml.safe_load(BASE)
    net = settings["model"]["init_args"]["net"]["init_args"]
    gp.hf_model("vit", num_labels=10, config=net.pop("config")).save_pretrained("stored")
    net["pretrained"] = "stored"
    config = Path("stored/config.json")  # of an older transformers, with a setting that is gone
    config.write_text(json.dumps(json.loads(config.read_text()) | {"position_embedding_type": "absolute"}))
    (here / "base.yaml").write_text(yaml.safe_dump(settings))
    assert fit() == 0
    assert "stored" not in str(torch.load(LAST, weights_only=True)["gateplug_model"])
    for file in Path("stored").iterdir():
        file.unlink()
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(gp.load(LAST)(pixel_values=x), RUNS[0].trainer.lightning_module.eval()(pixel_values=x))


def test_two_processes_from_the_console_script_print_one_result(here):
    script = Path(sys.executable).with_name("gateplug")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "gateplug"]
    (here / "base.yaml").write_text(BASE.split("  callbacks:", maxsplit=1)[0])
    done = subprocess.run(
        [*command, "fit", "-c", "base.yaml", "--trainer.strategy=ddp", "--trainer.devices=2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test/accuracy") == 1
    assert (here / LAST).is_file()


@pytest.mark.parametrize(
    ("options", "interval", "monitor"),
    [
        (["=CosineAnnealingLR", ".T_max=-1"], "step", None),
        (["=gateplug.WarmupCosineLR"], "step", None),
        (["=StepLR", ".step_size=1"], "epoch", None),
        (["=lightning.pytorch.cli.ReduceLROnPlateau", ".monitor=val/accuracy"], "epoch", "val/accuracy"),
    ],
)
def test_schedules_are_named_in_the_configuration(options, interval, monitor, here):
    assert fit("--test_after_fit=false", *[f"--model.init_args.scheduler{option}" for option in options]) == 0
    (config,) = RUNS[0].trainer.lr_scheduler_configs
    assert (config.interval, config.monitor) == (interval, monitor)
