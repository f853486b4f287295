"""APC, VQ-APC and NPC written out from their equations over tensors with S3PRL's names, and files of every layout of theirs.

One utterance at a time, no padding, gates and taps one by one: nothing here is shared with sslim. Names, shapes and order are
those of the specification (sections 1.8.5 and 3.4).
"""

import torch
import torch.nn.functional as F

AUDIO = {"feat_type": "fbank", "feat_dim": 80, "frame_length": 25, "frame_shift": 10, "decode_wav": False, "cmvn": True}


def drawn(shapes, seed=0):
    """Tensors of the given shapes, small enough for gates that are not saturated."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def codebook_shapes(num_codes, code_dims):
    shapes = {}
    for group, (codes, dim) in enumerate(zip(num_codes, code_dims, strict=True)):
        shapes[f"vq_layers.{group}.vq_logits.weight"] = (codes, dim)
        shapes[f"vq_layers.{group}.vq_logits.bias"] = (codes,)
        shapes[f"vq_layers.{group}.codebook_CxE.weight"] = (dim, codes)
    return shapes


def gru_shapes(stem, width, dim, num_layers):
    shapes = {}
    for i in range(num_layers):
        shapes[f"{stem}.{i}.weight_ih_l0"] = (3 * dim, dim if i else width)
        shapes[f"{stem}.{i}.weight_hh_l0"] = (3 * dim, dim)
        shapes[f"{stem}.{i}.bias_ih_l0"] = shapes[f"{stem}.{i}.bias_hh_l0"] = (3 * dim,)
    return shapes


def apc_file(width=80, dim=12, num_layers=3, codes=None, audio=AUDIO, residual=True):
    """A later APC or VQ-APC."""
    shapes = gru_shapes("rnn_layers", width, dim, num_layers) | {"postnet.weight": (width, dim), "postnet.bias": (width,)}
    paras = {"num_layers": num_layers, "hidden_size": dim, "dropout": 0.1, "residual": residual}
    if codes is not None:
        shapes |= codebook_shapes(*codes)
        paras["vq"] = {"codebook_size": list(codes[0]), "code_dim": list(codes[1]), "gumbel_temperature": 0.5}
    data = {} if audio is None else {"data": {"audio": dict(audio)}}
    return {"config": {"model": {"paras": paras}, **data}, "model": drawn(shapes)}


def old_apc_file(width=40, dim=12, num_layers=3, prenet=()):
    """An APC of v0.1."""
    shapes = {}
    for i, (inputs, outputs) in enumerate(zip((width, *prenet), prenet, strict=False)):
        shapes |= {f"prenet.layers.{i}.weight": (outputs, inputs), f"prenet.layers.{i}.bias": (outputs,)}
    shapes |= gru_shapes("rnns", prenet[-1] if prenet else width, dim, num_layers)
    return drawn(shapes | {"postnet.layer.weight": (width, dim, 1), "postnet.layer.bias": (width,)})


def npc_file(width=80, dim=12, num_blocks=4, kernel=15, mask=5, codes=((5, 7), (8, 4)), batch_norm=True, audio=AUDIO):
    """An NPC."""
    shapes = {}
    for i in range(num_blocks):
        shapes[f"blocks.{i}.conv.weight"] = (dim, dim if i else width, 3)
        shapes[f"blocks.{i}.linear.weight"] = (dim, dim, 1)
        shapes[f"masked_convs.{i}.conv.weight"] = (dim, dim, kernel)
        for part in (f"blocks.{i}.conv", f"blocks.{i}.linear", f"masked_convs.{i}.conv"):
            shapes[f"{part}.bias"] = (dim,)
    shapes |= {"postnet.weight": (width, dim), "postnet.bias": (width,)} | (codebook_shapes(*codes) if codes else {})
    state = drawn(shapes)
    for i in range(num_blocks):
        hidden = torch.zeros(kernel, dtype=torch.bool)
        middle, half = kernel // 2, (mask + 2 * (i + 1)) // 2
        hidden[middle - half : middle + half + 1] = True
        state[f"masked_convs.{i}.conv_mask"] = (~hidden).float().expand(dim, dim, kernel).clone()
        for norm in ("bn1", "bn2") if batch_norm else ():
            generator = torch.Generator().manual_seed(i)
            for part in ("weight", "bias", "running_mean"):
                state[f"blocks.{i}.{norm}.{part}"] = torch.randn(dim, generator=generator)
            state[f"blocks.{i}.{norm}.running_var"] = 0.5 + torch.rand(dim, generator=generator)
            state[f"blocks.{i}.{norm}.num_batches_tracked"] = torch.tensor(17)
    paras = {"kernel_size": kernel, "mask_size": mask, "n_blocks": num_blocks, "hidden_size": dim, "dropout": 0.1}
    paras |= {"residual": True, "batch_norm": batch_norm, "activate": "relu", "disable_cross_layer": False}
    if codes:
        paras["vq"] = {"codebook_size": list(codes[0]), "code_dim": list(codes[1]), "gumbel_temperature": 1.0}
    data = {} if audio is None else {"data": {"audio": dict(audio)}}
    return {"config": {"model": {"paras": paras}, **data}, "model": state}


def gru(state, stem, x_TF):
    """h = (1 - z) * n + z * h, with n = tanh(W x + b + r * (U h + c))."""
    w, u = state[f"{stem}.weight_ih_l0"], state[f"{stem}.weight_hh_l0"]
    b, c = state[f"{stem}.bias_ih_l0"], state[f"{stem}.bias_hh_l0"]
    h, outputs = torch.zeros(u.shape[1]), []
    for x in x_TF:
        (xr, xz, xn), (hr, hz, hn) = (w @ x + b).chunk(3), (u @ h + c).chunk(3)
        z = (xz + hz).sigmoid()
        h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
        outputs.append(h)
    return torch.stack(outputs)


def nearest_codes(state, x_TD):
    """Each group's code of the largest logit."""
    parts, start, group = [], 0, 0
    while f"vq_layers.{group}.vq_logits.weight" in state:
        weight, bias = state[f"vq_layers.{group}.vq_logits.weight"], state[f"vq_layers.{group}.vq_logits.bias"]
        width = weight.shape[1]
        chosen = (x_TD[:, start : start + width] @ weight.T + bias).argmax(-1)
        parts.append(state[f"vq_layers.{group}.codebook_CxE.weight"][:, chosen].T)
        start, group = start + width, group + 1
    return torch.cat(parts, dim=1) if parts else x_TD


