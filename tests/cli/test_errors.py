"""What the command line says when something is wrong: one paragraph with place, cause and nearest names."""

import os

import pytest
import torch

from gateplug.cli import main
from gateplug.cli.causes import Frame, plain_cause
from gateplug.cli.errors import UserError
from tests.cli.shared import fit

NET = "model:\n  init_args:\n    net:\n      class_path: hf_model\n      init_args:\n"
CALLBACK = "trainer:\n  callbacks:\n    - class_path: {}\n"
COUNTED = CALLBACK.format("tests.cli.shared.Counted") + "      init_args: {}\n"
WRONG = {
    "misspelt argument": (
        COUNTED.format("{targt: 0.4}"),
        "wrong.yaml, line 4, trainer.callbacks: Counted does not accept 'targt'. Did you mean 'target'? Allowed: target, name.",
    ),
    "wrong type": (
        COUNTED.format("{target: half}"),
        "wrong.yaml, line 4, trainer.callbacks.target: expected float, got half.",
    ),
    "refused value": (
        COUNTED.format("{target: 7}"),
        "wrong.yaml, line 3: Counted: target must lie in [0, 1], got 7.0",
    ),
    "refused value of a group": (
        "model:\n  init_args:\n    net:\n      class_path: MoE\n      init_args:\n"
        "        experts: {class_path: ExpertMLP, init_args: {experts: 4, dim: 8, hidden: 8}}\n"
        "        gate:\n          class_path: DSelectK\n          init_args:\n            experts: 4\n            k: 2\n"
        "            entropy:\n              start: 0.0\n              end: -1.0\n              steps: 3\n",
        "wrong.yaml, line 14: end=-1.0 of a Ramp must be a finite number ≥ 0",
    ),
    "refused by data": (
        "data:\n  class_path: Digits\n  init_args: {batch_size: 0}\n",
        "wrong.yaml, line 2: Digits(batch_size=0): it must be at least 1.",
    ),
    "unknown class": (
        CALLBACK.format("ReplaceFN"),
        "wrong.yaml, line 3, trainer.callbacks: there is no class 'ReplaceFN'. Did you mean 'ReplaceFFN'",
    ),
    "unknown class of a module": (
        CALLBACK.format("tests.cli.shared.Countd"),
        "wrong.yaml, line 3, trainer.callbacks: there is no class 'tests.cli.shared.Countd'. Did you mean 'Counted'",
    ),
    "unknown module": (
        CALLBACK.format("nowhere.Thing"),
        "wrong.yaml, line 3, trainer.callbacks: there is no class 'nowhere.Thing'.",
    ),
    "plug under model": (
        "model:\n  class_path: ReplaceFFN\n",
        "wrong.yaml, line 2, model: ReplaceFFN is no LightningModule. It is a callback and belongs into the list"
        " `trainer.callbacks:`.",
    ),
    "not YAML": (
        "trainer:\n  max_epochs: 3\n   max_steps: [\n",
        "wrong.yaml, line 3: this is no valid YAML: mapping values are not allowed in this context",
    ),
    "misspelt option of the Trainer": (
        "trainer:\n  max_epoch: 3\n",
        "wrong.yaml, line 2: Trainer does not accept 'max_epoch'. Did you mean 'max_epochs' or 'min_epochs'",
    ),
    "misspelt section": (
        "trainr:\n  max_epochs: 3\n",
        "wrong.yaml, line 1: the configuration does not accept 'trainr'. Did you mean 'trainer'? Allowed:"
        " seed_everything, trainer, model, data, ckpt_path, test_after_fit.",
    ),
    "union of types": (
        "trainer:\n  max_epochs: many\n",
        "wrong.yaml, line 2, trainer.max_epochs: expected int or null, got many.",
    ),
    "misspelt argument of a network": (
        NET + "        arch: vit\n",
        "wrong.yaml, line 6, model.net: hf_model does not accept 'arch'. Did you mean 'architecture'?",
    ),
    "misspelt value of a network's config": (
        NET + "        config: {hiden_size: 8}\n",
        "wrong.yaml, line 6: config has 'hiden_size', which ViTConfig does not know. Nearest: hidden_size",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_paragraph(case, here, capsys):
    text, expected = WRONG[case]
    (here / "wrong.yaml").write_text(text)
    assert fit("-c", "wrong.yaml") == 2
    said = capsys.readouterr().err
    (paragraph,) = [line for line in said.splitlines() if line.startswith("gateplug:")]
    assert paragraph.startswith(f"gateplug: {expected}")
    assert "Traceback" not in said
    assert "Subtypes" not in said


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit", "-c", "bas.yaml"], "there is no file bas.yaml. Did you mean 'base.yaml'?"),
        (["fit"], "data, model must be given, in a YAML file (`-c FILE`) or as options."),
        (["fit", "--data=Digits", "--model=Classifier", "--model.num_classes=3"], "command line, model: Classifier needs net"),
        (["fti"], "There is no command 'fti'. Did you mean 'fit'? Commands: fit, validate,"),
        (["fit", "-c", "base.yaml", "--data=Digit"], "command line, data: there is no class 'Digit'. Did you mean 'Digits'"),
        (
            ["fit", "-c", "base.yaml", "--trainer.callbacks+=ReplaceFFN", "--trainer.callbacks.varient=glu"],
            "command line, trainer.callbacks: ReplaceFFN does not accept 'varient'. Did you mean 'variant'?",
        ),
        # found while the run is set up, or by gateplug's own check of the first batch
        (["fit", "-c", "base.yaml", "--ckpt_path=none.ckpt"], "Checkpoint file not found: none.ckpt"),
        (["fit", "-c", "base.yaml", "--model.init_args.num_classes=3"], "Labels go from 0 to 9, but must lie in 0 … 2"),
        (["fit", "-c", "base.yaml", "--trainer.max_epochs=-1"], "OneCycleLR needs the number of training steps"),
        (["fold", "none.ckpt", "net.pt2"], "There is no checkpoint 'none.ckpt'."),
        (["fold", "base.yaml", "net.pt2"], "'base.yaml' is no checkpoint that can be read safely"),
        (["fold", "base.yaml", "net.bin"], "OUT is 'net.bin'; its ending must be .safetensors (weights) or .pt2"),
    ],
)
def test_a_wrong_command_is_one_paragraph(args, expected, here, capsys):
    assert main(args) == 2
    said = capsys.readouterr().err
    assert f"gateplug: {expected}" in said
    assert "Traceback" not in said


