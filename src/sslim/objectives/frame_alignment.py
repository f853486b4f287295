"""Which frames of a teacher belong to which frame of a student, when their frame periods differ.

Frame ``i`` of a front-end is centred at ``first_centre_s + i * frame_shift_s``. One of the two periods must be a whole multiple
``n`` of the other. A frame of the coarser model is taken together with ``n`` consecutive frames of the finer one, those whose
common centre lies nearest to its own (a tie goes to the later ones); the shift ``k`` that this gives is the same for every
frame: coarse frame ``b`` and the fine frames ``n * b + k`` to ``n * b + k + n - 1``. For n = 1 that is frame for frame.

- A coarser (or equal) student's target is the mean of the teacher's frames, of those that exist at an utterance's ends.
- A finer student's target is the one teacher frame, repeated.
- A student frame without any teacher frame has no target and counts in no loss: lengths that differ by one are thereby trimmed
  to the shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sslim.audio import stack_reach
from sslim.batch import Padded, valid_mask
from sslim.frontends import ConvFrontend, SpectralFrontend

AnyFrontend = SpectralFrontend | ConvFrontend


def frame_period(frontend: AnyFrontend) -> Fraction:
    """Returns the seconds from one frame to the next, exactly."""
    return Fraction(round(frontend.frame_shift_s * frontend.sample_rate), frontend.sample_rate)


def first_centre(frontend: AnyFrontend) -> Fraction:
    """Returns the time in seconds of the middle of what the first frame sees (of whole frames, with Kaldi's snip_edges)."""
    if isinstance(frontend, ConvFrontend):
        reach, _ = stack_reach([(layer.kernel, layer.stride) for layer in frontend.config.layers])
        return Fraction(reach, 2 * frontend.sample_rate)
    features = frontend.features
    return Fraction(features.first_span + (frontend.stack - 1) * features.shift, 2 * frontend.sample_rate)


@dataclass(frozen=True, kw_only=True)
class FrameAlignment:
    """Takes a teacher's frames to a student's frame rate; see the module's docstring.

    Attributes:
        averaged: Teacher frames in a frame of the student.
        repeated: Student frames in a frame of the teacher; one of the two is 1.
        shift: k, in frames of the finer of the two.
    """

    averaged: int = 1
    repeated: int = 1
    shift: int = 0

    def teacher_frames(self, num_frames: int) -> list[Tensor]:
        """Returns, for the first student frames, ``averaged`` vectors (T,) of teacher frames, some of them out of range."""
        student_T = torch.arange(num_frames)
        if self.repeated > 1:
            return [torch.div(student_T - self.shift, self.repeated, rounding_mode="floor")]
        return [student_T * self.averaged + self.shift + i for i in range(self.averaged)]

    def teacher_mask(self, mask_BT: Tensor, num_frames: int) -> Tensor:
        """Takes a mask over the student's frames to the teacher's.

        Args:
            mask_BT: (B, T) bool.
            num_frames: Padded frames T' of the teacher.

        Returns:
            (B, T') bool, True on frames that belong to a masked frame of the student.
        """
        count_BT = torch.zeros(len(mask_BT), num_frames, dtype=torch.int64, device=mask_BT.device)
        for index_T in self.teacher_frames(mask_BT.shape[1]):
            index_T = index_T.to(mask_BT.device)
            found_T = (index_T >= 0) & (index_T < num_frames)
            count_BT.index_add_(1, index_T[found_T], mask_BT[:, found_T].long())
        return count_BT > 0

    def __call__(self, teacher: Padded, lengths_B: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Aligns a batch.

        Args:
            teacher: (B, T', D) frames of the teacher.
            lengths_B: Valid frames of the student.
            num_frames: Padded frames T of the student.

        Returns:
            (B, T, D) targets, zero where there is none, and (B, T) bool, True where there is one.
        """
        device, dtype = teacher.values.device, teacher.values.dtype
        batch, available, dim = teacher.values.shape
        total = torch.zeros(batch, num_frames, dim, device=device, dtype=dtype)
        count_BT = torch.zeros(batch, num_frames, device=device, dtype=dtype)
        if available == 0:
            return total, count_BT > 0
        real_BT = valid_mask(lengths_B, num_frames)
        for index_T in self.teacher_frames(num_frames):
            index_T = index_T.to(device)
            found_BT = real_BT & (index_T >= 0)[None] & (index_T[None] < teacher.lengths[:, None])
            frames = teacher.values[:, index_T.clamp(0, available - 1)]
            total = total + frames.masked_fill(~found_BT[..., None], 0.0)
            count_BT = count_BT + found_BT
        return total / count_BT.clamp(min=1)[..., None], count_BT > 0


def align_frames(teacher: AnyFrontend | None, student: AnyFrontend | None) -> FrameAlignment:
    """Returns the alignment between two front-ends; models without one take the same features, frame for frame.

    Raises:
        ValueError: Neither frame period is a whole multiple of the other, or only one of the two has a front-end.
    """
    if teacher is None and student is None:
        return FrameAlignment()
    if teacher is None or student is None:
        who = "teacher" if teacher is None else "student"
        raise ValueError(f"the {who} takes features that sslim cannot compute, the other model its own: they cannot be aligned")
    teacher_s, student_s = frame_period(teacher), frame_period(student)
    coarse, fine = (student, teacher) if student_s >= teacher_s else (teacher, student)
    ratio = frame_period(coarse) / frame_period(fine)
    if ratio.denominator != 1:
        raise ValueError(
            f"the teacher has a frame every {1000 * float(teacher_s):g} ms, the student every {1000 * float(student_s):g} ms: "
            "one must be a whole multiple of the other"
        )
    n = int(ratio)
    offset = (first_centre(coarse) - first_centre(fine)) / frame_period(fine) - Fraction(n - 1, 2)
    shift = math.floor(offset + Fraction(1, 2))
    if student_s >= teacher_s:
        return FrameAlignment(averaged=n, shift=shift)
    return FrameAlignment(repeated=n, shift=shift)
