"""``load_model``: one entry for the native folder and every foreign format in the ``IMPORTERS`` table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslim.checkpoints.importers import (
    Imported,
    distilalhubert,
    distilhubert,
    dphubert,
    hubert,
    huggingface,
    lighthubert,
    melhubert,
    predictive,
    s3prl,
)
from sslim.checkpoints.native import DESCRIPTION, assemble, load_native
from sslim.checkpoints.restricted_pickle import OPTIMISER_KEYS, CheckpointError, read_pickle
from sslim.frontends import ConvFrontendConfig, load_statistics
from sslim.models import SpeechModel
from sslim.models.elastic import extract_model

MAX_KEYS = 8  # top-level keys spelt out in an error


@dataclass(frozen=True, kw_only=True)
class Importer:
    """A foreign format.

    Attributes:
        name: What people call it.
        recognises: Whether the contents of a file (as ``read_pickle`` gives them) are of this format; looks at keys only.
        convert: Contents and the file's name to a description and native tensors.
        holds: The top-level keys that tell it, for the error about an unknown file.
    """

    name: str
    recognises: Callable[[Any], bool]
    convert: Callable[..., Imported]
    holds: str


def load_model(
    path: str | Path,
    *,
    statistics: str | Path | None = None,
    subnet: str | Mapping[str, Any] | None = None,
    compat: Literal["reference"] | None = None,
) -> SpeechModel:
    """Loads a model from a native folder or a foreign checkpoint.

    Args:
        path: A folder that ``save_model`` wrote, or a foreign checkpoint: a file, or a folder of Hugging Face's.
        statistics: Global mean and standard deviation for the front-end of a foreign file, which holds none: a published set
            (``libri-100``, ``libri-360``, ``libri-960``) or a file. Without it features can be encoded, waveforms cannot.
        subnet: Which part of a supernet: ``default``, ``max``, ``min``, or a description (see ``SearchSpace.subnet``);
            ``whole`` keeps the supernet, to train or search it further. None is the default subnet where one is known, else
            the whole.
        compat: ``reference`` makes a convolutional front-end treat padding as the reference implementation does (see
            ``ConvFrontendConfig``), and cuts long inputs where S3PRL does (see ``ChunkingConfig``): features then depend on
            what an utterance is batched with.

    Returns:
        The model in eval mode on the CPU, with its provenance.

    Raises:
        CheckpointError: Not a checkpoint that can be read; the sentence says why.
        ValueError: Unknown statistics; statistics, a subnet or ``compat`` for a model that has no use for them; a subnet that
            the supernet does not have.
        FileNotFoundError: There is nothing at ``path``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a model folder or a checkpoint file")
    model = _import_folder(path) if path.is_dir() else _import_file(path, subnet)
    model = _chosen_subnet(model, subnet, path)
    if compat is not None:
        model = _with_compat(model, compat, path)
    return model if statistics is None else _with_statistics(model, statistics, path)


def _chosen_subnet(model: SpeechModel, choice: str | Mapping[str, Any] | None, path: Path) -> SpeechModel:
    space = model.config.search_space
    if space is None:
        if choice is not None:
            raise ValueError(f"{path} is no supernet: subnet {choice!r} cannot be chosen, leave it out")
        return model
    if choice is None:
        choice = "whole" if space.default is None else "default"
    if choice == "whole":
        return model
    try:
        return extract_model(model, space.subnet(choice)).eval()
    except ValueError as error:
        hint = "; give the sizes, subnet={...}, or subnet='whole'" if isinstance(choice, str) else ""
        raise ValueError(
            f"{path}: {f'subnet {choice!r}' if isinstance(choice, str) else 'that subnet'}: {error}{hint}"
        ) from error


def _with_compat(model: SpeechModel, compat: Literal["reference"], path: Path) -> SpeechModel:
    if compat != "reference":
        raise ValueError(f"compat={compat!r} is unknown; accepted: 'reference', or None")
    config = model.config
    if isinstance(config.frontend, ConvFrontendConfig):
        config = replace(config, frontend=replace(config.frontend, compat=compat))
    elif config.chunking is not None:
        config = replace(config, chunking=replace(config.chunking, compat=compat))
    else:
        raise ValueError(
            f"{path} has no convolutional front-end and no limit on its inputs: compat={compat!r} changes nothing, leave it out"
        )
    return assemble(
        config,
        model.state_dict(),
        model.provenance,
        source=str(path),
    )


