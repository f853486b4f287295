from dataclasses import replace

import pytest
import torch

from sslim.checkpoints import load_model
from sslim.models import PRESETS, build_model
from sslim.models.storage import stored_as
from sslim.probes import FineTuningConfig, NamedModel, ProbeConfig, load_task, probe, read_tuned, write_tuned
from sslim.probes.classifiers import Examples, ProbeClassifier, standardisation
from sslim.probes.features import mean_pooling, mean_std_pooling
from sslim.probes.fine_tuning import TunedModel, bare_copy, known_logits, model_targets, pooled, training_batches
from sslim.probes.tuned_files import ClassifierDescription

SETTINGS = FineTuningConfig(max_epochs=8, batch_s=4.0, learning_rates=(3e-3,), head_learning_rate=1e-2, patience=4)


@pytest.fixture
def blind(spoken, tiny_model):
    """A model whose projection takes away the directions that tell labels apart, in both frames of a stack."""
    model = bare_copy(tiny_model.model).eval()
    basis_DK = torch.linalg.qr(torch.from_numpy(spoken.directions["label"].T).float()).Q
    keep_DD = torch.eye(40) - basis_DK @ basis_DK.T
    with torch.no_grad():
        weight_DF = model.projection.linear.weight
        weight_DF.copy_(torch.cat([half @ keep_DD for half in weight_DF.split(40, dim=1)], dim=1))
    return NamedModel(name="blind", model=model)


def config_for(task, **changes):
    return ProbeConfig(**{"task": task, "num_seeds": 1, "max_frames": None, "layer": "last", "baselines": False, **changes})


def test_fine_tuning_improves_and_leaves_the_original(spoken, blind, tmp_path):
    before = {name: tensor.clone() for name, tensor in blind.model.state_dict().items()}
    (frozen,) = probe(spoken, [blind], config_for("label"))["rows"]
    kept = []
    config = config_for("label", fine_tuning=SETTINGS)
    card = probe(spoken, [blind], config, keep=lambda model, tuned: kept.append((model, tuned)))
    (row,) = card["rows"]
    assert row["name"] == "blind, fine-tuned"
    assert row["fine_tuned"]
    assert row["mean"] > 0.9
    assert row["mean"] > frozen["mean"] + 0.3
    assert 0 < card["chance"] < 0.6
    assert "trained with the classifier" in card["protocol"]["models"]
    assert all(torch.equal(before[name], tensor) for name, tensor in blind.model.state_dict().items())
    assert not blind.model.training
    ((model, tuned),) = kept
    assert model is blind
    changed = tuned.model.state_dict()
    assert not torch.equal(changed["projection.linear.weight"], before["projection.linear.weight"])
    assert not torch.equal(changed["encoder.blocks.1.feedforward.up.weight"], before["encoder.blocks.1.feedforward.up.weight"])
    # the saved model alone, frozen, keeps what it learnt
    description = ClassifierDescription(
        task="label", classes=tuple(card["classes"]), unit="utterance", layer="last", pooling=config.pooling
    )
    write_tuned(tuned, description, spoken, tmp_path / "run")
    loaded = load_model(tmp_path / "run" / "model")
    assert loaded.provenance[-1]["step"] == "fine-tuned"
    assert loaded.provenance[-1]["dev_accuracy"] == pytest.approx(row["dev_scores"][0], abs=1e-4)
    assert not tuned.model.provenance
    (again,) = probe(spoken, [NamedModel(name="saved", model=loaded)], config_for("label"))["rows"]
    assert again["mean"] > 0.9
    stored = read_tuned(tmp_path / "run")
    assert stored.description == description
    state = stored.classifier.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tuned.classifier.state_dict().items())
    sounds = [torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.zeros(2000)]
    together = stored.classify(sounds)
    assert together == [stored.classify([sound])[0] for sound in sounds]
    assert all(len(one) == 1 and one[0] in description.classes for one in together)
    with pytest.raises(ValueError, match="utterance 1 is shorter than one frame of the model"):
        stored.classify([sounds[0], torch.zeros(20)])


def test_shuffled_labels_leave_chance_when_tuned(spoken, tiny_model):
    settings = replace(SETTINGS, max_epochs=2)
    card = probe(spoken, [tiny_model], config_for("speaker-frames", fine_tuning=settings, shuffle_labels=True))
    assert abs(card["rows"][0]["mean"] - card["chance"]) < 0.25


def targets_of(spoken, model, task, layer="mix", context=0):
    loaded = load_task(task, spoken)
    return loaded, model_targets(model, spoken, loaded, pooling="mean-std", layer=layer, context=context)


@pytest.mark.parametrize(("task", "layer", "context"), [("phones", "mix", 4), ("label", "mean", 0), ("speaker-frames", "1", 0)])
def test_an_utterance_is_classified_alike_in_any_batch(task, layer, context, spoken, tiny_model):
    model = tiny_model.model
    loaded, targets = targets_of(spoken, model, task, layer, context)
    width = 32 * (2 if loaded.unit == "utterance" else 1) * (2 * context + 1)
    shape = (3 if layer == "mix" else 1, width)
    classifier = ProbeClassifier(torch.zeros(shape), torch.ones(shape), len(loaded.classes))
    classifier.initialize(torch.Generator().manual_seed(0))
    tuned = TunedModel(bare_copy(model), classifier, train_frontend=False).eval()
    with torch.no_grad():
        together = known_logits(tuned, targets, [0, 1, 2, 3])
        alone = [known_logits(tuned, targets, [position]) for position in range(4)]
    torch.testing.assert_close(together[0], torch.cat([logits for logits, _ in alone]), rtol=0, atol=1e-5)
    assert torch.equal(together[1], torch.cat([y for _, y in alone]))
    # control: with other contents the logits are others
    with torch.no_grad():
        other = known_logits(tuned, targets, [4, 5, 6, 7])[0]
    assert other.shape != together[0].shape or (other - together[0]).abs().max() > 1e-3


