"""Headers of GGUF files."""

from __future__ import annotations

import pytest

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from gguf_files import write_gguf  # noqa: E402
from tiny import make  # noqa: E402

from qins.files import open_checkpoint, open_gguf, reading_once  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, make("llama"), gguf.GGMLQuantizationType.Q8_0, tokenizer=True)
    return path


@pytest.fixture
def read(monkeypatch):
    """The files whose headers the gguf package reads."""
    files = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path, *args):
            files.append(str(path))
            super().__init__(path, *args)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    return files


def test_a_header_is_read_once(file, read):
    checkpoint = open_checkpoint(file)
    read.clear()
    opened = open_gguf(checkpoint)
    assert read == [str(file)]
    assert opened.load("model.norm.weight").shape == (opened.transformers_config.hidden_size,)
    with reading_once():
        given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        transformers.AutoModelForCausalLM.from_pretrained(**given)
        transformers.AutoTokenizer.from_pretrained(**given)
    assert read == 2 * [str(file)]


def test_more_layers_than_tensors(file, tmp_path):
    data = bytearray(file.read_bytes())
    at = data.index(b"llama.block_count") + len(b"llama.block_count")
    assert data[at : at + 4] == (4).to_bytes(4, "little")  # uint32
    data[at + 4 : at + 8] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "deep.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"deep\.gguf: llama\.block_count: expected at most 4096"):
        open_gguf(open_checkpoint(tmp_path / "deep.gguf"))


def test_nothing_is_kept(file, read):
    """After an error, too, a file that has changed is read again."""
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(KeyError), reading_once():
        gguf.GGUFReader(str(file))
        raise KeyError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    gguf.GGUFReader(str(file))
    assert len(read) == 2
