"""S3PRL's tables of lengths (``len_for_bucket``) as a source: CSV files of audio, ``file_path,length,label``, one for each set.

The lengths are not used. The first version's are samples at 22,050 Hz, librosa's default, whatever the sound has, and were
compared with numbers of frames; the later one's are samples at the sound's own rate. Here every file tells its own length. The
first version's paths end in ``.npy`` although they stand for sound (``train-clean-100/19-198-0000.npy``): they are found by
LibriSpeech's layout.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from sslim.data.audio_sources import AUDIO_SUFFIXES, LIBRISPEECH_NAME, folder_split
from sslim.data.label_layout import LayoutError
from sslim.data.numpy_lists import find_lists, read_list
from sslim.data.sources import Source, SourceUtterance

LEN_FOR_BUCKET = "len_for_bucket"
NUM_TRIED = 20  # paths that decide whether the root is right


def find_audio(stated: str, root: Path) -> Path | None:
    """Returns the sound that a line stands for: below the root as stated, or as in LibriSpeech; None when it is nowhere."""
    path = Path(stated)
    candidates = [root / path] if path.suffix.lower() in AUDIO_SUFFIXES else []
    match = LIBRISPEECH_NAME.fullmatch(path.stem)
    if match is not None:
        folder = root.joinpath(*path.parts[:1], match["speaker"], match["chapter"])
        candidates += [folder / f"{path.stem}{suffix}" for suffix in (".flac", ".wav")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def length_table_source(path: str | Path, *, audio_root: Path | None = None) -> Source:
    """Reads a table of lengths, or a folder of them; each becomes a split of its name.

    Args:
        path: A ``.csv`` file or a folder with some.
        audio_root: Folder that the paths start from; by default the table's own, and those above it.

    Raises:
        ValueError: Another layout, an utterance twice, or none of the first files is there.
    """
    path = Path(path)
    tables = {table: read_list(table) for table in find_lists(path)}
    folder = next(iter(tables)).resolve().parent
    roots = [folder, *list(folder.parents)[:3]] if audio_root is None else [audio_root]
    stated = [row.features for rows in tables.values() for row in islice(rows, NUM_TRIED)]
    root = next((root for root in roots if any(find_audio(name, root) for name in stated)), None)
    if root is None:
        below = f"{path} lists audio, for example {stated[0]}, of which nothing lies below {roots[0]}"
        raise LayoutError(
            f"{below}: give the folder that the paths start from with --audio-root"
            if audio_root is None
            else f"{below}, the --audio-root; of tables of .npy features leave that out"
        )
    utterances = []
    seen: dict[str, Path] = {}
    for table, rows in tables.items():
        for row in rows:
            name = Path(row.features).with_suffix("").as_posix().lstrip("/")
            if name in seen:
                raise LayoutError(f"{table}: the utterance {name!r} comes a second time, it is in {seen[name].name}, too")
            seen[name] = table
            match = LIBRISPEECH_NAME.fullmatch(Path(name).name)
            utterances.append(
                SourceUtterance(
                    id=name if match is None else Path(name).name,
                    audio=find_audio(row.features, root) or root / row.features,
                    speaker=None if match is None else match["speaker"],
                    label=row.utterance_class,
                    split=folder_split(table.stem) or table.stem,
                )
            )
    return Source(
        name=path.stem if path.is_file() else path.resolve().name,
        utterances=utterances,
        num_utterances=len(utterances),
        note=f"files are read from {root}; the lengths in the tables are not used, each file tells its own",
    )
