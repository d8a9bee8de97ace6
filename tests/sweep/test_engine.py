"""Properties of the sweep: the model is left alone, nobody's rows are computed in vain, contexts do not matter."""

import contextlib
import warnings
from dataclasses import replace

import pytest
import torch

import kedit_fast as kf
from kedit_fast.jobs.collect import Collect, collect
from kedit_fast.jobs.score import Score
from kedit_fast.model.family import FAMILIES, layers_of
from kedit_fast.model.seam import frozen
from kedit_fast.sweep import attend, engine, plan
from kedit_fast.sweep.engine import ALL, sweep
from kedit_fast.sweep.plan import PLACE, RowCost
from kedit_fast.sweep.runs import NEVER, RunList, add_edited, add_sequences
from kedit_fast.sweep.sites import IN, INSIDE, OUT, Site
from kedit_fast.sweep.store import KVStore
from tests.conftest import close, open_tiny, relative_error, tiny_lm
from tests.make import FACTS, bits, lowrank, make_edit, same_bits
from tests.oracle.access import changing
from tests.tiny import DISTINCT, PROMPTS, tiny_model, tiny_tokenizer

TEXTS = [tiny_tokenizer()(p.template.format(p.subject))["input_ids"] for p in PROMPTS[:4]]
LAST = 3


def places_of(numbers, texts):
    """(run [k], pos [k]): every place of every text, whose runs have these numbers."""
    places = [(int(n), pos) for n, ids in zip(numbers, texts, strict=True) for pos in range(len(ids))]
    return torch.tensor(places).unbind(1)


def packed(texts=TEXTS):
    """(runs, run [k], pos [k]): texts as a trie, and every place of every text."""
    runs = RunList()
    places = places_of(add_sequences(runs, texts), texts)
    return runs.runs(), *places


