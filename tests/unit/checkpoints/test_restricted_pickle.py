"""The reader of foreign pickles: the same values as torch.load, nothing executed, and one sentence for every bad file."""

import argparse
import collections
import contextlib
import io
import os
import pathlib
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslim.checkpoints import CheckpointError, Placeholder, pickle_machine, read_pickle


def same(got, want):
    """Equality through tensors, arrays and containers; types too."""
    if isinstance(want, torch.Tensor):
        return isinstance(got, torch.Tensor) and got.dtype == want.dtype and torch.equal(got, want)
    if isinstance(want, np.ndarray):
        return isinstance(got, np.ndarray) and got.dtype == want.dtype and np.array_equal(got, want)
    if isinstance(want, dict):
        return type(got) is dict and list(got) == list(want) and all(same(got[key], want[key]) for key in want)
    if isinstance(want, list | tuple):
        return type(got) is type(want) and len(got) == len(want) and all(map(same, got, want))
    return type(got) is type(want) and got == want


def contents():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    return {
        "plain": [
            1,
            -2,
            2**70,
            1.5,
            float("inf"),
            None,
            True,
            "ä\udc80",
            b"\x00\xff",
            (),
            {"a": (1, (2,))},
            {3, 4},
        ],
        "state": collections.OrderedDict(weight=weight, transposed=weight.t(), part=weight[1:3, ::2], scalar=torch.tensor(3)),
        "dtypes": [
            torch.arange(5).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8)
        ],
        "bools": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "numpy": [np.arange(6, dtype=np.uint32).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array([True])],
        "random": random.Random(0).getstate(),
        "size": torch.Size([1, 2]),
        "default": collections.defaultdict(list, a=[1]),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_it_reads_what_was_saved(tmp_path, zipped, protocol):
    values = contents()
    torch.save(values, tmp_path / "file.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_pickle(tmp_path / "file.pt")
    expected = {**values, "state": dict(values["state"]), "default": dict(values["default"]), "size": (1, 2)}
    expected["parameter"] = values["parameter"].data
    assert same(read, expected)
    state = read["state"]
    assert state["weight"].data_ptr() == state["transposed"].data_ptr()  # one storage stays one
    changed = {**expected, "bools": torch.tensor([True, False, False])}
    assert not same(read, changed)


def test_unknown_objects_become_placeholders(tmp_path):
    namespace = argparse.Namespace(lr=1e-4, expdir=pathlib.PurePosixPath("a/b"), nested=argparse.Namespace(x=torch.ones(2)))
    torch.save({"Args": namespace, "dtype": torch.float32, "slice": slice(1, 2)}, tmp_path / "file.pt")
    read = read_pickle(tmp_path / "file.pt")
    assert (read["Args"].module, read["Args"].name) == ("argparse", "Namespace")
    assert read["Args"].state["lr"] == 1e-4
    assert read["Args"].state["expdir"].args == ("a", "b")
    assert torch.equal(read["Args"].state["nested"].state["x"], torch.ones(2))
    assert (read["dtype"].module, read["dtype"].name) == ("torch", "float32")
    assert hash(read["Args"]) is not None


class Attack:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(sentinel):
    command = f"open({str(sentinel)!r}, 'w').close()"
    return {
        "system": Attack(os.system, f"touch {sentinel}"),
        "eval": Attack(eval, command),
        "exec": Attack(exec, command),
        "mkdir": Attack(os.mkdir, str(sentinel)),
        "nested": Attack(getattr, Attack(__import__, "os"), "system"),
        "torch_load": Attack(torch.storage._load_from_bytes, pickled_by_torch(Attack(eval, command))),
        "state": {"weight": Attack(torch._utils._rebuild_parameter, Attack(eval, command), True, {})},
    }


def pickled_by_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["system", "eval", "exec", "mkdir", "torch_load", "state"])
@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_nothing_in_a_file_is_executed(tmp_path, kind, container):
    sentinel, path = tmp_path / "executed", tmp_path / "hostile.ckpt"
    attack = {"model": attacks(sentinel)[kind]}
    if container == "plain":
        path.write_bytes(pickle.dumps(attack, protocol=2))
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=container == "zip")
    try:
        read = read_pickle(path)
    except CheckpointError:
        assert kind == "state"  # a tensor builder that is given no tensor
    else:
        assert isinstance(read["model"], Placeholder | dict)
    assert not sentinel.exists()
    if kind not in ("torch_load", "state"):  # the control: the file is an attack
        pickle.loads(pickle.dumps(attack, protocol=2))  # noqa: S301
        assert sentinel.exists()


