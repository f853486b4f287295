import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sslim.probes.classifiers import ClassifierConfig, Examples, ProbeClassifier, score, standardisation, train_paths
from sslim.probes.selection import fit


def clouds(num_classes=8, num_examples=900, width=40, num_layers=1, noise=3.0, seed=0):
    """Overlapping Gaussian classes with correlated channels of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=generator)
    y_N = torch.randint(num_classes, (num_examples,), generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    scales = torch.logspace(-2, 2, width)
    layers = []
    for _ in range(num_layers):
        x_NP = (centres[y_N] + noise * torch.randn(num_examples, width, generator=generator)) @ mixing
        layers.append(x_NP * scales + 10 * scales)
    return torch.stack(layers), y_N


def part(x_LNP, y_N, start, stop):
    return Examples(x_LNP=x_LNP, y_N=y_N, rows=torch.arange(start, stop))


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-2, 1e-3])
def test_linear_classifier_equals_scikit_learn(weight_decay):
    x_LNP, y_N = clouds()
    train, test = part(x_LNP, y_N, 0, 600), part(x_LNP, y_N, 600, 900)
    config = ClassifierConfig(weight_decays=(weight_decay,), max_iterations=200)
    (path,) = train_paths(train, num_classes=8, config=config, seed=0)
    ((_, classifier),) = list(path)
    mean_LP, scale_LP = standardisation(train)
    z_NP = ((x_LNP - mean_LP[:, None]) * scale_LP[:, None])[0].numpy()
    # mean loss + decay/2 |W|^2 is scikit-learn's objective divided by N C
    oracle = LogisticRegression(C=1 / (600 * weight_decay), max_iter=2000, tol=1e-8).fit(z_NP[:600], y_N[:600].numpy())
    expected = oracle.predict_proba(z_NP[600:])
    with torch.no_grad():
        ours = classifier(test.batch(torch.arange(300))[0]).softmax(-1).numpy()
    assert np.abs(ours - expected).max() < 5e-3
    assert abs(score(classifier, test)[0] - oracle.score(z_NP[600:], y_N[600:].numpy())) <= 0.01
    # control: another weight decay is visibly another classifier
    other = LogisticRegression(C=0.1 / (600 * weight_decay), max_iter=2000, tol=1e-8).fit(z_NP[:600], y_N[:600].numpy())
    assert np.abs(ours - other.predict_proba(z_NP[600:])).max() > 2e-2


def test_default_settings_reach_the_best_of_scikit_learn():
    x_LNP, y_N = clouds(noise=2.0)
    fitted = fit(part(x_LNP, y_N, 0, 500), part(x_LNP, y_N, 500, 700), num_classes=8, config=ClassifierConfig(), seed=0)
    ours = score(fitted.classifier, part(x_LNP, y_N, 700, 900))[0]
    mean_LP, scale_LP = standardisation(part(x_LNP, y_N, 0, 500))
    z_NP = ((x_LNP - mean_LP[:, None]) * scale_LP[:, None])[0].numpy()
    oracles = [LogisticRegression(C=c, max_iter=3000).fit(z_NP[:500], y_N[:500].numpy()) for c in (0.02, 0.2, 2.0)]
    best = max(oracles, key=lambda oracle: oracle.score(z_NP[500:700], y_N[500:700].numpy()))
    assert abs(ours - best.score(z_NP[700:], y_N[700:].numpy())) <= 0.03
    assert ours > 0.5  # and both are far from 1/8


@pytest.mark.parametrize("hidden_dim", [None, 32])
def test_layer_weights_find_the_informative_layer(hidden_dim):
    x_LNP, y_N = clouds(num_layers=3, noise=0.7)
    generator = torch.Generator().manual_seed(1)
    x_LNP[0] = 1e4 * torch.randn(x_LNP.shape[1:], generator=generator)  # loud noise: standardisation must not let it win
    x_LNP[2] = torch.randn(x_LNP.shape[1:], generator=generator)
    config = ClassifierConfig(hidden_dim=hidden_dim, batch_size=64)
    fitted = fit(part(x_LNP, y_N, 0, 600), part(x_LNP, y_N, 600, 750), num_classes=8, config=config, seed=0)
    weights = fitted.classifier.layer_weights
    assert sum(weights) == pytest.approx(1.0)
    assert max(range(3), key=weights.__getitem__) == 1
    assert weights[1] > 0.4
    assert score(fitted.classifier, part(x_LNP, y_N, 750, 900))[0] > 0.9


def test_hidden_layer_solves_what_a_linear_classifier_cannot():
    generator = torch.Generator().manual_seed(0)
    x_NP = torch.rand(1200, 2, generator=generator) * 2 - 1
    y_N = ((x_NP[:, 0] > 0) ^ (x_NP[:, 1] > 0)).long()
    parts = [part(x_NP[None], y_N, *span) for span in ((0, 800), (800, 1000), (1000, 1200))]
    accuracy = {}
    for hidden_dim in (None, 64):
        config = ClassifierConfig(hidden_dim=hidden_dim, batch_size=64)
        fitted = fit(parts[0], parts[1], num_classes=2, config=config, seed=0)
        accuracy[hidden_dim] = score(fitted.classifier, parts[2])[0]
    assert accuracy[64] > 0.93
    assert accuracy[None] < 0.7


def test_mini_batches_agree_with_full_batch(monkeypatch):
    x_LNP, y_N = clouds(num_layers=2, noise=2.0)
    train, dev, test = part(x_LNP, y_N, 0, 600), part(x_LNP, y_N, 600, 750), part(x_LNP, y_N, 750, 900)
    config = ClassifierConfig(batch_size=64)
    full = fit(train, dev, num_classes=8, config=config, seed=0)
    monkeypatch.setattr("sslim.probes.classifiers.FULL_BATCH_EXAMPLES", 0)
    mini = fit(train, dev, num_classes=8, config=config, seed=0)
    assert "weight_decay" in full.chosen
    assert "learning_rate" in mini.chosen
    assert abs(score(full.classifier, test)[0] - score(mini.classifier, test)[0]) < 0.06


def test_float16_store_is_standardised_like_float32():
    x_LNP, y_N = clouds()
    x_LNP = x_LNP.clamp(-6e4, 6e4)
    whole = Examples(x_LNP=x_LNP, y_N=y_N, rows=torch.arange(100, 900))
    mean_LP, scale_LP = standardisation(whole)
    expected = x_LNP[:, 100:].double()
    torch.testing.assert_close(mean_LP.double(), expected.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(scale_LP.double(), 1 / expected.std(1, correction=0), rtol=1e-4, atol=0)
    half = standardisation(Examples(x_LNP=x_LNP.half(), y_N=y_N, rows=whole.rows))
    torch.testing.assert_close(half[1], scale_LP, rtol=2e-2, atol=0)


def test_constant_channels_are_harmless():
    x_LNP, y_N = clouds(noise=1.0)
    x_LNP[..., 3] = 1e3 + 1e-7
    x_LNP[..., 4] = 0.0
    train = part(x_LNP, y_N, 0, 600)
    _, scale_LP = standardisation(train)
    assert scale_LP[0, 3] == 0
    assert scale_LP[0, 4] == 0
    assert torch.isfinite(scale_LP).all()
    fitted = fit(train, part(x_LNP, y_N, 600, 900), num_classes=8, config=ClassifierConfig(), seed=0)
    x_LNP[..., 3] += 50.0  # a channel that never varied says nothing
    assert score(fitted.classifier, part(x_LNP, y_N, 600, 900))[0] == fitted.dev_accuracy


def test_score_counts_every_example_once(monkeypatch):
    classifier = ProbeClassifier(torch.zeros(1, 3), torch.ones(1, 3), 3).initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        classifier.output.weight.copy_(torch.eye(3))
    y_N = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    x_LNP = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 0, 1])][None]
    monkeypatch.setattr("sslim.probes.classifiers.SCORING_BATCH", 2)
    accuracy, loss = score(classifier, Examples(x_LNP=x_LNP, y_N=y_N, rows=torch.arange(7)))
    assert accuracy == pytest.approx(5 / 7)
    expected = torch.nn.functional.cross_entropy(x_LNP[0], y_N)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_empty_parts_are_refused():
    x_LNP, y_N = clouds(num_examples=20)
    with pytest.raises(ValueError, match="no dev examples"):
        fit(part(x_LNP, y_N, 0, 20), part(x_LNP, y_N, 0, 0), num_classes=8, config=ClassifierConfig(), seed=0)