def test_a_plug_that_finds_no_layer_is_one_paragraph(here, capsys):
    assert fit("--trainer.callbacks+=ReplaceFFN", "--trainer.callbacks.layers=nothing.like.it") == 2
    assert "nothing.like.it" in capsys.readouterr().err


def test_a_plug_given_twice_is_one_paragraph(here, capsys):
    assert fit("--trainer.callbacks+=ReplaceFFN", "--trainer.callbacks+=ReplaceFFN") == 2
    assert "gateplug: trainer.callbacks holds two ReplaceFFN for the same layers: leave one" in capsys.readouterr().err


def test_debug_shows_the_traceback(here):
    with pytest.raises(UserError, match=r"there is no file bas\.yaml") as error:
        main(["fit", "-c", "bas.yaml", "--debug"])
    assert error.value.__cause__ is not None


def test_an_error_of_the_users_code_in_training_keeps_its_traceback(here):
    with pytest.raises(ValueError, match="a bug of the user"):
        main(["fit", "--model=tests.cli.shared.Mine", "--model.fails=true", "--data=Digits", "--trainer.max_epochs=1"])


def test_an_ambiguous_name_says_how_to_name_gateplugs():
    text = "Multiple subclasses with name Classifier. Give the full class path to avoid ambiguity: a.Classifier, b."
    assert plain_cause(text, Frame()).text.endswith("gateplug's is gateplug.Classifier.")


class Evil:
    """What a pickle may do: here it only makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("pickle_was_read",)


@pytest.mark.parametrize("command", [["test", "-c", "base.yaml", "--ckpt_path", "evil.ckpt"], ["fold", "evil.ckpt", "net.pt2"]])
def test_a_checkpoint_with_a_pickle_is_refused_and_not_read(command, here, capsys):
    torch.save({"state_dict": {}, "thing": Evil()}, "evil.ckpt")
    assert main(command) == 2
    assert "is no checkpoint that can be read safely" in capsys.readouterr().err
    assert not (here / "pickle_was_read").exists()


def test_a_value_given_as_an_option_is_not_looked_for_in_the_file(tmp_path, capsys):
    """The class stands in the file, the wrong value on the command line."""
    recipe = tmp_path / "run.yaml"
    recipe.write_text("trainer:\n  callbacks:\n    - class_path: ReplaceFFN\n      init_args: {variant: geglu}\n")
    args = ["fit", "-c", str(recipe), "--trainer.callbacks.variant=swigloo", "--model=Classifier", "--data=Digits"]
    assert main(args) == 2
    assert "command line" in capsys.readouterr().err
