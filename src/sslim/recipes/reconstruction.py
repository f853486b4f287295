"""Mockingjay, TERA and AALBERT recipes: the published ones of S3PRL and small ones for two CPU cores. None needs labels.

Published ones alter features as the reference does (``mode="reference"``) and use the settings of its configuration files. What
differs from it:

- The optimiser is AdamW. v0.1's BertAdam has no bias correction, clips the gradient of each tensor to norm 1 beside the whole
  one's, and reads its schedule before counting the step, so that the first update has a learning rate of 0. The later
  ``AdamW_with_schedule`` adds its epsilon to the uncorrected root of the second moment.
- Padding is neither altered nor scored, utterances are normalised by their own frames, and their lengths are known, not guessed
  from frames that sum to zero.
- The mean is taken over all altered elements of an update, not over those of each micro-batch.
- Weight decay leaves out all vectors; the reference's rule by name comes to the same for these models.
"""

from __future__ import annotations

from typing import Any

from sslim.data.feature_presets import feature_preset
from sslim.frontends import SpectralFrontendConfig
from sslim.models import ModelConfig
from sslim.models.melhubert import melhubert_frontend
from sslim.models.reconstruction import aalbert, mockingjay, tera
from sslim.objectives import AlterationConfig, ReconstructionConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.pretrain import PretrainRecipe
from sslim.recipes.small_runs import MINI_DATA, TINY_DATA, mini_training, tiny_training
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig


def _published(
    name: str,
    about: str,
    model: ModelConfig,
    alteration: dict[str, Any],
    data: DataConfig,
    *,
    steps: int,
    learning_rate: float,
    max_grad_norm: float,
    accumulate: int = 1,
    eps: float = 1e-6,
    target: SpectralFrontendConfig | None = None,
) -> PretrainRecipe:
    """AdamW with betas 0.9 and 0.999, decay 0.01, warm-up over 7 % of the updates, then linear to zero."""
    return PretrainRecipe(
        name=name,
        about=about,
        model=model,
        objective=ReconstructionConfig(alteration=AlterationConfig(mode="reference", **alteration), target=target),
        training=TrainerConfig(
            total_steps=steps,
            accumulate=accumulate,
            max_grad_norm=max_grad_norm,
            save_every=10_000,
            validate_every=10_000,
            optimizer=OptimizerConfig(kind="adamw", lr=learning_rate, betas=(0.9, 0.999), eps=eps, weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.07),
        ),
        data=data,
    )


def _whole(max_utterances: int, max_s: float) -> DataConfig:
    """Whole utterances; longer ones are left out (``max_timestep`` of v0.1)."""
    return DataConfig(batch_s=None, max_utterances=max_utterances, crop_s=None, max_s=max_s)


def _features(name: str) -> SpectralFrontendConfig:
    frontend = feature_preset(name)
    assert frontend is not None, f"{name} are waveforms"
    return frontend


def mockingjay_base() -> PretrainRecipe:
    """Mockingjay Base (``mockingjay_libri_fbankBase``): 3 layers on librosa's 80 channels with deltas, 10 ms, 360 hours."""
    return _published(
        "mockingjay-base",
        "arXiv 1910.12638, S3PRL v0.1, 360 h, 500,000 updates of 6 utterances on one GPU; paper: 94.54 % of 63 speakers",
        mockingjay(frontend=_features("fbank160-librosa")),
        {"time_share": 0.15, "span_min": 7, "span_max": 7},
        _whole(6, 30.0),
        steps=500_000,
        learning_rate=4e-4,
        max_grad_norm=1.0,
    )


def mockingjay_large() -> PretrainRecipe:
    """Mockingjay Large (``mockingjay_libri_fbankLarge``): 12 layers on 3 stacked frames.

    Spans are one stacked frame long, 30 ms, as in the configuration file; the paper says three (``C_num``).
    """
    return _published(
        "mockingjay-large",
        "arXiv 1910.12638, S3PRL v0.1, 360 h, 500,000 updates of 6 utterances on one GPU; paper: 96.26 % of 63 speakers",
        mockingjay(num_layers=12, stack=3, frontend=_features("fbank160-librosa")),
        {"time_share": 0.15, "span_min": 1, "span_max": 1},
        _whole(6, 30.0),
        steps=500_000,
        learning_rate=4e-4,
        max_grad_norm=1.0,
    )


