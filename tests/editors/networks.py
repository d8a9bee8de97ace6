"""Networks and facts for the tests of trained editors, and what the oracle takes of them."""

import torch
from torch import Tensor

import kedit_fast as kf
from kedit_fast.basics import catalog
from kedit_fast.editors.networks import Network
from kedit_fast.editors.training_settings import Training
from kedit_fast.editors.training_step import edit_task
from kedit_fast.jobs.gradients import gradient_factors
from tests.oracle import trained as oracle

MODULES = {"gpt2": {"down": "transformer.h.{}.mlp.c_proj", "up": "transformer.h.{}.mlp.c_fc"}}
LLAMA = {role: f"model.layers.{{}}.mlp.{role}_proj" for role in ("down", "up", "gate")}
LAYERS = (1, 3)
QUICK = {"layers": (2, 3), "lr": 1e-3, "lr_lr": 1e-3, "edit_lr": 1e-2, "cedit": 1.0, "val_interval": 4, "batch_size": 4}
OWN = {"mend": {"rank": 6}, "malmen": {"rank": 6}, "ke": {"condition_dim": 7, "hidden_dim": 5}}
METHODS = tuple(OWN)

PLACES = ("Rome", "Paris", "London", "Madrid", "Seattle", "Spain", "Italy", "Japan")
SUBJECTS = (
    "Space Needle", "Louvre", "Big Ben", "Vimeo", "Microsoft", "Zürich", "Eiffel Tower", "Toyota", "Miles Davis",
    "Beats Music", "Thomas Joannes", "Illinois",
)  # fmt: skip
FACTS = tuple(
    kf.Fact(
        "The {} is located in the city of", subject, target_new=PLACES[i % len(PLACES)],
        paraphrases=(f"{subject} is in the city of", f"You can see the {subject} in"),
        neighborhood=("LeBron James plays the", "The capital of France is"),
    )
    for i, subject in enumerate(SUBJECTS)
)  # fmt: skip


def settings(method: str, **more) -> Training:
    """Of a training that takes a second."""
    return catalog.loaded(catalog.TRAINED)[method](**QUICK | OWN[method] | {"max_iters": 8} | more)


def network(lm, method: str, dtype=torch.float64, layers=LAYERS, noise: float = 0.3) -> Network:
    """A network whose parameters all count: far from where a training begins, with statistics of some facts."""
    made = settings(method, layers=layers)
    shapes = {(layer, role): lm.shape_of(role) for layer in layers for role in lm.family.roles}
    of_method = made.NETWORK(lm.fingerprint, shapes, vars(made) | {"seed": 0})
    of_method.observe(gradient_factors(lm, [edit_task(lm, fact) for fact in FACTS[4:]], of_method.places).factors)
    generator = torch.Generator().manual_seed(1)
    for parameter in of_method.parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (
            parameter.data.double() + noise * random * parameter.data.abs().double().mean().clamp(1e-2)
        ).to(dtype)
    return of_method.requires_grad_(False)


def matrices(family: str, made: Network) -> list[oracle.Matrix]:
    """What a network changes, as the oracle calls it."""
    paths = MODULES.get(family, LLAMA)
    return [oracle.Matrix(layer, role, paths[role].format(layer)) for layer, role in made.places]


def expected(lm, family: str, made: Network, facts) -> dict[tuple[int, str], Tensor]:
    """{place: ΔW [out, in]} of the facts together, by the oracle."""
    places, tensors = matrices(family, made), dict(made.state_dict())
    tasks = [edit_task(lm, fact) for fact in facts]
    found = [oracle.factors(lm.model, task.prompt, task.target, places) for task in tasks]
    deltas = {}
    for place in places:
        given = tensors, places, place, [of_fact[place] for of_fact in found]
        if made.METHOD == "ke":
            delta = oracle.ke(*given, [of_fact[places[0]] for of_fact in found], made.settings)
        else:
            delta = getattr(oracle, made.METHOD)(*given)
        deltas[place.layer, place.role] = delta
    return deltas