def test_attacks_by_opcodes_change_nothing(tmp_path):
    """BUILD with a slot state sets attributes in Python's unpickler, on classes and functions too."""
    builder = b"ctorch._utils\n_rebuild_tensor_v2\n"
    poison = b"(N}X\x0c\x00\x00\x00__defaults__(tsX\x04\x00\x00\x00nameK\x01stb"
    path = tmp_path / "hostile.ckpt"
    path.write_bytes(b"\x80\x02" + builder + poison + b".")
    before = torch._utils._rebuild_tensor_v2.__defaults__
    assert isinstance(read_pickle(path), Placeholder)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    for attack in (
        b"(i__builtin__\neval\n.",
        b"(c__builtin__\neval\nX\x03\x00\x00\x001+1o.",
        b"c__builtin__\neval\n(X\x03\x00\x00\x001+1t\x81.",
    ):
        path.write_bytes(b"\x80\x02" + attack)
        assert read_pickle(path).name == "eval"


def billion_laughs(levels):
    """Ten references to a list of ten references to ...: small in memory, 10 ** levels when walked."""
    value = ["ha"]
    for _ in range(levels):
        value = [value] * 10
    return value


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def cyclic():
    value = {}
    value["self"] = [value]
    return value


def tuple_key():
    key = ()
    for _ in range(40):
        key = (key, key)
    return b"\x80\x02}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"K\x01s."


