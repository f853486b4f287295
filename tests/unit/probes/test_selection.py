import pytest
import torch

from sslim.probes import classifiers
from sslim.probes.classifiers import ClassifierConfig, Examples, score, train_paths
from sslim.probes.selection import fit_leaving_out

NUM_GROUPS = 4


def grouped(seed=0, num_examples=60, width=12, num_classes=3, shift=2.0):
    """Classes with a nuisance direction for each group, as speakers have; features of all groups in one store."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=generator)
    xs, ys, groups = [], [], []
    for group in range(NUM_GROUPS):
        y_N = torch.randint(num_classes, (num_examples,), generator=generator)
        offset = shift * torch.randn(width, generator=generator)
        xs.append(centres[y_N] + offset + torch.randn(num_examples, width, generator=generator))
        ys.append(y_N)
        groups.append(torch.arange(group * num_examples, (group + 1) * num_examples))
    x_LNP, y_N = torch.cat(xs)[None], torch.cat(ys)
    return x_LNP, y_N, groups


def leave_out(x_LNP, y_N, groups, config, seed=0):
    examples = [Examples(x_LNP=x_LNP, y_N=y_N, rows=rows) for rows in groups]
    return fit_leaving_out(examples, num_classes=3, config=config, seed=seed)


CONFIGS = {
    "full-batch": ClassifierConfig(weight_decays=(1.0, 1e-1, 1e-2, 1e-3)),
    "mini-batch": ClassifierConfig(hidden_dim=8, batch_size=16, max_epochs=6, patience=2),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_left_out_group_has_no_say(kind):
    x_LNP, y_N, groups = grouped()
    before = leave_out(x_LNP, y_N, groups, CONFIGS[kind])
    altered_y, altered_x = y_N.clone(), x_LNP.clone()
    altered_y[groups[1]] = (altered_y[groups[1]] + 1) % 3
    altered_x[:, groups[1]] *= -5.0
    after = leave_out(altered_x, altered_y, groups, CONFIGS[kind])
    assert after[1].setting == before[1].setting
    assert after[1].dev_accuracy == before[1].dev_accuracy
    for old, new in zip(before[1].classifier.parameters(), after[1].classifier.parameters(), strict=True):
        assert torch.equal(old, new)
    # control: the other groups' classifiers did learn from it
    assert not torch.equal(before[0].classifier.output.weight, after[0].classifier.output.weight)


def test_setting_has_the_best_mean_over_the_other_groups():
    x_LNP, y_N, groups = grouped(shift=3.0)
    config = CONFIGS["full-batch"]
    fitted = leave_out(x_LNP, y_N, groups, config)
    for test in range(NUM_GROUPS):
        others = [g for g in range(NUM_GROUPS) if g != test]
        table = dict.fromkeys(config.weight_decays, 0.0)
        for dev in others:
            rows = torch.cat([groups[g] for g in others if g != dev])
            (path,) = train_paths(Examples(x_LNP=x_LNP, y_N=y_N, rows=rows), num_classes=3, config=config, seed=0)
            for (_, decay, _), classifier in path:
                table[decay] += score(classifier, Examples(x_LNP=x_LNP, y_N=y_N, rows=groups[dev]))[0] / len(others)
        assert fitted[test].dev_accuracy == pytest.approx(max(table.values()))
        assert table[fitted[test].setting[1]] == pytest.approx(max(table.values()))


def test_last_training_is_on_all_other_groups():
    x_LNP, y_N, groups = grouped()
    config = ClassifierConfig(weight_decays=(1e-2,), max_iterations=100)
    fitted = leave_out(x_LNP, y_N, groups, config)[2]
    rows = torch.cat([groups[g] for g in (0, 1, 3)])
    (path,) = train_paths(Examples(x_LNP=x_LNP, y_N=y_N, rows=rows), num_classes=3, config=config, seed=0)
    ((_, expected),) = list(path)
    torch.testing.assert_close(fitted.classifier.output.weight, expected.output.weight)
    assert not torch.allclose(fitted.classifier.mean_LP, x_LNP.mean(1))


def test_choices_and_the_last_training_have_one_solver(monkeypatch):
    """Between the sizes of the two, 120 and 180 examples, lies the border between L-BFGS and AdamW."""
    x_LNP, y_N, groups = grouped()
    config = ClassifierConfig(learning_rates=(1e-2,), batch_size=16, max_epochs=4, patience=2)
    found = {}
    for border in (150, 0):
        monkeypatch.setattr(classifiers, "FULL_BATCH_EXAMPLES", border)
        found[border] = leave_out(x_LNP, y_N, groups, config)[0]
    assert found[150].setting == found[0].setting
    assert found[150].setting[0] == "learning_rate"
    torch.testing.assert_close(found[150].classifier.output.weight, found[0].classifier.output.weight)


def test_two_groups_are_too_few():
    x_LNP, y_N, groups = grouped()
    with pytest.raises(ValueError, match="at least 3"):
        leave_out(x_LNP, y_N, groups[:2], CONFIGS["full-batch"])
