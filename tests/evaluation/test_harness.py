"""lm-evaluation-harness on a model with its edits answers as its own adapter does of a written one."""

import copy
import json
import logging
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kedit_fast as kf
from kedit_fast.basics.catalog import CAPABILITY
from kedit_fast.edits.deltas import LowRank
from kedit_fast.evaluation import harness
from kedit_fast.evaluation.scores import Capability
from kedit_fast.evaluation.tasks import FOLDER
from kedit_fast.jobs.generate import generate
from tests.commands.cases import run
from tests.conftest import disk_and_resident, open_tiny, refused, save_tiny, tiny_lm
from tests.edits.test_prompts import ASKED, READ, in_context
from tests.make import make_edit, owned_edit
from tests.tiny import D_FF, D_MODEL, POSITIONS, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason=harness.MISSING)
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kedit_fast.evaluation.harness_lm import HarnessLM

pytestmark = pytest.mark.filterwarnings("ignore:. of .* requests are longer than the 128 tokens")
TASKS = list(CAPABILITY)
TOWER = "The Eiffel Tower is in the city of"
LONG = "Big Ben is located in the city of London. " * 14
PAIRS = [
    (TOWER, " Paris"),
    (TOWER, " Paris, the capital of France"),
    (f"{TOWER} ", "Rome"),  # the space goes to the continuation
    ("", "The capital of France"),
    ("", "Zürich"),
    (TOWER, " Paris"),
    (LONG, " London is in England"),  # longer than the model reads
    ("Toyota", " is in Japan. Miles Davis plays the trumpet."),
]
TEXTS = ["The capital of Spain is Madrid.", LONG, "", "Zürich"]
WRITTEN = [
    (TOWER, {"until": ["\n"], "max_gen_toks": 5}),
    ("The capital of France", {"until": [" t", "\n\n"], "max_gen_toks": 20}),
    ("Miles Davis plays", {"until": [" t", "\n\n"], "max_gen_toks": 20}),
    ("Zürich is", {"until": "a", "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
    (LONG, {"max_gen_toks": 9}),
]


def requests(kind, of_each):
    return [Instance(kind, {}, one, i) for i, one in enumerate(of_each)]


def read(model, pairs=PAIRS):
    return model.loglikelihood(requests("loglikelihood", pairs))


def rolled(model, texts=TEXTS):
    return model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))


def written(model, asked=WRITTEN):
    return model.generate_until(requests("generate_until", asked))


def theirs(model, tokenizer=None):
    """The harness's own adapter."""
    return HFLM(pretrained=model, tokenizer=tokenizer or tiny_tokenizer(), batch_size=3, max_length=POSITIONS)


def same_scores(found, expected):
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


# ---- the adapter


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("bos", [False, True])
def test_requests_are_answered_as_by_the_harness_s_own_adapter(family, bos):
    model, tokenizer = tiny_model(family), tiny_tokenizer(bos)
    ours, other = HarnessLM(kf.open_model(model, tokenizer=tokenizer)), theirs(model, tokenizer)
    same_scores(read(ours), read(other))
    ids = ours.tok_encode(TOWER)
    (said,) = generate(ours.lm, [ids], 3)
    own = [((TOWER, ""), ids, said), ((TOWER, ""), ids, [*said[:2], 7])]  # what the model itself says, and nearly
    found = ours._loglikelihood_tokens(own)
    same_scores(found, other._loglikelihood_tokens(own))
    assert [greedy for _, greedy in found] == [True, False]
    if ours.lm.longest is not None:
        other._max_length = POSITIONS - 1
    assert rolled(ours) == pytest.approx(rolled(other), rel=1e-5)
    other._max_length = POSITIONS
    assert read(ours, [("\n", "Paris")]) == read(ours, [("", "\nParis")])  # theirs fails where no start token is added
    texts = written(ours)
    assert texts == written(other) and len(set(texts)) > 2


def test_a_text_ends_at_its_stop_string_without_being_written_on(monkeypatch):
    ours = HarnessLM(tiny_lm("llama"))
    (whole,) = written(ours, [(TOWER, {"max_gen_toks": 40})])
    end = whole[3:6]
    steps = []
    head = type(ours.lm).head
    monkeypatch.setattr(type(ours.lm), "head", lambda lm, h: steps.append(1) or head(lm, h))
    (cut,) = written(ours, [(TOWER, {"max_gen_toks": 40, "until": [end]})])
    assert cut == whole[: whole.index(end)] and len(steps) < 10


