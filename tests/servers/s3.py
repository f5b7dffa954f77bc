"""An S3 server on loopback (moto), for tests of stores; they are skipped where it is not installed."""

import contextlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Serve an empty bucket while the context lasts, and set what clients read of the environment; yields its URL."""
    reason = "no S3 server here: pip install s3fs 'moto[s3,server]'"
    pytest.importorskip("s3fs", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    boto3 = pytest.importorskip("boto3", reason=reason)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        # What moto holds belongs to the process, so an earlier server's bucket would still be there.
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}"
    finally:
        server.stop()


def put_folder(folder: Path, prefix: str) -> None:
    """Upload the files of a folder to the bucket, by boto3 and not by what is tested."""
    import boto3

    client = boto3.client("s3")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


def delete(key: str) -> None:
    """Delete a file of the bucket."""
    import boto3

    boto3.client("s3").delete_object(Bucket=BUCKET, Key=key)


def keys(prefix: str) -> list[str]:
    """Return the names of what the bucket holds below a prefix."""
    import boto3

    found = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return sorted(one["Key"] for one in found)
