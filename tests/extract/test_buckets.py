"""Caches and image tars in buckets: a real S3 server on loopback, and a proxy that fails often."""

import functools
import http.client
import http.server
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE

from extract import run as extract_run
from extract.cache.dataset import Batch, CachedViews
from extract.cache.errors import CacheError
from extract.cache.mirror import Mirror
from extract.cache.reader import Cache, select
from extract.cache.remote import Bucket, RemoteError
from extract.cache.schema import ArraySpec, Layout, UnitRecord
from extract.cache.staging import Staging
from extract.cache.writer import UnitWriter, commit, group_name
from extract.config import ExtractConfig
from extract.run import extract
from extract.sharing.claim_store import ClaimObjects
from extract.sharing.claims import Claims

LABEL = f"unic@{SIZE}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server; its address."""
    port = free_port()
    process = subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    yield address
    process.terminate()
    process.wait(20)


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty bucket's URL; mirrors of its caches are below tmp_path."""
    name = f"b{random.getrandbits(64):x}"
    request = urllib.request.Request(f"{server}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=20).close()
    for key, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "UNIC_MIRROR": str(tmp_path / "mirrors"),
    }.items():
        monkeypatch.setenv(key, value)
    return f"s3://{name}"


class Flaky(http.server.BaseHTTPRequestHandler):
    """Passes requests on to `upstream`; a share of them is refused, dropped or cut short."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    share = 0.3
    draw = random.Random(0)
    faults = 0

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.draw.choice(["503", "drop", "lost", "short"])
        if self.draw.random() >= self.share:
            fault = ""
        type(self).faults += bool(fault)
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        answer = self._ask(body)
        data = answer.read()
        if fault == "lost":  # It was done, but nobody hears of it.
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer.status)
        length = answer.getheader("Content-Length") or str(len(data))
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "short" and len(data) > 1:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _ask(self, body: bytes) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.upstream.removeprefix("http://"), timeout=20)
        connection.request(self.command, self.path, body, dict(self.headers))
        return connection.getresponse()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


class QuietServer(http.server.ThreadingHTTPServer):
    """Says nothing of connections that end early: here that is what it is for."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet."""


class Silent(http.server.SimpleHTTPRequestHandler):
    """Serves a folder."""

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def flaky(server: str) -> Iterator[type[Flaky]]:
    """A fresh proxy class with its own `faults`, and its address in `address`."""
    handler: Any = type("Proxy", (Flaky,), {"upstream": server, "draw": random.Random(1)})
    proxy = QuietServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield handler
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def web(tars: list[Path], flaky: Any) -> Iterator[str]:
    """The training tars on a web server that fails often."""
    handler = functools.partial(Silent, directory=str(tars[0].parent))
    files = QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    flaky.upstream = f"http://127.0.0.1:{files.server_address[1]}"
    yield flaky.address
    files.shutdown()
    files.server_close()


@pytest.fixture
def run(tars: list[Path], encoders: dict[str, Path]) -> Callable[..., Any]:
    def extracted(cache: str, names: tuple[str, ...] = ("alpha",), **changes: Any) -> Any:
        plain = ExtractConfig(
            data=tuple(map(str, tars)),
            cache=cache,
            teachers=tuple(f"{name}={encoders[name]}" for name in names),
            recipe=LABEL,
            views=2,
            batch_size=16,
            workers=2,
            device="cpu",
        )
        return extract(replace(plain, **changes))

    return extracted


def objects(url: str) -> dict[str, bytes]:
    """All objects but the tars' records, which say where the tars are."""
    bucket = Bucket(url)
    return {name: bucket.get(name) for name in bucket.names() if not name.startswith("tars/")}


def files(root: Path, *owners: str) -> dict[str, bytes]:
    return {
        name: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
        and (name := path.relative_to(root).as_posix()).startswith(("cache.json", *owners))
    }


def everything(location: str | Path, **options: Any) -> Batch:
    dataset = CachedViews(select(Cache(location), encoders=["alpha"]), **options)
    return dataset.__getitems__(range(len(dataset)))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a["views"], b["views"]) and all(
        torch.equal(a["targets"]["alpha"][n], b["targets"]["alpha"][n]) for n in ("cls", "patches")
    )


def test_a_cache_in_a_bucket_is_the_cache_on_disk(
    bucket: str, run: Callable[..., Any], feats: Path, tmp_path: Path
) -> None:
    url = f"{bucket}/feats"
    assert run(url)[0].computed == 102
    assert objects(url) == files(feats, "views", "alpha")
    assert run(url)[0].computed == 0
    assert same(everything(url), everything(feats))
    shutil.rmtree(tmp_path / "mirrors")  # Another machine.
    assert same(everything(url), everything(feats))
    CachedViews(select(Cache(url))).check_pixels(1000)
    assert run(url, names=("beta",))[0].computed == 102
    assert objects(url) == files(feats, "views", "alpha", "beta")