def test_sampled_text_is_made_again_by_its_seed_and_what_cannot_be_done_is_said():
    lm = tiny_lm("llama")
    asked = [(TOWER, {"do_sample": True, "temperature": 1.0, "top_k": 20, "max_gen_toks": 8})] * 3
    one, again, other = (written(HarnessLM(lm, seed=seed), asked) for seed in (1, 1, 2))
    assert one == again != other and len(set(one)) == 3
    how = {"max_gen_toks": 4, "num_beams": 1, "repetition_penalty": 1.0, "top_p": 0.5}  # greedy: they change nothing
    assert written(HarnessLM(lm), [(TOWER, how)]) == [lm.generate(TOWER, 4)]
    how = {"max_gen_toks": 4, "use_cache": True, "no_repeat_ngram_size": 0, "length_penalty": 2.0, "min_length": None}
    assert written(HarnessLM(lm), [(TOWER, how)]) == [lm.generate(TOWER, 4)]
    for idle in ("no_repeat_ngram_size", "min_new_tokens", "min_length"):  # at 1 they do change something
        refused(
            rf"generation_kwargs \{{'{idle}': 1\}}", written, HarnessLM(lm), [(TOWER, {idle: 1, "max_gen_toks": 4})]
        )
    for sampled in ({"max_gen_toks": 4}, {"max_gen_toks": 4, "temperature": 0.0}):  # theirs is an error as well
        refused(
            "do_sample without a temperature above 0", written, HarnessLM(lm), [(TOWER, sampled | {"do_sample": True})]
        )
    for wrong in (
        {"max_gen_toks": 9, "num_beams": 4},
        {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0, "top_p": 0.5},
    ):
        refused(r"generation_kwargs \{'(num_beams|top_p)'", written, HarnessLM(lm), [(TOWER, wrong)])
    with pytest.warns(UserWarning, match="1 of 2 requests are longer than the 128 tokens"):
        read(HarnessLM(lm), [(TOWER, " Rome"), (LONG, " Rome")])
    refused("max_gen_toks = 128: the model reads 128", written, HarnessLM(lm), [(TOWER, {"max_gen_toks": POSITIONS})])
    refused("a continuation of 0 tokens behind", read, HarnessLM(lm), [(TOWER, "")])


