"""`/log/…`: the whole build log in any stored form, marked immutable once it is complete."""

import bz2
import http.client
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import zstandard

from harmonia.nix.store_path import StorePath
from harmonia.store.build_log import find_log
from harmonia.tools.store_builder import StoreBuilder
from support.build_logs import DAY, FORMS, TEXT, add_log, age, collected
from support.running import KNOWN_LENGTHS, Server, peak_bytes, read_answer

Start = Callable[..., Server]

IMMUTABLE = "public, max-age=31536000, immutable"


def bytes_read(server: Server) -> int:
    """Return how many bytes the only worker has read so far."""
    (worker,) = server.workers
    return int(re.findall(r"rchar: (\d+)", Path(f"/proc/{worker}/io").read_text())[0])


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> StoreBuilder:
    return StoreBuilder(tmp_path_factory.mktemp("logs") / "store")


@pytest.fixture(scope="module")
def server(logs: StoreBuilder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(
        tmp_path_factory.mktemp("server") / "running", Path(logs.real_dir).parents[1], program=KNOWN_LENGTHS
    )
    running.start()
    yield running
    assert running.stop() == 0
    assert not [line for line in running.log if "Traceback" in line]


@pytest.mark.parametrize("flat", [False, True], ids=["split", "flat"])
@pytest.mark.parametrize("suffix", FORMS)
def test_log_is_served_from_every_stored_form(server: Server, logs: StoreBuilder, suffix: str, flat: bool) -> None:  # noqa: FBT001 (a parameter of pytest)
    derivation = collected(logs, f"form-{flat}-{suffix}")
    add_log(logs, derivation, suffix=suffix, flat=flat)
    answer = server.get(f"/log/{derivation}")
    assert (answer.status, answer.body) == (200, TEXT)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == IMMUTABLE
    assert answer.headers["vary"] == "Accept-Encoding"
    assert "content-disposition" not in answer.headers
    assert ("content-length" in answer.headers) == (suffix == "")


@pytest.mark.parametrize("suffix", FORMS)
def test_log_is_compressed_for_clients_that_accept_zstd(server: Server, logs: StoreBuilder, suffix: str) -> None:
    derivation = collected(logs, f"encoded-{suffix}")
    add_log(logs, derivation, suffix=suffix)
    where = f"/log/{derivation}"
    answer = server.get(where, {"Accept-Encoding": "zstd"})
    assert answer.headers["content-encoding"] == "zstd"
    assert zstandard.ZstdDecompressor().decompressobj().decompress(answer.body) == TEXT
    assert len(answer.body) < len(TEXT) // 5
    assert zstandard.get_frame_parameters(answer.body).window_size <= 8 << 20
    assert answer.headers["etag"] != server.head(where).headers["etag"]
    assert answer.headers == server.head(where, {"Accept-Encoding": "zstd"}).headers


def test_small_log_is_not_compressed(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "small")
    add_log(logs, derivation, b"small\n", "")
    answer = server.get(f"/log/{derivation}", {"Accept-Encoding": "zstd"})
    assert answer.body == b"small\n"
    assert "content-encoding" not in answer.headers


def test_enable_compression_false_sends_logs_uncompressed(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation = collected(store, "plain")
    add_log(store, derivation)
    server = start(store=tmp_path / "store", settings="enable_compression = false")
    answer = server.get(f"/log/{derivation}", {"Accept-Encoding": "zstd"})
    assert answer.body == TEXT
    assert "vary" not in answer.headers


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize(
    ("asked", "part"),
    [("100-199", slice(100, 200)), ("1000000-", slice(1_000_000, len(TEXT))), ("-7", slice(len(TEXT) - 7, len(TEXT)))],
)
def test_ranges_of_every_stored_form(server: Server, logs: StoreBuilder, suffix: str, asked: str, part: slice) -> None:
    derivation = collected(logs, f"range-{suffix}")
    add_log(logs, derivation, suffix=suffix)
    headers = {"Range": f"bytes={asked}"}
    answer = server.get(f"/log/{derivation}", headers)
    assert (answer.status, answer.body) == (206, TEXT[part])
    assert answer.headers["content-range"] == f"bytes {part.start}-{part.stop - 1}/{len(TEXT)}"
    head = server.head(f"/log/{derivation}", headers)  # HEAD ignores ranges (RFC 9110 section 14.2)
    assert (head.status, head.headers) == (200, server.get(f"/log/{derivation}").headers)


@pytest.mark.parametrize("suffix", FORMS)
def test_http_1_0_gets_a_content_length(server: Server, logs: StoreBuilder, suffix: str) -> None:
    derivation = collected(logs, f"old-{suffix}")
    add_log(logs, derivation, suffix=suffix)
    with server.connect() as connection:
        connection.sendall(f"GET /log/{derivation} HTTP/1.0\r\nAccept-Encoding: zstd\r\n\r\n".encode())
        answer = read_answer(connection)
        assert connection.recv(1) == b""
    assert answer.body == TEXT
    assert answer.headers["content-length"] == str(len(TEXT))
    head = server.request("HEAD", f"/log/{derivation}", {"Accept-Encoding": "zstd"}, version="1.0")
    assert head.headers == answer.headers


@pytest.mark.parametrize("suffix", FORMS)
def test_etag_changes_with_the_file(server: Server, logs: StoreBuilder, suffix: str) -> None:
    derivation = collected(logs, f"condition-{suffix}")
    path = add_log(logs, derivation, suffix=suffix)
    where = f"/log/{derivation}"
    etag = server.head(where).headers["etag"]
    answer = server.get(where, {"If-None-Match": etag})
    assert (answer.status, answer.body) == (304, b"")
    age(path, 3 * DAY)
    assert server.get(where, {"If-None-Match": etag}).status == 200


@pytest.mark.parametrize("suffix", FORMS)
def test_head_equals_get_without_a_body(server: Server, logs: StoreBuilder, suffix: str) -> None:
    derivation = collected(logs, f"head-{suffix}")
    add_log(logs, derivation, suffix=suffix)
    get, head = server.get(f"/log/{derivation}"), server.head(f"/log/{derivation}")
    assert (head.status, head.headers, head.body) == (200, get.headers, b"")


# Lookup


@pytest.mark.parametrize("asked", ["derivation", "stem", "output", "hash part", "hash part of output"])
def test_log_is_found_by_derivation_output_or_hash_part(server: Server, logs: StoreBuilder, asked: str) -> None:
    derivation, output = logs.add_derivation(f"{asked.replace(' ', '-')}-1.0", "/bin/sh")
    logs.add(output, b"out", deriver=derivation.path)
    logs.add_log(derivation.path, asked.encode())
    name = {
        "derivation": derivation.path,
        "stem": derivation.path.removesuffix(".drv"),
        "output": output,
        "hash part": derivation.path.hash_part,
        "hash part of output": output.hash_part,
    }[asked]
    answer = server.get(f"/log/{name}")
    assert (answer.status, answer.body) == (200, asked.encode())


@pytest.mark.parametrize("flat", [False, True], ids=["split", "flat"])
@pytest.mark.parametrize("suffix", FORMS)
def test_log_of_a_collected_derivation_is_found_by_hash_part(
    server: Server, logs: StoreBuilder, suffix: str, *, flat: bool
) -> None:
    derivation = collected(logs, f"hash-{flat}-{suffix}")
    beside = f"{derivation[:2]}{'0' * 30}-other.drv"  # in the same directory
    for each in (derivation, beside):
        add_log(logs, each, each.encode(), suffix, flat=flat)
    assert server.get(f"/log/{derivation[:32]}").body == derivation.encode()
    assert server.get(f"/log/{derivation[:2]}{'1' * 30}").status == 404


def test_log_is_found_by_the_output_of_a_collected_derivation(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "lost")
    output = logs.add(logs.output_path("lost"), b"out", deriver=StorePath(derivation))
    add_log(logs, derivation)
    assert server.get(f"/log/{output.path.hash_part}").body == TEXT


def test_files_that_are_no_logs_are_not_found(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "no-log")
    for rest in ("no-log", "no-log.drv.gz", "no log.drv", "x" * 215 + ".drv"):
        name = f"{derivation[2:32]}-{rest}"
        os.makedirs(f"{logs.log_dir}/{derivation[:2]}", exist_ok=True)
        Path(logs.log_dir, derivation[:2], name).write_bytes(b"no log")
    assert server.get(f"/log/{derivation[:32]}").status == 404


def test_log_of_a_collected_derivation_is_found_without_the_drv_suffix(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "stem")
    add_log(logs, derivation)
    assert server.get(f"/log/{derivation.removesuffix('.drv')}").body == TEXT


NAMES = ["plain-1.0", "c++-1.0", "q?z=1", "a?b?c=d", "ends?", "x=y", "_._"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".drv", ""], ids=["derivation", "output"])
def test_names_with_special_characters_work_in_every_encoding(
    server: Server, logs: StoreBuilder, name: str, suffix: str
) -> None:
    path = StorePath(f"{logs.output_path(name).hash_part}-{name}")
    add_log(logs, f"{path}.drv", name.encode())
    asked = f"{path}{suffix}"
    for spelling in (asked, quote(asked), "".join(f"%{byte:02x}" for byte in asked.encode())):
        assert server.get(f"/log/{spelling}").body == name.encode()


def test_doubly_encoded_name_gets_404(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "c++")
    add_log(logs, derivation)
    assert server.get(f"/log/{quote(quote(derivation))}").status == 404
    assert server.get(f"/log/{derivation.replace('+', ' ')}").status in (400, 404)


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "x",
        "." * 2,
        "%2e%2e",
        "{derivation}/",
        "{derivation}x",
        "{derivation}.bz2",
        "{derivation}?",
        "{derivation}%00",
        "%2e%2e%2f{derivation}",
        "..%2f..%2fsecret",
        "{split}",
        "{hash}-..%2f..%2f..%2fsecret",
        "{hash}-%5c..%5csecret",
        "%80",
        "%e2%82%ac",
        "a" * 5000,
        "{hash}-" + "n" * 211,
    ],
)
def test_malformed_name_or_traversal_gets_404(server: Server, logs: StoreBuilder, asked: str) -> None:
    derivation = collected(logs, "existing")
    add_log(logs, derivation)
    Path(logs.log_dir, "..", "secret").write_bytes(b"secret")
    name = asked.format(derivation=derivation, hash=derivation[:32], split=f"{derivation[:2]}%2f{derivation[2:]}")
    answer = server.get(f"/log/{name}")
    assert (answer.status, answer.body) == (404, b"Not Found\n")


