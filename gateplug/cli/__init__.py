"""The command ``gateplug``: choose the sub-command, and say in one paragraph what a person can correct."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from gateplug.cli.errors import UserError

COMMANDS = {
    "fit": "train, then test and print the result",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "write predictions to a file",
    "plugs": "list all plugs: name, room, what it does, paper",
    "fold": "write the plain network of a checkpoint to .safetensors or .pt2",
}
USAGE = """usage: gateplug COMMAND [options]

  gateplug fit -c recipes/quickstart.yaml [-c more.yaml] [--trainer.max_epochs 5]
  gateplug fold runs/quickstart/version_0/checkpoints/last.ckpt net.safetensors

commands:
{commands}

options of every command:
  --help       what the command takes
  --debug      show the traceback of an error
  --version    print the version"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error that the person can correct, printed as one paragraph.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: classes of your own beside the YAML are found
    try:
        return _dispatch(given)
    except UserError as error:
        if debug:
            raise
        print(f"gateplug: {error}\n(`--debug` shows the traceback.)", file=sys.stderr)
        return 2


def _dispatch(given: list[str]) -> int:
    command, rest = (given[0], given[1:]) if given else ("", [])
    if command == "--version":
        import gateplug

        print(f"gateplug {gateplug.__version__}")
        return 0
    if command in ("", "-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())))
        return 0 if command else 2
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"There is no command {command!r}.{hint} Commands: {', '.join(COMMANDS)}.")
    # Imported on use: Lightning takes seconds.
    if command == "plugs":
        from gateplug.cli.plugs import show_plugs

        show_plugs(rest)
    elif command == "fold":
        from gateplug.cli.fold import fold_checkpoint

        fold_checkpoint(rest)
    else:
        from gateplug.cli.training import run

        run(given)
    return 0
