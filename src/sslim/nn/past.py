"""What attention keeps of the frames that are over, so that a causal encoder can go on from them.

Each block application has its own :class:`Past`, blocks that are run several times as well. With an attention window it holds
no more frames than the window reaches; without one it grows with the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_ROOM = 16  # frames that are given room at least


class Past:
    """Keys and values of one block application; frames that no later query can see are dropped.

    Room is for twice the frames that are needed, so that each frame is moved about once, whatever the size of the chunks.

    Args:
        window: Frames that a query sees before its own; None for all.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self._room: Tensor | None = None  # (2, B, N, room, H): keys and values
        self._begin = self._end = 0

    @property
    def num_frames(self) -> int:
        """Frames that the next query sees before its own."""
        return self._end - self._begin

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that are held."""
        return 0 if self._room is None else self._room.numel() * self._room.element_size()

    def extend(self, k_BTNH: Tensor, v_BTNH: Tensor) -> tuple[Tensor, Tensor]:
        """Appends frames.

        Args:
            k_BTNH: Keys of T new frames.
            v_BTNH: Their values.

        Returns:
            Keys and values (B, K, N, H) of the frames from before that the first new one sees, and of the new ones.
        """
        batch, new, num_heads, head_dim = k_BTNH.shape
        if self._room is None or self._end + new > self._room.shape[3]:
            self._make_room(k_BTNH.new_empty(2, batch, num_heads, 0, head_dim), new)
        assert self._room is not None
        room, begin, end = self._room, self._begin, self._end + new
        room[0, :, :, self._end : end], room[1, :, :, self._end : end] = k_BTNH.transpose(1, 2), v_BTNH.transpose(1, 2)
        self._begin, self._end = begin if self.window is None else max(begin, end - self.window), end
        keys, values = room[:, :, :, begin:end].transpose(2, 3)
        return keys, values

    def _make_room(self, like: Tensor, new: int) -> None:
        """Moves what is still seen to the front, of a larger tensor where there is too little room for ``new`` frames."""
        kept = None if self._room is None else self._room[:, :, :, self._begin : self._end].clone()
        needed = self.num_frames + new
        if self._room is None or 2 * needed > self._room.shape[3]:
            self._room = like.new_empty(*like.shape[:3], max(2 * needed, MIN_ROOM), like.shape[4])
        if kept is not None:
            self._room[:, :, :, : kept.shape[3]] = kept
        self._begin, self._end = 0, needed - new


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """New frames that attend to a past and to each other.

    Attributes:
        past: What they see of the frames before, which they are added to.
        mask: (Q, K) bool, True where a new frame may look at a key; of the K keys the last Q are the new frames' own.
    """

    past: Past
    mask: Tensor

    @property
    def before(self) -> int:
        """Keys before the first new frame."""
        return self.mask.shape[1] - self.mask.shape[0]


def continuation_mask(num_new: int, num_before: int, window: int | None, device: torch.device) -> Tensor:
    """Returns the (Q, K) mask of a :class:`Continuation`: a frame sees itself and what lies up to ``window`` frames before it.

    Args:
        num_new: New frames Q.
        num_before: Frames before them that the past holds; K is both together.
        window: Frames that a frame sees before its own; None for all.
        device: Where to build it.
    """
    query_Q1 = torch.arange(num_before, num_before + num_new, device=device)[:, None]
    distance_QK = query_Q1 - torch.arange(num_before + num_new, device=device)
    mask_QK = distance_QK >= 0
    return mask_QK if window is None else mask_QK & (distance_QK <= window)
