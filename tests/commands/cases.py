"""What the tests of the commands share: facts, quick settings, and a command run in this process."""

from kedit_fast.commands import cli

FACTS = (
    {"prompt": "{} is located in the city of", "subject": "Big Ben", "target_new": "Seattle", "target_true": "London"},
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "target_true": "Paris"},
)
ONE = ["--prompt", "The capital of {} is", "--subject", "France"]
FAST = {"v_num_grad_steps": 3, "context_template_length_params": [[4, 2]], "mom2_update_weight": 80.0}


def run(*args):
    """The exit status of a command, also where its arguments alone are refused or help is asked for."""
    try:
        return cli.main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code


def parsed(*args):
    """What the parser makes of a command's words."""
    return cli.build_parser().parse_args(args)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def raising(error):
    def act(args):
        raise error

    return act
