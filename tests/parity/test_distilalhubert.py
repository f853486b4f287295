"""DistilALHuBERT, DistilHuBERT and their teacher compute what the references computed.

Two kinds of evidence: the numbers of the DistilALHuBERT specification's appendix A, which the references gave for a
deterministic fill of their tensors (1e-4; a padded batch, so with ``compat="reference"``), and stored outputs of small
checkpoints (2e-5).
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sslim
from reference_layouts import distilalhubert_file, distilhubert_file, teacher_file, waves
from sslim.batch import valid_mask

ASSETS = Path(__file__).parent / "assets" / "distilalhubert"
STORED = ["postnorm_2x6", "prenorm_2x2_layernorm"]
GOLDEN = [*STORED, "postnorm_3x4"]
VECTORS, TOLERANCE = 1e-4, 2e-5


def load(contents, tmp_path, **options):
    torch.save(contents, tmp_path / "file.ckpt")
    return sslim.load_model(tmp_path / "file.ckpt", **{"compat": "reference", **options})


def captured(model):
    """Runs the two waves; returns the output and what every block gave, padding included, as the reference returns it.

    Also what every block's first norm gave, where the model is pre-norm its normed input.
    """
    with torch.inference_mode():
        output = model.encode(*waves())
        raw, normed = [], []
        hooks = [block.register_forward_hook(lambda _m, _i, out: raw.append(out[0])) for block in model.encoder.blocks]
        hooks += [b.attention_norm.register_forward_hook(lambda _m, _i, out: normed.append(out)) for b in model.encoder.blocks]
        model.encoder(output.embed, output.lengths)  # the padded batch as a whole, which encode may split
    for hook in hooks:
        hook.remove()
    return output, raw, normed


def check(x_BTD, first, second, mean):
    """Values at [item 0, frame 0, dims 0-3], at [item 1, frame 3, dims 0-3], and mean |x| over everything."""
    got = [*x_BTD[0, 0, :4].tolist(), *x_BTD[1, 3, :4].tolist(), float(x_BTD.abs().mean())]
    assert got == pytest.approx([*first, *second, mean], abs=VECTORS)


def feature_penalty(model):
    """Mean square of the convolutions' output, padding included."""
    waveform_BS, lengths_B = waves()
    with torch.inference_mode():
        return float(model.frontend(waveform_BS, torch.full_like(lengths_B, 4800)).values.square().mean())


POST = [
    (0, (-0.889683, 0.526724, -0.006290, -0.538140), (2.692528, 0.327436, -1.715860, -0.289836), 0.819948),
    (1, (-0.909390, -0.594152, 0.225502, 1.129363), (-0.106853, -0.636333, -0.851925, 1.016106), 0.793725),
    (2, (1.129263, 1.132523, -0.014628, -0.980771), (1.181496, 1.294561, 0.122209, -0.965012), 0.772841),
    (5, (0.069683, -1.588177, 1.259645, 0.449584), (-0.016618, -1.391459, 1.170613, 0.288351), 0.806119),
]


def test_post_norm_vectors(tmp_path):
    model = load(distilalhubert_file(), tmp_path)
    assert model.num_parameters() == 65_760
    output, raw, _ = captured(model)
    assert output.lengths.tolist() == [14, 9]
    for index, *values in POST:
        check(raw[index], *values)
        check_valid(output.layers[index + 1], raw[index], output.lengths)
    check_valid(output.final, raw[5], output.lengths)
    assert feature_penalty(model) == pytest.approx(0.514226, abs=1e-5)


def check_valid(ours_BTD, raw_BTD, lengths_B):
    """Ours is the reference's on valid frames and zero elsewhere."""
    valid = valid_mask(lengths_B, raw_BTD.shape[1])[..., None]
    torch.testing.assert_close(ours_BTD, raw_BTD * valid, rtol=0, atol=1e-5)


def test_pre_norm_vectors(tmp_path):
    model = load(distilalhubert_file(layer_norm_first=True, extractor_mode="layer_norm"), tmp_path)
    assert model.num_parameters() == 66_144
    output, raw, normed = captured(model)
    check(raw[0], (1.505946, -2.846893, -0.837335, 3.704938), (2.041616, 2.638525, 0.409292, -1.391751), 1.725915)
    last = (6.335389, -5.349050, -13.870692, 15.516996), (7.081093, 5.878239, -7.889256, -0.276931), 6.294693
    check(raw[5], *last)
    check(normed[1], (0.753044, -1.344040, -0.434982, 1.788570), (1.212678, 1.453886, 0.395514, -0.486709), 0.822199)
    final = (0.804428, -0.411721, -1.450123, 1.952221), (0.916842, 0.833894, -0.939478, 0.048483), 0.794701
    with torch.inference_mode():
        check(model.encoder.final_norm(raw[5]), *final)
        check_valid(output.final, model.encoder.final_norm(raw[5]), output.lengths)
    assert feature_penalty(model) == pytest.approx(0.434169, abs=1e-5)


