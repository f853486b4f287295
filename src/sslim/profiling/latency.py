"""Latency of a model's parts, measured once, so that the latency of any subnet is a sum.

A whole net is a front-end, an entry (projection, positions, norms) of its width, and blocks one after another. How long each
takes depends on its own sizes, on the length of the audio, the batch, the threads and the machine, and hardly on its
neighbours. So a supernet with billions of subnets needs a few dozen measurements (the look-up table of once-for-all networks,
Cai et al. 2020, section 3.3; proxyless search, Cai et al. 2019). Whether the sum is right is not taken on trust: whole nets are
measured in the same rounds, the error is reported, and a line is fitted where the sum is biased (:func:`compare`).

All are timed in turns, a new random order each round, so that a drift of the machine's clock or load meets all of them alike,
and a block's weights are not all in cache because the same block ran just before. The median over rounds counts.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sslim.config import from_plain, read_json, to_plain
from sslim.frontends import SpectralFrontend, SpectralFrontendConfig
from sslim.models.elastic import subnet_config
from sslim.models.search_space import SearchSpace, Subnet
from sslim.models.speech import ModelConfig, Projection, SpeechModel, build_model
from sslim.nn.encoder import BlockConfig, Encoder, EncoderConfig
from sslim.profiling.macs import count_macs, frontend_rate
from sslim.profiling.turns import times_in_turns, using_threads
from sslim.storage import write_json

FORMAT_VERSION = 1
FRONTEND = "front-end"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a latency holds for.

    Attributes:
        seconds: Length of each utterance's audio.
        batch: Utterances B.
        threads: Threads of torch on a CPU.
        device: ``cpu`` or ``cuda``.
    """

    seconds: float = 10.0
    batch: int = 1
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.batch < 1 or self.threads < 1:
            raise ValueError(
                f"seconds {self.seconds:g}, batch {self.batch} and threads {self.threads} must be above 0 to measure latency"
            )


@dataclass(frozen=True, kw_only=True)
class Additivity:
    """How far sums of parts are from measured whole nets.

    Attributes:
        predicted_ms: Sum of each net's parts.
        measured_ms: Its own median.
        intercept_ms: Of the line from sums to measurements; 0 without a correction.
        slope: Likewise; 1 without.
        median_error: Median relative error of the plain sums.
        max_error: The largest.
        corrected_median_error: Of the line, each net predicted from a line through the others; None without a correction.
        corrected_max_error: The largest.
    """

    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]
    intercept_ms: float = 0.0
    slope: float = 1.0
    median_error: float
    max_error: float
    corrected_median_error: float | None = None
    corrected_max_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured parts of all subnets of a space.

    Attributes:
        conditions: What was measured.
        parts: Milliseconds by name: see :func:`entry_name` and :func:`block_name`.
        machine: Where, for people: processor, system, torch, repeats.
        additivity: How well sums agree with whole nets; None while unchecked.
        format_version: Of the file.
    """

    conditions: Conditions
    parts: dict[str, float]
    machine: dict[str, str] = field(default_factory=dict)
    additivity: Additivity | None = None
    format_version: int = FORMAT_VERSION

    def require(self, conditions: Conditions) -> None:
        """Refuses other conditions than those measured.

        Raises:
            ValueError: Another length, batch, number of threads or device.
        """
        for name in ("seconds", "batch", "threads", "device"):
            have, want = getattr(self.conditions, name), getattr(conditions, name)
            if have != want:
                raise ValueError(f"the latency table was measured with {name} {have}, not {want}: measure another")

    def raw_ms(self, config: ModelConfig) -> float:
        """Returns the plain sum of the parts of a model (for a subnet: ``subnet_config``).

        Raises:
            ValueError: A part that was not measured.
        """
        encoder = config.transformer
        names = [FRONTEND] if config.frontend is not None else []
        names += [entry_name(encoder), *(block_name(encoder, encoder.blocks[index]) for index in encoder.depth_map)]
        if missing := [name for name in names if name not in self.parts]:
            raise ValueError(f"the latency table has no {missing[0]!r}: it was measured for another supernet")
        return sum(self.parts[name] for name in names)

    def predict(self, config: ModelConfig) -> float:
        """Returns the latency in milliseconds, the sum corrected by the line of ``additivity`` where there is one."""
        line = self.additivity
        raw = self.raw_ms(config)
        return raw if line is None else line.intercept_ms + line.slope * raw

    def save(self, path: Path) -> None:
        """Writes the table as JSON, whole or not at all."""
        write_json(path, to_plain(self))

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Reads a table.

        Raises:
            ValueError: The file is no latency table of this version.
        """
        values = read_json(path)
        if not isinstance(values, Mapping) or values.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} is not a latency table of version {FORMAT_VERSION}")
        return from_plain(cls, values, path.name)


