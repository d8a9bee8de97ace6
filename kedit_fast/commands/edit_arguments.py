"""The arguments of ``kedit-fast edit | train | compare | merge | history`` and of their actions; torch-free."""

from argparse import ArgumentTypeError

from kedit_fast.basics import catalog
from kedit_fast.commands.argument_types import (
    count,
    layers,
    list_of,
    names,
    path,
    positive,
    share,
    size,
    text_such_as,
)
from kedit_fast.commands.parser import (
    EDIT,
    Commands,
    benchmark_options,
    chat_options,
    checkpoint_option,
    edits_argument,
    ending,
    fact_options,
    file_options,
    flag,
    folder_argument,
    machine_options,
    option,
    output,
    signed,
    statistics_options,
)

METHODS = tuple(catalog.EDITORS)
KINDS = {  # of methods: the help of --method
    "solved for in a few layers": "rome memit alphaedit emmet encore pmet memit-blue alphaedit-blue betaedit rect nas",
    "by gradient": "ft ft-l ft-m locft-bf crispedit ultraedit stableedit",
    "by a trained --network": "mend malmen ke",
    "a memory beside the weights": "grace wise memoir",
    "a text before the prompt": "ike ike-plain ice serac",
    "neurons": "kn",
    "to forget target_true": "unlearn",
}
TRAINED = tuple(catalog.TRAINED)


def add_edit(commands: Commands) -> None:
    parser = commands.command(
        "edit",
        "make an edit file that rewrites facts",
        "Computes what must change for the model to say new answers, and writes it to a file: weights, solved for\n"
        "by MEMIT (many facts at once) and its kin or fine-tuned, or a memory or a text beside unchanged weights.\n"
        "The model itself stays as it is in any case. README says which method to take when.",
        'kedit-fast edit --prompt "{} is in the city of" --subject "The Eiffel Tower" --target Rome',
        also="with edits that are there: kedit-fast edit inspect --help, also edit diff, only, without",
    )
    fact_options(parser, targets=True, forget=True)
    how = parser.add_argument_group("how to edit")
    kinds = "; ".join(f"{kind}: {names.replace(' ', ', ')}" for kind, names in KINDS.items())
    option(how, "--method NAME", METHODS, kinds, "memit")
    option(how, "--layers L", layers, "for instance 3-7 (default: published or derived)")
    option(how, "--hparams FILE", path, "a published hyper-parameter file (.json, .yaml)")
    option(how, "--network FILE", path, f"of {', '.join(TRAINED)}: what `kedit-fast train` made")
    statistics_options(how)
    option(how, "--on-top-of EDIT", path, f"what this edit is made on top of: {EDIT}; again for more", action="append")
    flag(how, "--independent", "each fact as an edit of its own that sees no other, all at once; `edit only` takes one")
    route = "such edits behind a route, each on some prompts alone, all others stay as they are: names: on all that "
    route += "name its subject, whatever they ask; scope: on those that also ask for the fact, by a classifier"
    option(how, "--route WHICH", catalog.ROUTES, route)
    option(how, "--examples FILE", path, "with --route scope: facts to learn it from (default: the package's own)")
    checkpoint_option(how)
    flag(how, "--strict", "exit status 1 where the edited model does not say a fact's new answer")
    output(parser, "FILE", "the edit", "edit.safetensors")
    machine_options(parser)


def add_train(commands: Commands) -> None:
    parser = commands.command(
        "train",
        "train a network that makes edits",
        "MEND, MALMEN and KE edit by a network, which turns the gradient of an edit into an edit. It is trained once\n"
        "for a model, on facts whose paraphrases and neighbors are known, and then edits others in one pass. Facts of\n"
        "some subjects are held out and say how well it does; the network of the best look at them is written.",
        "kedit-fast train --facts counterfact.json -n 1000 --related --routed -o mend.safetensors",
        also="to edit by it, each fact by itself behind a route (their sum soon breaks a model):\n"
        "kedit-fast edit --method mend --network mend.safetensors --route names",
    )
    which = parser.add_argument_group("which facts")
    file_options(which)
    chat_options(which)
    related = (
        "phrasings, and prompts on the subject's other relations, where a fact has none: as the file's other facts "
    )
    flag(which, "--related", related + "ask (CounterFact has their relation_id)")
    how = parser.add_argument_group("how to train")
    option(how, "--method", TRAINED, ", ".join(TRAINED), "mend")
    option(how, "--layers L", layers, "whose MLPs the edits change, for instance 27-29 (default: the last three)")
    option(how, "--steps N", positive, "at most (default: of --hparams, else 1,000)")
    routed = (
        "for edits that stand behind a route (edit --route): the subject's other relations must not change, nor how "
    )
    flag(how, "--routed", routed + "text goes on behind the answer; neighbors, which such edits pass by, may")
    option(how, "--held-out SHARE", share, "of the subjects, to look at meanwhile", 0.1)
    option(how, "--hparams FILE", path, "hyper-parameters of the training (.json, .yaml)")
    checkpoint_option(how)
    output(parser, "FILE", "the network", "network.safetensors")
    machine_options(parser)


