"""Full-size MelHuBERT 20 ms against the same network on transformers' HuBERT encoder layers (SDPA), interleaved, medians.

Training step: masked prediction forward, backward, Adam (fused on both sides). Inference: encoder output of the same features.
Batch 4 x 375 frames (30 s of audio), two threads. Run it on an idle machine: ``python benchmarks/training_step.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import Padded
from sslim.models import build_model
from sslim.models.melhubert import melhubert
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, span_mask
from sslim.objectives.masked_prediction import PreparedMaskedPrediction


class TransformersMelHubert(nn.Module):
    """Linear, transformers' HubertEncoder with SDPA, linear: the peer."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import HubertConfig
        from transformers.models.hubert.modeling_hubert import HubertEncoder

        config = HubertConfig(layerdrop=0.0, attn_implementation="sdpa")
        assert config._attn_implementation == "sdpa"
        self.projection, self.encoder, self.head = nn.Linear(80, 768), HubertEncoder(config), nn.Linear(768, 512)

    def forward(self, features_BTF: Tensor) -> Tensor:
        return self.encoder(self.projection(features_BTF))[0]

    def loss(self, features_BTF: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> Tensor:
        hidden = self(features_BTF.masked_fill(mask_BT[..., None], 0.0))
        return F.cross_entropy(self.head(hidden[mask_BT]).float(), labels_BT[mask_BT])


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(repetitions: int, batch: int, frames: int) -> dict[str, list[float]]:
    """Returns seconds of every repetition, the sides taking turns; the first round warms up and is dropped."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, frames, 80, generator=generator)
    labels = torch.randint(0, 512, (batch, frames), generator=generator)
    lengths = torch.full((batch,), frames)
    model = build_model(melhubert(), generator)
    objective, peer = MaskedPrediction(model, MaskedPredictionConfig()), TransformersMelHubert()
    assert abs(sum(p.numel() for p in peer.parameters()) - model.num_parameters()) == 0
    ours_optimizer = torch.optim.Adam(objective.parameters(), lr=1e-4, fused=True)
    peer_optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4, fused=True)
    mask = span_mask(lengths, frames, objective.config.masking, generator)
    weights = {"masked": mask.sum(), "unmasked": (~mask).sum()}
    prepared = PreparedMaskedPrediction(
        features=Padded(values=features, lengths=lengths), labels_BT=labels, mask_BT=mask, weights=weights
    )

    def train(side: str, bf16: bool) -> None:
        optimizer = ours_optimizer if side == "sslim" else peer_optimizer
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = objective(prepared, weights).loss if side == "sslim" else peer.loss(features, mask, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters() if side == "sslim" else peer.parameters(), 10.0)
        optimizer.step()

    def infer(side: str, bf16: bool) -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if side == "sslim":
                model.encode_features(features, keep_layers=False)
            else:
                peer(features)

    times: dict[str, list[float]] = {}
    for what, run in (("train", train), ("infer", infer)):
        for part in (objective, peer):
            part.train(what == "train")
        for repetition in range(repetitions + 1):
            for bf16 in (False, True):
                for side in ("sslim", "transformers"):
                    seconds = timed(lambda side=side, bf16=bf16, run=run: run(side, bf16))
                    if repetition:
                        times.setdefault(f"{what} {'bf16' if bf16 else 'fp32'} {side}", []).append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=375)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = {name: statistics.median(t) for name, t in measure(options.repetitions, options.batch, options.frames).items()}
    for name, seconds in times.items():
        print(f"{name:28s} {1000 * seconds:8.0f} ms")
    ratios = {
        "train fp32, transformers / sslim": times["train fp32 transformers"] / times["train fp32 sslim"],
        "train sslim, fp32 / bf16": times["train fp32 sslim"] / times["train bf16 sslim"],
        "infer sslim, fp32 / bf16": times["infer fp32 sslim"] / times["infer bf16 sslim"],
        "infer fp32, transformers / sslim": times["infer fp32 transformers"] / times["infer fp32 sslim"],
    }
    for name, ratio in ratios.items():
        print(f"{name:34s} {ratio:5.2f} x")
    print(json.dumps({"benchmark": "training_step", "seconds": times, "ratios": ratios}))


if __name__ == "__main__":
    main()