def hugging_faces(model, texts=TEXTS) -> torch.Tensor:
    """[k, V] logits of every place of every text."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts])


def logits(lm, texts=TEXTS) -> torch.Tensor:
    runs, *places = packed(texts)
    with torch.no_grad():
        return lm.head(collect(lm, runs, Site.layer_out, [LAST], *places)[LAST])


class Watch:
    """A job that calls ``act(site, layer, x)`` at sites of layers."""

    def __init__(self, act, *sites, layers=range(4), reads=ALL):
        self.act, self._sites, self._layers, self._reads = act, sites, layers, reads

    def sites(self, layer):
        return self._sites if layer in self._layers else ()

    def reads(self, layer):
        return self._reads

    def at(self, site, layer, x, call):
        return self.act(site, layer, x)


# ---- the model is left as it was


def state(model):
    """Everything a sweep touches for its length."""
    return {
        "training": [m.training for m in model.modules()],
        "asks": [p.requires_grad for p in model.parameters()],
        "attention": [model.config._attn_implementation, model.config.get_text_config()._attn_implementation],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "instance": [sorted(vars(m)) for m in model.modules()],
        "grad": torch.is_grad_enabled(),
    }


def disturbed(family):
    """A model in a state that a sweep must change: half of it in training mode, half of it frozen."""
    model = tiny_model(family)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


@pytest.mark.parametrize("site", [None, *Site])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma3"])
def test_model_is_left_as_it_was(family, site):
    """After success (no site), and after an error of a job at each site, in the middle of a layer."""

    def fail(at, layer, x):
        assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
        if layer == (0 if site is Site.embed else 2) and at is site:
            raise ZeroDivisionError

    model = disturbed(family)
    lm, before, weights = open_tiny(model), state(model), bits(model)
    sites = [each for each in Site if each not in INSIDE or getattr(lm.family, INSIDE[each][0])]
    with pytest.raises(ZeroDivisionError) if site in sites else contextlib.nullcontext():
        sweep(lm, packed()[0], [Watch(fail, *sites)])
    assert state(model) == before and same_bits(model, weights)
    close("a sweep after it", logits(lm), hugging_faces(tiny_lm(family).model))


def test_training_mode_does_not_matter():
    model = tiny_model("gpt2").train()  # dropout 0.1 in three places
    assert torch.equal(logits(open_tiny(model)), logits(tiny_lm("gpt2")))
    assert model.training


def test_hugging_faces_forward_works_between_sweeps():
    model = tiny_model("gptj")
    before = hugging_faces(model)
    logits(open_tiny(model))
    assert torch.equal(hugging_faces(model), before)


def test_foreign_hooks_are_reported_and_run():
    model = tiny_model("llama")
    lm, plain = open_tiny(model), logits(tiny_lm("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(lm), plain)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.warns(UserWarning, match=r"hooks of others stand on 1 module .*first: model\.layers\.1\.mlp"):
        hooked = logits(lm)
    assert relative_error(hooked, plain) > 0.01
    before = state(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        logits(lm)
    assert state(model) == before
    handle.remove()


# ---- attention is ours, or the sweep fails


def refused(model, says):
    """A sweep is refused with these words, and leaves the model as it was."""
    before = state(model)
    with pytest.raises(RuntimeError, match=says):
        logits(open_tiny(model))
    assert state(model) == before


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_block_that_does_not_attend_once_is_refused(family):
    model = tiny_model(family)
    attn = layers_of(model)[1].get_submodule(FAMILIES[family].attn)
    forward = attn.forward

    def twice(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    def never(*args, **kwargs):
        return torch.zeros_like(args[0] if args else kwargs["hidden_states"]), None

    for replaced, times in ((never, 0), (twice, 2)):
        attn.forward = replaced
        refused(model, rf"layer 1 of this {family} model was called {times} times, not once")
    del attn.forward
    close("once again", logits(open_tiny(model)), hugging_faces(model))


def test_gptj_attention_replaced_by_another_is_refused():
    model = tiny_model("gptj")
    model.transformer.h[2].attn._attn = lambda *args: None
    refused(model, "_attn is already replaced")


@pytest.mark.parametrize(("given", "message"), [("bias", r"passes \['bias'\]"), ("attention_mask", "passes a mask")])
def test_attention_keywords_that_would_be_ignored_are_refused(given, message):
    model = tiny_model("llama")
    attn = model.model.layers[0].self_attn
    forward = attn.forward
    attn.forward = lambda *a, **k: forward(*a, **k | {given: torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        logits(open_tiny(model))
    attn.forward = lambda *a, **k: forward(*a, **k | {"bias": None, "s_aux": None})  # None says nothing
    close("None", logits(open_tiny(model)), hugging_faces(tiny_lm("llama").model))


def test_our_attention_outside_a_sweep_is_refused():
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "kedit_fast"
    with pytest.raises(RuntimeError, match="outside a sweep"):
        hugging_faces(model)


# ---- numbers


@pytest.mark.parametrize("family", DISTINCT)
def test_float64_and_half_precisions(family):
    """fp64 to 1e-10 (gptj's own forward attends in fp32); the others no further from the truth than Hugging Face's."""
    exact = tiny_model(family, torch.float64)
    truth = hugging_faces(exact)
    close("fp64", logits(tiny_lm(family, torch.float64)), truth, torch.float32 if family == "gptj" else torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        lm = tiny_lm(family, dtype)
        got, theirs = logits(lm), hugging_faces(lm.model)
        assert got.dtype == dtype
        assert relative_error(got, truth) <= 1.5 * relative_error(theirs, truth)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_autocast_outside_does_not_matter(family):
    lm = tiny_lm(family)
    plain = logits(lm), lm.top_tokens("The Eiffel Tower", 3), lm.generate("The Eiffel Tower", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(hugging_faces(lm.model), plain[0]) > 1e-4
        assert torch.equal(logits(lm), plain[0])
        assert (lm.top_tokens("The Eiffel Tower", 3), lm.generate("The Eiffel Tower", 4)) == plain[1:]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize(("size", "dense_from"), [(1000, 64), (12, 64), (5, 64), (5, 5)])
def test_gradients_are_those_of_hugging_face(family, size, dense_from, monkeypatch):
    """One call or many, gathered or dense; the embedding's output asks for a gradient."""
    monkeypatch.setattr("kedit_fast.kernels.attention.DENSE_FROM", dense_from)
    monkeypatch.setattr(plan, "CALL_ROWS", size)
    lm, texts = tiny_lm(family), [ids[:5] for ids in TEXTS]
    runs = RunList()
    runs.add(torch.tensor(texts))
    leaves, tops = [], []

    def act(site, layer, x):
        if site is Site.embed:
            leaves.append(x.detach().requires_grad_())
            return leaves[0]
        return tops.append(x)

    sites = [Watch(act, Site.embed, layers=[0]), Watch(act, Site.layer_out, layers=[LAST])]
    with torch.no_grad():
        sweep(lm, runs.runs(), sites, grad=True)
    weight = torch.randn(len(texts), 5, lm.n_vocab, generator=torch.Generator().manual_seed(0))
    with frozen(lm.model):
        (lm.head(torch.cat(tops)).view_as(weight) * weight).sum().backward()
    assert all(p.grad is None for p in lm.model.parameters())
    embed, wanted = lm.model.get_input_embeddings(), []

    def leaf(hidden):
        wanted.append(hidden.detach().requires_grad_())
        return wanted[0]

    with frozen(lm.model), changing([(embed, leaf)]):
        (lm.model(torch.tensor(texts)).logits * weight).sum().backward()
    error = relative_error(leaves[0].grad, wanted[0].grad.flatten(0, 1))
    assert error <= 5e-5  # four layers there and back: five times the forward's tolerance


def test_no_graph_is_kept_unless_asked_for():
    leaf = Watch(lambda site, layer, x: x.detach().requires_grad_(), Site.embed, layers=[0])
    top = Watch(lambda site, layer, x: asks.append(x.requires_grad), Site.layer_out)
    for grad in (False, True):
        asks = []
        sweep(tiny_lm("llama"), packed()[0], [leaf, top], grad=grad)
        assert asks == [grad] * 4


# ---- rows


def test_rows_that_nobody_reads_stop_at_the_last_attention():
    lm = tiny_lm("gemma2")
    runs, run, pos = packed()
    last = torch.tensor([place == len(ids) - 1 for ids in TEXTS for place in range(len(ids))])
    targets = torch.arange(int(last.sum()))
    rows = {}

    def count(site, layer, x):
        rows[layer] = rows.get(layer, 0) + len(x)

    scores = [Score(lm, run[last], pos[last], targets) for _ in range(2)]
    sweep(lm, runs, [Watch(count, Site.mlp_key, reads=None), scores[0]])
    n_rows = int(runs.n_rows.sum())
    assert rows == {0: n_rows, 1: n_rows, 2: n_rows, LAST: len(targets)} and n_rows > 2 * len(targets)
    rows.clear()
    sweep(lm, runs, [Watch(count, Site.mlp_key, reads=ALL), scores[1]])
    assert rows[LAST] == n_rows
    close("scores", scores[0].logprob, scores[1].logprob)
    wanted = hugging_faces(lm.model)[last].log_softmax(-1)
    close("truth", scores[0].logprob, wanted[torch.arange(len(targets)), targets])


def test_a_block_is_left_when_all_has_been_seen():
    """The keys of the last layer need no down projection."""
    lm, calls = open_tiny(tiny_model("llama")), []
    runs, *places = packed()
    down = lm.model.model.layers[2].mlp.down_proj
    down.register_forward_hook(lambda *a: calls.append(1))
    with pytest.warns(UserWarning, match="hooks of others"):
        got = collect(lm, runs, Site.mlp_key, [2], *places)[2]
        assert not calls
        both = [Collect(site, [1, 2], *places) for site in (Site.mlp_key, Site.layer_out)]
        sweep(lm, runs, both, last_layer=2)
    assert calls and torch.equal(both[0].values[2], got)
    with torch.no_grad():
        close("mlp_out", down(got), collect(tiny_lm("llama"), runs, Site.mlp_out, [2], *places)[2])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "gemma3", "phi3"])
