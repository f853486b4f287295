"""Frames of features from outside, stacked by the model itself, and states brought back to the features' frame rate.

A front-end stacks by itself (``SpectralFrontendConfig.stack``), each utterance on its own. A model without one (Mockingjay,
AALBERT on features that sslim cannot compute) takes frames as they are and stacks them by ``ProjectionConfig.stack``, as S3PRL
v0.1 does (``downsample_rate``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sslim.audio import num_stacked_frames
from sslim.batch import EncoderOutput, Padded, zero_padding
from sslim.frontends.context import stack_frames


def stack_given(features: Padded, stack: int) -> Padded:
    """Concatenates every ``stack`` frames that were given: (B, T, F) to (B, T // stack, stack * F).

    S3PRL's rule: what does not fill a stack at the end of the tensor is dropped, and a stack is real when any of its frames is.
    So an utterance's incomplete last stack counts where the tensor has room for it, filled with zeros, and does not where the
    tensor ends. Give whole stacks, :func:`padded_to_stacks`, and what an utterance is batched with makes no difference.
    """
    if stack == 1:
        return features
    values_BTF = zero_padding(features.values, features.lengths)
    kept = num_stacked_frames(values_BTF.shape[1], stack, "drop")
    whole = torch.full_like(features.lengths, kept * stack)
    stacked = stack_frames(Padded(values=values_BTF[:, : kept * stack], lengths=whole), stack)
    return replace(stacked, lengths=num_stacked_frames(features.lengths, stack, "pad").clamp(max=kept))


def padded_to_stacks(features_BTF: Tensor, stack: int) -> Tensor:
    """Appends zeros until the frames fill whole stacks, so that :func:`stack_given` drops nothing."""
    return torch.nn.functional.pad(features_BTF, (0, 0, 0, -features_BTF.shape[1] % stack))


def repeat_frames(states: Padded, stack: int, lengths_B: Tensor, *, centred: bool = False) -> Padded:
    """Gives every frame before stacking the state of its stack: (B, T', D) to (B, T, D).

    Frame t gets the state of stack ``t // stack``; frames after the last stack get the last state, so there are exactly
    ``lengths_B`` of them. An utterance without any stack has none.

    Args:
        states: States or a head's output at the stacked frame rate.
        stack: Frames in one.
        lengths_B: (B,) frames of each utterance before stacking.
        centred: S3PRL's ``upsample``: half of the frames left over, rounded down, go before the first stack, which puts the
            states that many frames late.
    """
    lengths_B = lengths_B.to(states.lengths.device) * (states.lengths > 0)
    num_frames = int(lengths_B.max()) if len(lengths_B) else 0
    before_B1 = (lengths_B % stack // 2 if centred else torch.zeros_like(lengths_B))[:, None]
    index_BT = (torch.arange(num_frames, device=lengths_B.device)[None] - before_B1).clamp(min=0) // stack
    index_BT = torch.minimum(index_BT, (states.lengths - 1).clamp(min=0)[:, None])
    values_BTD = states.values.gather(1, index_BT[..., None].expand(-1, -1, states.values.shape[-1]))
    return Padded(values=zero_padding(values_BTD, lengths_B), lengths=lengths_B)


def repeat_output(output: EncoderOutput, stack: int, lengths_B: Tensor, *, centred: bool = False) -> EncoderOutput:
    """Returns an output with :func:`repeat_frames` done to every state; attention weights are left out."""

    def repeated(states_BTD: Tensor) -> Tensor:
        return repeat_frames(Padded(values=states_BTD, lengths=output.lengths), stack, lengths_B, centred=centred).values

    layers = tuple(repeated(layer) for layer in output.layers)
    same = bool(layers) and output.final is output.layers[-1]
    return EncoderOutput(
        final=layers[-1] if same else repeated(output.final),
        lengths=lengths_B.to(output.lengths.device) * (output.lengths > 0),
        layers=layers,
        embed=None if output.embed is None else repeated(output.embed),
    )