def test_symlinks_fifos_and_directories_are_not_served(server: Server, logs: StoreBuilder) -> None:
    for name, make in (
        ("link", lambda path: os.symlink("/etc/passwd", path)),
        ("fifo", os.mkfifo),
        ("directory", os.mkdir),
    ):
        derivation = collected(logs, f"no-{name}")
        os.makedirs(f"{logs.log_dir}/{derivation[:2]}", exist_ok=True)
        make(f"{logs.log_dir}/{derivation[:2]}/{derivation[2:]}")
        assert server.get(f"/log/{derivation}").status == 404


def test_missing_log_directory_gets_404(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    os.rmdir(store.log_dir)
    server = start(store=tmp_path / "store")
    assert server.get(f"/log/{collected(store, 'none')}").status == 404
    assert not [line for line in server.log if "ERROR" in line]


@pytest.mark.parametrize("setting", ["log_dir", "NIX_LOG_DIR"])
def test_log_dir_and_nix_log_dir_are_used(start: Start, store: StoreBuilder, tmp_path: Path, setting: str) -> None:
    derivation = collected(store, "elsewhere")
    add_log(store, derivation)
    elsewhere = tmp_path / "logs"
    elsewhere.mkdir()
    os.rename(store.log_dir, elsewhere / "drvs")
    given = (
        {"settings": f"log_dir = '{elsewhere}'"}
        if setting == "log_dir"
        else {"settings": "log_dir = '/none'", "environment": {"NIX_LOG_DIR": str(elsewhere)}}
    )
    server = start(store=tmp_path / "store", **given)
    assert server.get(f"/log/{derivation}").body == TEXT


def test_log_by_derivation_needs_no_database(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation = collected(store, "existing")
    add_log(store, derivation)
    server = start(store=tmp_path / "store")
    os.rename(store.db_path, tmp_path / "away")
    assert server.get(f"/log/{derivation}").body == TEXT
    assert server.get(f"/log/{derivation[:32]}").status == 503


def test_stored_forms_are_tried_in_the_order_of_nix(tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    derivation = StorePath(collected(store, "all"))
    log_dir = os.path.dirname(store.log_dir)
    order = [(flat, suffix) for flat in (False, True) for suffix in FORMS]
    for flat, suffix in reversed(order):
        text = f"{flat} {suffix}".encode()
        add_log(store, derivation, text, suffix, flat=flat)
        found = find_log(log_dir, derivation)
        assert found
        assert b"".join(chunk or b"" for chunk in found.read(0, None)) == text


# Growing and damaged logs


def test_growing_plain_log_is_not_immutable(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "growing")
    path = add_log(logs, derivation, TEXT, "")
    where = f"/log/{derivation}"
    age(path, 12 * 60 * 60)
    answer = server.get(where)
    assert (answer.headers["cache-control"], answer.headers["content-length"]) == ("no-cache", str(len(TEXT)))
    with open(path, "ab") as file:
        file.write(b"more\n")
    grown = server.get(where, {"If-None-Match": answer.headers["etag"]})
    assert (grown.status, grown.body) == (200, TEXT + b"more\n")
    part = server.get(where, {"Range": f"bytes={len(TEXT)}-", "If-Range": answer.headers["etag"]})
    assert part.status == 200  # the log has changed
    age(path, 25 * 60 * 60)
    assert server.get(where).headers["cache-control"] == IMMUTABLE


@pytest.mark.parametrize("kept", [0, 3, 10, 100, -1, -12])
def test_growing_compressed_log_is_sent_up_to_its_last_block_and_not_immutable(
    server: Server, logs: StoreBuilder, kept: int
) -> None:
    """Nix compresses block by block while it builds."""
    derivation = collected(logs, f"growing-{kept}")
    path = add_log(logs, derivation)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:kept])
    age(path, 2 * DAY)
    for headers in ({}, {"Accept-Encoding": "zstd"}):
        answer = server.get(f"/log/{derivation}", headers)
        text = zstandard.ZstdDecompressor().decompressobj().decompress(answer.body) if headers else answer.body
        assert (answer.status, answer.headers["cache-control"]) == (200, "no-cache")
        assert TEXT.startswith(text)
        assert (len(text) > 0) == (kept < 0)
    Path(path).write_bytes(whole)
    answer = server.get(f"/log/{derivation}", {"If-None-Match": answer.headers["etag"]})
    assert (answer.status, answer.headers["cache-control"]) == (200, IMMUTABLE)


@pytest.mark.parametrize("length", range(0, 3000, 97))
def test_end_of_a_bz2_log_is_detected_at_any_bit_offset(tmp_path: Path, length: int) -> None:
    store = StoreBuilder(tmp_path / "store")
    derivation = StorePath(collected(store, "length"))
    path = add_log(store, derivation, os.urandom(length))
    whole = Path(path).read_bytes()
    for stop, finished in ((len(whole), True), (len(whole) - 1, False)):
        Path(path).write_bytes(whole[:stop])
        found = find_log(os.path.dirname(store.log_dir), derivation)
        assert found
        assert found.finished is finished


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 4] ^= 0xFF
    path.write_bytes(data)