def test_teacher_vectors_and_the_distance_to_it(tmp_path):
    output, teacher, _ = captured(load(teacher_file(), tmp_path))
    assert output.lengths.tolist() == [14, 10]  # fairseq's coarse count: one frame more than the student's
    check(teacher[1], (-0.381043, -0.717880, -0.167788, 0.510110), (0.161802, 0.824075, -1.017370, 0.785265), 0.823482)
    check(teacher[5], (-0.431203, 0.573386, -1.374778, 0.641295), (0.618156, -0.673214, -0.796511, 1.013661), 0.805948)
    _, student, _ = captured(load(distilalhubert_file(), tmp_path))
    pairs = [(student[index], teacher[index]) for index in (1, 3, 5)]
    square = sum(F.mse_loss(s, t) for s, t in pairs)
    cosine = sum(-F.logsigmoid(F.cosine_similarity(s, t, dim=-1)).mean() for s, t in pairs)
    assert (float(square), float(cosine)) == pytest.approx((5.580491, 1.986037), abs=VECTORS)


def test_distilhubert_vectors(tmp_path):
    model = load(distilhubert_file(), tmp_path)
    assert model.num_parameters() == 79_760
    output, raw, _ = captured(model)
    embed = (-2.000563, -0.261805, 1.347458, 0.396438), (-1.365149, 0.524270, 0.364841, 2.370136), 0.670451
    check(output.embed, *embed)  # the reference's is zero on padding too
    check(raw[0], (0.016799, 2.032142, 0.164691, -1.314041), (0.267705, 1.485214, -0.576657, -0.907196), 0.806395)
    check(raw[1], (-0.788776, -0.284232, -0.272774, 0.578974), (-0.796881, 0.183761, -1.223543, 1.076507), 0.816543)
    with torch.inference_mode():
        predictions_BNTO = model.heads["distillation"](raw[1])
    expected = [
        ((-0.233874, 0.183121, -0.176614, 0.102541), (-0.121166, 0.099848, -0.130380, 0.031299), 0.149785),
        ((-0.079494, -0.085779, 0.248251, 0.072440), (-0.009530, -0.121130, 0.334747, 0.039989), 0.158966),
        ((-0.040860, 0.425875, 0.210743, 0.095295), (-0.010323, 0.233352, 0.266965, -0.050089), 0.131816),
    ]
    for task, values in enumerate(expected):
        check(predictions_BNTO[:, task], *values)


def test_without_compat_only_the_padded_utterance_differs(tmp_path):
    reference, _, _ = captured(load(distilalhubert_file(), tmp_path))
    ours, _, _ = captured(load(distilalhubert_file(), tmp_path, compat=None))
    torch.testing.assert_close(ours.final[0], reference.final[0], rtol=0, atol=1e-5)
    assert (ours.final[1] - reference.final[1]).abs().max() > 0.1  # group norm over its padding moves the second


def differences(model, gold, prefix):
    mask = gold[f"{prefix}.pad_mask"].bool()
    lengths = torch.tensor([8000, 11123][: len(mask)])
    with torch.inference_mode():
        output = model.encode(gold[f"{prefix}.wav"], lengths)
    assert output.lengths.tolist() == mask.sum(1).tolist()
    states = [gold[f"{prefix}.hidden{index}"] for index in range(model.num_layers)]
    assert f"{prefix}.hidden{model.num_layers}" not in gold
    found = [(output.layers[index + 1] - state).abs()[mask].max() for index, state in enumerate(states)]
    return max([*found, (output.final - gold[f"{prefix}.last_hidden_state"]).abs()[mask].max()])


@pytest.mark.parametrize("name", STORED)
def test_stored_outputs_of_one_utterance_and_of_a_padded_batch(name):
    gold = load_file(ASSETS / f"{name}.safetensors")
    model = sslim.load_model(ASSETS / f"{name}.ckpt")
    assert differences(model, gold, "single") <= TOLERANCE
    reference = sslim.load_model(ASSETS / f"{name}.ckpt", compat="reference")
    assert differences(reference, gold, "batch") <= TOLERANCE
    if name.startswith("post"):  # the control: without compat, group norm does not see the padding
        assert differences(model, gold, "batch") > 0.1
    with torch.no_grad():
        model.get_parameter("encoder.blocks.1.feedforward.down.bias")[0] += 1e-3
    assert differences(model, gold, "single") > TOLERANCE


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_compute_the_same(name, shared_golden):
    gold = load_file(shared_golden / "distilalhubert" / f"{name}.safetensors")
    path = shared_golden / "distilalhubert" / f"{name}.ckpt"
    assert differences(sslim.load_model(path), gold, "single") <= TOLERANCE
    assert differences(sslim.load_model(path, compat="reference"), gold, "batch") <= TOLERANCE


def test_every_golden_file_is_in_the_list(shared_golden):
    assert sorted(path.stem for path in (shared_golden / "distilalhubert").glob("*.ckpt")) == sorted(GOLDEN)