def add_forgotten(commands: Commands) -> None:
    parser = commands.command(
        "forgotten EDIT ...",
        "is an old answer gone, or only not said?",
        "Asks for old answers on every way on which they may come back: in other words, as a choice, by yes or no, in\n"
        "the layers below the last, with the written weights rounded to a few bits, and after a few steps of learning\n"
        "them again, beside those that a new answer takes.",
        "kedit-fast forgotten edit.safetensors",
        also="to make the model forget: kedit-fast edit --method unlearn --forget OLD",
    )
    edits_argument(parser)
    file_options(parser, " whose old answers are asked for (default: the edits' own)")
    option(parser, "--keep FILE", path, "facts whose answers were to stay (default: of the edits' those with one)")
    chat_options(parser)
    option(parser, "--budget N", positive, "tokens of the layers' candidates", 20)
    option(parser, "--bits N,N", list_of(*map(str, range(2, 17))), "widths that weights are rounded to", "8,4")
    option(parser, "--steps N", count, "of learning again, at most", 25)
    output(parser, "FILE", "everything as .json")
    machine_options(parser, seed=None)


def add_implied(commands: Commands) -> None:
    parser = commands.command(
        "implied EDIT ...",
        "what an edit implies: followed, contradictory, still to be edited",
        "By a table of relations, an edit's facts imply others: the same of other names, what the answer is to the\n"
        "subject, and what follows with facts that are known. This command shows which of them the edited model says,\n"
        "and where they contradict each other, and writes the rest as facts to edit.",
        "kedit-fast implied edit.safetensors --relations builtin -o rest.json",
        also="then: kedit-fast edit --facts rest.json --on-top-of edit.safetensors -o more.safetensors",
    )
    edits_argument(parser)
    told = "a table of relations (.json), or 'builtin' (of this package); again for more, the last one's word counts; "
    told += "python -m pydoc kedit_fast.facts.knowledge has the fields"
    option(parser, "--relations TABLE", path, told + " (default: builtin)", action="append")
    option(parser, "--hops N", positive, "rules that may follow each other, 3 at most", 1)
    flag(parser, "--ask", "have the model, without the edit, answer what a rule needs and the table does not know")
    followed = "what says that a fact is followed: exact: all its tokens are the likeliest; success: P(new) > P(old); "
    option(
        parser, "--by WHICH", ("exact", "success", "written"), followed + "written: it is in what is written", "exact"
    )
    option(parser, "--generate N", count, "tokens written behind each prompt", 10)
    output(parser, "FILE", "the facts still to be edited, as .json")
    option(parser, "--html PAGE", path, "everything as a page")
    machine_options(parser, seed=None)


def add_compare(commands: Commands) -> None:
    parser = commands.command(
        "compare [FILE ...]",
        "several methods or edits on the same facts, in one table and one page",
        "Edits facts by several methods, all facts at once, and asks the model with each edit the same questions;\n"
        "edits that are there are asked too, and reports of `kedit-fast eval -o` and of EasyEdit stand beside them.\n"
        "The facts are the same, so each fact's difference is taken: better and worse stand where the 95 % interval\n"
        "of the mean difference leaves 0 out. No model is changed.",
        "kedit-fast compare --facts counterfact.json -n 100 --methods rome,memit,alphaedit --html compare.html",
    )
    what = "edit files, or folders of versions (its edits in force), and reports: what `kedit-fast eval -o` writes, or "
    what += "EasyEdit's results (.json)"
    parser.add_argument("compared", nargs="*", type=path, metavar="FILE", help=what)
    file_options(parser, "; as the benchmark reads it")
    chat_options(parser)
    option(parser, "--methods M,M", names, "to edit by, with their settings for the model: rome,memit,alphaedit")
    statistics_options(parser)
    against = "with which of them the others are compared; base: the unedited model (default: the first)"
    option(parser, "--against NAME", text_such_as("memit"), against)
    modes = "readings of an answer that are shown, for instance token,match (default: those of the benchmark's score)"
    option(parser, "--modes M,M", names, modes)
    benchmark_options(parser)
    option(parser, "--html FILE", path, "the tables and a picture as a page")
    output(parser, "FILE", "everything as .json")
    checkpoint_option(parser)
    machine_options(parser)


def add_merge(commands: Commands) -> None:
    parser = commands.command(
        "merge EDIT ...",
        "write an edit into a copy of a model, or make an adapter of it",
        "An edit file changes no model by itself. This command writes it into a copy of a model's folder, which any\n"
        "program can then load; the folder keeps what it takes to undo it. The model is never in memory as a whole.\n"
        "With --peft it makes a LoRA adapter instead, a small folder to load beside the unchanged model.",
        "kedit-fast merge edit.safetensors --model ./llama -o ./llama-edited",
        also="to take the edit out again: kedit-fast merge undo --help",
    )
    edits_argument(parser)
    model = "the model's folder with its safetensors files (save_pretrained writes one), smollm2 or gemma3; "
    model += "with --peft only its name is written: a hub id, or the folder's full path"
    option(parser, "--model FOLDER", path, model)
    option(parser, "-o --output DIR", path, "the folder to make, new or empty", required=True)
    flag(parser, "--peft", "make a LoRA adapter; the model stays as it is")
    rank = "with --peft: the largest rank that your loader accepts, or 'none' (default: 512, vLLM's limit)"
    option(parser, "--max-rank N", _rank, rank, 512)
    flag(parser, "--truncate", "with --peft: cut larger ranks to it; the error is shown")
    option(
        parser, "--server NAME", ("vllm",), "with --peft: refuse what vLLM does not load (families, matrices, ranks)"
    )
    force = "also for another model than the edit was made for, or (not with --peft) edits out of their chain"
    flag(parser, "--force", force)
    signed(parser)
    ending(parser)