def test_sites_are_hugging_faces_modules(family):
    lm, ids = tiny_lm(family), TEXTS[0]
    runs = RunList()
    runs.add(ids)
    places = torch.zeros(len(ids), dtype=torch.int64), torch.arange(len(ids))
    seen, entry = {}, FAMILIES[family]
    block = layers_of(lm.model)[1]
    modules = {
        Site.embed: lm.model.get_input_embeddings(), Site.layer_out: block,
        Site.attn_out: block.get_submodule(entry.attn_proj), Site.mlp_out: block.get_submodule(entry.mlp_down),
        **{OUT[role]: block.get_submodule(path) for role, path in entry.roles.items()},
    }  # fmt: skip
    into = {IN[role]: OUT[role] for role in entry.roles}  # whose input it is

    def keep(site):
        return lambda module, args, out: seen.update({site: (args, out[0] if isinstance(out, tuple) else out)})

    with contextlib.ExitStack() as hooks:
        for site, module in modules.items():
            hooks.enter_context(module.register_forward_hook(keep(site)))
        hugging_faces(lm.model, [ids])
    for site in (*modules, *into):
        layer = 0 if site is Site.embed else 1
        wanted = seen[into[site]][0][0] if site in into else seen[site][1]
        assert wanted.shape[-1] == lm.width_of(site)
        close(f"{family} {site}", collect(lm, runs.runs(), site, [layer], *places)[layer], wanted[0])


