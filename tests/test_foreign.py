"""Names and files that others wrote: what leads out of a folder, is no regular file or has no end is never used."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from resources.artifacts.records import Record
from resources.boundary.foreign import (
    ForeignError,
    check_name,
    is_file_below,
    local_path,
    open_below,
    parse_json,
    read_below,
    values_of,
)
from resources.errors import ReleaseError
from resources.storage.locations import parse_location
from resources.triton.layout import list_releases, parse_internal, pinned_number
from resources.triton.mirror import Mirror
from resources.triton.release import Release


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "//tmp/x",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "a//x",
        "a/",
        "./x",
        "a\\..\\x",
        "a\0x",
        "a\nx",
        "\x1b[2J",
        "\ud800",
        "x" * 256,
        "a/" * 600 + "x",
        None,
        5,
        ["x"],
    ],
)
def test_names_that_lead_out_of_a_folder(tmp_path, name):
    for use in (lambda: check_name(name), lambda: local_path(tmp_path, name), lambda: open_below(tmp_path, name)):
        with pytest.raises(ForeignError):
            use()


@pytest.mark.parametrize("name", ["x", "a/b/x.json", "..x", "a..b", "naïve/模型.json", ".hidden", "x" * 255])
def test_names_that_stay(tmp_path, name):
    assert local_path(tmp_path, name) == tmp_path / name


def test_links_that_lead_out_are_not_written_to(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "in").symlink_to(folder)
    for name in ("out", "out/x", "circle/x"):
        with pytest.raises(ForeignError):
            local_path(folder, name)
    assert local_path(folder, "in/x") == folder / "in/x"


def special_files(folder):
    """One of each kind, by name; and a link to the most dangerous device."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    return ("pipe", "socket", "zero", "folder")


def test_only_regular_files_are_opened(tmp_path):
    """The test hangs where a pipe is opened as usual."""
    for name in special_files(tmp_path):
        with pytest.raises(ForeignError, match="is not a regular file"):
            open_below(tmp_path, name)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    before = (tmp_path / "file").stat()
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr(Path, "stat", lambda path: before)
    with pytest.raises(ForeignError, match="is not a regular file"):
        open_below(tmp_path, "file")


def test_links_are_followed_within_the_folder_alone(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"of somebody else")
    (folder / "real").write_bytes(b"ours")
    (folder / "in").symlink_to("real")
    (folder / "out").symlink_to("../secret")
    (folder / "dangling").symlink_to("../nowhere")
    assert read_below(folder, "in", 10) == b"ours"
    assert is_file_below(folder, "in")
    assert not is_file_below(folder, "dangling")
    for use in (read_below, lambda *args: is_file_below(*args[:2])):
        with pytest.raises(ForeignError, match="leads out"):
            use(folder, "out", 100)


def test_the_hubs_cache_links_to_its_blobs(tmp_path):
    """As huggingface_hub lays it out, its store of files that repositories have in common included."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for folder in (snapshot, blobs, cache / "blobs" / "ab", tmp_path / "models--x" / "snapshots" / "1"):
        folder.mkdir(parents=True)
    (blobs / "one").write_bytes(b"one")
    (cache / "blobs" / "ab" / ("ab" * 32)).write_bytes(b"two")
    (blobs / "two").symlink_to(Path("../../blobs/ab") / ("ab" * 32))
    (cache / "secret").write_bytes(b"secret")
    (cache / "blobs" / "secret").write_bytes(b"secret")
    (snapshot / "one").symlink_to("../../blobs/one")
    (snapshot / "two").symlink_to("../../blobs/two")
    assert (read_below(snapshot, "one", 9), read_below(snapshot, "two", 9)) == (b"one", b"two")
    (snapshot / "out").symlink_to("../../../secret")
    (snapshot / "shared").symlink_to("../../../blobs/secret")
    # A copy of that layout whose `blobs` is a link to elsewhere.
    (tmp_path / "models--x" / "blobs").symlink_to(cache)
    fake = tmp_path / "models--x" / "snapshots" / "1"
    (fake / "out").symlink_to("../../blobs/secret")
    for folder, name in ((snapshot, "out"), (snapshot, "shared"), (fake, "out")):
        with pytest.raises(ForeignError, match="leads out"):
            read_below(folder, name, 100)


def test_files_beyond_their_bound_are_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(10**12)  # it takes no room
    with pytest.raises(ForeignError, match="larger than 1 MB"):
        read_below(tmp_path, "large", 2**20)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" + b"{}," * 600_000 + b"1]",
        b"1" * 5000,
        b"\xff\xfe",
        b"{",
        b"",
    ],
)
def test_json_that_costs_too_much_is_a_value_error(text):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', "[" * 40 + "]" * 40, json.dumps("x" * (2**20 + 1))])
def test_texts_and_depths_that_others_cannot_take(text):
    with pytest.raises(ValueError, match=r"surrogate|nested|text"):
        list(values_of(parse_json(text.encode())))


def test_values_come_with_their_keys():
    found = list(values_of({"a": [1, {"b": 2}]}))
    assert ("a", 1) in found
    assert ("b", 2) in found


def test_a_model_of_a_bucket_that_leads_out_of_the_mirror(tmp_path, monkeypatch):
    """fsspec lists `..` as any other name."""
    place = parse_location("s3://bucket/models", tmp_path, {})
    mirror = Mirror(place, tmp_path / "mirror")
    monkeypatch.setattr("resources.triton.mirror.public_models", lambda where: [".."] if where is place else [])
    with pytest.raises(ReleaseError, match="leads out of its folder"):
        mirror.refresh()


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx_ir", "openvino"])
def test_graphs_whose_weights_are_elsewhere(tmp_path, runtime):
    """The libraries that open a graph from a shared store refuse them; this holds them to it."""
    import onnx

    (tmp_path / "secret").write_bytes(bytes(16))
    folder = tmp_path / "graph"
    folder.mkdir()
    weights = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="../secret")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(Exception, match=r"escapes model directory|outside the base directory"):
        if runtime == "onnxruntime":
            from resources.engines.onnxruntime.sessions import open_session

            open_session(str(path), 1)
        elif runtime == "onnx_ir":
            from resources.engines.precision.tensorrt_precision import plain_graph

            plain_graph(path)
        else:
            import openvino

            openvino.Core().read_model(path)


def test_numbers_that_python_does_not_read(tmp_path):
    """In a bucket's folders, names and configurations."""
    digits = "9" * 5000
    assert pinned_number(f"version_policy {{ specific {{ versions: {digits} }} }}") is None
    assert parse_internal(f"bert__r{digits}__engine") is None
    (tmp_path / "bert" / ("9" * 200)).mkdir(parents=True)
    assert list_releases(tmp_path, "bert") == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//x", ""])
def test_records_that_name_files_of_elsewhere_cannot_be_read(name):
    """Whoever can write to a shared store or to a repository writes these."""
    fields = {"digest": "a", "model": "m", "files": {name: {"sha256": "", "size_bytes": 0}}}
    for kind, given in ((Record, fields), (Release, fields), (Release, {"model": name})):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate_json(json.dumps(given))
        assert {"files", "model"} & {
            error["loc"][0] for error in caught.value.errors() if error["type"] == "value_error"
        }
