"""Heads against hand calculations."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sslim.nn.heads import (
    ClusterHeadConfig,
    CodewordHeadConfig,
    HeadConfig,
    MaskEmbeddingConfig,
    RegressionHeadConfig,
    SpectrogramHeadConfig,
    SplitHeadConfig,
    build_head,
)


def built(config: HeadConfig, dim: int = 6) -> Any:
    head: Any = build_head(dim, config).requires_grad_(False)
    head.initialize(torch.Generator().manual_seed(0))
    return head


def test_codeword_logits_are_cosines_over_temperature() -> None:
    head = built(CodewordHeadConfig(num_clusters=5, codeword_dim=4, temperature=0.1))
    x = torch.randn(2, 3, 6)
    logits = head(x)
    projected, codewords = head.projection(x), head.codewords
    for b, t, k in ((0, 0, 0), (1, 2, 4)):
        a, c = projected[b, t], codewords[k]
        cosine = float(a @ c) / math.sqrt(float(a @ a) * float(c @ c))
        assert logits[b, t, k].item() == pytest.approx(10 * cosine, abs=1e-4)
    assert logits.abs().max() <= 10.001


def test_split_head_is_a_shared_layer_and_one_map_for_each_task() -> None:
    head = built(SplitHeadConfig(num_tasks=3, hidden_dim=4, output_dim=5))
    x = torch.randn(2, 7, 6)
    hidden = nn.functional.gelu(head.inner(x))
    output = head(x)
    assert output.shape == (2, 3, 7, 5)
    for task in range(3):
        own = hidden[..., 4 * task : 4 * task + 4] @ head.weight[task] + head.bias[task]
        torch.testing.assert_close(output[:, task], own)


def test_spectrogram_head_norms_between_two_maps() -> None:
    head = built(SpectrogramHeadConfig(hidden_dim=7, output_dim=5, layer_norm_eps=1e-12))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    hidden = x @ head.inner.weight.T + head.inner.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    normed = (hidden - hidden.mean(-1, keepdim=True)) / hidden.var(-1, unbiased=False, keepdim=True).sqrt()
    expected = (normed * head.norm.weight + head.norm.bias) @ head.outer.weight.T + head.outer.bias
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-5)
    relu = built(SpectrogramHeadConfig(hidden_dim=7, output_dim=5, activation="relu"))
    relu.load_state_dict(head.state_dict())
    assert (relu(x) - expected).abs().max() > 1e-3


def test_mask_embedding_replaces_exactly_the_masked_frames() -> None:
    head = built(MaskEmbeddingConfig(dim=6))
    x, mask = torch.randn(2, 4, 6), torch.tensor([[True, False, False, True], [False] * 4])
    hidden = head(x, mask)
    assert torch.equal(hidden[~mask], x[~mask])
    assert torch.equal(hidden[mask], head.embedding.expand(2, -1))


def test_parameter_counts() -> None:
    counts: dict[HeadConfig, int] = {
        CodewordHeadConfig(num_clusters=504): 768 * 256 + 256 + 504 * 256,
        RegressionHeadConfig(output_dim=768, bias=False): 768 * 768,
        RegressionHeadConfig(output_dim=10): 768 * 10 + 10,
        SplitHeadConfig(num_tasks=3, hidden_dim=768, output_dim=768): 27_034_752 - 23_491_200,
        ClusterHeadConfig(num_clusters=7): 768 * 7 + 7,
        MaskEmbeddingConfig(dim=768): 768,
    }
    for config, count in counts.items():
        assert sum(p.numel() for p in build_head(768, config).parameters()) == count
