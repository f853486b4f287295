"""Depth pruning: angles against arccosines, planted layers that do nothing, what is measured anew, sizes, settings."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sslim.batch import Padded, valid_mask
from sslim.compress.calibration import Calibration
from sslim.compress.depth import DepthPruning, depth_config, layer_angles, prune_depth
from sslim.compress.origins import origins
from sslim.config import from_plain, to_plain
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import BlockConfig


def described(num_layers: int = 5, **encoder: Any) -> ModelConfig:
    config = melhubert(
        num_layers=num_layers, dim=16, num_heads=2, feedforward_dim=12, conv_kernel_size=4, conv_groups=2, num_clusters=3
    )
    pre_norm = {"norm_placement": "pre", "input_norm": False, "final_norm": True}
    return replace(config, encoder=replace(config.encoder, **{**pre_norm, **encoder}))


def made(config: ModelConfig | None = None, seed: int = 0) -> SpeechModel:
    """Pre-norm, so that a block whose parts give nothing passes on exactly what it is given."""
    model = build_model(config or described(), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def speech(seed: int, frames: tuple[int, ...] = (9, 6), padded_to: int = 9) -> Padded:
    values = torch.zeros(len(frames), padded_to, 80)
    for row, length in enumerate(frames):
        values[row, :length] = torch.randn(length, 80, generator=torch.Generator().manual_seed(seed + row))
    return Padded(values=values, lengths=torch.tensor(frames))


CALIBRATION = Calibration(features=(speech(2), speech(5, (9, 9))))


def scale_block(model: SpeechModel, block: int, factor: float) -> None:
    """Makes what a pre-norm block adds to its input smaller; nothing at 0."""
    with torch.no_grad():
        for last in (model.encoder.blocks[block].attention.output, model.encoder.blocks[block].feedforward.down):
            last.weight *= factor
            last.bias *= factor


def final(model: SpeechModel) -> Tensor:
    with torch.no_grad():
        return model.encode_features(speech(3).values, speech(3).lengths).final


@pytest.mark.parametrize("run", [1, 2, 5])
def test_angles_are_arccosines_over_all_valid_frames(run: int) -> None:
    model, total, count = made(), torch.zeros(6 - run, dtype=torch.float64), 0
    for batch in CALIBRATION.features:
        for values, length in zip(batch.values, batch.lengths.tolist(), strict=True):
            with torch.no_grad():
                layers = model.encode_features(values[None, :length]).layers
            for k in range(6 - run):
                cosine = torch.cosine_similarity(layers[k][0].double(), layers[k + run][0].double(), dim=-1)
                total[k] += (cosine.arccos() / math.pi).sum()
            count += length
    torch.testing.assert_close(layer_angles(model, CALIBRATION.features, run=run), total / count, atol=1e-6, rtol=0)


def test_angles_of_small_changes_are_exact() -> None:
    """The cosine of these frames is 1 in single precision; opposite frames are half a turn apart."""
    model = made()
    scale_block(model, 1, 1e-5)
    angles = layer_angles(model, CALIBRATION.features)
    assert 1e-8 < float(angles[1]) < 1e-4 < float(angles[0])
    scale_block(model, 1, 0.0)
    assert float(layer_angles(model, CALIBRATION.features)[1]) == 0.0
    assert bool((angles < 1).all())


def test_padding_does_not_count() -> None:
    model = made()
    longer = layer_angles(model, [speech(2, padded_to=14)])
    torch.testing.assert_close(layer_angles(model, [speech(2)]), longer, atol=1e-7, rtol=0)


@pytest.mark.parametrize("choose", ["greedy", "run"])
def test_layers_that_do_nothing_go_first(choose: str) -> None:
    model = made()
    scale_block(model, 2, 0.0)
    scale_block(model, 3, 0.0)
    small = prune_depth(model, DepthPruning(num_layers=3, choose=choose), CALIBRATION)  # type: ignore[arg-type]
    assert small.provenance[-1]["removed_depths"] == [2, 3]
    assert origins(small).blocks == (0, 1, 4)
    torch.testing.assert_close(final(small), final(model), atol=1e-6, rtol=1e-6)
    fewer = prune_depth(model, DepthPruning(keep=0.4, choose=choose), CALIBRATION)  # type: ignore[arg-type]
    assert fewer.num_layers == 2
    assert (final(fewer) - final(model)).abs().max() > 1e-2  # the control: the third one did something


def test_a_run_stays_together_and_single_layers_need_not() -> None:
    model = made()
    scale_block(model, 0, 1e-3)
    scale_block(model, 4, 1e-3)
    apart = prune_depth(model, DepthPruning(num_layers=3), CALIBRATION)
    together = prune_depth(model, DepthPruning(num_layers=3, choose="run"), CALIBRATION)
    assert sorted(apart.provenance[-1]["removed_depths"]) == [0, 4]
    first, second = together.provenance[-1]["removed_depths"]
    assert second == first + 1
    assert first == int(layer_angles(model, CALIBRATION.features, run=2).argmin())


def test_every_removal_is_measured_in_what_is_left() -> None:
    """The layers left run alone, with the others out of ``depth_map``; ranking all of them once would choose otherwise."""
    differ = 0
    for seed in range(6):
        model = made(described(norm_placement="post", input_norm=True, final_norm=False), seed=seed)
        thinned, left, expected = copy.deepcopy(model), list(range(5)), []
        for _ in range(3):
            thinned.encoder.config = replace(model.config.encoder, depth_map=tuple(left))
            with torch.no_grad():
                outputs = [thinned.encode_features(batch.values, batch.lengths) for batch in CALIBRATION.features]
            valid = [valid_mask(output.lengths, 9) for output in outputs]
            layers = [
                torch.cat([out.layers[k][v] for out, v in zip(outputs, valid, strict=True)]) for k in range(len(left) + 1)
            ]
            cosines = [torch.cosine_similarity(a, b, dim=-1).arccos().mean() for a, b in itertools.pairwise(layers)]
            expected.append(left.pop(int(torch.stack(cosines).argmin())))
        removed = prune_depth(model, DepthPruning(num_layers=2), CALIBRATION).provenance[-1]["removed_depths"]
        assert removed == expected
        differ += set(removed) != set(layer_angles(model, CALIBRATION.features).argsort()[:3].tolist())
    assert differ > 0


def test_applications_of_shared_blocks_are_dropped_one_by_one() -> None:
    config = described(2)
    model = made(replace(config, encoder=replace(config.encoder, depth_map=(0, 1) * 3)))
    small = prune_depth(model, DepthPruning(keep=0.5), CALIBRATION)
    gone = small.provenance[-1]["removed_depths"]
    expected = [depth % 2 for depth in range(6) if depth not in gone]
    assert [origins(small).blocks[block] for block in small.config.encoder.depth_map] == expected
    assert len(gone) == 3
    last = prune_depth(model, DepthPruning(num_layers=1), CALIBRATION)
    assert len(last.encoder.blocks) == 1  # a block without any application is gone


@pytest.mark.parametrize(
    ("depth_map", "sizes", "num_layers"),
    [((0, 1, 2), ((2, 12),) * 3, 2), ((0, 1) * 3, ((2, 12), (1, 5)), 4), ((0, 1, 2), ((2, 12), (1, 5), (2, 12)), 3)],
)
def test_sizes_are_known_before(depth_map: tuple[int, ...], sizes: tuple[tuple[int, int], ...], num_layers: int) -> None:
    config = described()
    blocks = tuple(BlockConfig(num_heads=heads, head_dim=8, feedforward_dim=units) for heads, units in sizes)
    config = replace(config, encoder=replace(config.encoder, blocks=blocks, depth_map=depth_map))
    settings = DepthPruning(num_layers=num_layers)
    small = prune_depth(made(config), settings, CALIBRATION)
    predicted = depth_config(config, settings)
    assert count_parameters(predicted) == small.num_parameters()
    assert predicted.encoder.num_layers == small.num_layers == num_layers


def test_sizes_that_depend_on_data_are_not_guessed() -> None:
    config = described(2)
    shared = replace(config, encoder=replace(config.encoder, depth_map=(0, 1) * 3))
    uneven = replace(config.encoder.blocks[0], num_heads=1)
    for unknown in (shared, replace(config, encoder=replace(config.encoder, blocks=(config.encoder.blocks[0], uneven)))):
        with pytest.raises(ValueError, match="depends on which ones"):
            depth_config(unknown, DepthPruning(keep=0.5))


def test_what_cannot_be_done_is_refused() -> None:
    model = made()
    with pytest.raises(ValueError, match="no calibration speech"):
        prune_depth(model, DepthPruning(keep=0.5))
    for number in (prune_depth, lambda model, settings, _: depth_config(model.config, settings)):
        with pytest.raises(ValueError, match="num_layers is 6, but the model has 5 layers; expected 1 to 5"):
            number(model, DepthPruning(num_layers=6), CALIBRATION)
    with torch.no_grad():
        model.encoder.blocks[1].feedforward.down.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        prune_depth(model, DepthPruning(keep=0.5), CALIBRATION)


def test_settings_are_plain_values_and_checked() -> None:
    settings = DepthPruning(num_layers=3, choose="run")
    assert from_plain(DepthPruning, to_plain(settings)) == settings
    note = prune_depth(made(), settings, CALIBRATION).provenance[-1]
    assert (note["step"], note["num_layers"], note["choose"]) == ("depth", 3, "run")
    with pytest.raises(ValueError, match=r"keep is 0\.5 and num_layers is 3; expected one of them"):
        DepthPruning(keep=0.5, num_layers=3)
    with pytest.raises(ValueError, match="num_layers is 0; expected at least 1"):
        DepthPruning(num_layers=0)
