from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import s3

from storage.stores import errors, files
from storage.stores.errors import Patience, StoreError, WrongBytesError

DATA = bytes(range(256)) * 400

pytestmark = pytest.mark.slow  # the server takes seconds


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3.s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, own_cache: None, tmp_path: Path) -> None:
    monkeypatch.setattr(errors, "PATIENCE", Patience(attempts=2, stall_s=30.0, first_wait_s=0.01))
    files.use_cache(tmp_path / "cache", 1)


def read(path: Path) -> bytes:
    with files.open_file(path) as file:
        return file.read()


def put(tmp_path: Path, name: str, data: bytes, **options: str) -> None:
    import boto3

    (tmp_path / "put").write_bytes(data)
    boto3.client("s3").upload_file(str(tmp_path / "put"), s3.BUCKET, name, ExtraArgs=options)


def test_a_file_of_s3_is_verified_by_its_md5(bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "one/a.tar", DATA)
    with caplog.at_level("INFO"):
        assert read(files.remote_file(f"{bucket}/one/a.tar")) == DATA
    assert "verified by its size and MD5 of its store" in caplog.text


def test_a_fetch_from_s3_goes_on_where_it_ended(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    put(tmp_path, "two/a.tar", DATA)
    monkeypatch.setattr("storage.stores.remote.BLOCK", 40_000)
    asked: list[int] = []
    fetch_range = s3fs.core.S3File._fetch_range

    def failing(self: object, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) == 2:
            raise OSError("the connection is gone")
        return bytes(fetch_range(self, start, end))

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", failing)
    assert read(files.remote_file(f"{bucket}/two/a.tar")) == DATA
    assert asked == [0, 40_000, 39_999, 79_999]


def test_other_bytes_than_the_md5_of_s3_are_refused(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    put(tmp_path, "three/a.tar", DATA)
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", lambda self, start, end: bytes(min(end, len(DATA)) - start))
    with pytest.raises(WrongBytesError, match=r"other bytes than it should .MD5 of its store"):
        read(files.remote_file(f"{bucket}/three/a.tar"))


def test_under_a_key_of_its_owner_the_etag_is_no_md5(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "four/a.tar", DATA, ServerSideEncryption="aws:kms")
    with caplog.at_level("INFO"):
        assert read(files.remote_file(f"{bucket}/four/a.tar")) == DATA
    assert "verified by its size;" in caplog.text


def test_what_is_missing_is_told(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no s3://bucket/gone.tar in its store"):
        read(files.remote_file(f"{bucket}/gone.tar"))
    with pytest.raises(FileNotFoundError, match=r"no s3://another/a.tar in its store"):
        read(files.remote_file("s3://another/a.tar"))
    with pytest.raises(StoreError, match=r"s3://another/a.tar cannot be written: there is no such bucket"):
        files.write_file(files.remote_file("s3://another/a.tar"), lambda path: path.write_bytes(DATA))


@pytest.mark.parametrize(
    ("code", "status"), [("ExpiredToken", 400), ("InvalidAccessKeyId", 403), ("AccessDenied", 403)]
)
def test_keys_that_are_wrong_or_expired_are_told(
    bucket: str, code: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}

    async def refuse(self: object, *_: object, **__: object) -> None:
        raise s3fs.errors.translate_boto_error(ClientError(answer, "HeadObject"))  # type: ignore[arg-type]

    monkeypatch.setattr(s3fs.core.S3FileSystem, "_call_s3", refuse)
    with pytest.raises(StoreError, match=r"its store forbids it .*missing, wrong or expired") as raised:
        read(files.remote_file(f"{bucket}/a.tar"))
    assert "tried" not in str(raised.value)


def test_without_keys_it_is_told_that_they_are_missing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(StoreError, match="its store forbids it"):
        read(files.remote_file(f"{bucket}/a.tar"))


def test_files_and_folders_are_written_read_and_deleted(bucket: str, tmp_path: Path) -> None:
    path = files.below(Path(f"{bucket}/five"), "a.tar")
    files.write_file(path, lambda local: local.write_bytes(DATA))
    assert files.files_in(Path(f"{bucket}/five"), ".tar") == [path]
    assert read(path) == DATA
    files.write_file(path, lambda local: local.write_bytes(DATA[1:]))
    assert read(path) == DATA[1:]
    files.delete_file(path)
    assert not files.exists(path)


MANIFEST = ("a", "gone", "deep/*.b")


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        one.relative_to(folder).as_posix(): one.read_bytes()
        for one in folder.rglob("*")
        if one.is_file() and not one.name.startswith(".")
    }


def test_a_local_folder_is_as_in_the_store_and_holds_nothing_else(bucket: str, tmp_path: Path) -> None:
    url = Path(f"{bucket}/six")
    for name, data in (("six/deep/1.b", b"1"), ("six/gone", b"2"), ("six/0.tar", DATA), ("six/deep/a", DATA)):
        put(tmp_path, name, data)
    folder = files.local_folder(url, MANIFEST)
    assert files_below(folder) == {"deep/1.b": b"1", "gone": b"2"}
    (folder / "a").write_bytes(b"22")
    (folder / "deep" / "1.b").write_bytes(b"333")
    files.upload_folder(url, MANIFEST)
    files.delete_file(files.remote_file(f"{bucket}/six/gone"))
    (folder / "deep" / "new.b").write_bytes(b"made before an interruption")
    assert files.local_folder(url, MANIFEST, made="deep/*.b") == folder
    assert files_below(folder) == {"a": b"22", "deep/1.b": b"333", "deep/new.b": b"made before an interruption"}
    assert files.local_folder(url, MANIFEST) == folder
    assert files_below(folder) == {"a": b"22", "deep/1.b": b"333"}
    files.upload_folder(url, MANIFEST)
    assert s3.keys("six/") == ["six/0.tar", "six/a", "six/deep/1.b", "six/deep/a"]
    files.use_cache(tmp_path / "another", 1)
    assert files_below(files.local_folder(url, MANIFEST)) == {"a": b"22", "deep/1.b": b"333"}
