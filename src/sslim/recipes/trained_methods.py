"""The table of methods that train while they compress: gates, iterative pruning of weights, distillation into a student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from sslim.objectives.gated import GatedConfig
from sslim.recipes.distil import NamedTeacher, distil
from sslim.recipes.distil_recipes import DistilRecipe, named_recipe, recipe_for_model
from sslim.recipes.gates import gates_mini_recipe, train_gates
from sslim.recipes.iterative_weights import IterativeWeights, prune_weights_iteratively
from sslim.training import TrainerConfig, TrainingResult


@dataclass(frozen=True, kw_only=True)
class TrainingSteps:
    """How long and on what a method trains.

    Attributes:
        steps: Updates.
        minutes: Stop after this much training time.
        learning_rate: Peak.
        batch_s: Seconds of audio in a micro-batch.
        crop_s: Longer utterances are cut to this.
        precision: ``fp32`` or ``bf16`` autocast.
        device: Where to train.
        seed: Decides everything random.
    """

    steps: int = 2_000
    minutes: float | None = None
    learning_rate: float = 5e-4
    batch_s: float = 30.0
    crop_s: float = 10.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def applied_to(self, recipe: DistilRecipe) -> Any:
        """Returns a recipe of the same kind that trains so long and on this."""
        training: TrainerConfig = replace(
            recipe.training,
            total_steps=self.steps,
            max_minutes=self.minutes,
            precision=self.precision,
            device=self.device,
            seed=self.seed,
            log_every=max(1, min(50, self.steps // 20)),
            validate_every=None,
            optimizer=replace(recipe.training.optimizer, lr=self.learning_rate),
        )
        return replace(recipe, training=training, data=replace(recipe.data, batch_s=self.batch_s, crop_s=self.crop_s))


@dataclass(frozen=True, kw_only=True)
class GatesStep(TrainingSteps):
    """Settings of gates in a pipeline; give one of ``sparsity`` and ``params``.

    Attributes:
        sparsity: Share of the model's parameters that goes.
        params: Parameters, heads left out, that are left.
        ramp_share: Share of the updates over which the target rises.
    """

    sparsity: float | None = None
    params: float | None = None
    ramp_share: float = 0.25

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.params is None):
            raise ValueError(f"sparsity is {self.sparsity} and params is {self.params}; give one of them")

    def share_gone(self, num_parameters: int) -> float:
        """Returns the share of a model's parameters that goes.

        Raises:
            ValueError: More are to be left than there are.
        """
        if self.sparsity is not None:
            return self.sparsity
        assert self.params is not None
        if self.params >= num_parameters:
            raise ValueError(f"params is {self.params:,.0f}, but the model has only {num_parameters:,}")
        return 1.0 - self.params / num_parameters


@dataclass(frozen=True, kw_only=True)
class DistilStep(TrainingSteps):
    """Settings of distillation in a pipeline.

    Attributes:
        student: A recipe, a JSON file with one, or a preset, as ``sslim compress distil`` takes them.
        loss: Loss for a preset.
    """

    student: str
    loss: str = "distil-hubert"


class Train(Protocol):
    """Trains a smaller model into ``output/model``, or goes on with what is there."""

    def __call__(
        self, settings: Any, model: NamedTeacher, whole: NamedTeacher, corpus: Path, output: Path, *, say: Callable[[str], None]
    ) -> TrainingResult: ...


def _train_gates(
    settings: GatesStep,
    model: NamedTeacher,
    whole: NamedTeacher,
    corpus: Path,
    output: Path,
    *,
    say: Callable[[str], None],
) -> TrainingResult:
    sparsity = settings.share_gone(model.model.num_parameters(with_heads=False))
    ramp_steps = max(1, round(settings.ramp_share * settings.steps))
    recipe = gates_mini_recipe(model.model.config, whole.model.config)
    recipe = replace(settings.applied_to(recipe), lagrangian=GatedConfig(sparsity=sparsity, ramp_steps=ramp_steps))
    return train_gates(recipe, model, corpus, output, teacher=whole, say=say)


def _distil(
    settings: DistilStep,
    model: NamedTeacher,
    whole: NamedTeacher,
    corpus: Path,
    output: Path,
    *,
    say: Callable[[str], None],
) -> TrainingResult:
    found = named_recipe(settings.student)
    teacher = model.model.config
    recipe = (
        found if isinstance(found, DistilRecipe) else recipe_for_model(settings.student, found, teacher, settings.loss, None)
    )
    return distil(settings.applied_to(recipe), model, corpus, output, say=say)


@dataclass(frozen=True, kw_only=True)
class TrainedMethod:
    """A method that trains while it compresses.

    Attributes:
        settings: The class of its settings.
        train: What runs.
    """

    settings: type
    train: Train


TRAINED_METHODS: dict[str, TrainedMethod] = {
    "gates": TrainedMethod(settings=GatesStep, train=_train_gates),
    "iterative-weights": TrainedMethod(settings=IterativeWeights, train=prune_weights_iteratively),
    "distil": TrainedMethod(settings=DistilStep, train=_distil),
}
