"""Tensor names and shapes of the waveform references, a deterministic fill for them, and files of every layout made of both.

The tables are those of the specifications (DistilALHuBERT sections 1.5 and 1.7, LightHuBERT section 1.3), the fill is that of
the DistilALHuBERT specification's appendix A, for which the reference's outputs are known. Everything is written out here from
sizes alone, so that it cannot agree with sslim's own key tables by construction.
"""

import math

import torch

CONV = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernel, stride
TINY = {
    "extractor_mode": "default",
    "extractor_conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
    "extractor_dropout": 0.0,
    "feature_grad_mult": 0.1,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "encoder_layers": 2,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 96,
    "encoder_attention_heads": 4,
    "layer_norm_first": False,
}


def shapes(
    *, channels=512, dim=768, units=3072, num_layers=12, kernel=128, groups=16, conv_norm="default", norm=True, mask=True
):
    """What every reference of this line has: convolutions, projection, positions, encoder; the rest by options."""
    table = {}
    for index, (taps, _) in enumerate(CONV):
        table[f"feature_extractor.conv_layers.{index}.0.weight"] = (channels, channels if index else 1, taps)
        if conv_norm == "layer_norm" or index == 0:
            middle = "2.1" if conv_norm == "layer_norm" else "2"
            table |= {f"feature_extractor.conv_layers.{index}.{middle}.{part}": (channels,) for part in ("weight", "bias")}
    if channels != dim:
        table |= {"post_extract_proj.weight": (dim, channels), "post_extract_proj.bias": (dim,)}
    table |= {"encoder.pos_conv.0.bias": (dim,), "encoder.pos_conv.0.weight_g": (1, 1, kernel)}
    table["encoder.pos_conv.0.weight_v"] = (dim, dim // groups, kernel)
    for i in range(num_layers):
        for part, out, inner in (("fc1", units, dim), ("fc2", dim, units)):
            table |= {f"encoder.layers.{i}.{part}.weight": (out, inner), f"encoder.layers.{i}.{part}.bias": (out,)}
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            name = f"encoder.layers.{i}.self_attn.{part}"
            table |= {f"{name}.weight": (dim, dim), f"{name}.bias": (dim,)}
        for part in ("self_attn_layer_norm", "final_layer_norm"):
            table |= {f"encoder.layers.{i}.{part}.{leaf}": (dim,) for leaf in ("weight", "bias")}
    table |= {"encoder.layer_norm.weight": (dim,), "encoder.layer_norm.bias": (dim,)}
    if norm:
        table |= {"layer_norm.weight": (channels,), "layer_norm.bias": (channels,)}
    return table | ({"mask_emb": (dim,)} if mask else {})


def output_layer_shapes(num_tasks, *, dim=768, inner=768, teacher_dim=768):
    """DistilHuBERT's prediction heads; a single one is an ordinary linear map."""
    table = {"output_layer.0.weight": (num_tasks * inner, dim), "output_layer.0.bias": (num_tasks * inner,)}
    if num_tasks == 1:
        return table | {"output_layer.2.layer.weight": (teacher_dim, inner), "output_layer.2.layer.bias": (teacher_dim,)}
    return table | {
        "output_layer.2.weight": (num_tasks, inner, teacher_dim),
        "output_layer.2.bias": (1, 1, num_tasks, teacher_dim),
    }


def filled(table):
    """The deterministic fill, float32."""
    state = {}
    for i, name in enumerate(sorted(table)):
        shape = table[name]
        count = math.prod(shape)
        u = torch.sin(12.9898 * torch.arange(count, dtype=torch.float64) + 78.233 * (i + 1)) * 43758.5453
        s = 2 * (u - torch.floor(u)) - 1
        if name.endswith("weight_g") or (len(shape) == 1 and name.endswith("weight")):
            s = 1 + 0.1 * s
        elif len(shape) == 1 or name.endswith("bias"):
            s = 0.05 * s
        else:
            s = s * math.sqrt(6 * shape[0] / count)
        state[name] = s.float().view(shape)
    return state


def waves():
    """The two utterances of appendix A, padded, (2, 4800), and their lengths."""
    t = torch.arange(4800, dtype=torch.float64)
    first = 0.5 * torch.sin(2 * math.pi * 220 * t / 16000) + 0.25 * torch.sin(2 * math.pi * 1333 * t / 16000 + 0.5)
    second = 0.3 * torch.sin(2 * math.pi * 440 * t / 16000)
    second[3200:] = 0.0
    return torch.stack([first, second]).float(), torch.tensor([4800, 3200])


def _tiny_shapes(settings, **options):
    sizes = {"channels": 32, "dim": 48, "units": 96, "num_layers": settings["encoder_layers"], "kernel": 16, "groups": 4}
    return shapes(conv_norm=settings["extractor_mode"], **sizes, **options)


def distilalhubert_file(**settings):
    """A DistilALHuBERT file of appendix A's size."""
    settings = {**TINY, "repeat_time": 3, "activation_dropout": 0.0, **settings}
    return {
        "Step": 99,
        "Config": {"alhubert": settings, "teacher": {"model": "hubert_local"}, "audio": {"target_level": "None"}},
        "alhubert": filled(_tiny_shapes(settings)),
        "dictionaries": [],
    }


def distilhubert_file(num_tasks=3, **settings):
    """A DistilHuBERT file of appendix A's size."""
    settings = {**TINY, "final_dim": 48, "n_tasks": num_tasks, "pred_layer_id": list(range(4, 4 + num_tasks)), **settings}
    table = _tiny_shapes(settings, norm=False, mask=False)
    table |= output_layer_shapes(num_tasks, dim=48, inner=48, teacher_dim=48)
    config = {"distiller": settings, "teacher": {"model": "hubert_base", "n_layers": 12}, "audio": {"target_level": "None"}}
    return {"Step": 99, "Config": config, "Distiller": filled(table)}


def teacher_file():
    """The HuBERT teacher of appendix A in S3PRL's layout."""
    settings = {**TINY, "encoder_layers": 6, "final_dim": 8, "conv_feature_layers": TINY["extractor_conv_feature_layers"]}
    table = _tiny_shapes(settings)
    table |= {"final_proj.weight": (8, 48), "final_proj.bias": (8,), "label_embs_concat": (5, 8)}
    return {
        "task_cfg": {"label_rate": 50, "sample_rate": 16000, "normalize": False},
        "model_cfg": settings,
        "model_weight": filled(table),
        "dictionaries_symbols": [["a", "b", "c", "d", "e"]],
    }


def lighthubert_file(*, channels=8, dim=64, units=64, teacher_dim=24, leftovers=True, **settings):
    """A LightHuBERT file with random tensors; heads are 64 wide as in every LightHuBERT."""
    settings = {
        "_name": "hubert_pruner",
        "pruner_supernet": "config/Supernet-Base.yaml",
        "extractor_mode": "layer_norm",
        "conv_feature_layers": f"[({channels},10,5)] + [({channels},3,2)] * 4 + [({channels},2,2)] * 2",
        "conv_pos": 16,
        "encoder_embed_dim": dim,
        "encoder_ffn_embed_dim": units,
        "encoder_attention_heads": dim // 64,
        "teacher_embed_dim": teacher_dim,
        **settings,
    }
    table = shapes(channels=channels, dim=dim, units=units, kernel=16, conv_norm=settings["extractor_mode"])
    table["layer_pred_heads.11.weight"] = (teacher_dim, dim)
    if leftovers:
        table |= {"final_proj.weight": (16, dim), "final_proj.bias": (16,), "label_embs_concat": (20, 16)}
    return {"cfg": {"model": settings, "task": {"normalize": True}}, "model": filled(table), "extra_state": {"epoch": 3}}