def test_a_small_mirror_reads_all_the_same(
    bucket: str,
    run: Callable[..., Any],
    feats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{bucket}/feats"
    run(url)
    shutil.rmtree(tmp_path / "mirrors")
    monkeypatch.setenv("UNIC_MIRROR_GB", "0.00005")
    assert same(everything(url), everything(feats))
    shards = [p for p in (tmp_path / "mirrors").rglob("c/*/**") if p.is_file()]
    assert sum(path.stat().st_size for path in shards) < 150_000
    monkeypatch.setenv("UNIC_MIRROR_GB", "much")
    with pytest.raises(Exception, match="UNIC_MIRROR_GB='much', expected gigabytes"):
        Cache(url)


def test_changed_and_lost_objects_are_named(
    bucket: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    url = f"{bucket}/feats"
    run(url)
    shutil.rmtree(tmp_path / "mirrors")
    (shard, *_) = [name for name in Bucket(url).names("alpha") if "/patches/c/" in name]
    content = bytearray(Bucket(url).get(shard))
    content[100] ^= 1
    Bucket(url).put(shard, bytes(content))
    with pytest.raises(RemoteError, match=rf"{shard}.*its sha256 is .*tried 5 times"):
        everything(url)
    Bucket(url).delete([shard])
    with pytest.raises(CacheError, match=f"{url}/{shard} is missing"):
        everything(url)


def test_of_two_writers_on_different_hardware_one_wins(bucket: str, tmp_path: Path) -> None:
    """Two machines (mirrors) publish other bits of one unit: one manifest, nobody's leftovers."""
    specs = {"key": ArraySpec("uint64"), "cls": ArraySpec("float16", (8,), sharded=True)}
    won = []
    for value in (1, 2):
        mirror = Mirror(f"{bucket}/feats", tmp_path / f"machine-{value}")
        with Staging(mirror.folder) as staging:
            writer = UnitWriter(staging.folder / "unit", 5, specs)
            writer.append("key", np.arange(5, dtype=np.uint64))
            writer.append("cls", np.full((5, 8), value, np.float16))
            found = writer.finish()
            record = UnitRecord(
                **{"tar": "a", "tar_sha256": "", "recipe": LABEL, "view": 0, "rows": 5},
                **{"keys_digest": "", "group": group_name("a", found)},
                arrays=writer.array_table(),
                objects=found,
            )
            layout = Layout(mirror.folder)
            won.append(commit(layout, "alpha", writer, record, staging.folder, mirror))
    assert won == [True, False]
    names = set(Bucket(f"{bucket}/feats").names())
    assert {name.split("/")[3] for name in names} == {
        "a.json",
        UnitRecord.read(tmp_path / "machine-2" / "alpha" / LABEL / "0" / "a.json").group,
    }


def test_what_another_machine_did_meanwhile_is_not_done_again(
    bucket: str,
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between this machine's look at the bucket and its first tar, another one does it all."""
    url, plain = f"{bucket}/feats", extract_run.find_tars

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(extract_run, "find_tars", plain)
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("UNIC_MIRROR", str(tmp_path / "elsewhere"))
            assert run(url)[0].computed == 102
        return plain(*arguments)

    monkeypatch.setattr(extract_run, "find_tars", meanwhile)
    (done,) = run(url)
    assert (done.computed, done.images) == (0, 51)


def test_claims_in_a_bucket(bucket: str) -> None:
    store = ClaimObjects(Bucket(f"{bucket}/feats"))
    with Claims(store, "a") as mine, Claims(store, "a") as other:
        assert mine.take("000000") and not other.take("000000")
        mine.release("000000")
        assert other.take("000000")
    assert store.names() == []
    store.create("000001.x", b'{"machine": "elsewhere", "process": 1}')
    assert store.age("000001.x") < 5
    time.sleep(2.1)
    with Claims(store, "a", lease=1) as claims:
        assert claims._dead("000001.x")


def test_three_requests_in_ten_may_fail(
    bucket: str,
    run: Callable[..., Any],
    feats: Path,
    flaky: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{bucket}/feats"
    monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.address)
    run(url)
    shutil.rmtree(tmp_path / "mirrors")
    assert same(everything(url), everything(feats))
    assert flaky.faults > 30
    monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.upstream)
    assert objects(url) == files(feats, "views", "alpha")


def test_a_server_that_never_answers_is_given_up(
    bucket: str, monkeypatch: pytest.MonkeyPatch, flaky: Any
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.address)
    flaky.share = 1.1
    began = time.monotonic()
    with pytest.raises(RemoteError, match=rf"{bucket}/x/cache\.json: .*tried 5 times"):
        Bucket(f"{bucket}/x").get("cache.json")
    assert time.monotonic() - began < 90


def test_tars_in_a_bucket_and_on_a_web_server(
    bucket: str,
    run: Callable[..., Any],
    tars: list[Path],
    feats: Path,
    tmp_path: Path,
    web: str,
) -> None:
    for tar in tars:
        Bucket(f"{bucket}/data").put(tar.name, tar)
    for number, pattern in enumerate(
        (
            f"{bucket}/data/train-{{000000..000001}}.tar",
            f"{bucket}/data/train-*.tar",
            f"{web}/train-{{000000..000001}}.tar",
        )
    ):
        cache = tmp_path / f"cache-{number}"
        run(str(cache), data=(pattern,))
        assert files(cache, "views", "alpha") == files(feats, "views", "alpha")
        assert Cache(cache).tar("train-000001").locations[0].startswith(pattern.split("train")[0])
    assert same(everything(tmp_path / "cache-0"), everything(feats))  # Fetched for training.
    for missing in (f"{bucket}/data/none.tar", f"{bucket}/data/none-*.tar"):
        with pytest.raises(RemoteError, match="check the address given for the data"):
            run(str(tmp_path / "other"), data=(missing,))


def test_an_unknown_kind_of_url_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(RemoteError, match="ftp://host/feats cannot be opened"):
        run("ftp://host/feats")
