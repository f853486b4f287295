"""HuBERT Base inference against transformers' ``HubertModel`` (SDPA): interleaved, medians, same weights.

Two cases: one utterance of 10 s, and a batch of 8 utterances of 1 to 15 s. transformers pads the batch and computes its padding
(under an attention mask); its outputs there also depend on the padding, so each utterance's reference is computed alone.
Run it on an idle machine: ``python benchmarks/inference.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints import load_model

SAMPLE_RATE = 16000
MIXED_S = (1, 3, 5, 7, 9, 11, 13, 15)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def both_models(folder: str, layer_norm: bool) -> tuple[Any, Any]:
    """Returns transformers' model with random weights and the same one loaded by sslim."""
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    settings = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True} if layer_norm else {}
    peer = HubertModel(HubertConfig(attn_implementation="sdpa", **settings)).eval()
    peer.save_pretrained(folder)
    return peer, load_model(folder)


def largest_difference(peer: Any, model: Any, waveform_BS: Tensor, lengths_B: Tensor) -> float:
    """Over the valid frames of a batch: ours batched against theirs one by one."""
    ours = model.encode(waveform_BS, lengths_B)
    largest = 0.0
    for row, length in enumerate(lengths_B.tolist()):
        theirs = peer(_prepared(model, waveform_BS[row : row + 1, :length])).last_hidden_state[0]
        largest = max(largest, (ours.final[row, : len(theirs)] - theirs).abs().max().item())
    return largest


def _prepared(model: Any, waveform_BS: Tensor) -> Tensor:
    if not model.config.frontend.normalize_waveform:
        return waveform_BS
    variance, mean = torch.var_mean(waveform_BS, 1, correction=0, keepdim=True)
    return (waveform_BS - mean) * (variance + model.config.frontend.waveform_eps).rsqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layer-norm", action="store_true", help="Large-style front-end and norms at Base width")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        peer, model = both_models(folder, options.layer_norm)
        generator = torch.Generator().manual_seed(1)
        single = 0.1 * torch.randn(1, 10 * SAMPLE_RATE, generator=generator)
        lengths_B = torch.tensor([seconds * SAMPLE_RATE for seconds in MIXED_S])
        mixed = 0.1 * torch.randn(len(MIXED_S), int(lengths_B.max()), generator=generator)
        mixed *= torch.arange(mixed.shape[1])[None] < lengths_B[:, None]
        attention_mask = (torch.arange(mixed.shape[1])[None] < lengths_B[:, None]).long()
        functions = {
            "single": (lambda: peer(single), lambda: model.encode(single, keep_layers=False)),
            "mixed": (lambda: peer(mixed, attention_mask), lambda: model.encode(mixed, lengths_B, keep_layers=False)),
        }
        seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
        for repetition in range(options.repetitions + 1):
            for name, pair in functions.items():
                for side, function in enumerate(pair):
                    spent = timed(function)
                    if repetition:
                        seconds[name][side].append(spent)
        result: dict[str, Any] = {"threads": options.threads, "front-end": "layer norm" if options.layer_norm else "group norm"}
        for name, (theirs, ours) in seconds.items():
            result[name] = {
                "transformers_s": round(statistics.median(theirs), 4),
                "sslim_s": round(statistics.median(ours), 4),
                "ratio": round(statistics.median(theirs) / statistics.median(ours), 3),
            }
        result["single"]["largest_difference"] = largest_difference(peer, model, single, torch.tensor([single.shape[1]]))
        result["mixed"]["largest_difference"] = largest_difference(peer, model, mixed, lengths_B)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
