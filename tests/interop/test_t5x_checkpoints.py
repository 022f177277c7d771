"""T5X's layouts on disk: arrays survive writing and reading, and killed writers do no harm."""

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from diffusion_t5x.interop import t5x_checkpoints
from diffusion_t5x.interop.stored_arrays import StoredArray, stack, unstack

ARRAYS = {
    "decoder/decoder_norm/scale": np.arange(5, dtype=np.float32),
    "decoder/token_embedder/embedding": np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16),
}


def stored(arrays):
    return {name: StoredArray(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def read(path):
    checkpoint = t5x_checkpoints.open_checkpoint(path)
    return checkpoint, {name: array.read() for name, array in checkpoint.params.items()}


def test_what_is_written_is_read_with_its_types(tmp_path):
    path = t5x_checkpoints.write_checkpoint(str(tmp_path), 12, stored(ARRAYS))
    assert path == f"{tmp_path}/checkpoint_12"
    assert t5x_checkpoints.is_t5x_checkpoint(path)
    checkpoint, arrays = read(path)
    assert (checkpoint.step, checkpoint.has_optimizer_state) == (12, False)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        assert array.dtype == ARRAYS[name].dtype == checkpoint.params[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_arrays_lie_where_t5x_looks_for_them(tmp_path):
    path = t5x_checkpoints.write_checkpoint(str(tmp_path), 1, stored(ARRAYS))
    index = flax.serialization.msgpack_restore((tmp_path / "checkpoint_1/checkpoint").read_bytes())
    assert index["version"] == 3
    spec = index["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"]
    assert spec["kvstore"] == {"driver": "file", "path": "target.decoder.decoder_norm.scale"}
    kvstore = {"driver": "file", "path": f"{path}/target.decoder.decoder_norm.scale"}
    array = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
    assert array.spec().to_json()["metadata"]["compressor"]["id"] == "gzip"


@pytest.mark.parametrize(
    "leaf",
    [
        "PLACEHOLDER://target.norm",  # Orbax, as T5X first used it
        {"driver": "zarr", "kvstore": {"driver": "gfile"}, "path": "target.norm"},  # before 0.1.14
        {"driver": "zarr", "kvstore": {"driver": "gcs", "bucket": "b", "path": "target.norm/"}},
    ],
)
def test_every_way_in_which_an_index_points_at_an_array_is_followed(leaf, tmp_path):
    array = stored({"norm": ARRAYS["decoder/decoder_norm/scale"]})
    t5x_checkpoints.write_checkpoint(str(tmp_path), 1, array)
    index = {"target": {"norm": leaf, "gone": None}, "state": {"param_states": {"a": 1}}}
    file = tmp_path / "checkpoint_1" / "checkpoint"
    file.write_bytes(flax.serialization.msgpack_serialize(index))
    checkpoint, arrays = read(str(tmp_path / "checkpoint_1"))
    np.testing.assert_array_equal(arrays["norm"], ARRAYS["decoder/decoder_norm/scale"])
    # The index has no step, so the directory's name gives it.
    assert (checkpoint.step, checkpoint.has_optimizer_state) == (1, True)


def test_addresses_are_local_or_in_a_bucket():
    assert t5x_checkpoints.kvstore("/a/checkpoint_1/x") == {
        "driver": "file", "path": "/a/checkpoint_1/x/",
    }  # fmt: skip
    assert t5x_checkpoints.kvstore("gs://bucket/a/checkpoint_1/x") == {
        "driver": "gcs", "bucket": "bucket", "path": "a/checkpoint_1/x/",
    }  # fmt: skip


def test_a_killed_writer_leaves_no_checkpoint_and_does_not_stop_the_next(tmp_path):
    def fail():
        raise KeyboardInterrupt

    broken = stored(ARRAYS)
    name = next(reversed(broken))
    broken[name] = StoredArray(name, (1,), np.dtype("float32"), fail)
    with pytest.raises(KeyboardInterrupt):
        t5x_checkpoints.write_checkpoint(str(tmp_path), 3, broken)
    assert not t5x_checkpoints.is_t5x_checkpoint(str(tmp_path / "checkpoint_3"))
    path = t5x_checkpoints.write_checkpoint(str(tmp_path), 3, stored(ARRAYS))
    assert read(path)[1].keys() == ARRAYS.keys()
    assert [child.name for child in tmp_path.iterdir()] == ["checkpoint_3"]
    with pytest.raises(FileExistsError, match="checkpoint_3"):
        t5x_checkpoints.write_checkpoint(str(tmp_path), 3, stored(ARRAYS))


def test_large_arrays_are_cut_into_chunks_that_divide_them(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x_checkpoints, "CHUNK_BYTES", 4 * 60)
    array = np.arange(30 * 14, dtype=np.float32).reshape(30, 14)
    path = t5x_checkpoints.write_checkpoint(str(tmp_path), 1, stored({"x": array}))
    np.testing.assert_array_equal(read(path)[1]["x"], array)
    spec = ts.open({"driver": "zarr", "kvstore": f"file://{path}/target.x/"}).result().spec()
    chunks = spec.to_json()["metadata"]["chunks"]
    assert np.prod(chunks) <= 60
    assert all(size % chunk == 0 for size, chunk in zip(array.shape, chunks, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model_checkpoint_path: 'x'", "is a TensorFlow checkpoint"),
        (b"\xc1 nonsense", "is not an index of T5X's"),
        (flax.serialization.msgpack_serialize({"optimizer": {}}), "has no parameters"),
        (
            flax.serialization.msgpack_serialize({"target": {"x": np.zeros(2, np.uint16)}}),
            "x is uint16; expected a floating type",
        ),
    ],
)
def test_what_is_no_checkpoint_of_t5xs_is_refused(content, message, tmp_path):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        t5x_checkpoints.open_checkpoint(str(tmp_path))


def test_layers_taken_apart_and_put_together_are_read_once():
    array, reads = np.arange(24.0).reshape(2, 3, 4), []

    def read_it():
        reads.append(1)
        return array

    whole = StoredArray("x", array.shape, array.dtype, read_it)
    parts = unstack(whole, axis=1)
    assert [part.shape for part in parts] == [(2, 4)] * 3
    np.testing.assert_array_equal(stack(parts, axis=1).read(), array)
    np.testing.assert_array_equal(stack(parts, axis=0).read(), np.moveaxis(array, 1, 0))
    assert len(reads) == 2  # one for each time that all of it was asked for
    with pytest.raises(ValueError, match="differ"):
        stack([parts[0], whole], axis=0)