def entry_name(config: EncoderConfig) -> str:
    """Name of the part before the blocks: ``entry 384``."""
    return f"entry {config.dim}"


def block_name(config: EncoderConfig, block: BlockConfig) -> str:
    """Name of a block: ``block 384: 6 x 64 heads, 1536 units`` and, where they differ from the plain ones, window and ranks."""
    name = f"block {config.dim}: {block.num_heads} x {block.head_dim} heads, {block.feedforward_dim} units"
    name += "" if block.attention_window is None else f", window {block.attention_window}"
    name += ", LightHuBERT's rule" if block.has_reference_windows else ""
    ranks = [f"{key} {rank}" for key, rank in to_plain(block.ranks).items() if rank is not None]
    return name + (f", rank {' '.join(ranks)}" if ranks else "")


class _Entry(nn.Module):
    """Projection, positions and the encoder's own norms: all that a net of one width does outside front-end and blocks."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.projection = Projection(config.projection, config.transformer.dim)
        self.encoder = Encoder(replace(config.transformer, blocks=(), depth_map=()))
        self.projection.initialize(generator)
        self.encoder.initialize(generator)

    def forward(self, features_BTF: Tensor) -> Tensor:
        return self.encoder(self.projection(features_BTF)).final


class _Block(nn.Module):
    """A block alone, with the mask that its window needs."""

    def __init__(self, config: EncoderConfig, block: BlockConfig, generator: torch.Generator) -> None:
        super().__init__()
        bare = replace(config, positions=None, input_norm=False, final_norm=False)
        self.encoder = Encoder(replace(bare, blocks=(block,), depth_map=(0,)))
        self.encoder.initialize(generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.encoder(x_BTD).final


class _Frontend(nn.Module):
    def __init__(self, model: SpeechModel) -> None:
        super().__init__()
        assert model.frontend is not None
        self.frontend = model.frontend

    def forward(self, waveform_BS: Tensor) -> Tensor:
        lengths_B = torch.full((len(waveform_BS),), waveform_BS.shape[1], device=waveform_BS.device)
        return self.frontend(waveform_BS, lengths_B).values


class _Whole(nn.Module):
    def __init__(self, model: SpeechModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        run = self.model.encode if inputs.dim() == 2 else self.model.encode_features
        return run(inputs, keep_layers=False).final


def check_device(name: str) -> None:
    """Checks that torch can run on a device.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ValueError: Another name, or no such GPU here.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and (kind == "cpu" or not number.isdecimal())):
        raise ValueError(f"device is {name!r}; accepted are cpu, cuda and cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no GPU here; cpu works everywhere")
    if number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch finds {torch.cuda.device_count()} here, counted from 0")


Timed = tuple[nn.Module, Tensor]