def mockingjay_large_linear() -> PretrainRecipe:
    """Mockingjay Large as in the paper: 12.5 ms log-Mel channels with deltas restore a linear spectrum of 1025 bins.

    ``mockingjay_libri_linearLarge`` of the deprecated runner. Both are computed from the sound, so that frames belong together.
    """
    return _published(
        "mockingjay-large-linear",
        "arXiv 1910.12638, S3PRL v0.1, 360 h, 500,000 updates of 6 utterances on one GPU; not trained here",
        mockingjay(num_layers=12, stack=3, frontend=_features("mel160-librosa"), target_dim=1025),
        {"time_share": 0.15, "span_min": 1, "span_max": 1},
        _whole(6, 30.0),
        steps=500_000,
        learning_rate=4e-4,
        max_grad_norm=1.0,
        target=_features("linear1025"),
    )


def tera_base() -> PretrainRecipe:
    """TERA Base on log-Mel channels (``tera_logMelBase_T_F_M_AdamW_b32_1m_960hr_drop1``, S3PRL's hub default), 960 hours.

    Time, frequency and magnitude are altered; utterances are cut to 1,500 frames, and an update has 4 micro-batches of 8.
    """
    return _published(
        "tera-base",
        "arXiv 2007.06028, later S3PRL, 960 h, 1,000,000 updates of 32 utterances; not trained here",
        tera(),
        {"time_share": 0.15, "bucket_ratio": 1.5, "max_channel_share": 0.2, "noise_probability": 0.15},
        DataConfig(batch_s=None, max_utterances=8, crop_s=15.0, min_s=2.0),
        steps=1_000_000,
        learning_rate=2e-4,
        max_grad_norm=5.0,
        accumulate=4,
        eps=1e-8,
    )


def _tera_fmllr(size: str, num_layers: int) -> PretrainRecipe:
    return _published(
        f"tera-fmllr-{size}",
        "arXiv 2007.06028, S3PRL v0.1, 960 h, 1,000,000 updates of 12 utterances on one GPU",
        tera(frontend=_features("fmllr40"), num_layers=num_layers),
        {"time_share": 0.15, "max_channels": 8, "noise_probability": 0.15},
        _whole(12, 15.0),
        steps=1_000_000,
        learning_rate=2e-4,
        max_grad_norm=1.0,
    )


def tera_fmllr_base() -> PretrainRecipe:
    """TERA on 40 fMLLR features from outside (``tera_libri_fmllrBase``): 3 layers, 960 hours."""
    return _tera_fmllr("base", 3)


def tera_fmllr_medium() -> PretrainRecipe:
    """The same with 6 layers (``tera_libri_fmllrMedium``)."""
    return _tera_fmllr("medium", 6)


def tera_fmllr_large() -> PretrainRecipe:
    """The same with 12 layers (``tera_libri_fmllrLarge``)."""
    return _tera_fmllr("large", 12)


def tera_voxceleb() -> PretrainRecipe:
    """TERA on 24 MFCC of Kaldi's VoxCeleb recipe (``tera_kaldi_voxceleb_mfccBase``): time and 5 channels are altered."""
    return _published(
        "tera-voxceleb",
        "S3PRL v0.1, VoxCeleb1, 30,000 updates of 128 utterances on one GPU; not trained here",
        tera(frontend=_features("mfcc24-voxceleb")),
        {"time_share": 0.15, "max_channels": 5},
        DataConfig(batch_s=None, max_utterances=16, crop_s=15.0),
        steps=30_000,
        learning_rate=2e-4,
        max_grad_norm=1.0,
        accumulate=8,
    )


def _aalbert(num_layers: int, hours: int, steps: int) -> PretrainRecipe:
    """Frames are stacked by three, so spans of one frame last 30 ms."""
    return _published(
        f"aalbert-{num_layers}l",
        f"arXiv 2005.08575, S3PRL v0.1, {hours} h, {steps:,} updates of 50 utterances on one GPU",
        aalbert(num_layers=num_layers, frontend=_features("fbank80-librosa")),
        {"time_share": 0.15, "span_min": 1, "span_max": 1},
        _whole(10, 15.0),
        steps=steps,
        learning_rate=2e-4,
        max_grad_norm=5.0,
        accumulate=5,
    )