def test_a_template_without_system_messages_is_asked_without():
    """As the harness's own adapter does."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TOWER}]
    refusing = "{% for m in messages %}{% if m.role == 'ROLE' %}{{ raise_exception('no ROLE') }}{% endif %}"
    rest = "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.chat_template = refusing.replace("ROLE", "system") + rest
    ours = HarnessLM(kf.open_model(tiny_model("llama"), tokenizer=tokenizer))
    with pytest.warns(UserWarning, match="takes no system messages"):
        text = ours.apply_chat_template(turns)
    assert text == theirs(tiny_model("llama"), tokenizer).apply_chat_template(turns) == f"<user>{TOWER}<assistant>"
    tokenizer.chat_template = refusing.replace("ROLE", "user") + rest
    for some in (turns, turns[1:]):
        refused("chat template refuses a task's chat: no user", ours.apply_chat_template, some)


def test_a_view_answers_as_the_written_model():
    model = tiny_model("llama")
    edit = make_edit(model)
    lm = open_tiny(model)
    view, base = HarnessLM(lm.with_edit(edit)), HarnessLM(lm)
    found, texts, whole, before = read(view), written(view), rolled(view), read(base)
    with edit.apply(model):
        other = theirs(model)
        same_scores(found, read(other))
        assert texts == written(other) and whole == pytest.approx(rolled(other), rel=1e-5)
    assert abs(found[0][0] - before[0][0]) > 0.01 and read(HarnessLM(lm)) == before


def test_the_edited_model_answers_in_the_sweeps_of_the_base_model(monkeypatch):
    lm = tiny_lm("llama")
    view = lm.with_edit(make_edit(lm.model))
    alone = [(read(one), rolled(one)) for one in (HarnessLM(lm), HarnessLM(view))]
    edited = HarnessLM(view)
    base = HarnessLM(lm, edited=edited)
    same_scores(read(base), alone[0][0])
    assert rolled(base) == pytest.approx(alone[0][1], rel=1e-5)
    monkeypatch.setattr("kedit_fast.evaluation.harness_lm.read_edited", None)
    monkeypatch.setattr("kedit_fast.evaluation.harness_lm.text_logprobs", None)
    same_scores(read(edited), alone[1][0])
    assert rolled(edited) == pytest.approx(alone[1][1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:facts not written")
def test_a_memory_acts_on_the_prompts_that_hit_it_alone():
    lm = tiny_lm("llama")
    facts = [
        kf.Fact("{} is in the city of", "The Eiffel Tower", "Rome"),
        kf.Fact("{} plays the", "Miles Davis", "piano"),
    ]
    view = lm.with_edit(kf.Grace(layers=(2,), n_iter=8, eps=0.5).edit(lm, facts))
    pairs = [(TOWER, " Rome"), (TOWER, " Paris"), ("Zürich is located in", " Rome"), ("", " Rome")]
    asked = [(text, {"max_gen_toks": 4}) for text, _ in pairs[1:3]]
    edited = HarnessLM(view)
    before, after = read(HarnessLM(lm, edited=edited), pairs), read(edited, pairs)
    same_scores(read(HarnessLM(view), pairs), after)
    assert after[0][0] > before[0][0] and after[1] != before[1] and after[2:] == before[2:]
    assert written(edited, asked) == view.generate([text for text, _ in asked], 4)


def test_text_that_an_edit_puts_before_prompts_stands_before_contexts():
    lm = tiny_lm("llama")
    view = HarnessLM(lm.with_edit(in_context(lm)))
    plain = HarnessLM(lm)
    same_scores(read(view, [(text, " Rome") for text in ASKED]), read(plain, [(text, " Rome") for text in READ]))
    assert written(view, [(text, {"max_gen_toks": 3}) for text in ASKED]) == lm.generate(READ, 3)


def test_a_chat_is_asked_in_the_model_s_template():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}me:"
    lm = kf.open_model(tiny_model("llama"), tokenizer=tokenizer)
    ours, other = HarnessLM(lm), theirs(lm.model, tokenizer)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED[0]}]
    text = ours.apply_chat_template(chat)
    assert text == other.apply_chat_template(chat) == f"system: Be brief.\nuser: {ASKED[0]}\nme:"
    same_scores(read(ours, [(text, " Rome")]), read(other, [(text, " Rome")]))
    view = HarnessLM(lm.with_edit(in_context(lm)))
    whole = view.apply_chat_template(chat).replace(ASKED[0], READ[0])  # inside the question, not before the template
    same_scores(read(view, [(text, " Rome")]), read(ours, [(whole, " Rome")]))
    assert kf.capability(lm, "kedit_short", limit=2, chat=True).meta["chat"] is True
    refused("has no chat template", kf.capability, tiny_lm("llama"), TASKS, chat=True)


def test_a_model_that_is_read_from_disk_answers_as_in_memory(tmp_path):
    disk, resident = disk_and_resident(save_tiny(tmp_path, tiny_model("llama")))
    edit = make_edit(resident.model)
    streamed, held = (HarnessLM(lm.with_edit(edit)) for lm in (disk, resident))
    same_scores(read(streamed), read(held))
    assert written(streamed, WRITTEN[:2]) == written(held, WRITTEN[:2])


def test_an_edit_that_overflows_counts_against_itself():
    lm = tiny_lm("llama")
    huge = LowRank(torch.full((D_MODEL, 1), 1e30), torch.full((D_FF, 1), 1e30))
    view = HarnessLM(lm.with_edit(make_edit(lm.model, deltas={1: huge})))
    assert read(view, PAIRS[:1]) == [(-math.inf, False)] and written(view, WRITTEN[:1]) == [""]


# ---- the run


def test_view_and_written_model_are_worth_the_same():
    model = tiny_model("llama")
    edit, lm = make_edit(model), open_tiny(model)
    found = kf.capability(lm, TASKS, edit, limit=20, seed=3)
    with edit.apply(model):
        applied = kf.capability(lm, TASKS, limit=20, seed=3)
    bare = kf.capability(lm, TASKS, limit=20, seed=3)
    assert list(found.scores) == TASKS and list(found.scores["kedit_common"]) == ["acc", "acc_norm"]
    for task, metrics in found.scores.items():
        for metric, score in metrics.items():
            assert score.n == 20 and score.edited == applied.scores[task][metric].base
            assert score.base == bare.scores[task][metric].base and bare.scores[task][metric].edited is None
            assert score.difference.mean == pytest.approx(score.edited - score.base) and score.difference.n == 20
            assert score.difference.low <= score.difference.mean <= score.difference.high
    assert found.meta["method"] == "memit" and found.meta["limit"] == 20 and bare.meta["method"] is None
    assert found.meta["n_shot"] == {"kedit_common": 0, "kedit_short": 0}


def test_a_task_folder_and_examples_before_the_question(tmp_path):
    """A text's perplexity is no mean over documents, so it has a difference without an interval."""
    lines = [{"text": text} for text in ("The capital of Spain is Madrid.", "Big Ben is in London.", "Toyota.")]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function kedit_fast.evaluation.tasks.documents\n"
        "dataset_kwargs: {file: mine.jsonl}\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    (tmp_path / "both.yaml").write_text("group: both\ntask: [mine, kedit_common]\n")
    lm = tiny_lm("llama")
    edit = make_edit(lm.model)
    found = kf.capability(lm, ["both"], edit, limit=3, num_fewshot=2, task_folder=tmp_path)
    score = found.scores["mine"]["word_perplexity"]
    assert score.difference[0] == score.edited - score.base != 0 and score.difference.n == 0
    assert math.isnan(score.difference.low) and score.higher_is_better is False
    words = sum(len(line["text"].split()) for line in lines)
    logs = rolled(HarnessLM(lm), [line["text"] for line in lines])
    assert score.base == pytest.approx(math.exp(-sum(logs) / words), rel=1e-5)
    assert found.meta["n_shot"]["kedit_common"] == 2
    assert found.scores["kedit_common"] != kf.capability(lm, "kedit_common", edit, limit=3).scores["kedit_common"]


