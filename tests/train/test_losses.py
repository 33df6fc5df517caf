"""Every certified loss: limits, gradients, resumption, learning; and one that is added."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cactus_edge.errors import DataError
from cactus_edge.train import losses, objective, recipe, train
from cactus_edge.train.bounds import forward
from cactus_edge.train.checkpoint import HISTORY_FILE, MODEL_FILE, STATE_FILE
from cactus_edge.train.data import generator
from cactus_edge.train.losses import LOSSES, Case, CertifiedLoss
from cactus_edge.train.members import PrunedQuantized
from cactus_edge.train.objective import cactus_loss, schedule
from cactus_edge.train.recipe import Compression, Recipe, parse_recipe
from cactus_edge.train.reports import EpochRow, StepReport
from cactus_edge.train.views import deployed_view
from cactus_edge.train.zoo import Network, build

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "training.md"
KEYS = {
    "crown-ibp": "options = { fusion = true, final_beta = 0.5 }",
    "mtl-ibp": "options = { alpha = 0.5, attack_scale = 1.5 }",
    "cc-ibp": "options = { alpha = 0.5 }",
    "qa-ibp": "options = { margin = 0.5 }",
}
LOSS_NAMES = [*LOSSES, "crown-ibp per rival"]


def with_loss(text: str, name: str, keys: str | None = None) -> Recipe:
    """The recipe with another loss; ``crown-ibp per rival`` is CROWN-IBP without fusion."""
    if name == "crown-ibp per rival":
        name, keys = "crown-ibp", "options = { fusion = false, final_beta = 1 }"
    keys = KEYS.get(name, "") if keys is None else keys
    return parse_recipe(
        text.replace("l1 = 1e-6", f'l1 = 1e-6\nloss = "{name}"\nattack_steps = 2\n{keys}')
    )


def case_of(
    chosen: Recipe, network: Network, growth: float = 1.0, weight: float = 1.0, *, int4: bool = True
) -> Case:
    torch.manual_seed(1)
    images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 10
    ranges = {f"relu{index}": torch.tensor(0.5) for index in (1, 2, 3)}
    member = PrunedQuantized(0.5, 4)
    view = deployed_view(network, member, Compression(activations="int8"), ranges if int4 else {})
    logits, statistics = forward(network, images, view)
    return Case(
        network=network,
        images=images,
        labels=labels,
        view=view,
        logits=logits,
        statistics=statistics,
        objective=chosen.objective,
        epsilon=growth * chosen.objective.epsilon,
        certified_weight=weight,
        source=generator(torch.device("cpu"), 0, "attack"),
    )


def value_of(case: Case) -> float:
    return float(LOSSES[case.objective.loss].function(case)[0].detach())


@pytest.fixture(params=["cnn-tiny", "cnn-small-bn"])
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    return build(request.param, (1, 8, 8), 10, 0.3)


@pytest.mark.parametrize("name", ["mtl-ibp", "cc-ibp"])
@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_combinations_end_in_intervals_and_attacks(
    tiny_text: str, network: Network, name: str, weight: float
) -> None:
    intervals = value_of(case_of(with_loss(tiny_text, "ibp"), network, weight=weight))
    whole = with_loss(tiny_text, name, "options = { alpha = 1 }")
    assert value_of(case_of(whole, network, weight=weight)) == intervals

    none = case_of(with_loss(tiny_text, name, "options = { alpha = 0 }"), network, weight=weight)
    same = case_of(whole, network, weight=weight)  # an equal source, not used so far
    points = same.attacked(same.box())
    attacked = functional.cross_entropy(same.logits_at(points), same.labels)
    assert same.logits is not None
    standard = functional.cross_entropy(same.logits, same.labels)
    expected = weight * float(attacked.detach()) + (1 - weight) * float(standard.detach())
    assert value_of(none) == pytest.approx(expected, rel=1e-5)
    half = with_loss(tiny_text, name, "options = { alpha = 0.5 }")
    assert expected < value_of(case_of(half, network, weight=weight)) < intervals


@pytest.mark.parametrize("correct_only", [True, False])
def test_qa_ibp_is_what_it_says(tiny_text: str, network: Network, correct_only: bool) -> None:
    only = str(correct_only).lower()
    keys = f"options = {{ margin = 0.3, regulariser = 1.0, correct_only = {only} }}"
    case = case_of(with_loss(tiny_text, "qa-ibp", keys), network, weight=0.5)
    bounds, labels = case.bounds(case.box()), case.labels
    margins = bounds.margins.detach()
    assert case.logits is not None
    expected = float(functional.cross_entropy(case.logits, labels).detach())
    for row, label in enumerate(labels.tolist()):
        if not correct_only or int(case.logits[row].argmax()) == label:
            for rival in set(range(10)) - {label}:
                expected += 0.5 * max(0.0, 0.3 + float(margins[row, rival])) / len(labels)
    for name, box in bounds.hidden.items():
        levels = case.view.ranges[name] / 255  # activations are rounded
        ends = [(end.clamp(0, 0.5) / levels).round() * levels for end in (box.lower, box.upper)]
        expected += (0.5 / 0.75) * float((ends[1] - ends[0]).mean().detach())
    assert value_of(case) == pytest.approx(expected, rel=1e-4)


def test_attacks_reach_as_far_as_their_scale(tiny_text: str, network: Network) -> None:
    near, far = (
        case_of(with_loss(tiny_text, "mtl-ibp", f"options = {{ attack_scale = {scale} }}"), network)
        for scale in (0.1, 3.0)
    )
    assert value_of(near) < value_of(far)
    epsilon = far.objective.epsilon
    reach = (far.attacked(far.box(3.0)) - far.images).abs().amax()
    assert epsilon < float(reach) <= 3 * epsilon + 1e-6


@pytest.mark.parametrize("fusion", ["true", "false"])
def test_crown_ends_in_intervals(tiny_text: str, network: Network, fusion: str) -> None:
    intervals = value_of(case_of(with_loss(tiny_text, "ibp"), network))
    ending = with_loss(tiny_text, "crown-ibp", f"options = {{ fusion = {fusion} }}")
    assert value_of(case_of(ending, network)) == intervals
    keeping = with_loss(
        tiny_text, "crown-ibp", f"options = {{ fusion = {fusion}, final_beta = 1 }}"
    )
    assert value_of(case_of(keeping, network)) < intervals  # tighter, on networks like these
    middle = value_of(case_of(ending, network, growth=0.5))
    same_radius = case_of(keeping, network, growth=0.5)
    assert value_of(same_radius) < middle


@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("fusion", ["true", "false"])
@pytest.mark.parametrize("int4", [True, False])
def test_no_sampled_point_beats_the_crown_loss(
    tiny_text: str, network: Network, epsilon: float, fusion: str, int4: bool
) -> None:
    keys = f"options = {{ fusion = {fusion}, final_beta = 1 }}"
    text = tiny_text.replace("epsilon = 0.05", "epsilon = 0.3")
    case = case_of(with_loss(text, "crown-ibp", keys), network, epsilon / 0.3, int4=int4)
    bound = value_of(case)
    box, source = case.box(), torch.Generator().manual_seed(0)
    place = torch.rand(30, *case.images.shape, generator=source).round()
    points = (box.lower + place * (box.upper - box.lower)).flatten(0, 1)
    logits = case.logits_at(points).detach()
    reached = functional.cross_entropy(logits, case.labels.repeat(30), reduction="none")
    assert float(reached.unflatten(0, (30, -1)).mean(1).max()) <= bound + 1e-5
    if epsilon == 0.0 and not int4:
        logits = case.logits_at(case.images)
        exact = float(functional.cross_entropy(logits, case.labels).detach())
        assert bound == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("step", [0, 5, 15])
def test_every_parameter_gets_a_finite_gradient(
    tiny_text: str, network: Network, name: str, step: int
) -> None:
    chosen = with_loss(tiny_text.replace("lambda_ramp = 1", "lambda_max = 0.9"), name)
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    now = schedule(chosen, step, 10)
    value, ranges = cactus_loss(network, images, labels, chosen, step, now, {}, {})
    value.backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(torch.isfinite(parameter.grad).all()), parameter_name
    assert sorted(ranges) == ["relu1", "relu2", "relu3"]


class StopAt:
    """Asks for an end at a step, by the interrupt that Ctrl-C is."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, report: StepReport) -> None:
        if report.step == self.at:
            raise KeyboardInterrupt

    def epoch(self, row: EpochRow) -> None:
        pass


