"""Pre-training in iterations (Hsu et al. 2021, section III-B): cluster, train, cluster a layer of that model, train again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslim.checkpoints import load_model
from sslim.data.corpus import LABELS, Corpus
from sslim.data.labels import LabelStore
from sslim.recipes.pretrain import PretrainRecipe, TargetsConfig, pretrain
from sslim.targets import KMeansConfig, Vectors, cluster_corpus, make_vectors
from sslim.training import TrainingResult, pick_device
from sslim.training.distributed import Processes

POLL_S = 0.2  # while another process clusters


def pretrain_iterations(
    recipe: PretrainRecipe,
    corpus_folder: Path,
    output: Path,
    *,
    num_iterations: int = 2,
    labels_name: str | None = None,
    start: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Makes targets and trains, several times over; repeated, it goes on where it was stopped.

    Every iteration is a run of its own in ``output/iteration-K`` and starts from a new model; only its targets come from the
    one before. Targets go to the corpus: ``mfcc-kmeans100``, and ``layer3-kmeans100-DIGEST`` with the digest of the model. The
    same labels are never made twice.

    Args:
        recipe: What to train; ``targets`` says what to cluster before each iteration.
        corpus_folder: A prepared corpus; the first iteration needs log filterbank features in it, unless labels are named.
        output: Folder for the runs.
        num_iterations: How many.
        labels_name: Labels of the first iteration, instead of those the recipe makes.
        start: ``init_from``, ``init_optimizer`` and ``keep_head`` of :func:`~sslim.recipes.pretrain.pretrain`, for the first.
        say: Where notes for the user go.

    Returns:
        That of the last iteration, or of the one that was stopped.

    Raises:
        ValueError: The recipe has no targets for so many iterations, or whatever ``pretrain`` refuses.
    """
    _check(recipe, num_iterations)
    processes = Processes.of_environment()  # under torchrun the first clusters, the others wait for its labels
    result: TrainingResult | None = None
    for number, targets in enumerate(recipe.targets[:num_iterations], start=1):
        before = output / f"iteration-{number - 1}" / "model" if number > 1 else None
        name = labels_name if number == 1 else None
        if name is None:
            name = _labels(recipe, Corpus.open(corpus_folder), targets, before, processes, say)
        training = recipe.training
        if targets.steps is not None:
            training = replace(training, total_steps=targets.steps, epochs=None)
        if processes.is_main:
            say(f"iteration {number} of {num_iterations}: labels {name}")
        result = pretrain(
            replace(recipe, training=training),
            corpus_folder,
            name,
            output / f"iteration-{number}",
            **(start or {} if number == 1 else {}),
            say=say,
        )
        if not result.finished:
            break
    assert result is not None
    return result


def _check(recipe: PretrainRecipe, num_iterations: int) -> None:
    if not recipe.task.needs_labels:
        raise ValueError(f"recipe {recipe.name} learns without labels, so there is nothing to cluster: leave out --iterations")
    if num_iterations < 1 or num_iterations > len(recipe.targets):
        raise ValueError(
            f"recipe {recipe.name} says what to cluster for {len(recipe.targets)} iterations, {num_iterations} are asked for: "
            "set its targets, or cluster and train by hand with `sslim cluster` and `sslim pretrain`"
        )


def _labels(
    recipe: PretrainRecipe,
    corpus: Corpus,
    targets: TargetsConfig,
    model_folder: Path | None,
    processes: Processes,
    say: Callable[[str], None],
) -> str:
    """Returns the name of the labels that an iteration trains on, made now if they are not there."""
    device = pick_device(recipe.training.device, processes)
    vectors = _vectors(corpus, targets, model_folder, str(device))
    name = f"mfcc-kmeans{targets.num_clusters}"
    if targets.layer is not None:
        name = f"layer{targets.layer}-kmeans{targets.num_clusters}-{vectors.origin['model_digest'][:8]}"
    folder = corpus.path / LABELS / name
    if processes.is_main and not folder.exists():
        say(f"clustering {'MFCC' if targets.layer is None else f'layer {targets.layer}'} into {targets.num_clusters}")
        kmeans = KMeansConfig(num_clusters=targets.num_clusters)
        notes = {} if model_folder is None else {"model": model_folder.parent.name}
        cluster_corpus(corpus, name, vectors, kmeans, notes=notes, device=str(device))
    while not folder.exists():
        time.sleep(POLL_S)
    made = LabelStore.open(folder).origin
    if any(made.get(key) != value for key, value in vectors.origin.items()):
        raise ValueError(f"corpus {corpus.name} has labels {name} that were made of something else: rename them")
    return name


def _vectors(corpus: Corpus, targets: TargetsConfig, model_folder: Path | None, device: str) -> Vectors:
    if targets.layer is None:
        return make_vectors(corpus, mfcc=True)
    if model_folder is None:
        raise ValueError("the first iteration has no model to cluster a layer of: its targets must be MFCC (layer null)")
    return make_vectors(corpus, load_model(model_folder).to(device), targets.layer)