def add_inspect(commands: Commands) -> None:
    parser = commands.command(
        "edit inspect EDIT ...",
        "what an edit holds",
        "Shows how an edit was made, which facts it writes, and how much it changes in which layers.",
        "kedit-fast edit inspect edit.safetensors",
    )
    edits_argument(parser)
    option(parser, "--model", path, "compare the changes with this model's weights")
    option(parser, "--memory SIZE", size, "bytes to use with --model, for instance 8GB")
    # Of the model that is compared with.
    parser.set_defaults(threads=None, device=None, dtype=None, accept_licence=False)
    ending(parser)


def add_diff(commands: Commands) -> None:
    parser = commands.command(
        "edit diff EDIT EDIT",
        "how two edits differ",
        "Compares facts, settings and, layer by layer, the changes themselves. Cosine 1: the same direction.",
        "kedit-fast edit diff old.safetensors new.safetensors",
    )
    edits_argument(parser, 2, EDIT)
    ending(parser)


def add_only(commands: Commands) -> None:
    parser = commands.command(
        "edit only EDIT N",
        "one of the independent edits of a file, or of a memory's facts, as an edit",
        "An edit made with --independent holds an edit for each of its facts, and acts for one fact at a time. This\n"
        "command writes one of them to a file of its own, which can be merged, gated and asked like any edit. Of a\n"
        "memory (--method grace, for instance) it writes one fact's entry.",
        "kedit-fast edit only edit.safetensors 0 -o first.safetensors",
    )
    _of_one_fact(parser, "a file of independent edits, or of a memory")


def add_without(commands: Commands) -> None:
    parser = commands.command(
        "edit without EDIT N",
        "a memory without one of its facts",
        "What an edit that leaves the weights alone (--method grace, for instance) says of a fact is an entry of its\n"
        "own. This command writes the edit without it: the fact is undone, and the others are as they were.",
        "kedit-fast edit without edit.safetensors 0 -o rest.safetensors",
    )
    _of_one_fact(parser, "a file of a memory")


def _of_one_fact(parser, what: str) -> None:
    edits_argument(parser, 1, what)
    number = "the fact, as `kedit-fast edit inspect` numbers them"
    parser.add_argument("i", type=count, metavar="N", help=number)
    option(parser, "-o --output FILE", path, "the edit", required=True)
    flag(parser, "--force", "replace a file that is there already")
    ending(parser)


def add_undo(commands: Commands) -> None:
    parser = commands.command(
        "merge undo FOLDER",
        "take a merged edit out of a model's folder",
        "Restores, bit for bit, the folder that `kedit-fast merge` was given. Checks first that nothing else has\n"
        "changed the weights since.",
        "kedit-fast merge undo ./llama-edited",
    )
    folder_argument(parser, "a folder that `kedit-fast merge` wrote")
    option(parser, "-o --output DIR", path, "the restored model, a new folder (default: in place)")
    ending(parser)


def add_log(commands: Commands) -> None:
    parser = commands.command(
        "history log FOLDER",
        "the versions of a folder of edits",
        "Lists what was in force when, and who changed it.",
        "kedit-fast history log ./edits",
    )
    folder_argument(parser, "a folder of versions")
    ending(parser)


def add_version(commands: Commands) -> None:
    parser = commands.command(
        "history add FOLDER EDIT ...",
        "add an edit to a folder of versions",
        "Makes a new version: the edits in force and this one on top. The folder is made if it is not there.\n"
        "Of several edits each is a version.",
        'kedit-fast history add ./edits edit.safetensors -m "new capital"',
    )
    folder_argument(parser, "a folder of versions")
    edits_argument(parser)
    flag(parser, "--force", "also an edit that was not made on top of those in force")
    signed(parser)
    ending(parser)


def add_rollback(commands: Commands) -> None:
    parser = commands.command(
        "history rollback FOLDER N",
        "bring an earlier version back",
        "Makes a new version with the edits of an earlier one; 0 is the model without edits. Nothing is lost: the\n"
        "versions between stay, and can be brought back in the same way.",
        "kedit-fast history rollback ./edits 1",
    )
    folder_argument(parser, "a folder of versions")
    parser.add_argument("number", type=count, metavar="N", help="the version to bring back")
    signed(parser)
    ending(parser)


def _rank(text: str) -> int | None:
    try:
        return None if text == "none" else positive(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or none") from None
