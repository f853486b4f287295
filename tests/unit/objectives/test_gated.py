"""The Lagrangian of a target sparsity: by hand, independent of micro-batches, ascending multipliers, none in validation."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from sslim.batch import Batch, StepOutput
from sslim.models import PRESETS, SpeechModel, build_model
from sslim.objectives.gated import Gated, GatedConfig
from sslim.training import OptimizerConfig, build_optimizer

SPARSITY, LOSS = 0.3, 2.0


class OneGate(nn.Module):
    """A sparsity that is a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(SPARSITY))
        self.samples = 0

    def attach(self, model: SpeechModel) -> None:
        self.model = [model]

    def sample(self) -> None:
        self.samples += 1

    def expected_sparsity(self) -> Tensor:
        return self.value.double()

    def largest_sparsity(self) -> float:
        return 0.8


@dataclass(frozen=True, kw_only=True)
class Prepared:
    weights: dict[str, Tensor] = field(default_factory=lambda: {"frames": torch.tensor(5.0)})


class Constant(nn.Module):
    """Half of every micro-batch's share of ``LOSS`` frames."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model(PRESETS["melhubert-tiny"]()).requires_grad_(False)
        self.begun: list[int] = []

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        self.begun.append(step)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        return Prepared()

    def forward(self, prepared: Prepared, totals: dict[str, Tensor]) -> StepOutput:
        loss = LOSS * prepared.weights["frames"] / totals["frames"]
        return StepOutput(loss=loss, metrics={"inner": (loss, loss / LOSS)})


def gated(**settings: float) -> Gated:
    return Gated(Constant(), OneGate(), GatedConfig(**{"sparsity": 0.75, "ramp_steps": 100, **settings}))  # type: ignore[arg-type]


def run(objective: Gated, micro_batches: int) -> list[StepOutput]:
    batch = Batch(inputs=torch.zeros(1, 4, 40), lengths=torch.tensor([4]), ids=("a",))
    prepared = [objective.prepare(batch, torch.Generator()) for _ in range(micro_batches)]
    totals = {name: torch.stack([item.weights[name] for item in prepared]).sum() for name in prepared[0].weights}
    return [objective(item, totals) for item in prepared]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_lagrangian_by_hand(micro_batches: int) -> None:
    """From 0.3 to 0.75 in 100 steps: at step 0 the target is reached, at step 20 it is 0.39."""
    objective = gated(stiffness=5.0, ascent=0.1).train()
    objective.begin_step(0, torch.Generator())
    assert sum(float(output.loss.detach()) for output in run(objective, micro_batches)) == pytest.approx(LOSS)
    assert objective.multipliers.tolist() == [0.0, 5.0]
    objective.begin_step(20, torch.Generator())
    first, second = -0.1 * 0.09, 5 + 0.1 * 0.09**2  # the multipliers have ascended along the gap
    outputs = run(objective, micro_batches)
    total = torch.stack([output.loss for output in outputs]).sum()
    assert float(total.detach()) == pytest.approx(LOSS - first * 0.09 + second * 0.09**2)
    total.backward()
    assert float(objective.gates.value.grad) == pytest.approx(first - 2 * second * 0.09)  # type: ignore[attr-defined]
    metrics = {name: float(value / count) for name, (value, count) in outputs[0].metrics.items()}
    expected = {"inner": LOSS, "sparsity": SPARSITY, "target": 0.39, "lambda1": first, "lambda2": second}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert objective.gates.samples == 2 * micro_batches  # type: ignore[attr-defined]
    assert objective.objective.begun == [0, 20]  # type: ignore[comparison-overlap]


def test_the_sparsity_follows_the_target_against_a_loss() -> None:
    """A loss that rises with the sparsity, and the control: without the ascent a gap stays."""
    reached = {}
    for ascent in (0.2, 0.0):
        objective = gated(stiffness=10.0, ascent=ascent).train()
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
        for step in range(600):
            objective.begin_step(step, torch.Generator())
            optimizer.zero_grad()
            (run(objective, 1)[0].loss + 4 * objective.gates.expected_sparsity()).backward()
            optimizer.step()
            if step == 100:
                early = objective.gates.expected_sparsity().item()
                assert 0.4 < early < 0.75
        reached[ascent] = objective.gates.expected_sparsity().item()
    assert reached[0.2] == pytest.approx(0.75, abs=0.005)
    assert reached[0.0] == pytest.approx(0.75 - 4 / (2 * 10), abs=0.005)


def test_only_the_gates_learn_at_a_rate_of_their_own() -> None:
    objective = gated()
    assert objective.learning_rate_factors() == {"gates": 100.0}
    optimizer = build_optimizer(objective, OptimizerConfig(kind="adamw", lr=1e-3, weight_decay=0.1))
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 0.0, 1)]


def test_validation_has_the_inner_loss_alone_and_draws_nothing() -> None:
    objective = gated().eval()
    objective.multipliers.fill_(7.0)
    with torch.no_grad():
        output = run(objective, 1)[0]
    assert float(output.loss) == pytest.approx(LOSS)
    assert set(output.metrics) == {"inner", "sparsity"}
    assert objective.gates.samples == 0  # type: ignore[attr-defined]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RuntimeError, match="begin_step was not called"):
        run(gated().train(), 1)
    with pytest.raises(ValueError, match=r"sparsity 0\.85 is asked for, but with every gate closed 0\.800"):
        gated(sparsity=0.85)
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        GatedConfig(sparsity=1.5)
    with pytest.raises(ValueError, match="ramp_steps is -1; it must be at least 0"):
        GatedConfig(ramp_steps=-1)
    with pytest.raises(ValueError, match="Linear holds no model"):
        Gated(nn.Linear(1, 1), OneGate(), GatedConfig())