def time_in_turns(
    pairs: Mapping[str, Timed],
    *,
    device: str,
    repeats: int,
    least_s: float = 0.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the milliseconds of each module on its input in each round: one warm-up, then rounds in random order.

    Args:
        pairs: Name to module and input, both on ``device``.
        device: ``cpu`` or ``cuda``; a GPU is waited for before and after each run.
        repeats: Rounds that count.
        least_s: Seconds for which rounds go on at least: small models need many, since other load disturbs them most.
        seed: Decides the orders.
        clock: Monotonic seconds.

    Raises:
        ValueError: Less than one round.
    """
    if repeats < 1:
        raise ValueError(f"latency is to be measured in {repeats} rounds; expected 1 or more")
    calls = {name: partial(module, inputs) for name, (module, inputs) in pairs.items()}
    return times_in_turns(calls, device=device, repeats=repeats, least_s=least_s, seed=seed, clock=clock)


def measure_latency(
    config: ModelConfig,
    conditions: Conditions,
    *,
    repeats: int = 10,
    least_s: float = 0.0,
    seed: int = 0,
    whole_nets: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> LatencyTable:
    """Measures every part that a subnet of ``config.search_space`` can have (or the model's own parts, without a space).

    Weights are random: only sizes matter. The number of torch's threads is set while measuring, and put back.

    Args:
        config: The supernet.
        conditions: Length, batch, threads, device.
        repeats: Rounds at least; the median counts.
        least_s: Seconds that all rounds take at least.
        seed: Decides orders, random weights and the whole nets.
        whole_nets: Random subnets to measure whole, to check and correct the sums; 0 for none, else at least 3. They are in
            memory all at once.
        say: Told what is being measured.

    Raises:
        ValueError: Too few whole nets to judge, or no round.
    """
    if whole_nets and (config.search_space is None or whole_nets < 3):
        raise ValueError(f"{whole_nets} whole nets cannot check the sums: it takes 3 or more, and a supernet to draw them from")
    subnets = [] if config.search_space is None else varied_subnets(config.search_space, whole_nets, seed)
    configs = {f"whole {i}": subnet_config(config, subnet) for i, subnet in enumerate(subnets)}
    with using_threads(conditions.threads):
        pairs = _parts(config, conditions, seed)
        say(
            f"measuring {len(pairs)} parts{f' and {len(configs)} whole nets to check their sums' if configs else ''}: "
            f"{conditions.seconds:g} s of audio, threads: {conditions.threads}"
        )
        names = list(pairs)
        pairs |= _whole(configs, conditions, seed)
        rounds = time_in_turns(pairs, device=conditions.device, repeats=repeats, least_s=least_s, seed=seed)
    times = {name: statistics.median(of_name) for name, of_name in rounds.items()}
    machine = {**describe_machine(conditions.device), "repeats": str(len(rounds[names[0]]))}
    table = LatencyTable(conditions=conditions, parts={name: times[name] for name in names}, machine=machine)
    if not configs:
        return table
    sums = [table.raw_ms(net) for net in configs.values()]
    return replace(table, additivity=compare(sums, [times[name] for name in configs]))


def varied_subnets(space: SearchSpace, count: int, seed: int) -> list[Subnet]:
    """Returns the smallest, the largest and random distinct subnets, ``count`` in all (fewer where the space is smaller)."""
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys([space.smallest(), space.largest()])
    for _ in range(100 * count):
        if len(found) >= min(count, space.num_subnets()):
            break
        found[space.sample(generator)] = None
    return list(found)[:count]


def measure_whole(
    configs: Mapping[str, ModelConfig], conditions: Conditions, *, repeats: int = 10, least_s: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """Returns the median milliseconds of whole models with random weights, from waveform (or features) to the last layer."""
    rounds = time_whole(configs, conditions, repeats=repeats, least_s=least_s, seed=seed)
    return {name: statistics.median(of_name) for name, of_name in rounds.items()}


def time_whole(
    configs: Mapping[str, ModelConfig], conditions: Conditions, *, repeats: int = 10, least_s: float = 0.0, seed: int = 0
) -> dict[str, list[float]]:
    """Returns the milliseconds of the same in every round, so that equal places can be compared."""
    with using_threads(conditions.threads):
        pairs = _whole(configs, conditions, seed)
        return time_in_turns(pairs, device=conditions.device, repeats=repeats, least_s=least_s, seed=seed)


def _whole(configs: Mapping[str, ModelConfig], conditions: Conditions, seed: int) -> dict[str, Timed]:
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, Timed] = {}
    for name, config in configs.items():
        model = _ready(replace(config, heads={}, search_space=None), generator).to(conditions.device)
        pairs[name] = (_Whole(model).eval(), noise_inputs(config, conditions, generator))
    return pairs


def compare(predicted_ms: Sequence[float], measured_ms: Sequence[float]) -> Additivity:
    """Judges sums against measurements.

    A line is fitted through (sum, measurement); it corrects predictions only if, predicting each net from a line through the
    others, its median error is smaller than that of the plain sums.
    """
    plain = [abs(p - m) / m for p, m in zip(predicted_ms, measured_ms, strict=True)]
    left_out = []
    for i, (p, m) in enumerate(zip(predicted_ms, measured_ms, strict=True)):
        others = [j for j in range(len(plain)) if j != i]
        intercept, slope = _line([predicted_ms[j] for j in others], [measured_ms[j] for j in others])
        left_out.append(abs(intercept + slope * p - m) / m)
    result = Additivity(
        predicted_ms=tuple(predicted_ms),
        measured_ms=tuple(measured_ms),
        median_error=statistics.median(plain),
        max_error=max(plain),
    )
    intercept, slope = _line(predicted_ms, measured_ms)
    if statistics.median(left_out) >= result.median_error or slope <= 0:
        return result
    return replace(
        result,
        intercept_ms=intercept,
        slope=slope,
        corrected_median_error=statistics.median(left_out),
        corrected_max_error=max(left_out),
    )


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares; the identity's slope where all x are one."""
    if len(set(x)) < 2:
        return statistics.mean(y) - statistics.mean(x), 1.0
    slope, intercept = statistics.linear_regression(x, y)
    return intercept, slope


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Returns the processor (and GPU), system and torch version, for people."""
    machine = {"processor": _processor(), "system": f"{platform.system()} {platform.machine()}", "torch": torch.__version__}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _ready(config: ModelConfig, generator: torch.Generator) -> SpeechModel:
    """A model with random weights, and statistics of zeros and ones where its front-end wants some."""
    frontend = config.frontend
    if isinstance(frontend, SpectralFrontendConfig) and frontend.normalization.kind == "global":
        config = replace(config, frontend=replace(frontend, normalization=replace(frontend.normalization, statistics=None)))
    return with_some_statistics(build_model(config, generator))


def with_some_statistics(model: SpeechModel) -> SpeechModel:
    """Gives a front-end that lacks its global mean and standard deviation zeros and ones: time does not depend on them."""
    frontend = model.frontend
    if isinstance(frontend, SpectralFrontend) and frontend.config.normalization.kind == "global" and frontend.mean is None:
        dim = frontend.normalized_dim
        model.set_statistics(torch.zeros(dim), torch.ones(dim), source="none: for timing")
    return model.eval()


def noise_inputs(config: ModelConfig, conditions: Conditions, generator: torch.Generator) -> Tensor:
    """Returns noise: waveforms (B, S), or features (B, T, F) for a model without a front-end (a frame is taken as 10 ms)."""
    if config.frontend is None:
        shape: tuple[int, ...] = (conditions.batch, round(100 * conditions.seconds), config.projection.feature_dim)
    else:
        shape = (conditions.batch, round(conditions.seconds * frontend_rate(config.frontend)))
    return (0.1 * torch.randn(shape, generator=generator)).to(conditions.device)


def _parts(config: ModelConfig, conditions: Conditions, seed: int) -> dict[str, Timed]:
    """Every part of every subnet, with an input for each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = noise_inputs(config, conditions, generator)
    pairs: dict[str, Timed] = {}
    num_frames = inputs.shape[1] // config.projection.stack
    if config.frontend is not None:
        tiny = replace(config, heads={}, search_space=None, encoder=replace(config.transformer, blocks=(), depth_map=()))
        pairs[FRONTEND] = (_Frontend(_ready(tiny, generator)).eval().to(conditions.device), inputs)
        num_frames = count_macs(config, seconds=conditions.seconds).num_frames
    features = torch.randn(conditions.batch, num_frames, config.projection.stacked_dim, generator=generator)
    for net in _all_widths(config):
        encoder = net.transformer
        if entry_name(encoder) not in pairs:
            pairs[entry_name(encoder)] = (_Entry(net, generator).eval().to(conditions.device), features.to(conditions.device))
        x_BTD = torch.randn(conditions.batch, num_frames, encoder.dim, generator=generator).to(conditions.device)
        for block in encoder.blocks:
            if (name := block_name(encoder, block)) not in pairs:
                pairs[name] = (_Block(encoder, block, generator).eval().to(conditions.device), x_BTD)
    return pairs


def _all_widths(config: ModelConfig) -> list[ModelConfig]:
    """Nets whose entries and blocks are together all that subnets can have."""
    space = config.search_space
    if space is None:
        return [config]
    nets = [
        space.uniform(dim, heads, ratio, number)
        for dim in space.dims
        for heads in space.num_heads
        for ratio in space.feedforward_ratios
        for number in space.num_layers
    ]
    nets += [] if space.default is None else [space.default]
    return [subnet_config(config, net) for net in nets]