def cut_zst(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_amid_bz2(path: Path) -> None:
    """Cut the middle out, but keep the end."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + data[-20:])


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(".bz2", damage_middle), (".zst", damage_middle), (".zst", cut_zst), (".bz2", cut_amid_bz2)],
)
@pytest.mark.parametrize("encoding", ["identity", "zstd"])
def test_damaged_log_breaks_the_transfer(
    server: Server, logs: StoreBuilder, suffix: str, damage: Callable[[Path], None], encoding: str
) -> None:
    derivation = collected(logs, f"{damage.__name__}-{encoding}-{suffix}")
    text = TEXT + os.urandom(1_000_000).hex().encode()
    damage(Path(add_log(logs, derivation, text, suffix)))
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        server.get(f"/log/{derivation}", {"Accept-Encoding": encoding})
    assert server.wait_for_log(rf"ERROR .*{re.escape(derivation)} breaks off")


@pytest.mark.parametrize("suffix", [".bz2", ".zst"])
def test_file_that_is_not_compressed_gets_404(server: Server, logs: StoreBuilder, suffix: str) -> None:
    derivation = collected(logs, f"nonsense{suffix}")
    path = Path(add_log(logs, derivation, suffix=suffix))
    path.write_bytes(b"nonsense" * 10_000)
    assert server.get(f"/log/{derivation}").status == 404
    assert server.wait_for_log(rf"ERROR .*{re.escape(derivation)}: 404")


def test_log_truncated_while_it_is_sent_breaks_the_transfer(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "cut")
    path = add_log(logs, derivation, b"", "")
    os.truncate(path, 1 << 30)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(f"GET /log/{derivation} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = connection.recv(1000)
        os.truncate(path, 1000)
        received = len(head)
        with suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                received += len(data)
    assert received < 1 << 30
    assert server.wait_for_log(rf"ERROR .*{re.escape(derivation)} breaks off.*cut short")


# Large logs


BOMBS = {
    ".bz2": lambda: bz2.compress(bytes(16 << 20)) * 4,
    ".zst": lambda: zstandard.compress(bytes(16 << 20), 19) * 4,
}


@pytest.mark.parametrize("suffix", BOMBS)
@pytest.mark.parametrize("encoding", ["identity", "zstd"])
def test_decompression_bomb_takes_little_memory(
    start: Start, store: StoreBuilder, tmp_path: Path, suffix: str, encoding: str
) -> None:
    derivation = collected(store, "bomb")
    Path(add_log(store, derivation, suffix=suffix)).write_bytes(BOMBS[suffix]())
    server = start(store=tmp_path / "store")
    server.get(f"/log/{collected(store, 'none')}")
    (worker,) = server.workers
    before = peak_bytes(worker)
    answer = server.get(f"/log/{derivation}", {"Accept-Encoding": encoding})
    if encoding == "identity":
        assert len(answer.body) == 64 << 20
    assert peak_bytes(worker) - before < 32 << 20


def test_range_of_a_large_log_reads_only_the_range(server: Server, logs: StoreBuilder) -> None:
    derivation = collected(logs, "large")
    path = add_log(logs, derivation, b"", "")
    os.truncate(path, 2 << 30)
    with open(path, "ab") as file:
        file.write(b"end\n")
    age(path, 2 * DAY)
    where = f"/log/{derivation}"
    assert server.head(where).headers["content-length"] == str((2 << 30) + 4)
    read = bytes_read(server)
    assert server.get(where, {"Range": "bytes=-4"}).body == b"end\n"
    assert bytes_read(server) - read < 1 << 20


def test_too_large_zstd_window_gets_404(server: Server, logs: StoreBuilder) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    derivation = collected(logs, "window")
    path = Path(add_log(logs, derivation, suffix=".zst"))
    path.write_bytes(compressor.compress(TEXT) + compressor.flush())
    assert server.get(f"/log/{derivation}").status == 404
    assert server.wait_for_log("ERROR .*-window.drv: 404, .*too much memory")


def test_unusable_database_row_hides_no_log(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    drv = store.add_text("damaged.drv", b"")
    output = store.add(store.output_path("other"), b"")
    add_log(store, drv.path)
    add_log(store, f"{output.path}.drv")
    with store.connect() as database:
        database.execute("update ValidPaths set narSize = null")
    server = start(store=tmp_path / "store")
    for asked in (drv.path, drv.path.hash_part, output.path):
        assert server.get(f"/log/{asked}").body == TEXT, asked
