"""How a model's weights are stored: float32, as half-precision numbers, or with the encoder's linear maps in int8.

int8 is a form that the model runs in (``sslim.nn.quantized``). Half precision is one of the file only: in memory such a model
is float32 throughout, with weights that half precision can hold, so that saving and loading changes nothing. To compute in half
precision, run it under autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sslim.nn.quantized import quantize_linears

if TYPE_CHECKING:
    from sslim.models.speech import SpeechModel

Storage = Literal["int8-dynamic", "int8-weights", "bf16", "fp16"]
INT8 = ("int8-dynamic", "int8-weights")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def require_float(model: SpeechModel, *, allow_half: bool = False) -> None:
    """Raises ValueError for a quantised model: what has to change weights comes before quantisation.

    Args:
        model: Any model.
        allow_half: Whether half-precision storage will do, as where its float32 weights are only read.
    """
    storage = model.config.storage
    if storage is not None and not (allow_half and storage in HALF):
        raise ValueError(
            f"the weights of this {model.config.family} model are stored as {storage}, and this needs a float32 model: "
            "quantise last, and go back to the model before that"
        )


def prepare_storage(encoder: nn.Module, storage: Storage | None) -> None:
    """Gives an encoder the form that its storage asks for, in place: with int8 its linear maps change, weights and all."""
    if storage in INT8:
        quantize_linears(encoder, dynamic=storage == "int8-dynamic")


def stored_as(model: SpeechModel, storage: Storage) -> SpeechModel:
    """Returns a copy of a float32 model, in eval mode, whose weights are those of another storage.

    With int8 the linear maps of the encoder (attention and feed-forward, factors too) change; convolutions, recurrent layers,
    norms, gates, codebooks, projection and heads do not. With half precision every parameter is rounded; statistics of features
    are not.

    Raises:
        ValueError: The model is quantised already, its encoder has no linear maps that int8 could store, or weights are not
            finite or too large for the storage.
    """
    require_float(model)
    if storage in INT8 and not any(isinstance(module, nn.Linear) for module in model.encoder.modules()):
        raise ValueError(
            f"the {model.config.encoder.kind} encoder of this {model.config.family} model has no linear maps, so {storage} "
            "would change nothing: bf16 and fp16 store it in half the bytes"
        )
    small = copy.deepcopy(model).eval()
    small.config = replace(model.config, storage=storage)
    if storage in INT8:
        for name, tensor in small.encoder.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"encoder.{name} is not finite: the model is broken, {storage} cannot hold it")
        prepare_storage(small.encoder, storage)
        return small
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(_halved(name, parameter, storage))
    return small


def stored_state(model: SpeechModel) -> dict[str, Tensor]:
    """Returns a model's tensors by name as they are written to a file; what training changed is rounded again.

    Raises:
        ValueError: A weight is not finite or too large for half-precision storage.
    """
    state, storage = model.state_dict(), model.config.storage
    if storage not in HALF:
        return state
    parameters = dict(model.named_parameters())
    return {name: _halved(name, tensor, storage) if name in parameters else tensor for name, tensor in state.items()}


def loaded_state(state: Mapping[str, Tensor], storage: Storage | None) -> dict[str, Tensor]:
    """Returns tensors of a file as they are computed with: half precision becomes float32."""
    if storage not in HALF:
        return dict(state)
    return {name: tensor.float() if tensor.dtype is HALF[storage] else tensor for name, tensor in state.items()}


def _halved(name: str, tensor: Tensor, storage: Storage) -> Tensor:
    half = tensor.detach().to(HALF[storage])
    if not bool(torch.isfinite(half).all()):
        largest = tensor.detach().abs().max().item()
        raise ValueError(
            f"{name} reaches {largest:.4g}, which {storage} cannot hold; expected at most {torch.finfo(half.dtype).max:g}"
        )
    return half
