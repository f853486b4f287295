"""What a subnet run inside its supernet costs against the same subnet extracted: forward and backward, interleaved, medians.

LightHuBERT-Base's supernet, its default (66.9 million parameters) and largest subnet. Cutting the tensors costs the same for
any amount of audio, so one second is the hardest case and no training step; five seconds are a short one, and recipes take
minutes. ``step`` starts from the waveform, ``encoder`` from the front-end's output; ``update`` adds clipping and AdamW, which
always run over the whole supernet on the elastic side. Run it on an idle machine: ``python benchmarks/elastic.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslim.frontends import ConvFrontendConfig
from sslim.models import ModelConfig, ProjectionConfig, SpeechModel, build_model
from sslim.models.elastic import extract_model, model_units, model_view
from sslim.models.search_space import LIGHTHUBERT_BASE
from sslim.nn.encoder import EncoderConfig, plain_blocks


def supernet() -> SpeechModel:
    """LightHuBERT's supernet with random tensors, without dropout."""
    config = ModelConfig(
        family="lighthubert",
        frontend=ConvFrontendConfig(norm="layer", normalize_waveform=True),
        projection=ProjectionConfig(feature_dim=512, norm=True),
        encoder=EncoderConfig(
            dim=768, **plain_blocks(12, 12, 64, 3072), dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        search_space=LIGHTHUBERT_BASE,
    )
    return build_model(config, torch.Generator().manual_seed(0)).train()


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def train(model: SpeechModel, run: SpeechModel, inputs: Tensor) -> None:
    """One forward and backward of ``run``, whose gradients end in ``model``."""
    for parameter in model.parameters():
        parameter.grad = None
    output = run.encode(inputs, keep_layers=False) if inputs.dim() == 2 else run.encode_features(inputs, keep_layers=False)
    output.final.square().mean().backward()


def measure(repetitions: int, batch: int, audio_s: float, *, update: bool) -> dict[str, list[float]]:
    """Returns seconds of every repetition, the sides taking turns; the first round warms up and is dropped."""
    generator, whole = torch.Generator().manual_seed(1), supernet()
    waveform = torch.randn(batch, int(16000 * audio_s), generator=generator)
    assert whole.frontend is not None
    with torch.no_grad():
        features = whole.frontend(waveform, torch.full((batch,), waveform.shape[1])).values
    times: dict[str, list[float]] = {}
    for name in ("default", "max"):
        alone = extract_model(whole, name).train()
        optimizers = {id(m): torch.optim.AdamW(m.parameters(), lr=0.0, fused=True) for m in (whole, alone)} if update else {}

        def elastic(inputs: Tensor, name: str = name) -> None:
            train(whole, model_view(whole, model_units(whole.config, name)), inputs)

        def extracted(inputs: Tensor, alone: SpeechModel = alone) -> None:
            train(alone, alone, inputs)

        def step(model: SpeechModel, optimizers: dict[int, torch.optim.Optimizer] = optimizers) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizers[id(model)].step()

        for repetition in range(repetitions + 1):
            for side, run, model in (("elastic", elastic, whole), ("extracted", extracted, alone)):
                for part, inputs in (("encoder", features), ("step", waveform)):
                    seconds = timed(lambda run=run, inputs=inputs: run(inputs))
                    if repetition:
                        times.setdefault(f"{audio_s:g} s, {name} {part} {side}", []).append(seconds)
                if update:
                    more = timed(lambda model=model, step=step: step(model))
                    if repetition:
                        times.setdefault(f"{audio_s:g} s, {name} update {side}", []).append(seconds + more)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--audio-s", type=float, nargs="+", default=(1.0, 5.0), help="seconds of audio, one case each")
    parser.add_argument("--update", action="store_true", help="measure the optimiser's part too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured: dict[str, list[float]] = {}
    for audio_s in options.audio_s:
        measured |= measure(options.repetitions, options.batch, audio_s, update=options.update)
    times = {name: statistics.median(seconds) for name, seconds in measured.items()}
    for name, seconds in times.items():
        print(f"{name:34s} {1000 * seconds:8.0f} ms")
    cases = [name.removesuffix(" elastic") for name in times if name.endswith(" elastic")]
    ratios = {case: times[f"{case} elastic"] / times[f"{case} extracted"] for case in cases}
    for name, ratio in ratios.items():
        print(f"{name + ', elastic / extracted':40s} {ratio:5.2f} x")
    print(json.dumps({"benchmark": "elastic", "seconds": times, "ratios": ratios}))


if __name__ == "__main__":
    main()
