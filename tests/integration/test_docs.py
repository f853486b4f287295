"""The documents do not drift: their commands parse, the names in them exist, their Python runs, their links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

import sslim
from sslim import cli
from sslim.batch import Padded, valid_mask
from sslim.checkpoints.exporters import export_s3prl
from sslim.commands.pretrain import changed, changes_of
from sslim.commands.probe import check_conditions, probe_config
from sslim.config import to_plain
from sslim.data.audio_sources import SourceOptions, folder_source
from sslim.data.feature_presets import PRESETS as FEATURES
from sslim.data.feature_presets import feature_preset
from sslim.data.prepare import prepare
from sslim.frontends import build_frontend
from sslim.models import build_model
from sslim.models.reconstruction import tera
from sslim.models.stacking import repeat_frames
from sslim.recipes.pretrain_recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "parity" / "assets"
S3PRL = ASSETS / "s3prl"
DOCS = sorted((ROOT / "docs").glob("*.md"))
NAMES = {  # verb -> the option that is a name out of a table, and where the table is
    "pretrain": ("recipe", ("sslim.recipes.pretrain_recipes",)),
    "compress distil": ("student", ("sslim.recipes.distil_recipes", "sslim.models")),
    "compress supernet": ("recipe", ("sslim.recipes.supernet",)),
}
THEIRS = {  # what each document has to answer: every command, script and entry point of the originals' own guides
    "from_s3prl.md": (
        "mockingjay_libri_linearLarge", "tera_libri_fmllrBase", "aalbert_libri_fbank3L", "Custom_train", "fea_lst",
        "preprocess_libri.py", "preprocess_timit.py", "preprocess_any.py", "preprocess_mosi.py", "preprocess_mosei",
        "ark2libri.py", "ark2timit.py", "ark2voxceleb.py", "timit2ark.py", "generate_len_for_bucket.py",
        "preprocess_alignment.py", "run_upstream.py", "--run transformer", "--run apc", "--config", "--resume", "--name",
        "--ckpdir", "--seed", "--test", "--cpu", "--multi_gpu", "--test_reconstruct", "--online_config", "--kaldi_data",
        "run_downstream.py", "phone_linear", "phone_1hidden", "phone_concat", "speaker_frame", "speaker_utterance",
        "--upstream transformer", "--upstream apc", "--upstream baseline", "--ckpt", "--input_dim", "--fine_tune",
        "--weighted_sum", "--phone_set", "cpc_phone", "montreal_phone", "--expdir", "ckpt_file", "load_pretrain", "no_grad",
        "dropout", "spec_aug", "spec_aug_prev", "weighted_sum", "select_layer", "permute_input", "inp_dim", "SPEC_TRANSFORMER",
        "LIN", "example_extract_finetune.py", "tutorial_use_pretrained_model_without_preprocessing.py", "src/runner.py",
        "observe_lnsr.py", "observe_input.py", "observe_weights.py", "observe_ckpt.py", "fix_ckpt.py", "find_lowest_wer.py",
        "nn_transformer.py", "get_upstream_model", "tensorboard", "downsample_rate", "get_optimizer", "load_data",
    ),
    "from_melhubert.md": (
        "preprocess.sh", "train.py", "extract_feature.py", "cal_data_mean_var.py", "extract_label.py", "create_csv.py",
        "s3prl_upstream", "weight-pruning", "head-pruning", "row-pruning", "distillation",
        "--init_optimizer_from_initial_weight", "--multi_gpu", "--seed", "--device", "-i", "-f", "-g", "-c", "-n", "-m",
        "adjust_init_weight", "mean-std.npy",
    ),
    "from_distilalhubert.md": (
        "run_pretrain.py", "run_downstream.py", "alhubert_local", "generate_len_for_bucket.py", "-u", "-g", "-c", "-n", "-p",
        "-a", "-e", "-o", "--multi_gpu", "hubert_local", "distilhubert", "Featurizer", "hidden_states", "repeat_time",
    ),
    "from_lighthubert.md": (
        "LightHuBERTConfig", "supernet_type", "set_sample_config", "max_subnet", "min_subnet", "sample_subnet", "subnet",
        "extract_features", "ret_hs", "dynamize", "calc_sampled_param_num", "lighthubert_small.pt", "lighthubert_base.pt",
        "lighthubert_stage1.pt", "slide_wsz", "search_subnet.py", "distill.py", "prune.py", "final_distill.py",
        "save_final_ckpt.py", "s3prl_profiling_test.py", "convert_hubert_from_hf.py",
    ),
}  # fmt: skip


def shell_commands(text: str) -> list[list[str]]:
    """Arguments of every sslim command in bash blocks, behind launchers too."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["sslim"]:
            found.append(words[1:])
        elif "sslim" in words and words[words.index("sslim") - 1] == "-m":
            found.append(words[words.index("sslim") + 1 :])
    return found