def test_gradients_do_not_depend_on_padding(spoken, tiny_model):
    """The gradient of a batch is the mean of its frames' gradients, whatever the batch pads."""
    model = bare_copy(tiny_model.model)
    loaded, targets = targets_of(spoken, model, "phones", "last")
    shape = (1, 32)
    classifier = ProbeClassifier(torch.zeros(shape), torch.ones(shape), len(loaded.classes))
    classifier.initialize(torch.Generator().manual_seed(0))
    tuned = TunedModel(model, classifier, train_frontend=False).eval()
    sums = []
    for groups in ([[0, 1, 2]], [[0], [1], [2]]):
        tuned.zero_grad()
        for group in groups:
            logits_NV, y_N = known_logits(tuned, targets, group)
            torch.nn.functional.cross_entropy(logits_NV, y_N, reduction="sum").backward()
        sums.append([p.grad.clone() for p in tuned.parameters() if p.grad is not None])
    assert len(sums[0]) > 10
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_pooling_with_a_gradient_equals_pooling_of_stored_frames():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, length, 5, generator=generator) for length in (7, 1, 3)]
    x_LBTD = torch.zeros(2, 3, 7, 5)
    for row, x_LTD in enumerate(rows):
        x_LBTD[:, row, : x_LTD.shape[1]] = x_LTD
        x_LBTD[:, row, x_LTD.shape[1] :] = float("nan")
    lengths_B = torch.tensor([7, 1, 3])
    x_LBTD.requires_grad_(True)
    for name, pool in (("mean", mean_pooling), ("mean-std", mean_std_pooling)):
        expected = torch.stack([pool(x) for x in rows], dim=1)
        torch.testing.assert_close(pooled(x_LBTD, lengths_B, name), expected, rtol=0, atol=2e-5)
    pooled(x_LBTD.detach().nan_to_num().requires_grad_(True), lengths_B, "mean-std").sum().backward()
    one_frame = torch.ones(1, 1, 1, 5, requires_grad=True)
    pooled(one_frame, torch.tensor([1]), "mean-std").sum().backward()
    assert torch.isfinite(one_frame.grad).all()


def test_every_utterance_is_trained_on_once_an_epoch(spoken, tiny_model):
    _, targets = targets_of(spoken, tiny_model.model, "label")
    part = torch.arange(5, 55).numpy()
    generator = torch.Generator().manual_seed(0)
    epochs = [training_batches(targets.inputs, part, 1.0, generator) for _ in range(2)]
    for batches in epochs:
        assert sorted(member for batch in batches for member in batch) == part.tolist()
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(targets.inputs.lengths[batch]) * 0.01 <= 1.0
    assert epochs[0] != epochs[1]
    assert len(epochs[0]) > 5


def test_a_learnt_frontend_stays_as_it_is_unless_asked(tones):
    model = build_model(PRESETS["hubert-tiny"](), torch.Generator().manual_seed(0))
    shape = (1, 2 * model.config.encoder.dim)
    for train_frontend in (False, True):
        classifier = ProbeClassifier(torch.zeros(shape), torch.ones(shape), 2)
        tuned = TunedModel(bare_copy(model), classifier, train_frontend=train_frontend).train()
        loaded = load_task("label", tones)
        targets = model_targets(tuned.model, tones, loaded, pooling="mean-std", layer="last", context=0)
        logits_NV, y_N = known_logits(tuned, targets, [0, 1])
        torch.nn.functional.cross_entropy(logits_NV, y_N).backward()
        trained = [p.grad is not None for p in tuned.model.frontend.parameters()]
        assert all(trained) is train_frontend
        assert any(trained) is train_frontend
        assert tuned.model.frontend.training is train_frontend
        assert tuned.model.encoder.training


def test_what_cannot_be_tuned_is_refused(spoken, tiny_model):
    small = NamedModel(name="int8", model=stored_as(bare_copy(tiny_model.model).eval(), "int8-dynamic"))
    with pytest.raises(ValueError, match="quantise last"):
        probe(spoken, [small], config_for("label", fine_tuning=SETTINGS))
    with pytest.raises(ValueError, match="layer 'all' needs frozen features"):
        config_for("label", fine_tuning=SETTINGS, layer="all")
    with pytest.raises(ValueError, match="must be above 0"):
        FineTuningConfig(learning_rates=(1e-4, 0.0))


def test_standardisation_is_that_of_the_untouched_model(spoken, tiny_model):
    """Fine-tuning starts where a frozen probe stands: the classifier's statistics are those of the training part."""
    config = config_for("label", fine_tuning=replace(SETTINGS, max_epochs=1))
    kept = []
    probe(spoken, [tiny_model], config, keep=lambda model, tuned: kept.append(tuned))
    from sslim.probes.evaluate import store
    from sslim.probes.features import model_representation
    from sslim.probes.layers import with_layers
    from sslim.probes.protocol import divide

    loaded = load_task("label", spoken)
    stored = store(with_layers(model_representation(tiny_model.model, spoken, "m"), "last"), spoken, loaded, config)
    parts = divide(loaded.classes_N, [None] * len(spoken), spoken.column("speaker"), config.split)
    examples: Examples = stored.examples(parts.train, slice(None))
    mean_LP, scale_LP = standardisation(examples)
    torch.testing.assert_close(kept[0].classifier.mean_LP, mean_LP, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept[0].classifier.scale_LP, scale_LP, rtol=1e-4, atol=1e-5)
