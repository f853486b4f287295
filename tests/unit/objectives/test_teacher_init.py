"""A student that starts from its teacher: what is copied, what is left, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.distilhubert import distilhubert
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.objectives.teacher_init import TeacherInitConfig, init_from_teacher

SMALL: Any = {"num_heads": 2, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 2}


def built(config: ModelConfig, seed: int) -> SpeechModel:
    model = build_model(config, torch.Generator().manual_seed(seed))
    for parameter in model.parameters():  # norms too, which initialisation makes all alike
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model


def mel(num_layers: int, dim: int = 16) -> ModelConfig:
    return replace(melhubert(num_layers=num_layers, dim=dim, **SMALL), heads={})


def test_every_part_is_copied_the_norms_too() -> None:
    teacher, student = built(mel(4), 1), built(mel(2), 2)
    teacher.set_statistics(torch.full((40,), 3.0), torch.full((40,), 2.0), source="made")
    assert init_from_teacher(student, teacher, TeacherInitConfig(layers=(1, 3))) == []
    theirs, mine = teacher.state_dict(), student.state_dict()
    for name, tensor in mine.items():
        source = name.replace("blocks.1.", "blocks.2.")
        assert torch.equal(tensor, theirs[source]), name
    assert student.frontend.statistics_source == "made"
    first = next(iter(student.parameters()))
    first.data.add_(1.0)
    assert not torch.equal(first, next(iter(teacher.parameters())))  # copies, not the same memory


def test_a_shared_teacher_gives_the_block_that_runs_at_a_depth() -> None:
    config = mel(2)
    teacher = built(replace(config, encoder=replace(config.encoder, depth_map=(0, 1, 0, 1))), 1)
    student = built(mel(1), 2)
    init_from_teacher(student, teacher, TeacherInitConfig(layers=(4,)))
    for name, tensor in student.encoder.blocks[0].state_dict().items():
        assert torch.equal(tensor, teacher.encoder.blocks[1].state_dict()[name]), name


def test_what_is_not_asked_for_stays() -> None:
    teacher, student = built(mel(4), 1), built(mel(2), 2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    init_from_teacher(student, teacher, TeacherInitConfig(layers=(0, 2), projection=False, positions=False, frontend=False))
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) is not name.startswith("encoder.blocks.1."), name


def test_what_does_not_fit_outside_the_blocks_is_noted() -> None:
    layers = narrow_conv_layers(8)
    teacher = built(hubert(num_layers=2, dim=16, conv_layers=layers, num_clusters=None, **SMALL), 1)
    student = built(distilhubert(num_tasks=0, dim=16, conv_layers=layers, **SMALL), 2)
    notes = init_from_teacher(student, teacher, TeacherInitConfig(layers=(1, 2)))
    assert len(notes) == 1  # DistilHuBERT has no norm before the projection
    assert "projection.norm" in notes[0]
    for part in ("frontend.", "projection.linear.", "encoder."):
        for name in (name for name in student.state_dict() if name.startswith(part)):
            assert torch.equal(student.state_dict()[name], teacher.state_dict()[name]), name
    assert init_from_teacher(built(mel(2), 3), teacher, TeacherInitConfig(projection=False, positions=False)) == [
        "front-end: the teacher's is of another kind"
    ]


def test_settings_that_make_other_use_of_the_tensors_are_noted() -> None:
    settings: Any = {"num_layers": 2, "dim": 16, "conv_layers": narrow_conv_layers(8), "num_clusters": None, **SMALL}
    student = hubert(**settings)
    teacher = replace(
        student,
        frontend=replace(student.frontend, normalize_waveform=True),  # type: ignore[type-var]
        encoder=replace(student.encoder, activation="relu"),
    )
    layers = TeacherInitConfig(layers=(1, 2))
    assert init_from_teacher(built(student, 2), built(student, 1), layers) == []
    assert init_from_teacher(built(student, 2), built(teacher, 1), layers) == [
        "normalize_waveform is True in the teacher and False in the student",
        "activation is 'relu' in the teacher and 'gelu' in the student",
    ]
    assert init_from_teacher(built(student, 2), built(teacher, 1), TeacherInitConfig(frontend=False)) == []


@pytest.mark.parametrize(
    ("dim", "layers", "sentence"),
    [
        (16, (1,), "names 1 teacher layers, the student has 2 blocks"),
        (16, (1, 5), "names teacher layer 5, the teacher has layers 1 to 4"),
        (8, (1, 2), "copied whole or not at all"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(dim: int, layers: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        init_from_teacher(built(mel(2, dim), 2), built(mel(4), 1), TeacherInitConfig(layers=layers))