@pytest.mark.parametrize("name", KEYS)
def test_resumed_run_equals_uninterrupted_run(
    few_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("cactus_edge.train.loop.REPORT_INTERVAL", -1.0)
    chosen = with_loss(few_text.replace('"cnn-tiny"', '"mlp"'), name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(chosen, whole, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(chosen, parts, progress=StopAt(12), device="cpu")  # nine steps per epoch
    train(chosen, parts, resume=True, device="cpu")
    for file in (MODEL_FILE, STATE_FILE, HISTORY_FILE):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


LEARNING = """
seed = 1
threads = 1
[data]
name = "digits"
[network]
name = "mlp"
width = 0.5
[objective]
epsilon = 0.02
epsilon_ramp = 3
l1 = 1e-6
[optimizer]
epochs = 6
batch_size = 64
learning_rate = 5e-3
"""


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_digits_are_learned_and_certified(tmp_path: Path, name: str) -> None:
    (dense,) = train(with_loss(LEARNING, name), tmp_path, device="cpu").members
    assert dense.test.certified > 0.6  # guessing reaches 0.1
    assert dense.test.standard > 0.8


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            "options = { alfa = 0.5 }",
            r"options: unknown key 'alfa'; did you mean 'alpha'\? known keys: alpha, attack_scale$",
        ),
        (
            "options = { alpha = 1.5 }",
            r"r: \[objective\] options.alpha: .*\(float\) at least 0 and at most 1$",
        ),
        ('options = { alpha = "x" }', r"r: \[objective\] options.alpha: Expected `float`"),
        ("options = { alpha = [1] }", r"\[objective\] options.*Expected `bool \| int \| .*array"),
    ],
)
def test_mistakes_in_options_are_named(tiny_text: str, keys: str, expected: str) -> None:
    text = tiny_text.replace("l1 = 1e-6", f'l1 = 1e-6\nloss = "mtl-ibp"\n{keys}')
    with pytest.raises(DataError, match=expected):
        parse_recipe(text, "r")


