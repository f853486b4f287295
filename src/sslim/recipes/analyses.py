"""The analyses of ``sslim analyze``: each measures, writes its JSON and its pictures, and returns a table to print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from sslim.analysis import attention_pictures as heads_drawn
from sslim.analysis import pictures
from sslim.analysis.ablation import ablate, distance_from_whole, random_orders
from sslim.analysis.attention import MEAN_DISTANCE, METRICS, Head, ordered, score_heads, uniform_scores
from sslim.analysis.layer_weights import read_layer_weights
from sslim.analysis.lnsr import LnsrConfig, measure_lnsr
from sslim.analysis.phone_relations import RELATIONS, phone_relations
from sslim.analysis.similarity import KEPT_VARIANCE, measure_similarity
from sslim.models.encoding import num_model_frames, run_batch
from sslim.models.speech import SpeechModel
from sslim.probes import ProbeConfig, probe, read_card
from sslim.recipes.analyzed_speech import AnalyzedSpeech, Tell, picture, write_result
from sslim.storage import file_digest, save_tensors

Say = Callable[[str], None]
RANDOM = "random"
DISTANCE = "distance"


def _quiet(done: int, total: int) -> None:
    """Tells nobody."""


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def analyze_lnsr(speech: AnalyzedSpeech, config: LnsrConfig, folder: Path, *, say: Say, tell: Tell = _quiet) -> Table:
    """Measures LNSR by layer; writes ``lnsr.json`` and ``lnsr.png``."""
    model = speech.models[0].model
    curves = measure_lnsr(model, speech.inputs(waveforms=config.perturb == "waveform"), config, tell=tell)
    layer = model.num_layers if config.attacked_layer is None else config.attacked_layer
    say(f"result: {write_result(folder, 'lnsr', speech.describe(), config, {'attacked_layer': layer, 'curves': curves})}")
    title = f"LNSR of {speech.title}: noise on {config.perturb}"
    with picture(folder / "lnsr.png", pictures.lnsr_size(curves), say) as figure:
        pictures.draw_lnsr(figure, curves, title=title, layer=layer)
    about = f"PGD of {config.steps} steps on layer {layer}; Gaussian noise equally loud; {config.norm} norm"
    table = _table(title, ["layer", *(f"{curve.noise} {curve.epsilon:g}" for curve in curves)], about)
    table.add_row("input", *(f"{curve.input:.4f}" for curve in curves))
    for i in range(model.num_layers + 1):
        table.add_row(str(i), *(f"{curve.layers[i]:.4f} ± {curve.layers_sd[i]:.4f}" for curve in curves))
    return table


def analyze_attention(
    speech: AnalyzedSpeech, folder: Path, *, example: str | None = None, say: Say, tell: Tell = _quiet
) -> Table:
    """Scores heads; writes ``attention.json``, ``heads.png``, ``examples.png`` and ``maps.png``.

    Args:
        speech: What to look at.
        folder: Where to.
        example: Id of the utterance that is shown; None is one of median length.
        say: Told what was written.
        tell: Told utterances done and in all.

    Raises:
        ValueError: There is no such utterance, or no attention.
    """
    shown = _example_index(speech, example)
    heads = score_heads(speech.models[0].model, speech.inputs(), tell=tell)
    settings = {"example": speech.corpus.utterance(shown).id, "frame_shift_s": speech.frame_shift_s}
    uniform = uniform_scores(num_model_frames(speech.models[0].model, speech.inputs()))
    result = {"uniform": uniform, "heads": heads}
    say(f"result: {write_result(folder, 'attention', speech.describe(), settings, result)}")
    with picture(folder / "heads.png", heads_drawn.heads_size(heads, 4), say) as figure:
        heads_drawn.draw_heads(figure, heads, title=f"Heads of {speech.title}")
    utterance = _example(speech, shown, heads)
    columns = min(heads_drawn.TOP, len(heads))
    with picture(folder / "examples.png", (2.7 * columns + 0.8, 2.75 * len(METRICS) + 0.4), say) as figure:
        heads_drawn.draw_examples(figure, heads, utterance)
    with picture(folder / "maps.png", heads_drawn.maps_size(heads), say) as figure:
        heads_drawn.draw_maps(figure, heads, utterance)
    caption = "rank among all heads in brackets; a head is of the category in which it ranks best"
    table = _table(f"Heads of {speech.title}", ["layer", "head", *METRICS, "mean distance / ms", "category"], caption)
    for head in heads:
        scores = [f"{getattr(head, metric):.4f} ({head.ranks[metric]})" for metric in METRICS]
        distance_ms = 1000 * head.mean_distance * speech.frame_shift_s
        table.add_row(str(head.layer), str(head.head), *scores, f"{distance_ms:.0f}", head.category)
    distance_ms = 1000 * uniform[MEAN_DISTANCE] * speech.frame_shift_s
    table.add_row("uniform", "", *(f"{uniform[metric]:.4f}    " for metric in METRICS), f"{distance_ms:.0f}", "")
    return table


def _example_index(speech: AnalyzedSpeech, name: str | None) -> int:
    if name is None:
        lengths = speech.inputs().lengths
        return int(speech.indices[np.argsort(lengths, kind="stable")[len(lengths) // 2]])
    ids = speech.corpus.ids()
    if name not in ids:
        raise ValueError(f"corpus {speech.corpus.name} has no utterance {name!r}; its first is {ids[0]!r}")
    return ids.index(name)


def _example(speech: AnalyzedSpeech, index: int, heads: Sequence[Head]) -> heads_drawn.ExampleUtterance:
    model, alone = speech.models[0].model, replace(speech, indices=np.array([index]))
    inputs = alone.inputs()
    with torch.inference_mode():
        output = run_batch(model, [inputs.read(0)], is_waveform=inputs.is_waveform, need_weights=True)
    layers = sorted({head.layer for head in heads})
    weights = {layer: part[0].float().cpu().numpy() for layer, part in zip(layers, output.attentions, strict=True)}
    utterance = speech.corpus.utterance(index)
    return heads_drawn.ExampleUtterance(
        name=utterance.id,
        frame_shift_s=speech.frame_shift_s,
        weights={head.place: weights[head.layer][head.head - 1] for head in heads},
        alignment=utterance.alignment,
    )


def analyze_ablation(
    speech: AnalyzedSpeech,
    folder: Path,
    *,
    measure: str = DISTANCE,
    num_points: int = 13,
    num_random: int = 3,
    say: Say,
    tell: Tell = _quiet,
) -> Table:
    """Takes heads away in the order of each score and at random; writes ``ablation.json`` and ``ablation.png``.

    Args:
        speech: What to look at; scores and distances are of these utterances, a probe takes the whole corpus.
        folder: Where to.
        measure: ``distance``: relative change of the final output; else a task of ``sslim probe``, whose accuracy is measured
            with a linear classifier trained anew on the mix of what each layer gives without the heads.
        num_points: Numbers of heads on each curve.
        num_random: Random orders.
        say: Told what was written.
        tell: Told measurements done and in all.
    """
    named = speech.models[0]
    heads = score_heads(named.model, speech.inputs())
    orders = {metric: ordered(heads, metric) for metric in METRICS}
    orders |= random_orders([head.place for head in heads], num_random, speech.config.seed)
    if measure == DISTANCE:
        label, value = "relative change of the final output", distance_from_whole(named.model, speech.inputs())
    else:
        config = ProbeConfig(task=measure, num_seeds=1, baselines=False)
        label = f"accuracy of a probe for {measure}"

        def value(changed: SpeechModel) -> float:
            return float(probe(speech.corpus, [replace(named, model=changed)], config)["rows"][0]["mean"])

    curves = ablate(named.model, orders, value, num_points=num_points, tell=tell)
    settings = {"measure": measure, "num_points": num_points, "num_random": num_random}
    say(f"result: {write_result(folder, 'ablation', speech.describe(), settings, curves)}")
    title = f"Head ablation of {speech.title}"
    with picture(folder / "ablation.png", (7.8, 4.0), say) as figure:
        pictures.draw_ablation(figure, curves, title=title, measure=label)
    columns = ["heads taken away", *(curve.order for curve in curves)]
    table = _table(title, columns, f"{label}; the heads of the highest score go first")
    for i, removed in enumerate(curves[0].removed):
        table.add_row(str(removed), *(f"{curve.values[i]:.4f}" for curve in curves))
    return table


def analyze_phones(speech: AnalyzedSpeech, folder: Path, *, say: Say, tell: Tell = _quiet) -> Table:
    """Adds up attention by phones; writes ``phones.json``, ``phones.safetensors``, ``phones.png`` and ``relations.png``.

    Args:
        speech: Utterances with alignments.
        folder: Where to.
        say: Told what was written.
        tell: Told utterances done and in all.
    """
    alignments = [speech.corpus.utterance(i).alignment or () for i in speech.indices.tolist()]
    shift_s = speech.frame_shift_s
    length_s = speech.frame_length_s
    options = {"frame_shift_s": shift_s, "frame_length_s": length_s}
    found = phone_relations(speech.models[0].model, speech.inputs(), alignments, tell=tell, **options)
    result = {"phones": found.phones, "uniform": found.uniform, "heads": found.heads}
    say(f"result: {write_result(folder, 'phones', speech.describe(), options, result)}")
    tensors = {"maps": torch.from_numpy(found.maps_HCC), "uniform": torch.from_numpy(found.uniform_CC)}
    save_tensors(folder / "phones.safetensors", {name: tensor.float().contiguous() for name, tensor in tensors.items()})
    say(f"maps: {folder / 'phones.safetensors'}")
    with picture(folder / "phones.png", heads_drawn.phone_maps_size(found), say) as figure:
        heads_drawn.draw_phone_maps(figure, found, title=f"Phone relations of {speech.title}")
    with picture(folder / "relations.png", heads_drawn.heads_size(found.heads, 6), say) as figure:
        heads_drawn.draw_relations(figure, found, title=f"What heads look at: {speech.title}")
    caption = "shares of the attention between frames of phones, in %"
    table = _table(f"Phone relations of {speech.title}", ["layer", "head", *RELATIONS, "nats from uniform"], caption)
    for head in found.heads:
        shares = [f"{100 * head.relations[name]:.1f}" for name in RELATIONS]
        table.add_row(str(head.layer), str(head.head), *shares, f"{head.divergence:.3f}")
    table.add_row("uniform", "", *(f"{100 * found.uniform[name]:.1f}" for name in RELATIONS), f"{0:.3f}")
    return table


def analyze_similarity(
    speech: AnalyzedSpeech, folder: Path, *, kept_variance: float = KEPT_VARIANCE, say: Say, tell: Tell = _quiet
) -> Table:
    """Compares layers of one model, or of two; writes ``similarity.json`` and ``similarity.png``.

    Args:
        speech: One or two models.
        folder: Where to.
        kept_variance: Share of a layer's variance that canonical correlation looks at.
        say: Told what was written.
        tell: Told utterances done and in all.
    """
    models = [named.model for named in speech.models]
    inputs = [speech.inputs(i) for i in range(len(models))]
    found = measure_similarity(models, inputs, kept_variance=kept_variance, tell=tell)
    say(f"result: {write_result(folder, 'similarity', speech.describe(), {'kept_variance': kept_variance}, found)}")
    names = (speech.models[0].name, speech.models[-1].name)
    title = f"Similarity of layers: {speech.title}"
    with picture(folder / "similarity.png", pictures.similarity_size(found), say) as figure:
        pictures.draw_similarity(figure, found, names=names, title=title)
    caption = f"linear CKA over {found.num_frames} frames; {folder / 'similarity.json'} has CCA and PWCCA"
    table = _table(title, [f"{names[0]} \\ {names[1]}", *map(str, range(len(found.cka[0])))], caption)
    for i, row in enumerate(found.cka):
        table.add_row(str(i), *(f"{value:.3f}" for value in row))
    return table


def analyze_layer_weights(cards: Sequence[Path], folder: Path, *, say: Say) -> Table:
    """Reads learned layer weights; writes ``layer-weights.json`` and ``layer-weights.png``.

    Args:
        cards: Result cards of ``sslim probe``.
        folder: Where to.
        say: Told what was written.

    Raises:
        ValueError: No card is given, or none has learned weights.
    """
    if not cards:
        raise ValueError("there is nothing to read: name a result card of `sslim probe`")
    rows = read_layer_weights([read_card(path) for path in cards])
    described = {"cards": [{"path": str(path), "sha256": file_digest(path)} for path in cards]}
    say(f"result: {write_result(folder, 'layer-weights', described, {}, rows)}")
    tasks = sorted({f"{row.task} on {row.corpus}" for row in rows})
    title = f"Layer weights of probes: {', '.join(tasks)}"
    with picture(folder / "layer-weights.png", pictures.layer_weights_size(rows), say) as figure:
        pictures.draw_layer_weights(figure, rows, title=title)
    width = max(len(row.weights) for row in rows)
    table = _table(
        title, ["features", "test", "mean layer", *map(str, range(width))], "weights after the softmax, mean over seeds"
    )
    for row in rows:
        score = f"{100 * row.score:.1f} ± {100 * row.sd:.1f}"
        weights = [f"{weight:.3f}" for weight in row.weights] + ["-"] * (width - len(row.weights))
        table.add_row(f"{row.task}: {row.name}", score, f"{row.centre:.2f}", *weights)
    return table