def spans(text: str) -> list[list[str]]:
    """Arguments of every `sslim ...` inside a sentence or table."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [shlex.split(span)[1:] for span in re.findall(r"`(sslim [^`]+)`", outside)]


def python_blocks(text: str) -> dict[str, str]:
    """Python blocks by the name in the comment above them; every block must have one."""
    found = re.findall(r"(?:<!-- tested: ([\w-]+) -->\n)?```python\n(.*?)```", text, flags=re.DOTALL)
    assert all(name for name, _ in found), "a Python block without a line <!-- tested: NAME --> above it"
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def is_a_name(words: list[str]) -> bool:
    """Whether a span only names a verb, or a method of one: `sslim prepare`, `sslim compress heads`."""
    module = importlib.import_module(cli.VERBS[words[0]][0])
    return len(words) == 1 or (len(words) == 2 and words[1] in getattr(module, "METHODS", {}))


def check(words: list[str]) -> Any:
    """Parses a command with the parser that a user meets, and looks names up that the parser takes as any word."""
    if words[-1] in ("--help", "--version"):
        assert not words[:-1] or is_a_name(words[:-1])
        return None
    verb, module, arguments = cli.find_command(words)
    assert module is not None
    options = cli.parse_options(verb, module, arguments)
    if verb == "prepare" and options.features is not None:
        feature_preset(options.features)
    if verb == "probe":
        check_conditions(options)
        probe_config(options)
    if verb == "pretrain" and options.recipe in RECIPES:
        changed(RECIPES[options.recipe](), changes_of(options))
    if verb in NAMES:
        field, tables = NAMES[verb]
        name = getattr(options, field)
        tables = [importlib.import_module(table) for table in tables]
        known = {name for table in tables for name in getattr(table, "RECIPES", getattr(table, "PRESETS", ()))}
        assert name in known or name is None or "/" in name or name.endswith(".json"), f"{name} is not among {sorted(known)}"
    return options


def ours(path: Path) -> list[tuple[str, list[str]]]:
    text = path.read_text(encoding="utf-8")
    named = [words for words in spans(text) if not (words[0] in cli.VERBS and is_a_name(words))]
    return [(path.name, words) for words in shell_commands(text) + named]


@pytest.mark.parametrize(
    ("name", "words"),
    [each for path in DOCS for each in ours(path)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_command_is_understood(name, words):
    check(words)


def test_spans_of_the_readme_name_verbs_and_options_that_exist():
    """Its table has placeholders in place of methods, so these are only looked up."""
    for words in spans((ROOT / "README.md").read_text(encoding="utf-8")):
        if words[-1] == "…":
            continue
        assert words[0] in cli.VERBS, words
        module = importlib.import_module(cli.VERBS[words[0]][0])
        methods = getattr(module, "METHODS", {})
        modules = [importlib.import_module(each[0]) for each in methods.values()] or [module]
        accepted = {f"--{field.replace('_', '-')}" for each in modules for field in each.Options.__dataclass_fields__}
        assert {word for word in words if word.startswith("--")} <= accepted, words


@pytest.mark.parametrize("text", ["sslim prune x", "sslim compress trim x --output y", "sslim extract m a --outputs f",
                                  "sslim pretrain tera-huge c --output r", "sslim import a", "sslim import a b c",
                                  "sslim probe tones m --corpus c", "sslim probe label m --corpus c --epochs 3",
                                  "sslim probe label m --corpus c --save-model x",
                                  "sslim prepare a b --features fbank81",
                                  "sslim pretrain tera-base c --output r --set objective.alteration.span=3"])  # fmt: skip
def test_control_wrong_commands_are_noticed(text):
    for wrapped in (f"see `{text}`", f"```bash\n{text}  # comment\n```"):
        (words,) = shell_commands(wrapped) + spans(wrapped)
        with pytest.raises((KeyError, AssertionError, ValueError)):
            check(words)


def test_control_launchers_and_names():
    assert shell_commands("```bash\ntorchrun --nproc-per-node 2 -m sslim report run\n```") == [["report", "run"]]
    assert is_a_name(["compress", "heads"])
    assert not is_a_name(["compress", "runs/x"])
    with pytest.raises(AssertionError, match="without a line"):
        python_blocks("```python\nx = 1\n```")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_hygiene(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|/home/|/work/|/tmp/|/root/|pip install|github\.com|huggingface\.co", text)
    assert max(map(len, text.splitlines())) <= 400
    text = re.sub(r"```.*?```|`[^`]+`", "", text, flags=re.DOTALL)  # indexing and calling looks like a link
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        headings = [re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()) for line in text.splitlines() if line[:1] == "#"]
        assert anchor in {heading.replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_options_features_and_keys_that_stand_alone_exist(path):
    """In tables, the columns behind the first hold parts of commands: an option with its value, a dotted key of a recipe."""
    text = path.read_text(encoding="utf-8")
    cells = [cell for row in re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE) for cell in row.split(" | ")[1:]]
    own = [span for cell in cells for span in re.findall(r"`(--[^`]+)`", cell)]
    modules = [importlib.import_module(module) for module, _ in cli.VERBS.values()]
    modules += [importlib.import_module(each[0]) for module in modules for each in getattr(module, "METHODS", {}).values()]
    accepted = {f"--{field.replace('_', '-')}" for module in modules for field in module.Options.__dataclass_fields__}
    assert {word for span in own for word in span.split() if word.startswith("--")} <= accepted
    for name in re.findall(r"--features (\w[\w@-]*)", " ".join(own)):
        feature_preset(name)
    plain = json.loads(json.dumps(to_plain(RECIPES["tera-base"]())))
    for key in re.findall(r"`((?:objective|training|data)\.[\w.]+)`", " ".join(cells)):
        node = plain
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_every_feature_is_defined_with_its_width_and_period():
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    for name, preset in FEATURES.items():
        (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", text, flags=re.MULTILINE)
        frontend = None if preset.frontend is None else build_frontend(preset.frontend)
        wanted = ("–", "–") if frontend is None else (str(frontend.feature_dim), f"{1000 * frontend.frame_shift_s:g} ms")
        assert tuple(cell.strip() for cell in row.split(" | ")[:2]) == wanted, name


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {path.name for path in DOCS} - {"index.md"} <= set(re.findall(r"\]\(([\w.]+)\)", index))


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_everything_of_theirs_is_answered(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`+[^`]+`+", text))
    missing = [word for word in THEIRS[name] if word not in code]
    assert not missing, f"{name} says nothing about {', '.join(missing)}"


def test_recipes_find_the_features_that_the_table_names():
    text = (ROOT / "docs" / "from_s3prl.md").read_text(encoding="utf-8")
    rows = re.search(r"\| recipes \| features of the corpus \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1].splitlines()
    named = [(re.findall(r"`([\w-]+)`", row.split("|")[1]), re.search(r"`(\w[\w-]+)`", row.split("|")[2])[1]) for row in rows]
    for recipes, features in named:
        for name in recipes:
            frontend, stored = RECIPES[name]().model.frontend, FEATURES[features].frontend
            if frontend is None:
                assert features == "fmllr40"
            else:
                assert frontend.features == stored.features, name
    learning = {name for name, make in RECIPES.items() if make().objective.kind != "masked_prediction"}
    assert {name for name in learning if not name.endswith("-tiny")} == {name for recipes, _ in named for name in recipes}


# ---- Python blocks, run on stored checkpoints and compared with what the originals gave for them ------------------------


def run(code: str, **given: Any) -> dict[str, Any]:
    """Runs a block as a script in the working directory; returns its names."""
    Path("block.py").write_text(code, encoding="utf-8")
    return runpy.run_path("block.py", init_globals=given)


def largest(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).detach().abs().max())


def run_melhubert(code: str) -> None:
    gold = load_file(ASSETS / "melhubert" / "melhubert_10ms.safetensors")
    shutil.copy(ASSETS / "melhubert" / "melhubert_10ms.ckpt", "melhubert.ckpt")
    np.save("mean-std.npy", torch.stack([gold["mean"], gold["std"]]).double().numpy())
    soundfile.write("audio.wav", gold["wav0"].numpy(), 16000, subtype="FLOAT")
    names = run(code)
    wanted = [gold["single.projected"], *(gold[f"single.hidden{k}"] for k in range(3))]
    assert len(names["hidden_states"]) == len(wanted)
    assert max(largest(*pair) for pair in zip(names["hidden_states"], wanted, strict=True)) <= 1e-5
    assert largest(names["last"], gold["single.last"]) <= 1e-5


def run_distilalhubert(code: str) -> None:
    """Its waveforms are noise, so the utterance with stored outputs takes the place of the first."""
    gold = load_file(ASSETS / "distilalhubert" / "postnorm_2x6.safetensors")
    shutil.copy(ASSETS / "distilalhubert" / "postnorm_2x6.ckpt", "alhubert.ckpt")
    assert code.count("torch.randn(16000)") == 1
    names = run(code.replace("torch.randn(16000)", "stored"), stored=gold["single.wav"][0])
    num_frames = gold["single.last_hidden_state"].shape[1]
    assert len(names["hidden_states"]) == 12
    assert names["num_frames_B"].tolist() == [num_frames, 27]
    for k, state in enumerate(names["hidden_states"]):  # beside a longer neighbour, which changes nothing here
        assert largest(state[:1, :num_frames], gold[f"single.hidden{k}"]) <= 2e-5
    assert largest(names["last_hidden_state"][:1, :num_frames], gold["single.last_hidden_state"]) <= 2e-5


def run_lighthubert(code: str) -> None:
    folder = ASSETS / "lighthubert"
    arrays = {key: torch.from_numpy(array) for key, array in np.load(folder / "supernet_default_subnets.npz").items()}
    described = json.loads((folder / "supernet_default_subnets.json").read_text())
    tensors = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
    torch.save({"cfg": described["cfg"], "model": tensors}, "lighthubert.pt")
    Path("subnet.json").write_text(json.dumps(described["subnets"]["subnet1"]["subnet"]))
    torch.save(arrays["gold/subnet1.single.wav"], "wav.pt")
    names = run(code)
    assert len(names["hidden_states"]) == 11
    for k, state in enumerate(names["hidden_states"]):
        assert largest(state, arrays[f"gold/subnet1.single.hidden{k}"]) <= 2e-5
    assert largest(names["rep"], arrays["gold/subnet1.single.last"]) <= 2e-5


def with_tera(name: str = "tera_prenorm") -> dict[str, Tensor]:
    """Puts a stored TERA and its features (the second utterance has 70 of 100 frames) where the blocks look for them."""
    gold = load_file(S3PRL / f"{name.removesuffix('_new_format')}.safetensors")
    shutil.copy(S3PRL / f"{name}.ckpt", "tera.ckpt")
    torch.save(gold["feat"], "features.pt")
    return gold


def run_representations(code: str) -> None:
    """TERA, whose states of all layers were stored, then AALBERT, which stacks three frames and repeats its states."""
    for name in ("tera_fmllr_new_format", "aalbert_fbank"):
        gold = with_tera(name)
        names = run(code)
        real = valid_mask(torch.tensor([100, 70]), 100)
        hidden = [gold[f"batch.hidden{k}"] for k in range(3)]
        if name == "aalbert_fbank":
            hidden = [
                repeat_frames(Padded(values=x, lengths=torch.tensor([33, 24])), 3, names["lengths_B"]).values for x in hidden
            ]
        assert largest(names["second_layer"][real], hidden[1][real]) <= 1e-5
        for got, want in zip(names["all_layers"], hidden, strict=True):
            assert largest(got[real], want[real]) <= 1e-5
        assert largest(names["last"][real], hidden[-1][real]) <= 1e-5
        if name != "aalbert_fbank":  # where S3PRL's own repetition is late by half of what is left over
            assert largest(names["last"][real], gold["batch.last"][real]) <= 1e-5


def run_settings(code: str) -> None:
    gold = with_tera()
    names = run(code)
    model, untrained, dropped = names["model"], names["untrained"], names["dropped"]
    assert not torch.equal(model.projection.linear.weight, untrained.projection.linear.weight)
    assert dropped.config.encoder.dropout == 0.3
    assert torch.equal(model.projection.linear.weight, dropped.projection.linear.weight)
    features, masked = names["features"], names["masked"].values
    assert torch.equal(features.values, gold["feat"])  # the caller's features stay
    hidden = (masked != features.values) & valid_mask(features.lengths, 100)[..., None]
    assert 0.1 < float(hidden.float().mean()) < 0.6
    assert bool((masked[hidden] == 0).all())
    assert torch.allclose(names["mixed_BTD"], torch.stack(names["output"].layers[1:]).mean(0), atol=1e-6)  # as theirs, frozen
    names["mixed_BTD"].square().mean().backward()
    assert bool((names["weights_L"].grad != 0).all())


def run_finetune(code: str) -> None:
    """Labels follow from the features, and the loss falls; what is saved is what was trained."""
    gold = with_tera()
    generator = torch.Generator().manual_seed(0)
    map_FC = torch.randn(40, 3, generator=generator)
    batches = []
    for _ in range(40):
        features_BTF = gold["feat"][:, :30] + 0.1 * torch.randn(2, 30, 40, generator=generator)
        labels_BT = (features_BTF @ map_FC).argmax(-1)
        labels_BT[1, 20:] = -100
        batches.append((features_BTF, torch.tensor([30, 20]), labels_BT))
    losses: list[float] = []

    def cross_entropy(*arguments: Any, **options: Any) -> Tensor:
        loss = original(*arguments, **options)
        losses.append(float(loss.detach()))
        return loss

    original = torch.nn.functional.cross_entropy
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
        names = run(code, batches=batches)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    saved = sslim.load_model("fine-tuned")
    assert not saved.training
    with torch.no_grad():
        states = [
            model.encode_features(gold["feat"][:1]).final for model in (saved, names["model"], sslim.load_model("tera.ckpt"))
        ]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2], atol=1e-2)


def run_waveform(code: str) -> None:
    """A checkpoint with a front-end, in S3PRL's layout: made here, since no stored one has any."""
    config = tera(num_layers=2, dim=32, num_heads=4, feedforward_dim=64)
    model = build_model(config, torch.Generator().manual_seed(0))
    export_s3prl(model, Path("tera_online.ckpt"))
    wave = 0.1 * np.random.default_rng(0).normal(size=20000)
    soundfile.write("audio.flac", wave, 16000)
    names = run(code)
    assert names["states_BTD"].shape == (1, 126, 32)
    samples = torch.from_numpy(soundfile.read("audio.flac", dtype="float32")[0])
    with torch.no_grad():
        assert largest(names["states_BTD"], model.encode(samples[None]).final) <= 1e-5