def _import_folder(path: Path) -> SpeechModel:
    if (path / DESCRIPTION).is_file():
        return load_native(path)
    if not huggingface.is_folder(path):
        inner = path / "model"  # where a run keeps its model
        hint = f"; its folder {inner} is one" if (inner / DESCRIPTION).is_file() else ""
        raise CheckpointError(
            f"{path} is no model folder: it has no {DESCRIPTION} (sslim) and no {huggingface.CONFIG} (Hugging Face){hint}"
        )
    imported = huggingface.convert_folder(path)
    provenance = [{"action": "import", "format": huggingface.NAME, "file": path.resolve().name, **imported.notes}]
    return assemble(imported.config, imported.state, provenance, source=str(path))


def _import_file(path: Path, subnet: str | Mapping[str, Any] | None) -> SpeechModel:
    if path.name in (DESCRIPTION, huggingface.CONFIG):
        raise CheckpointError(f"{path} is the description of a model: give its folder {path.parent}")
    if path.suffix == ".bin" and huggingface.is_folder(path.parent):
        raise CheckpointError(f"{path} holds tensors without their description: give their folder {path.parent}")
    contents = read_pickle(path, skip=OPTIMISER_KEYS)
    for importer in IMPORTERS:
        if importer.recognises(contents):
            imported = importer.convert(contents, str(path))
            if imported.undecided_subnet and subnet != "whole" and not isinstance(subnet, Mapping):
                raise CheckpointError(
                    f"{path} {imported.undecided_subnet}: give the subnet's sizes, subnet={{...}}, or subnet='whole'"
                )
            provenance = [{"action": "import", "format": importer.name, "file": path.name, **imported.notes}]
            return assemble(imported.config, imported.state, provenance, source=str(path))
    raise CheckpointError(
        f"{path} {_unknown(contents)}; known formats: {', '.join(f'{i.name} ({i.holds})' for i in IMPORTERS)}"
    )


def _unknown(contents: Any) -> str:
    if melhubert.is_head_scores(contents):
        return (
            "is a MelHuBERT list of head scores (heads_and_score_*.ckpt), not a model: give the states_prune_*.ckpt beside it"
        )
    if not isinstance(contents, dict):
        return f"holds a {type(contents).__name__}, not a dictionary with a model"
    keys = [str(key)[:40] for key in contents]
    more = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
    return f"is of no known format, its keys are {', '.join(keys[:MAX_KEYS]) or 'none'}{more}"


def _with_statistics(model: SpeechModel, statistics: str | Path, path: Path) -> SpeechModel:
    normalization = getattr(model.config.frontend, "normalization", None)
    if model.frontend is None or normalization is None or normalization.kind != "global":
        raise ValueError(f"{path} has a front-end without global statistics: leave statistics={str(statistics)!r} out")
    mean_F, std_F, source = load_statistics(statistics)
    model.set_statistics(mean_F, std_F, source=source)
    model.provenance.append({"action": "set statistics", "source": source})
    return model


IMPORTERS = (
    Importer(
        name="MelHuBERT",
        recognises=melhubert.recognises,
        convert=melhubert.convert,
        holds="model, Upstream_Config.melhubert or .hubert",
    ),
    Importer(
        name="LightHuBERT",
        recognises=lighthubert.recognises,
        convert=lighthubert.convert,
        holds="cfg.model._name hubert_pruner or student_hubert, model",
    ),
    Importer(
        name="DistilHuBERT",
        recognises=distilhubert.recognises,
        convert=distilhubert.convert,
        holds="Distiller, Config.distiller",
    ),
    Importer(
        name="DistilALHuBERT",
        recognises=distilalhubert.recognises,
        convert=distilalhubert.convert,
        holds="alhubert, Config.alhubert",
    ),
    Importer(
        name="DPHuBERT",
        recognises=dphubert.recognises,
        convert=dphubert.convert,
        holds="state_dict, config.extractor_conv_layer_config",
    ),
    Importer(
        name="HuBERT",
        recognises=hubert.recognises,
        convert=hubert.convert,
        holds="cfg or args, model; or task_cfg, model_cfg, model_weight; a folder with config.json is Hugging Face's",
    ),
    Importer(
        name="S3PRL",
        recognises=s3prl.recognises,
        convert=s3prl.convert,
        holds="Transformer or Mockingjay, and transformer in Settings.Config, Config or Upstream_Config",
    ),
    Importer(
        name=predictive.NAME,
        recognises=predictive.recognises,
        convert=predictive.convert,
        holds="model, and model.paras in config or Upstream_Config; or rnns.0.weight_ih_l0",
    ),
)
