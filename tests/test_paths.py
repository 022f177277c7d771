"""What users type as a path is understood, or refused by a message that names the setting."""

import pathlib

import pytest

from diffusion_t5x import paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/runs/a", str(pathlib.Path.home() / "runs" / "a")),
        ("runs/a/", str(pathlib.Path.cwd() / "runs" / "a")),
        ("/tmp/a/../b", "/tmp/b"),
        ("/tmp/100% of #1?", "/tmp/100% of #1?"),
        ("2024", str(pathlib.Path.cwd() / "2024")),
        ("a:b", str(pathlib.Path.cwd() / "a:b")),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file://localhost/tmp/a", "/tmp/a"),
        ("gs://my-bucket", "gs://my-bucket"),
        ("gs://my-bucket/", "gs://my-bucket"),
        ("gs://my-bucket/a b/100%/ü/", "gs://my-bucket/a b/100%/ü"),
        ("s3://my.bucket//a/./b/../c", "s3://my.bucket/a/c"),
    ],
)
def test_a_path_may_be_local_or_in_a_bucket(text, expected):
    path = paths.as_path(text, "MODEL_DIR")
    assert str(path) == expected
    assert str(paths.as_path(path, "MODEL_DIR")) == expected
    assert paths.is_remote(path) == (not expected.startswith("/"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (None, "expected a path"),
        (7, "expected a path"),
        ("abfs://a/b", "unknown scheme 'abfs'"),
        ("hdfs://a", "unknown scheme"),
        ("GS://bucket/a", "unknown scheme 'GS'"),
        (" gs://bucket/a", "unknown scheme"),
        ("runs/gs://bucket", "unknown scheme"),
        ("gs:/bucket/a", "two slashes"),
        ("S3:bucket", "two slashes"),
        ("file:/tmp", "two slashes"),
        ("file://host/tmp", "another host"),
        ("file://tmp", "another host"),
        ("gs://", "no valid bucket"),
        ("gs:///a", "no valid bucket"),
        ("s3://a b/c", "no valid bucket"),
        ("gs://bucket/../other/a", "out of its bucket"),
        ("gs://bucket/run?", "patterns or versions"),
        ("gs://bucket/a#1", "patterns or versions"),
        ("s3://bucket/[a]", "patterns or versions"),
        ("~no_such_user/a", "home"),
        ("runs\n", "cannot be printed"),
    ],
)
def test_what_is_no_path_is_refused_by_the_name_of_its_setting(text, reason):
    with pytest.raises(ValueError, match=f"(?s)MODEL_DIR = .*{reason}"):
        paths.as_path(text, "MODEL_DIR")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    paths.writable(tmp_path / "a" / "b", "X")
    assert not (tmp_path / "a").exists()
    with pytest.raises(
        paths.StorageError, match=r"X = '/proc/a' cannot be written to: .* \(/proc\)"
    ):
        paths.writable("/proc/a", "X")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file/a", "link"):
        with pytest.raises(paths.StorageError, match=r"X = .* is not a directory"):
            paths.writable(tmp_path / name, "X")