def test_options_are_completed_and_read_back(tiny_text: str) -> None:
    chosen = with_loss(tiny_text, "mtl-ibp", "options = { alpha = 1 }")
    assert chosen.objective.options == {"alpha": 1.0, "attack_scale": 1.0}
    text = recipe.format_recipe(chosen)
    assert parse_recipe(text) == chosen and "attack_scale = 1.0" in text
    assert "options" not in recipe.format_recipe(with_loss(tiny_text, "ibp"))
    with pytest.raises(DataError, match=r"options: unknown key 'alpha'; known keys: none$"):
        with_loss(tiny_text, "ibp", "options = { alpha = 1 }")


def documented_loss() -> types.ModuleType:
    """The module that docs/training.md shows."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    found = re.search(r"```python\n(\"\"\"Exp-IBP.*?)```", text, re.DOTALL)
    assert found is not None
    module = types.ModuleType("exp_ibp")
    exec(compile(found[1], "exp_ibp.py", "exec", dont_inherit=True), module.__dict__)
    return module


def registered(monkeypatch: pytest.MonkeyPatch, table: Mapping[str, CertifiedLoss]) -> None:
    monkeypatch.setattr(losses, "LOSSES", table)
    monkeypatch.setattr(objective, "LOSSES", table)


def test_documented_loss_can_be_added(
    few_text: str, tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = documented_loss()
    line = f'"exp-ibp": CertifiedLoss({module.__name__}.loss, {module.__name__}.Options)'
    assert line in DOCUMENTATION.read_text(encoding="utf-8")
    entry = CertifiedLoss(module.loss, module.Options)
    registered(monkeypatch, {**LOSSES, "exp-ibp": entry})
    values = [
        float(entry.function(case_of(chosen, network))[0].detach())
        for chosen in (
            with_loss(few_text, "exp-ibp", f"options = {{ alpha = {alpha} }}")
            for alpha in (0, 0.5, 1)
        )
    ]
    assert values[0] < values[1] < values[2]
    assert values[2] == pytest.approx(value_of(case_of(with_loss(few_text, "ibp"), network)))
    short = with_loss(few_text.replace("epochs = 2", "epochs = 1"), "exp-ibp")
    assert train(short, tmp_path, device="cpu").epochs == 1