def test_nothing_of_the_process_is_left_changed():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    level = logging.getLogger("lm_eval").level
    kf.capability(tiny_lm("llama"), "kedit_short", limit=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert logging.getLogger("lm_eval").level == level


def test_what_cannot_be_run_is_refused(tmp_path, no_sweep, monkeypatch):
    lm = tiny_lm("llama")
    refused("each for its own fact; take one", kf.capability, lm, TASKS, owned_edit(lm.model))
    refused("this edit was made on qwen2-", kf.capability, lm, TASKS, make_edit(tiny_model("qwen2")))
    with pytest.raises(FileNotFoundError, match="expected a folder of task files"):
        kf.capability(lm, TASKS, task_folder=tmp_path / "none")
    (tmp_path / "bad.yaml").write_text("task: bad\noutput_type: nothing\ntest_split: test\n")
    refused(r"tasks = \['bad'\]: the harness cannot load them", kf.capability, lm, "bad", task_folder=tmp_path)
    empty = SimpleNamespace(all_tasks=TASKS)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: empty)
    refused("neither the harness .*; did you mean kedit_common", kf.capability, lm, "kedit_comon")
    refused("the task folder has it, where a file that is no task is passed over$", kf.capability, lm, "qqqqqq")


def test_a_missing_library_is_named_with_the_way_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'kedit-fast\[harness\]'"):
        kf.capability(tiny_lm("llama"), TASKS)


def test_the_tasks_of_this_package_are_sound():
    """Each document once; of a question's answers one is right, and it stands at every place as often."""
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TASKS) == {"kedit_common", "kedit_short"}
    common, short = (
        [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()] for name in TASKS
    )
    assert len({one["question"] for one in common}) == len(common) == 60
    assert all(len(set(one["choices"])) == 4 for one in common)
    assert [[one["answer"] for one in common].count(place) for place in range(4)] == [15] * 4
    assert len({one["prompt"] for one in short}) == len(short) == 40


@pytest.mark.smollm2
def test_the_demo_model_is_between_chance_and_ceiling(smollm2):
    """Chance is 0.25 of the first, 0 of the second."""
    found = kf.capability(smollm2, TASKS).scores
    assert 0.45 < found["kedit_common"]["acc"].base < 0.95
    assert 0.2 < found["kedit_short"]["exact_match,first_word"].base < 0.95


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny("model", tiny_model("llama"))
    make_edit(tiny_model("llama")).save("edit.safetensors")
    capsys.readouterr()
    asked = ("capability", "edit.safetensors", "--model", "model", "-n", 3, "--quiet")
    assert run(*asked, "-o", "c.json", "--html", "c.html") == 0
    said = capsys.readouterr()
    assert "kedit_common" in said.out and "written: c.html" in said.out and not said.err
    found = Capability.load("c.json")
    assert found.scores["kedit_short"]["exact_match,first_word"].n == 3 and found.meta["limit"] == 3
    assert run(*asked, "-o", "edit.safetensors", "--force") == 2
    assert run(*asked, "--task-folder", "none") == 2
    assert "none: no such folder; expected a folder of task files" in capsys.readouterr().err
