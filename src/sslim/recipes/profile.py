"""``sslim profile``: models of any format beside a dense baseline, all measured in turns in one process."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.checkpoints.model_files import model_name, model_path, tensors_bytes, tensors_digest
from sslim.checkpoints.native import DESCRIPTION
from sslim.models import SpeechModel
from sslim.profiling import Conditions
from sslim.profiling.latency import check_device, describe_machine, with_some_statistics
from sslim.profiling.measure import measure_models, nonzero_parameters, zero_share
from sslim.profiling.memory import includes
from sslim.profiling.profile import Profile, ProfiledModel, ProfileRow
from sslim.profiling.torch_counter import check_macs
from sslim.recipes.peak_memory import peak_memory_bytes


@dataclass(frozen=True, kw_only=True)
class ProfileRecipe:
    """How to profile.

    Attributes:
        seconds: Lengths of audio.
        batches: Utterances B.
        threads: Threads of torch on a CPU.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        repeats: Rounds that count.
        memory: Whether peak memory is measured, in a fresh process for every model and every set of conditions.
        check_macs: Whether MACs are compared with torch's own count.
        seed: Decides noise and orders.
    """

    seconds: tuple[float, ...] = (10.0,)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    device: str = "cpu"
    repeats: int = 20
    memory: bool = True
    check_macs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; expected at least 1 round")
        if not (self.seconds and self.batches and self.threads):
            raise ValueError("give at least one number of seconds, of utterances in a batch, and of threads")
        check_device(self.device)

    @property
    def conditions(self) -> list[Conditions]:
        """All combinations, threads changing fastest."""
        combined = product(dict.fromkeys(self.seconds), dict.fromkeys(self.batches), dict.fromkeys(self.threads))
        return [Conditions(seconds=s, batch=b, threads=t, device=self.device) for s, b, t in combined]


def run_profile(
    paths: Sequence[Path], baseline: Path | None, recipe: ProfileRecipe, *, say: Callable[[str], None] = lambda _: None
) -> Profile:
    """Profiles models.

    Args:
        paths: Model folders, run folders or foreign checkpoints; what is named twice is measured once.
        baseline: The dense one among or beside them; None for the first.
        recipe: How.
        say: Where notes for the user go.

    Raises:
        ValueError: No model, one that cannot be read, or audio shorter than a frame.
        RuntimeError: sslim's count of MACs is not torch's, or a process that measures memory failed.
    """
    conditions = recipe.conditions
    given = [*([baseline] if baseline is not None else []), *paths]
    first: dict[Path, Path] = {}
    for place in map(model_path, given):
        first.setdefault(place.resolve(), place)
    places = list(first.values())
    if not places:
        raise ValueError("there is nothing to profile: name a model")
    if (cores := available_cores()) < max(recipe.threads):
        say(f"note: {max(recipe.threads)} threads share {cores} cores here, so they wait for each other")
    loaded = [with_some_statistics(load_model(place)) for place in places]
    names = distinct_names(places)
    models = [describe_model(name, place, model) for name, place, model in zip(names, places, loaded, strict=True)]
    for name, model in zip(names, loaded, strict=True) if recipe.check_macs else ():
        for seconds, batch in dict.fromkeys((one.seconds, one.batch) for one in conditions):
            count = sum(check_macs(model.config, seconds, batch).values())
            say(f"{name}, {seconds:g} s, batch {batch}: torch counts the same {count / 1e9:.3f} GMAC, in every module")
    by_name = dict(zip(names, loaded, strict=True))
    rows = measure_models(by_name, names[0], conditions, repeats=recipe.repeats, seed=recipe.seed, say=say)
    if recipe.memory:
        rows = _with_memory(rows, dict(zip(names, places, strict=True)), by_name, say)
    return Profile(
        sslim=__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine={**describe_machine(recipe.device), "cores": str(cores)},
        baseline=names[0],
        memory_includes=includes(recipe.device) if recipe.memory else "",
        models=tuple(models),
        rows=tuple(rows),
    )


def available_cores() -> int:
    """Returns how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def distinct_names(places: Sequence[Path]) -> list[str]:
    """Returns names for models, with as many parent folders as it takes to tell equal ones apart."""
    names = [model_name(place) for place in places]
    wholes = [place.resolve().parent if place.resolve().name == "model" else place.resolve() for place in places]
    for depth in range(2, max(len(whole.parts) for whole in wholes) + 1):
        names = ["/".join(w.parts[-depth:]) if names.count(n) > 1 else n for n, w in zip(names, wholes, strict=True)]
    return [name if names.count(name) == 1 else str(place) for name, place in zip(names, places, strict=True)]


def describe_model(name: str, path: Path, model: SpeechModel) -> ProfiledModel:
    """Returns what a model is, whatever it is run on."""
    return ProfiledModel(
        name=name,
        path=str(path.resolve()),
        digest=tensors_digest(path),
        family=model.config.family,
        num_parameters=model.num_parameters(with_heads=False),
        nonzero_parameters=nonzero_parameters(model),
        zero_share=zero_share(model),
        file_bytes=tensors_bytes(path),
        num_layers=model.num_layers,
    )


def _with_memory(
    rows: Sequence[ProfileRow], places: dict[str, Path], models: dict[str, SpeechModel], say: Callable[[str], None]
) -> list[ProfileRow]:
    """Measures peak memory; a foreign checkpoint is written in the native format first, so that only loading it counts."""
    say(f"peak memory: {len(rows)} fresh processes")
    with TemporaryDirectory(prefix="sslim-profile-") as temporary:
        folders = dict(places)
        for number, (name, place) in enumerate(places.items()):
            if not (place / DESCRIPTION).is_file():
                folders[name] = Path(temporary) / str(number)
                save_model(models[name], folders[name])
        return [replace(row, peak_memory_bytes=peak_memory_bytes(folders[row.model], row.conditions)) for row in rows]
