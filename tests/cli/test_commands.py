"""plugs, fold, version and help, and the example inputs that fold is given."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import gateplug as gp
from gateplug.cli import main
from gateplug.cli.record import build_example, describe
from tests.cli.shared import LAST, RUNS, fit

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_plugs_lists_every_public_plug(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plugs"]) == 0
    said = capsys.readouterr().out
    public = [n for n in gp.__all__ if isinstance(getattr(gp, n), type) and issubclass(getattr(gp, n), gp.Plug)]
    assert len(public) > 2
    for name in set(public) - {"Plug"}:
        assert name in said
        assert getattr(gp, name).summary
    assert "│ Plug " not in said


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gateplug {gp.__version__}\n"
    assert main(["--help"]) == 0
    assert {"fit", "validate", "test", "predict", "plugs", "fold"} <= set(capsys.readouterr().out.split())
    assert main([]) == 2


def test_fold_writes_what_was_trained_and_overwrites_nothing(here, capsys):
    assert fit("--trainer.callbacks+=ReplaceFFN") == 0
    x = torch.rand(5, 1, 8, 8)
    expected = RUNS[0].trainer.lightning_module.eval()(pixel_values=x)
    assert main(["fold", LAST, "out/net.pt2"]) == 0
    exported = torch.export.load("out/net.pt2").module()
    torch.testing.assert_close(exported(pixel_values=x)["logits"], expected, rtol=0, atol=1e-6)

    assert main(["fold", LAST, "out/net.safetensors"]) == 0
    folded = gp.fold(gp.load(LAST))
    assert {k: v.shape for k, v in load_file("out/net.safetensors").items()} == {
        k: v.shape for k, v in folded.state_dict().items()
    }
    config = yaml.safe_load(Path("out/config.json").read_text())
    assert config["hidden_size"] == 16
    assert [p["class"] for p in config["gateplug"]["plugs"]] == ["ReplaceFFN"]

    capsys.readouterr()
    before = Path("out/config.json").read_bytes()
    assert main(["fold", LAST, "out/other.safetensors"]) == 2
    assert "out/config.json would be overwritten" in capsys.readouterr().err
    assert Path("out/config.json").read_bytes() == before
    assert main(["fold", LAST, "out/net.safetensors", "--overwrite"]) == 0


def test_several_tasks_fold_into_one_exported_program(here):
    """Their forward takes any keywords."""
    recipe = RECIPES / "dselectk_synthetic128.yaml"
    less = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    assert main(["fit", "-c", str(recipe), *less, "--trainer.callbacks+=tests.cli.shared.Counted"]) == 0
    x = torch.rand(5, 10)
    expected = RUNS[0].trainer.lightning_module.eval()(x)["y"]
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    assert main(["fold", str(checkpoint), "out/net.pt2"]) == 0
    exported = torch.export.load("out/net.pt2").module()
    torch.testing.assert_close(exported(x=x)["y"], expected, rtol=0, atol=1e-6)


def test_an_exported_mixture_has_no_cache_and_says_what_it_needs(here, capsys):
    recipe = RECIPES / "moe_router_text.yaml"
    less = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    assert main(["fit", "-c", str(recipe), *less]) == 0
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    capsys.readouterr()
    assert main(["fold", str(checkpoint), "out/net.pt2"]) == 0
    assert "calls transformers.grouped_mm_fallback.default: import what defines it" in capsys.readouterr().out
    exported = torch.export.load("out/net.pt2").module()
    folded = gp.fold(gp.load(checkpoint)).eval()
    inputs = {"input_ids": torch.arange(3 * 128).view(3, 128) % 50, "attention_mask": torch.ones(3, 128, dtype=torch.int64)}
    output = exported(**inputs)
    assert list(output) == ["logits"]
    torch.testing.assert_close(output["logits"], folded(**inputs).logits, rtol=0, atol=1e-5)


def test_an_example_is_described_without_its_data_and_built_again():
    form = {"args": [describe([torch.rand(4, 2), None])], "kwargs": {"ids": describe(torch.zeros(4, 3).long()), "k": describe(2)}}
    args, kwargs = build_example(form, batch=1)
    assert args[0][0].shape == (1, 2)
    assert args[0][1] is None
    assert torch.equal(kwargs["ids"], torch.ones(1, 3).long())
    assert kwargs["k"] == 2
    with pytest.raises(ValueError, match="called with a object"):
        build_example({"args": [describe(object())], "kwargs": {}})


def test_inputs_of_different_lengths_keep_their_recorded_size():
    form = {"args": [describe(torch.rand(4, 2)), describe(torch.rand(7, 2))], "kwargs": {}}
    assert [a.shape[0] for a in build_example(form, batch=1)[0]] == [4, 7]


def test_a_network_with_exits_folds_into_a_program_for_each_stage(here, capsys):
    recipe = RECIPES / "early_exit_digits.yaml"
    less = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    assert main(["fit", "-c", str(recipe), *less]) == 0
    (checkpoint,) = map(str, Path("runs").rglob("last.ckpt"))
    runner = gp.fold(gp.load(checkpoint))
    x = torch.rand(5, 1, 8, 8)
    for more, tolerance in (([], 1e-6), (["--form", "onnx"], 1e-4)):
        folder = f"out/stages{len(more)}"
        assert main(["fold", checkpoint, folder, *more]) == 0
        programs = gp.ExitPrograms(folder)
        assert programs.threshold == runner.threshold
        got, want = programs(pixel_values=x), runner(pixel_values=x)
        assert got.exit.tolist() == want.exit.tolist()
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=tolerance)
    assert main(["fold", checkpoint, "out/net.safetensors"]) == 0
    capsys.readouterr()
    assert main(["fold", checkpoint, "out/net.pt2"]) == 2
    assert "a program for each stage. Name a folder, e.g. 'out/net'" in capsys.readouterr().err
    assert main(["fold", checkpoint, "out/stages0"]) == 2
    assert "holds something already" in capsys.readouterr().err


def test_a_network_without_exits_is_no_folder(here, capsys):
    assert fit() == 0
    capsys.readouterr()
    assert main(["fold", LAST, "out/stages"]) == 2
    assert "has no exits: it is one program. Add .pt2" in capsys.readouterr().err
    assert not Path("out/stages").exists()