def test_a_job_replaces_rows_and_the_next_one_sees_it():
    lm, seen = tiny_lm("llama"), {}

    def keep(site, layer, x):
        seen[site, layer] = x

    zero = Watch(lambda site, layer, x: torch.zeros_like(x), Site.mlp_out, layers=[1])
    look = Watch(keep, Site.attn_out, Site.mlp_out, Site.layer_out)
    sweep(lm, packed()[0], [zero, look])
    assert seen[Site.mlp_out, 0].any() and not seen[Site.mlp_out, 1].any()
    close("the rest of the block", seen[Site.layer_out, 1], seen[Site.layer_out, 0] + seen[Site.attn_out, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_start_half_way_from_rows_in_declared_order(family):
    """``h`` has a row for each (run, position) as declared, also where a trie's runs stand in another order."""
    lm = tiny_lm(family)
    texts = [*TEXTS, TEXTS[0][:5] + TEXTS[3][:4], [7, 8, 9]]
    runs, *_ = packed(texts)
    depth_first = runs.parent.tolist()
    assert depth_first != sorted(depth_first)
    own = zip(runs.first_pos.tolist(), runs.length.tolist(), strict=True)
    places = torch.tensor([(run, pos) for run, (begin, end) in enumerate(own) for pos in range(begin, end)]).unbind(1)
    whole = Collect(Site.layer_out, [1, LAST], *places)
    sweep(lm, runs, [whole])
    upper = Collect(Site.layer_out, [LAST], *places)
    sweep(lm, runs, [upper], first_layer=2, h=whole.values[1])
    close("upper half", upper.values[LAST], whole.values[LAST])
    with pytest.raises(ValueError, match=r"h has 3 rows and these runs own \d+"):
        sweep(lm, runs, [upper], first_layer=2, h=whole.values[1][:3])


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text"])
def test_suffixes_over_a_stored_prefix_equal_the_whole(family, poisoned_memory):
    lm = tiny_lm(family)
    prefix, suffixes = TEXTS[0], [TEXTS[1][:3], TEXTS[2][:5], TEXTS[3][:1]]
    store, runs = KVStore(), RunList()
    runs.add(prefix)
    sweep(lm, runs.runs(), [], keep=store)
    assert store.size == len(prefix) and torch.equal(store.table[0], torch.arange(len(prefix)))
    for _ in range(2):  # the store is the same after use
        runs = RunList()
        stored = runs.add(prefix, branch_layer=NEVER)
        whole = [prefix + suffix for suffix in suffixes]
        made = [runs.add(ids, parent=stored, source=-1, first_pos=len(prefix)) for ids in whole]
        top = Collect(Site.layer_out, [LAST], torch.cat(made), torch.tensor([len(ids) - 1 for ids in whole]))
        sweep(lm, runs.runs(), [top], store=store)
        with torch.no_grad():
            got = lm.head(top.values[LAST])
            wanted = torch.stack([lm.model(torch.tensor([ids])).logits[0, -1] for ids in whole])
        close("over a stored prefix", got, wanted)


def test_packs_of_any_size_give_the_same(monkeypatch):
    """Memory for what stays throughout, the tables of all runs and the rows read, and for 20 rows with their tables."""
    lm, packs, cut = tiny_lm("gemma2"), [], engine.cut
    monkeypatch.setattr(engine, "cut", lambda *a: packs.append(cut(*a)) or packs[-1])
    cost, (declared, read, _) = RowCost.of(lm), packed(TEXTS)
    longest = declared.tokens.shape[1]
    stays = declared.nbytes + len(read) * (lm.d_model * lm.dtype.itemsize + PLACE)
    small = replace(lm, memory=stays + cost.rows * cost.passing + 20 * cost.kept + 2 * longest * cost.position)
    close("in packs", logits(small), logits(lm))
    assert len(packs[0]) > 1 == len(packs[1])


# ---- edits


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
def test_edited_and_base_runs_of_one_sweep(family):
    """Edited runs equal Hugging Face's model with the weights changed, base runs the model as it is."""
    model = tiny_model(family)
    lm = open_tiny(model)
    edit = make_edit(model)
    edited = lm.with_edit(edit)
    runs = RunList()
    base, over = add_edited(edited, runs, TEXTS)
    top = Collect(Site.layer_out, [LAST], *places_of(torch.cat([base, over]), TEXTS * 2))
    sweep(edited, runs.runs(), [top])
    with torch.no_grad():
        got = lm.head(top.values[LAST]).chunk(2)
    before = hugging_faces(model)
    with edit.apply(model):
        after = hugging_faces(model)
    close("base", got[0], before)
    close("edited", got[1], after)
    assert relative_error(after, before) > 0.01


def test_each_run_has_its_own_factors():
    """Independent edits: a run of owner i is as the model with fact i's factors alone."""
    model = tiny_model("llama")
    edit = make_edit(model, deltas={1: lowrank(rank=3, seed=1)}, owners={1: torch.tensor([0, 1, 0])})
    lm = open_tiny(model).with_edit(edit)
    runs, ids = RunList(), TEXTS[0]
    numbers = torch.cat([runs.add(ids, owner=owner) for owner in (-1, 1, 0)])
    last = torch.full((3,), len(ids) - 1)
    with torch.no_grad():
        got = lm.head(collect(lm, runs.runs(), Site.layer_out, [LAST], numbers, last)[LAST])
        wanted = [model(torch.tensor([ids])).logits[0, -1]]
        for i in (1, 0):
            with edit.only(i).apply(model):
                wanted.append(model(torch.tensor([ids])).logits[0, -1])
    close("owned", got, torch.stack(wanted))
    assert relative_error(got[1], got[2]) > 0.01


def test_progress_is_told_by_rows(monkeypatch):
    """Shares of the sweep after each layer, over several packs, with runs that branch (one of them narrow)."""
    lm, runs = tiny_lm("llama"), RunList()
    clean = runs.add(TEXTS[0])
    runs.add(TEXTS[0], parent=clean[0], branch_layer=2, first_pos=torch.tensor([1, 3]))
    runs.add(TEXTS[0], parent=clean[0], branch_layer=1, first_pos=2, narrow=True)
    n = len(TEXTS[0])
    rows = [n, n + 1, n + (n - 1) + (n - 3) + (n - 2), n + (n - 1) + (n - 3) + (n - 2)]
    assert runs.runs().row_layers(0, LAST) == sum(rows)
    assert runs.runs().row_layers(2, 2) == rows[2] - (n - 3)  # a narrow run below the first layer keeps its one row
    shares = []
    sweep(lm, runs.runs(), [], advance=shares.append)
    assert shares == pytest.approx([r / sum(rows) for r in rows])
    monkeypatch.setattr(engine, "cut", lambda *a: [torch.tensor([0, 1]), torch.tensor([0, 2, 3])])
    shares.clear()
    sweep(lm, runs.runs(), [], advance=shares.append)
    assert len(shares) == 8 and sum(shares) == pytest.approx(1)


def test_texts_that_are_too_long_are_refused():
    lm = tiny_lm("gpt2")
    with pytest.raises(ValueError, match="a text of 129 tokens; this model takes 128"):
        logits(lm, [[5] * 129])
    logits(lm, [[5] * 128])


def test_frequencies_that_depend_on_the_longest_text_are_refused():
    """Dynamic rotary scaling would let a long text change a short one in its pack, and the model after it."""
    model = tiny_model("llama")
    config = model.config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    config.max_position_embeddings = 10
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    lm, long = open_tiny(model), max(TEXTS, key=len)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match="frequencies depend on the longest text"):
        logits(lm, [long * 2, TEXTS[3]])
    short = [ids[:10] for ids in TEXTS]
    close("short", logits(lm, short), hugging_faces(model, short))
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_that_are_cut_once_for_all_layers_are_those_that_the_kernel_needs(family, monkeypatch):
    """Calls of few rows, in Triton's interpreter; those of the last layer are cut by themselves."""
    monkeypatch.setattr(plan, "CALL_ROWS", 20)
    found, planned = [], attend.planned
    monkeypatch.setattr(attend, "planned", lambda *given: found.append(planned(*given)) or found[-1])
    how = {"samples": 1, "kinds": ("mlp",), "window": 2}
    traced = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("KEDIT_FAST_BACKEND", backend)
        traced[backend] = kf.trace(tiny_lm(family), FACTS[:1], **how)
    assert sum(made is not None for made in found) > 4
    for one, other in zip(*traced.values(), strict=True):
        assert abs(one.p_restored - other.p_restored).max() < 1e-5 * abs(other.p_restored).max()