def run_pytorch_kaldi(code: str) -> None:
    """A frozen one keeps its dropout off in a module that trains, and trains its head; another one trains itself."""
    gold = with_tera()
    names = run(code)
    features_TBF = gold["feat"][:1].transpose(0, 1)
    for no_grad in ("True", "False"):
        options = {"ckpt_file": "tera.ckpt", "no_grad": no_grad, "select_layer": "-1"}
        torch.manual_seed(0)
        upstream = names["TRANSFORMER"](options, 40)
        net = torch.nn.Sequential(upstream, torch.nn.Linear(upstream.out_dim, 5)).train()
        states = net[0](features_TBF)
        frozen = no_grad == "True"
        assert (largest(states.transpose(0, 1), gold["single.last"]) <= 1e-5) == frozen
        net(features_TBF).square().mean().backward()
        assert (net[0].model.projection.linear.weight.grad is None) == frozen
        assert net[1].weight.grad is not None
        assert largest(net.eval()[0](features_TBF).transpose(0, 1), gold["single.last"]) <= 1e-5


def run_own_model(code: str) -> None:
    """Words are low and high tones in noise, which any filters tell apart."""
    random, rows = np.random.default_rng(0), ["path,label"]
    for i in range(60):
        tone = np.sin(2 * np.pi * (300 if i % 2 else 2000) * np.arange(4000) / 16000)
        soundfile.write(f"{i}.wav", 0.1 * tone + 0.02 * random.normal(size=4000), 16000, subtype="FLOAT")
        rows.append(f"{i}.wav,{'low' if i % 2 else 'high'}")
    Path("index.csv").write_text("\n".join(rows))
    prepare(folder_source(Path(), SourceOptions()), Path("corpora/words"))
    torch.manual_seed(0)
    names = run(code)
    assert "mine" in [*names["table"].columns[0].cells]
    card = json.loads(Path("mine.json").read_text())
    (row,) = (row for row in card["rows"] if row["name"] == "mine")
    assert row["mean"] == 1.0


RUN: dict[tuple[str, str], Callable[[str], None]] = {
    ("from_s3prl.md", "representations"): run_representations,
    ("from_s3prl.md", "settings"): run_settings,
    ("from_s3prl.md", "finetune"): run_finetune,
    ("from_s3prl.md", "waveform"): run_waveform,
    ("from_s3prl.md", "pytorch-kaldi"): run_pytorch_kaldi,
    ("from_s3prl.md", "own-model"): run_own_model,
    ("from_melhubert.md", "melhubert"): run_melhubert,
    ("from_distilalhubert.md", "distilalhubert"): run_distilalhubert,
    ("from_lighthubert.md", "lighthubert"): run_lighthubert,
}


def test_every_python_block_is_run():
    found = {(path.name, name) for path in DOCS for name in python_blocks(path.read_text(encoding="utf-8"))}
    assert found == set(RUN)


@pytest.mark.parametrize(("document", "name"), list(RUN))
def test_python_blocks(document, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RUN[document, name](python_blocks((ROOT / "docs" / document).read_text(encoding="utf-8"))[name])
