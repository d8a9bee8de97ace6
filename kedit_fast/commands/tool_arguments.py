"""The arguments of the commands that ask no model, ``kedit-fast info | completion``; torch-free."""

from kedit_fast.commands.argument_types import path, positive, rate, size
from kedit_fast.commands.parser import Commands, ending, machine_options, option, output

PLANS = ("trace", "edit", "stats")
SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_info(commands: Commands) -> None:
    parser = commands.command(
        "info [MODEL]",
        "what this installation can use, and what work on a model will cost",
        "Shows versions, devices, which native code is there (or why not), and where files are kept. With --plan it\n"
        "says what a piece of work costs, from a model's config.json alone: where its weights go, passes over them,\n"
        "bytes, FLOP, time, and what would halve it.",
        "kedit-fast info ./llama-70b --plan edit --facts 1000 --memory 24GiB --device cuda",
    )
    parser.add_argument("of", nargs="?", type=path, metavar="MODEL", help="the same as --model")
    plan = parser.add_argument_group("what work will cost")
    option(plan, "--plan", PLANS, "for this work")
    option(plan, "--facts N", positive, "on so many facts", 1_000)
    option(plan, "--tflops N", rate, "that the device computes in the model's dtype (default: measured, if it is here)")
    option(plan, "--bus GB/S", rate, "gigabytes a second that reach the device (default: measured, if it is here)")
    option(plan, "--host SIZE", size, "host memory beside the device's (default: this machine's)")
    output(parser, "FILE", "the same as .json")
    machine_options(parser, seed=None, model=None)


def add_completion(commands: Commands) -> None:
    parser = commands.command(
        "completion SHELL",
        "have your shell complete commands, options and file names",
        "Prints a script for the shell (pip install 'kedit-fast[completion]'). bash reads it from\n"
        "~/.local/share/bash-completion/completions/kedit-fast; zsh from _kedit-fast in a folder of $fpath; fish from\n"
        "~/.config/fish/completions/kedit-fast.fish. Make it anew after an update.",
        "kedit-fast completion bash",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    ending(parser)
