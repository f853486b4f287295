"""Measuring models against a dense baseline: all in turns in one process, on the same noise, under several conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from sslim.models.speech import ModelConfig, SpeechModel
from sslim.profiling.latency import Conditions, noise_inputs
from sslim.profiling.macs import Macs, count_macs
from sslim.profiling.profile import ProfileRow, describe_conditions, profile_row
from sslim.profiling.turns import times_in_turns, using_threads

WARM_UPS = 2


def macs_at(config: ModelConfig, seconds: float, batch: int = 1) -> Macs:
    """Counts MACs for audio of a length; of a model without a front-end a frame of features is taken as 10 ms.

    Raises:
        ValueError: The audio is shorter than a frame.
    """
    if config.frontend is None:
        return count_macs(config, num_frames=max(1, round(100 * seconds)), batch=batch)
    return count_macs(config, seconds=seconds, batch=batch)


def encode_once(model: SpeechModel, conditions: Conditions, generator: torch.Generator) -> Callable[[], object]:
    """Returns a call that encodes noise, from waveform (or features) to the last layer, keeping no other layer."""
    run = model.encode if model.config.frontend is not None else model.encode_features
    return partial(run, noise_inputs(model.config, conditions, generator), keep_layers=False)


def measure_models(
    models: Mapping[str, SpeechModel],
    baseline: str,
    conditions: Sequence[Conditions],
    *,
    repeats: int = 20,
    warm_ups: int = WARM_UPS,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[ProfileRow]:
    """Times all models in turns, under one set of conditions after the other.

    Args:
        models: By name, in eval mode and with the statistics that their front-ends need; they are moved to the device.
        baseline: Name of the one that speed-ups refer to.
        conditions: Lengths, batches, threads, devices.
        repeats: Rounds that count.
        warm_ups: Rounds before them.
        seed: Decides the noise and the orders.
        say: Told what is being measured.

    Returns:
        A row for all conditions and models, in this order, without peak memory.

    Raises:
        ValueError: Audio shorter than a frame of a model.
    """
    counts = {named: macs_at(models[named[0]].config, *named[1:]) for named in _lengths(models, conditions)}
    rows = []
    for one in conditions:
        say(f"{describe_conditions(one)}: {len(models)} models in turns, {repeats} rounds after {warm_ups} to warm up")
        generator = torch.Generator().manual_seed(seed)
        calls = {name: encode_once(model.to(one.device), one, generator) for name, model in models.items()}
        with using_threads(one.threads):
            times = times_in_turns(calls, device=one.device, repeats=repeats, warm_ups=warm_ups, seed=seed)
        for name in models:
            macs = counts[name, one.seconds, one.batch]
            row = profile_row(
                name,
                one,
                macs=macs.total,
                macs_by_group=macs.groups(),
                times_ms=times[name],
                baseline_macs=counts[baseline, one.seconds, one.batch].total,
                baseline_times_ms=times[baseline],
            )
            rows.append(row)
    return rows


def _lengths(models: Mapping[str, SpeechModel], conditions: Sequence[Conditions]) -> list[tuple[str, float, int]]:
    """Every model with every length and batch, so that what is too short is said before anything is timed."""
    return [(name, one.seconds, one.batch) for name in models for one in conditions]


def nonzero_parameters(model: SpeechModel) -> int:
    """Counts parameters without heads that are not exactly zero."""
    zeros = sum(tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in _stored(model).values())
    return max(0, model.num_parameters(with_heads=False) - zeros)


def zero_share(model: SpeechModel) -> float:
    """Returns the share of exact zeros among the entries of matrices and kernels, without heads."""
    matrices = [tensor for tensor in _stored(model).values() if tensor.dim() > 1]
    total = sum(tensor.numel() for tensor in matrices)
    return sum(tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in matrices) / total if total else 0.0


def _stored(model: SpeechModel) -> dict[str, torch.Tensor]:
    """What is saved of a model, whether as parameters or (rounded weights) as buffers: not heads, not statistics."""
    outside = ("heads.", "frontend.mean", "frontend.std")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(outside)}