BOMBS = {
    "laughs": pickle.dumps(billion_laughs(30), 2),
    "texts": b"\x80\x02X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x00](" + b"h\x00" * 1000 + b"e.",
    "encode": b"\x80\x02X\x00\x00\x10\x00"
    + b"a" * (1 << 20)
    + b"q\x00X\x06\x00\x00\x00latin1q\x010]"
    + b"c_codecs\nencode\nq\x020"
    + b"h\x02h\x00h\x01\x86Ra" * 1000
    + b".",
    "cyclic": pickle.dumps(cyclic(), 2),
    "tuple_key": tuple_key(),
    "integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20) + b".",
    "huge_text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
    "extension": b"\x80\x02\x82\x01.",
    "no_stop": b"\x80\x02N",
    "empty_stack": b"\x80\x02.",
    "no_mark": b"\x80\x02Nt.",
    "deep": pickle.dumps(deep(200), 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(tmp_path, name):
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(BOMBS[name])
    with pytest.raises(CheckpointError, match=r"^\S+bomb\.ckpt "):
        read_pickle(path)


def test_endless_pickles_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "file.ckpt"
    path.write_bytes(b"\x80\x02" + b"N0" * 1000 + b"N.")
    assert read_pickle(path) is None
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="too large"):
        read_pickle(path)


def test_modest_repetition_is_read(tmp_path):
    (tmp_path / "file.ckpt").write_bytes(pickle.dumps({"a": billion_laughs(3), "b": deep(20)}, 2))
    assert len(read_pickle(tmp_path / "file.ckpt")["a"]) == 10


def zip_of(tmp_path, pickled, storage=b"", **options):
    path = tmp_path / "file.ckpt"
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", options.get("byteorder", "little"))
        archive.writestr("archive/data/0", storage)
    return path


def tensor_pickle(offset=0, size=(2,), stride=(1,), num_elements=4, storage="FloatStorage", key="0"):
    """Opcodes of one tensor, as torch writes them, with anything in its numbers."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", torch.__dict__[storage], key, "cpu", num_elements) if isinstance(value, Storage) else None

        def save_tensor(self, value):
            self.save_reduce(torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {}))

    buffer = io.BytesIO()
    pickler = Pickler(buffer, protocol=2)
    pickler.dispatch = {**pickler.dispatch, torch.Tensor: Pickler.save_tensor}
    pickler.dump(torch.zeros(1))
    return buffer.getvalue()


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def test_hand_made_tensor_reads(tmp_path):
    read = read_pickle(zip_of(tmp_path, tensor_pickle(offset=1, size=(2,), stride=(2,)), FOUR))
    assert read.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 3},
        {"offset": -1},
        {"offset": 1 << 61},
        {"offset": 1.0},
        {"offset": True},
        {"size": (5,)},
        {"size": (1 << 40, 1 << 40)},
        {"size": (-1,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (1000,), "stride": (0,)},
        {"size": (3, 3), "stride": (1, 0)},
        {"size": (2,), "stride": (-1,), "offset": 1},
        {"size": (2,), "stride": (4,)},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": [2]},
        {"num_elements": 1 << 40, "size": (1 << 40,)},
        {"num_elements": 5},
        {"num_elements": -1},
        {"storage": "DoubleStorage"},
        {"key": "1"},
        {"key": "../../data.pkl"},
        {"key": 0},
    ],
    ids=str,
)
def test_tensors_cannot_reach_outside_their_storage(tmp_path, change):
    with pytest.raises(CheckpointError, match=r"^\S+file\.ckpt "):
        read_pickle(zip_of(tmp_path, tensor_pickle(**change), FOUR))


def test_zip_containers_that_torch_does_not_write(tmp_path):
    good = tensor_pickle()
    with pytest.raises(CheckpointError, match="compressed"):
        read_pickle(zip_of(tmp_path, good, FOUR, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="zip bomb"):
        read_pickle(zip_of(tmp_path, good, bytes(1 << 22), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pickle(zip_of(tmp_path, good, FOUR, byteorder="big"))
    path = zip_of(tmp_path, good, FOUR)
    path.write_bytes(path.read_bytes().replace(FOUR, struct.pack("<4f", 1, 2, 3, 5)))
    with pytest.raises(CheckpointError, match="checksum"):
        read_pickle(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")
    with pytest.raises(CheckpointError, match=r"0 data\.pkl"):
        read_pickle(path)


def test_overlapping_entries_are_a_bomb(tmp_path):
    """Many directory entries that point at the same bytes would unpack to more than the file."""
    path = zip_of(tmp_path, tensor_pickle(), bytes(4096))
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    fields = struct.unpack("<4s4H2LH", data[end : end + 22])
    directory = data[fields[6] : end]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    added = b"".join(entry.replace(b"data/0", b"data/%d" % number) for number in range(1, 9))
    tail = struct.pack("<4s4H2LH", *fields[:3], 11, 11, len(directory) + len(added), fields[6], 0)
    path.write_bytes(data[:end] + added + tail)
    with pytest.raises(CheckpointError, match="zip bomb"):
        read_pickle(path)


OTHER_FILES = {
    "empty file": b"",
    "HTML page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "safetensors file": struct.pack("<Q", 100) + b'{"a":{}}' + b" " * 100,
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n",
    "gzip": b"\x1f\x8b" + bytes(100),
    "tar archive": bytes(257) + b"ustar" + bytes(300),
    "neither a torch file nor": b"just some text that is no checkpoint",
    "truncated": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("reason", OTHER_FILES)
def test_other_files_are_named(tmp_path, reason):
    path = tmp_path / "file.ckpt"
    path.write_bytes(OTHER_FILES[reason])
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="folder"):
        read_pickle(tmp_path)


def test_skipped_values_are_not_even_looked_at(tmp_path):
    path = tmp_path / "file.pt"
    moments = torch.full((1000,), 3.25)
    torch.save({"Optimizer": {"state": {0: moments}}, "model": {"w": torch.full((1000,), 1.5)}}, path)
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", 3.25) * 1000, struct.pack("<f", 3.5) * 1000))
    read = read_pickle(path, skip={"Optimizer"})
    assert isinstance(read["Optimizer"], Placeholder)
    assert read["model"]["w"].tolist() == [1.5] * 1000
    with pytest.raises(CheckpointError, match="checksum"):
        read_pickle(path)


def test_the_file_is_not_changed_through_its_tensors(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(100)}, path)
    before = path.read_bytes()
    read_pickle(path)["w"].fill_(1.0)
    assert path.read_bytes() == before


def whole_file(zipped):
    buffer = io.BytesIO()
    values = {
        "model": {"w": torch.arange(6.0), "mask": torch.tensor([True, False])},
        "n": np.arange(3),
        "args": argparse.Namespace(a=1),
    }
    torch.save(values, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


WHOLE = {zipped: whole_file(zipped) for zipped in (True, False)}


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_anywhere_is_refused(tmp_path, zipped):
    path = tmp_path / "file.ckpt"
    data = WHOLE[zipped]
    for length in range(0, len(data), 7 if zipped else 3):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_pickle(path)
    path.write_bytes(data)
    assert torch.equal(read_pickle(path)["model"]["w"], torch.arange(6.0))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    zipped=st.booleans(),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_files_give_a_sentence_or_plain_values(tmp_path, zipped, flips):
    data = bytearray(WHOLE[zipped])
    end = data.index(b"PK\x03\x04", 4) if zipped else len(data)
    for place, value in flips:
        data[int(place * end)] = value
    if zipped:  # mend the pickle's checksum, or nothing behind it would ever be reached
        data = rezip(bytes(data))
    path = tmp_path / "file.ckpt"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):  # any other exception fails the test
        read_pickle(path)


def rezip(data):
    """The first entry's bytes (the pickle), written anew with the other entries of the whole file."""
    with zipfile.ZipFile(io.BytesIO(WHOLE[True])) as archive:
        info = archive.infolist()[0]
        start = info.header_offset + 30 + sum(struct.unpack("<HH", WHOLE[True][26:30]))
        entries = {other.filename: archive.read(other) for other in archive.infolist()}
    entries[info.filename] = data[start : start + info.file_size]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()
