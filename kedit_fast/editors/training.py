"""Trains the network of an editor: one trainer for all of them, of steps as ``training_step.py`` has them.

What lies below the lowest matrix never changes, and is computed once a prompt (``jobs/below.py``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kedit_fast import __version__
from kedit_fast.basics import catalog, checks, ranks
from kedit_fast.basics.bits import digest, json_of, json_tensor
from kedit_fast.basics.progress import progress, show_progress, stages
from kedit_fast.basics.state import wide
from kedit_fast.basics.warn import warn
from kedit_fast.basics.words import counted
from kedit_fast.editors.contexts import BARE
from kedit_fast.editors.editor import check_lengths
from kedit_fast.editors.networks import Network, pull
from kedit_fast.editors.training_settings import Training
from kedit_fast.editors.training_step import (
    ANSWER,
    GOING_ON,
    Example,
    Outcome,
    Weights,
    about,
    examples,
    going_on,
    outcome,
    subject_digest,
)
from kedit_fast.facts.fact import Fact, check_facts
from kedit_fast.jobs.below import Below
from kedit_fast.jobs.gradients import gradient_packs
from kedit_fast.model.lm import LM, takes_lm
from kedit_fast.sweep.kept import Checkpoint, Run, asked_of, begun, check_run, fitting

STATE = 6  # times a network's size: its gradient, Adam's two, the best one so far, and what is written down
STATISTICS = 1_000  # facts whose factors are standardized by, at most
STAGES = ("layers below", "gradients", "training")


@takes_lm
def train_editor(
    lm: LM,
    facts: Iterable[Fact],
    method: str = "mend",
    *,
    settings: Training | None = None,
    held_out: float = 0.1,
    routed: bool = False,
    checkpoint: Checkpoint = None,
    seed: int = 0,
) -> Network:
    """A network for ``kf.Mend(network=...)`` and its kin, trained on facts; ``network.save(path)`` makes its file.

    Facts' phrasings and paraphrases are trained on (those in one wording alone are warned of), and their neighborhood
    and same_subject prompts must not change (``settings.keeps``; facts without any: another fact's prompt). So it is to
    be judged on facts of other subjects; it knows those that it was trained on, and an edit of one of them warns.

    method: "mend", "malmen" or "ke"; settings: its hyper-parameters (default: ``for_model``'s, for minutes of work)
    held_out: the share of the subjects (one at least) whose facts are not trained on but looked at every
        ``val_interval`` steps; the best look's network is what is given back, its figures in ``network.provenance``
    routed: for edits that are to stand behind a route (``Training.for_route``)
    checkpoint: a folder that keeps the run; the same call goes on there after it was killed, to the same bits
    seed: of the network's beginning, of who is held out, and of the batches

    Raises ValueError, before any work, for facts without a target, fewer than two subjects, layers out of range, a
    model that carries edits, and a checkpoint of other work; later, naming the fact, where a loss turns NaN.
    """
    kind = catalog.loaded(catalog.TRAINED)[checks.choice("method", method, catalog.TRAINED)]
    wanted = f"a {kind.__name__}, e.g. {kind.__name__}.for_model(lm)"
    settings = kind.for_model(lm) if settings is None else checks.instance("settings", settings, kind, wanted)
    settings = settings.for_route() if checks.flag("routed", routed) else settings
    held_out, seed = checks.share("held_out", held_out, below_one=True), checks.seed("seed", seed)
    if lm.n_experts > 1:
        raise ValueError(f"no editor is trained for mixtures of experts ({lm.config.model_type}); kf.Memit edits them")
    settings.check_layers(lm)
    if lm.edits:
        raise ValueError("lm carries edits, and a network is for the model as its weights are; train without them")
    if ranks.n_ranks() > 1:
        raise ValueError("several processes: a network is trained by one, since each step needs the one before")
    checkpoint = check_run(checkpoint)
    facts = check_facts(facts, need_new=True, together=False)
    check_lengths(lm, facts, [[BARE]])
    _warn_of_lacks(facts, settings.keeps)
    train, test = _split(facts, held_out, seed)
    asked = lambda: asked_of(  # noqa: E731
        lm, f"training for {settings.METHOD}", facts, hparams=asdict(settings), held_out=held_out, seed=seed
    )
    both = [examples(lm, some, settings.keeps, settings.kept_tokens) for some in (train, test)]
    with stages(*[GOING_ON] * (settings.kept_tokens > 1), *STAGES), begun(checkpoint, asked) as keep:
        return fitting(lm, keep, lambda lm: _trained(lm, settings, both, keep, seed))


def _warn_of_lacks(facts: Sequence[Fact], keeps: Sequence[str]) -> None:
    """Warns of facts without what a network learns from."""
    if bare := sum(not fact.paraphrases and not fact.phrasings for fact in facts):
        warn(
            f"{counted(bare, 'fact')} without paraphrases or phrasings: asked by the edit's own prompt, so the network "
            "learns nothing of other wordings there, and figures of those held out are too good",
        )
    asked_for = [name for name in keeps if name != ANSWER]
    if bare := sum(not any(fact.questions(name) for name in asked_for) for fact in facts) if asked_for else 0:
        warn(
            f"{counted(bare, 'fact')} without {' or '.join(asked_for)} prompts: what an edit does to these is not "
            "learned there",
        )


def _trained(lm: LM, settings: Training, both: Sequence[list[Example]], keep: Run, seed: int) -> Network:
    train, test = (going_on(lm, some, settings.kept_tokens) for some in both)
    return _Trainer(lm, settings, train, test, keep, seed).run()


def _split(facts: Sequence[Fact], held_out: float, seed: int) -> tuple[list[Fact], list[Fact]]:
    """The facts to train on, and those held out: all of a subject's on one side. Raises ValueError for one subject."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(about(fact), []).append(fact)
    if len(by_subject) < 2:
        raise ValueError(f"facts: {counted(len(by_subject), 'subject')}; a training needs more, and holds some out")
    order = torch.randperm(len(by_subject), generator=torch.Generator().manual_seed(seed)).tolist()
    n = min(max(1, round(held_out * len(by_subject))), len(by_subject) - 1)
    subjects = list(by_subject)
    test = {subjects[i] for i in order[:n]}
    return [fact for fact in facts if about(fact) not in test], [fact for fact in facts if about(fact) in test]


class _Trainer:
    """The loop: stretches of ``val_interval`` steps, each a part of the run, from the state that the last one left."""

    def __init__(self, lm: LM, settings: Training, train: list[Example], test: list[Example], keep: Run, seed: int):
        self.lm, self.settings, self.train, self.test, self.seed = lm, settings, train, test, seed
        self.below: Below | None = None
        self.keep = keep.own
        shapes = {(layer, role): lm.shape_of(role) for layer in sorted(settings.layers) for role in lm.family.roles}
        self.network = settings.NETWORK(lm.fingerprint, shapes, asdict(settings) | {"seed": seed})
        for parameter in self.network.parameters():
            parameter.data = parameter.data.to(wide(lm.dtype))
        self.network.to(torch.device("cpu") if lm.device.type == "mps" else lm.device)
        rates = asdict(settings)
        groups = [{"params": some, "lr": rates[rate]} for some, rate in self.network.groups() if some]
        self.adam = torch.optim.Adam(groups)
        self.best: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {"step": 0, "dual": settings.begin(), "looks": []}

    def run(self) -> Network:
        """Trains to the end, from where an earlier run stood."""
        done = sorted(name for name in self.keep.names() if name.startswith("steps-"))
        for older in done[:-1]:  # of a run that was killed before it removed them
            self.keep.forget(older)
        if done:
            self._take(self.keep(done[-1], self._nothing))
        if not self.ended:
            self._prepare()
        with progress("training (steps)", self.settings.max_iters) as bar:
            bar.resume(self.notes["step"])
            while not self.ended:
                before = f"steps-{self.notes['step']:08d}"
                stop = min(self.notes["step"] + self.settings.val_interval, self.settings.max_iters)
                self._take(self.keep(f"steps-{stop:08d}", partial(self._stretch, stop, bar)))
                self.keep.forget(before)
        return self._made()

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or the best look lies ``early_stop_patience`` steps back."""
        step, looks = self.notes["step"], self.notes["looks"]
        best = min(looks, key=lambda look: look["loss"])["step"] if looks else step
        return step >= self.settings.max_iters or step - best >= self.settings.early_stop_patience

    def _prepare(self) -> None:
        """What the steps need: what lies below, and the statistics of the factors, of the first facts."""
        lm = self.lm
        every = [task for one in (*self.train, *self.test) for task in (one.edit, *one.asked, *one.kept)]
        state = STATE * sum(parameter.nbytes for parameter in self.network.parameters())
        self.below = Below(lm, [task.ids for task in every], min(self.settings.layers), (lm.memory - state) // 4)
        self.lm = replace(lm, memory=max(1, lm.memory - state - self.below.nbytes))

        def make() -> dict[str, Tensor]:
            tasks = [example.edit for example in self.train[:STATISTICS]]
            for pack in gradient_packs(self.lm, tasks, self.network.places, below=self.below):
                self.network.observe(pack.factors)
            return {name: x.clone() for name, x in self.network.state_dict().items()}

        if not self.notes["step"]:
            self.network.load_state_dict(self.keep("statistics", make))

    def _stretch(self, stop: int, bar) -> dict[str, Tensor]:
        """Steps up to ``stop``, then a look at the facts held out; gives the state."""
        while self.notes["step"] < stop:
            said = self._step()
            self.notes["step"] += 1
            bar.advance(1, f"loss {said['loss']:.3f}, written {said['success']:.0%}, KL {said['kl']:.4f}")
        look = self._look()
        if not self.notes["looks"] or look["loss"] < min(each["loss"] for each in self.notes["looks"]):
            self.best = {name: x.detach().clone() for name, x in self.network.state_dict().items()}
        self.notes["looks"].append({"step": stop} | look)
        self.settings.after_validation(self.notes["dual"], look["success"])
        return self._state()

    def _step(self) -> dict[str, float]:
        """One Adam step; what the batch's losses were before it."""
        settings, dual = self.settings, self.notes["dual"]
        weights = settings.weights(dual)
        found = self._outcome(self._batch(), weights)
        self.adam.zero_grad()
        pull(found.updates, found.outer, not settings.TOGETHER).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.grad_clip)
        if not norm.isfinite():
            raise ValueError(
                f"the gradient of step {self.notes['step'] + 1} is NaN or infinite; train with a smaller lr or edit_lr"
            )
        self.adam.step()
        means = found.means(weights)
        settings.after_step(dual, means["kl"])
        return means

    def _outcome(self, batch: list[tuple], weights: Weights) -> Outcome:
        """What the network makes of a batch; the bar of the training is the one that is shown."""
        with show_progress(False):
            return outcome(self.lm, self.network, batch, weights, not self.settings.TOGETHER, self.below)

    def _batch(self) -> list[tuple]:
        """The facts of this step, with a paraphrase and a prompt that must not change drawn for each: of the seed and
        the step alone, so that it does not matter when the run began."""
        n, size, step = len(self.train), min(self.settings.batch_size, len(self.train)), self.notes["step"]
        per_round = n // size
        order = torch.randperm(n, generator=_generator(self.seed, step // per_round, 0))
        first, draw = step % per_round * size, _generator(self.seed, step, 1)
        some = [self.train[i] for i in order[first : first + size].tolist()]
        return [(one.fact, one.edit, _drawn(one.asked, draw), _drawn(one.kept, draw)) for one in some]

    @torch.no_grad()
    def _look(self) -> dict[str, float]:
        """The mean losses of the facts held out."""
        test, size = self.test[: self.settings.val_facts], self.settings.batch_size
        parts = [test[i : i + size] for i in range(0, len(test), size)]
        found = []
        for part in parts:
            batch = [(one.fact, one.edit, one.asked[0], one.kept[0]) for one in part]
            found.append(self._outcome(batch, Weights(1, 1)))
        columns = (torch.cat([getattr(each, name) for each in found]) for name in ("nll", "kl", "exact"))
        return Outcome({}, {}, *columns).means(Weights(self.settings.cedit, self.settings.cloc))

    # ---- the state between two stretches

    def _state(self) -> dict[str, Tensor]:
        state = {f"network.{name}": x for name, x in self.network.state_dict().items()}
        state |= {f"best.{name}": x for name, x in self.best.items()}
        for name, parameter in self.network.named_parameters():
            state |= {f"adam.{name}.{key}": x for key, x in self.adam.state[parameter].items()}
        return {name: x.detach().clone() for name, x in state.items()} | {"notes": json_tensor(self.notes)}

    def _take(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(_under(state, "network."))
        self.best, self.notes = _under(state, "best."), json_of(state["notes"])
        for name, parameter in self.network.named_parameters():
            of_adam = _under(state, f"adam.{name}.")
            # Adam's count of steps stays on the CPU
            moved = {key: x if key == "step" else x.to(parameter.device) for key, x in of_adam.items()}
            self.adam.state[parameter] = {key: x.clone() for key, x in moved.items()}

    @staticmethod
    def _nothing() -> dict[str, Tensor]:
        raise AssertionError("the part is there")

    def _made(self) -> Network:
        """The network of the best look."""
        looks = [{name: round(x, 6) for name, x in look.items()} for look in self.notes["looks"]]
        self.network.load_state_dict(self.best)
        network = self.network.cpu().requires_grad_(False)
        best = min(self.notes["looks"], key=lambda look: look["loss"])
        network.provenance = {
            "version": __version__, "facts": len(self.train), "held_out": len(self.test),
            "steps": self.notes["step"], "best_step": best["step"], "looks": looks, "dual": self.notes["dual"],
            "subjects": sorted({subject_digest(one.fact) for one in self.train}),
        }  # fmt: skip
        if best["success"] == 0:
            warn(
                "the trained network writes none of the facts held out; train it longer, or with another lr or cedit",
            )
        return network


def _under(state: Mapping[str, Tensor], begins: str) -> dict[str, Tensor]:
    return {name.removeprefix(begins): x for name, x in state.items() if name.startswith(begins)}


def _generator(seed: int, number: int, what: int) -> torch.Generator:
    """Of one of many independent choices."""
    return torch.Generator().manual_seed(int(digest(seed, number, what), 16) >> 1)


def _drawn(some: Sequence, generator: torch.Generator):
    return some[int(torch.randint(len(some), (1,), generator=generator))]