def aalbert_3l() -> PretrainRecipe:
    """Audio ALBERT, one layer applied 3 times (``aalbert_libri_fbank3L``), 100 hours."""
    return _aalbert(3, 100, 200_000)


def aalbert_6l() -> PretrainRecipe:
    """Audio ALBERT, one layer applied 6 times (``aalbert_libri_fbank6L``), 360 hours."""
    return _aalbert(6, 360, 500_000)


_MINI: dict[str, Any] = {
    "num_layers": 4,
    "dim": 192,
    "num_heads": 3,
    "feedforward_dim": 768,
    "stack": 2,
    "dropout": 0.0,
    "init_deviation": None,  # N(0, 0.02) is slower at first: after 300 steps tera-mini's loss was 0.632 with it, 0.622 without
}
_TIME: dict[str, Any] = {"time_share": 0.15, "span_min": 4, "span_max": 4}  # 80 ms, the published 70 in frames of 20


def _mini(name: str, about: str, model: ModelConfig, alteration: AlterationConfig) -> PretrainRecipe:
    """Features (not yet stacked), batches, length and optimiser of ``melhubert-mini``: one prepared corpus serves all."""
    return PretrainRecipe(
        name=name,
        about=about,
        model=model,
        objective=ReconstructionConfig(alteration=alteration),
        training=mini_training(),
        data=MINI_DATA,
    )


def mockingjay_mini() -> PretrainRecipe:
    """Size and training of ``melhubert-mini``; only time is altered."""
    return _mini(
        "mockingjay-mini",
        "own; 20 ms, 4 layers of width 192, 1.9 million parameters; 7 minutes on one CPU core in bf16",
        mockingjay(frontend=melhubert_frontend(10), **_MINI),
        AlterationConfig(**_TIME),
    )


def tera_mini() -> PretrainRecipe:
    """Size and training of ``melhubert-mini``; time, frequency and magnitude are altered."""
    return _mini(
        "tera-mini",
        "own; 20 ms, 4 layers of width 192, 1.9 million parameters; 7 minutes on one CPU core in bf16",
        tera(frontend=melhubert_frontend(10), **_MINI),
        AlterationConfig(**_TIME, max_channel_share=0.2, noise_probability=0.15),
    )


def aalbert_mini() -> PretrainRecipe:
    """As many parameters as ``melhubert-mini`` in one layer twice as wide that is applied 4 times: four times the work."""
    return _mini(
        "aalbert-mini",
        "own; 20 ms, one layer of width 384 applied 4 times, 1.8 million parameters; 14 minutes on one CPU core in bf16",
        aalbert(frontend=melhubert_frontend(10), **{**_MINI, "dim": 384, "num_heads": 6, "feedforward_dim": 1536}),
        AlterationConfig(**_TIME),
    )


def tera_tiny() -> PretrainRecipe:
    """2 layers, 32 wide: seconds; for tests and for trying the commands."""
    sizes = _MINI | {"num_layers": 2, "dim": 32, "num_heads": 4, "feedforward_dim": 64}
    return PretrainRecipe(
        name="tera-tiny",
        about="own; a smoke test of seconds",
        model=tera(frontend=melhubert_frontend(10), **sizes),
        objective=ReconstructionConfig(alteration=AlterationConfig(**_TIME, max_channel_share=0.2, noise_probability=0.15)),
        training=tiny_training(),
        data=TINY_DATA,
    )


RECIPES = {
    "mockingjay-base": mockingjay_base,
    "mockingjay-large": mockingjay_large,
    "mockingjay-large-linear": mockingjay_large_linear,
    "tera-base": tera_base,
    "tera-fmllr-base": tera_fmllr_base,
    "tera-fmllr-medium": tera_fmllr_medium,
    "tera-fmllr-large": tera_fmllr_large,
    "tera-voxceleb": tera_voxceleb,
    "aalbert-3l": aalbert_3l,
    "aalbert-6l": aalbert_6l,
    "mockingjay-mini": mockingjay_mini,
    "tera-mini": tera_mini,
    "aalbert-mini": aalbert_mini,
    "tera-tiny": tera_tiny,
}