def run_apc(state, x_TF, *, residual=True):
    """Hidden states that S3PRL exposes, and predictions, of the later layout."""
    states, i = [], 0
    while f"rnn_layers.{i}.weight_ih_l0" in state:
        output = gru(state, f"rnn_layers.{i}", x_TF)
        x_TF = output + x_TF if residual and i else output
        states.append(x_TF)
        i += 1
    return states, nearest_codes(state, x_TF) @ state["postnet.weight"].T + state["postnet.bias"]


def run_old_apc(state, x_TF):
    """All internal representations of v0.1 (the pre-net's first where there is one), and predictions."""
    states, i = [], 0
    while f"prenet.layers.{i}.weight" in state:
        x_TF = (x_TF @ state[f"prenet.layers.{i}.weight"].T + state[f"prenet.layers.{i}.bias"]).relu()
        i += 1
    states, i = ([x_TF] if i else []), 0
    while f"rnns.{i}.weight_ih_l0" in state:
        output = gru(state, f"rnns.{i}", x_TF)
        x_TF = output + x_TF if output.shape == x_TF.shape else output
        states.append(x_TF)
        i += 1
    return states, x_TF @ state["postnet.layer.weight"][..., 0].T + state["postnet.layer.bias"]


def run_npc(state, x_TF):
    """Outputs of blocks and masked convolutions in turn, their sum, and predictions."""
    x_CT, states, total, i = x_TF.T, [], 0, 0

    def norm(x_CT, name):
        if f"{name}.weight" not in state:
            return x_CT
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scaled = (x_CT - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]

    while f"blocks.{i}.conv.weight" in state:
        inner = F.conv1d(x_CT, state[f"blocks.{i}.conv.weight"], state[f"blocks.{i}.conv.bias"], padding=1)
        inner = norm(inner, f"blocks.{i}.bn1").relu()
        inner = F.conv1d(inner, state[f"blocks.{i}.linear.weight"], state[f"blocks.{i}.linear.bias"])
        inner = norm(inner, f"blocks.{i}.bn2")
        x_CT = (inner + x_CT).relu() if i else inner.relu()
        kept = state[f"masked_convs.{i}.conv.weight"] * state[f"masked_convs.{i}.conv_mask"]
        seen = F.conv1d(x_CT, kept, state[f"masked_convs.{i}.conv.bias"], padding=kept.shape[-1] // 2).tanh()
        total = total + seen
        states += [x_CT.T, seen.T]
        i += 1
    states.append(total.T)
    return states, nearest_codes(state, total.T) @ state["postnet.weight"].T + state["postnet.bias"]
