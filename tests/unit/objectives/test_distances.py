"""Distances against hand calculation and against the reference's golden loss."""

import math
from pathlib import Path

import pytest
import torch

import sslim
from sslim.objectives import Distillation, DistillationConfig, TargetConfig
from sslim.objectives.distances import frame_cosine, frame_distance, similarity_loss, sum_over_frames

A, B = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([[0.0, 2.0, 4.0]])


def test_by_hand() -> None:
    assert frame_distance(A, B, "l1").item() == pytest.approx(5 / 3)
    assert frame_distance(A, B, "l2").item() == pytest.approx(13 / 3)
    cosine = 16 / (5 * math.sqrt(20))
    assert frame_cosine(A, B).item() == pytest.approx(cosine)
    assert similarity_loss(torch.tensor(cosine), "raw").item() == pytest.approx(-cosine)
    assert similarity_loss(torch.tensor(cosine), "log_sigmoid").item() == pytest.approx(math.log1p(math.exp(-cosine)))
    assert frame_cosine(A, torch.zeros(1, 3)).item() == 0.0


def test_a_frame_outside_the_mask_gives_no_gradient_even_if_it_is_not_finite() -> None:
    values = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    total = sum_over_frames(values, torch.tensor([[True, False]]))
    total.backward()
    assert total.item() == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 0.0]]


def test_the_golden_loss_of_the_reference(tmp_path: Path) -> None:
    """Student and teacher of DistilALHuBERT's appendix A, layers 2, 4 and 6, padding counted as the reference does."""
    from reference_layouts import distilalhubert_file, teacher_file, waves

    models, outputs = [], []
    for contents in (distilalhubert_file(), teacher_file()):
        torch.save(contents, tmp_path / "file.ckpt")
        models.append(sslim.load_model(tmp_path / "file.ckpt", compat="reference"))
        raw: list[torch.Tensor] = []
        with torch.inference_mode():
            embed, lengths = (output := models[-1].encode(*waves())).embed, output.lengths
            hooks = [
                b.register_forward_hook(lambda _m, _i, out, raw=raw: raw.append(out[0])) for b in models[-1].encoder.blocks
            ]
            models[-1].encoder(embed, lengths)  # raw outputs: padded frames are not zero in them
        for hook in hooks:
            hook.remove()
        outputs.append(torch.stack([raw[index] for index in (1, 3, 5)], dim=2))
    config = DistillationConfig(
        target=TargetConfig(layers=(2, 4, 6)), student_layers=(2, 4, 6), distance="l2", over_targets="sum"
    )
    objective = Distillation(*models, config)
    everything = torch.ones(outputs[0].shape[:2], dtype=torch.bool)
    total, metrics = objective.compare(*outputs, everything)
    assert total.item() / everything.sum().item() == pytest.approx(7.566528, abs=1e-4)
    square = sum(metrics[f"layer{layer}_distance"][0] for layer in (2, 4, 6)) / everything.sum()
    assert square.item() == pytest.approx(5.580491, abs=1e-4)
