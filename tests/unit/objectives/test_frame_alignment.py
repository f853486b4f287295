"""Which teacher frames a student frame gets, against frames that carry their own time."""

import pytest
import torch

from sslim.batch import Padded
from sslim.frontends import ConvFrontendConfig, ConvLayerConfig, FilterbankConfig, SpectralFrontendConfig, build_frontend
from sslim.objectives.frame_alignment import align_frames, first_centre, frame_period


def mel(shift_ms: float = 10.0, stack: int = 1, snip_edges: bool = True):
    return build_frontend(
        SpectralFrontendConfig(features=FilterbankConfig(frame_shift_ms=shift_ms, snip_edges=snip_edges), stack=stack)
    )


def conv(*layers: tuple[int, int]):
    config = ConvFrontendConfig(layers=tuple(ConvLayerConfig(channels=2, kernel=k, stride=s) for k, s in layers))
    return build_frontend(config)


HUBERT = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))


def times(frontend, num_frames: int) -> torch.Tensor:
    """(1, T, 1): the centre of every frame in milliseconds."""
    first, period = float(first_centre(frontend)), float(frame_period(frontend))
    return 1000 * (first + period * torch.arange(num_frames)[None, :, None])


def test_where_frames_are() -> None:
    assert times(mel(), 2).flatten().tolist() == pytest.approx([12.5, 22.5])
    assert times(mel(stack=2), 2).flatten().tolist() == pytest.approx([17.5, 37.5])
    assert times(mel(snip_edges=False), 2).flatten().tolist() == pytest.approx([5.0, 15.0])
    assert times(conv(*HUBERT), 2).flatten().tolist() == pytest.approx([12.5, 32.5])


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (conv(*HUBERT), mel(stack=2)),  # both 20 ms, centres 5 ms apart
        (mel(), mel(stack=2)),  # 10 ms to 20 ms
        (mel(stack=2), mel()),  # 20 ms to 10 ms
        (conv(*HUBERT), mel()),
        (mel(), conv(*HUBERT)),
        (conv(*HUBERT), mel(stack=4)),  # 20 ms to 40 ms
        (mel(stack=4), conv(*HUBERT)),
        (mel(stack=3), mel(stack=3, snip_edges=False)),
    ],
)
def test_targets_lie_as_near_as_the_frames_allow(teacher, student) -> None:
    """The aligned times differ from the student's own by one constant of at most half a fine frame, repeats excepted."""
    alignment = align_frames(teacher, student)
    available = 24 * alignment.averaged
    frames = Padded(values=times(teacher, available), lengths=torch.tensor([available]))
    aligned, counted = alignment(frames, torch.tensor([20]), 20)
    n = alignment.repeated
    error = (aligned - times(student, 20))[0, :, 0][counted[0]]
    inner = error[n:-n] if n > 1 else error[1:-1]
    blocks = inner[: len(inner) // n * n].reshape(-1, n).mean(1)
    fine = 1000 * float(min(frame_period(teacher), frame_period(student)))
    assert blocks.abs().max() <= fine / 2 + 1e-3
    assert blocks.max() - blocks.min() < 1e-3
    assert counted.sum() >= 18


def test_values_by_hand() -> None:
    teacher = Padded(values=torch.tensor([[[1.0], [2.0], [5.0], [6.0], [9.0]]]), lengths=torch.tensor([5]))
    averaged, counted = align_frames(mel(), mel(stack=2))(teacher, torch.tensor([3]), 4)
    assert averaged.flatten().tolist() == [1.5, 5.5, 9.0, 0.0]  # the last is the mean of what exists
    assert counted.tolist() == [[True, True, True, False]]
    repeated, counted = align_frames(mel(stack=2), mel())(teacher, torch.tensor([12]), 12)
    assert repeated.flatten().tolist() == [1, 1, 2, 2, 5, 5, 6, 6, 9, 9, 0, 0]
    assert counted.sum() == 10


def test_lengths_that_differ_by_one_are_trimmed_to_the_shorter() -> None:
    alignment = align_frames(mel(), mel())
    values = torch.arange(1.0, 7.0).reshape(1, 6, 1)
    for teacher_length, student_length in ((6, 5), (5, 6)):
        frames = Padded(values=values[:, :teacher_length], lengths=torch.tensor([teacher_length]))
        aligned, counted = alignment(frames, torch.tensor([student_length]), student_length)
        assert counted.sum() == 5
        assert aligned[0, :5, 0].tolist() == [1, 2, 3, 4, 5]


def test_padding_of_the_teacher_is_never_a_target() -> None:
    values = torch.ones(2, 6, 1)
    values[1, 3:] = 100.0
    aligned, counted = align_frames(mel(), mel(stack=2))(
        Padded(values=values, lengths=torch.tensor([6, 3])), torch.tensor([3, 3]), 3
    )
    assert aligned.max() == 1.0
    assert counted.tolist() == [[True, True, True], [True, True, False]]


def test_periods_that_do_not_fit_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="the teacher has a frame every 20 ms, the student every 30 ms: one must be a whole"):
        align_frames(mel(stack=2), mel(stack=3))
    with pytest.raises(ValueError, match="the teacher takes features that sslim cannot compute"):
        align_frames(None, mel())
