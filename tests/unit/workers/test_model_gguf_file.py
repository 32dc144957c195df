"""The GGUF reader on good files, and on bad ones, which must each give one clear error."""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_model import write_tiny_gguf
from workers.errors import CorruptModel, UnsupportedModel
from workers.model.convert import plan_output
from workers.model.gguf_file import GgufFile, open_gguf
from workers.model.gguf_names import read_gguf


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> GgufFile:
    return open_gguf(tiny_path)


def read_all(path: Path) -> None:
    """Everything that is read before a conversion writes."""
    model = read_gguf(open_gguf(path))
    plan_output(model.checkpoint, model.config)


def test_same_metadata_and_tensors_as_the_gguf_library(tiny_path: Path, tiny: GgufFile) -> None:
    reader = GGUFReader(tiny_path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(tiny.metadata) == expected
    assert list(tiny.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = tiny.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.type == tensor.tensor_type
        assert tiny.rows(ours).tobytes() == tensor.data.tobytes()


def test_rows_are_mapped_and_read_only(tiny: GgufFile) -> None:
    rows = tiny.rows(tiny.tensors["token_embd.weight"])
    assert rows.shape == (384, 2 * 34)  # 64 values are two Q8_0 blocks of 34 bytes
    assert rows.dtype == np.uint8
    assert not rows.flags.writeable
    assert not rows.flags.owndata


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 something else"])
def test_another_kind_of_file_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptModel, match=r"other\.gguf is damaged at byte 0: not a GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused(tiny_path: Path, tmp_path: Path, version: int) -> None:
    content = bytearray(tiny_path.read_bytes())
    content[4:8] = struct.pack("<I", version)
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=f"GGUF version {version}"):
        open_gguf(tmp_path / "a.gguf")


def test_truncated_tensors_are_named(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny_path.read_bytes()[:-4096])
    with pytest.raises(CorruptModel, match=r"tensor '.*' ends \d+ bytes after the end of the file"):
        open_gguf(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_corrupt(
    tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = tiny_path.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 64))])
    with pytest.raises(CorruptModel) as caught:
        open_gguf(path)
    assert 0 <= caught.value.offset <= len(content)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_a_clear_error_or_harmless(
    tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(tiny_path.read_bytes())
    tensors_start = min(tensor.offset for tensor in open_gguf(tiny_path).tensors.values())
    content[data.draw(st.integers(0, tensors_start - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "changed.gguf"
    path.write_bytes(content)
    with suppress(CorruptModel, UnsupportedModel):
        read_all(path)


def patch_type(tiny_path: Path, path: Path, name: str, type_number: int) -> None:
    """Copy the file with another type number for a matrix: it follows the name and two dimensions."""
    content = bytearray(tiny_path.read_bytes())
    place = content.index(name.encode()) + len(name) + 4 + 2 * 8
    content[place : place + 4] = struct.pack("<I", type_number)
    path.write_bytes(content)


def test_unknown_tensor_type_is_named(tiny_path: Path, tmp_path: Path) -> None:
    patch_type(tiny_path, tmp_path / "a.gguf", "blk.0.attn_q.weight", 9999)
    with pytest.raises(UnsupportedModel, match=r"tensor type 9999 in 'blk.0.attn_q.weight'"):
        read_all(tmp_path / "a.gguf")


def test_tensor_type_without_dequantisation_is_named_with_what_is_supported(
    tiny_path: Path, tmp_path: Path
) -> None:
    int8 = 24
    patch_type(tiny_path, tmp_path / "a.gguf", "blk.0.attn_q.weight", int8)
    with pytest.raises(UnsupportedModel, match=r"tensor type I8 in 'blk.0.attn_q.weight'.*Q4_1"):
        read_all(tmp_path / "a.gguf")
