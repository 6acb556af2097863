"""Downloads from a real server that cuts connections, knows no ranges, or sends something else."""

import hashlib
import http.server
import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

import gac
from gac.checkpoint import find_released
from gac.checkpoint.download import cache_folder, download
from gac.checkpoint.weights import Released
from gac.errors import InputError

DIGITS = find_released("digits")
CONTENT = DIGITS.file().read_bytes()


class Server(http.server.ThreadingHTTPServer):
    """Sends ``content``; ``requests`` are the Range headers it got, one for each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.cuts: list[int] = []
        """After how many bytes the connection is cut, one for each of the next requests."""
        self.requests: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requests.append(asked)
        if self.path != "/weights":
            return self.send_error(404)
        content, begin = self.server.content, 0
        if asked is not None and self.server.knows_ranges:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.server.cuts:
            self.wfile.write(content[begin : begin + self.server.cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(content[begin:])
        return None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(tmp_path: Path):
    """Return a function that downloads the digits network's file from addresses and returns its bytes."""

    def fetch(*urls: str) -> bytes:
        path = tmp_path / "cache" / "digits.safetensors"
        download(urls, path, DIGITS.sha256, DIGITS.size)
        return path.read_bytes()

    return fetch


def refused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_a_connection_that_is_cut_is_continued_where_it_ended(server, fetch, tmp_path) -> None:
    server.cuts = [100_000, 1, 300_000]
    assert fetch(server.url) == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=100001-", "bytes=400001-"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".partial"]
    # What is there is not asked for again.
    assert fetch(server.url) == CONTENT
    assert len(server.requests) == 4


def test_the_progress_goes_on_where_the_download_does(server, fetch, monkeypatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, **options: object) -> None:
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("gac.checkpoint.download.tqdm", Bar)
    server.cuts = [100_000]
    fetch(server.url)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [
        (0, 100_000, len(CONTENT)),
        (100_000, len(CONTENT), len(CONTENT)),
    ]
    assert "digits.safetensors: 100%" in bars[1].fp.getvalue().replace("  ", " ")


def test_the_next_call_continues_and_from_another_address(server, fetch) -> None:
    server.cuts = [200_000, 0]
    with pytest.raises(InputError, match=rf"\(200000 of {len(CONTENT)} bytes have come and are kept\): "):
        fetch(server.url)
    offline = f"http://127.0.0.1:{refused_port()}/weights"
    assert fetch(offline, server.url) == CONTENT
    assert server.requests == [None, "bytes=200000-", "bytes=200000-"]


def test_a_server_without_ranges_is_asked_for_everything(server, fetch) -> None:
    server.knows_ranges, server.cuts = False, [100_000]
    assert fetch(server.url) == CONTENT
    assert server.requests == [None, "bytes=100000-"]


def test_a_server_that_gets_no_further_is_given_up(server, fetch) -> None:
    server.knows_ranges, server.cuts = False, [100_000] * 9
    with pytest.raises(InputError, match="the connection ended"):
        fetch(server.url)
    assert len(server.requests) == 2


def test_a_beginning_that_is_not_the_files_is_thrown_away(server, fetch, tmp_path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/digits.safetensors.partial").write_bytes(bytes(1000))
    assert fetch(server.url) == CONTENT
    assert server.requests == ["bytes=1000-", None]
    (tmp_path / "cache/digits.safetensors").unlink()
    (tmp_path / "cache/digits.safetensors.partial").write_bytes(bytes(len(CONTENT) + 1))
    assert fetch(server.url) == CONTENT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CONTENT[:-1] + b"x", "its content is not the expected one"),
        (CONTENT + b"x", f"offers {len(CONTENT) + 1} bytes instead of {len(CONTENT)}"),
        (b"<html>log in</html>", f"offers 19 bytes instead of {len(CONTENT)}"),
    ],
)
def test_another_file_is_not_taken_and_the_next_address_is(server, fetch, content, reason, tmp_path) -> None:
    server.content = content
    with pytest.raises(InputError, match=reason):
        fetch(server.url)
    assert not list((tmp_path / "cache").glob("*.partial"))
    with Server() as good:
        threading.Thread(target=good.serve_forever, args=(0.01,)).start()
        assert fetch(server.url, good.url) == CONTENT
        good.shutdown()


def test_where_no_address_answers_one_line_names_all_of_them(server, fetch, tmp_path) -> None:
    urls = [f"http://127.0.0.1:{refused_port()}/weights", f"{server.url}/none"]
    with pytest.raises(InputError) as refused:
        fetch(*urls)
    message = str(refused.value)
    assert message.startswith(f"digits.safetensors cannot be downloaded: {urls[0]}: ")
    assert "Connection refused" in message
    assert f"; {urls[1]}: HTTP Error 404: Not Found; try again with a connection, or put the file there" in message
    assert message.endswith(str(tmp_path / "cache" / "digits.safetensors"))
    assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be kept \(.*\): GAC_WEIGHTS_CACHE names another folder"):
        download([server.url], tmp_path / "file" / "w", DIGITS.sha256, DIGITS.size)
    assert server.requests == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GAC_WEIGHTS_CACHE": "/w", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/w"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/gac/weights"),
        ({"HOME": "/h"}, "/h/.cache/gac/weights"),
        ({"GAC_WEIGHTS_CACHE": "~/w", "HOME": "/h"}, "/h/w"),
        ({"XDG_CACHE_HOME": "~/x", "HOME": "/h"}, "/h/x/gac/weights"),
    ],
)
def test_the_cache_is_where_the_user_says(variables, expected, monkeypatch) -> None:
    for name in ("GAC_WEIGHTS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_released_weights_are_downloaded_once_and_again_when_damaged(server, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("gac.checkpoint.weights.FOLDER", tmp_path)
    monkeypatch.setenv("GAC_WEIGHTS_CACHE", str(tmp_path / "cache"))
    offline = f"http://127.0.0.1:{refused_port()}/weights"
    entry = Released("far", DIGITS.sha256, DIGITS.size, DIGITS.license, (offline, server.url), DIGITS.card)
    (tmp_path / "far.json").write_text(entry.to_json())
    assert gac.list_pretrained() == ["far"]
    for _ in range(2):
        assert gac.load_pretrained("far").card == DIGITS.card
        assert gac.create_model("gac_msresnet18_cifar", weights="far").T == 4
    assert len(server.requests) == 1
    assert entry.file() == tmp_path / "cache" / f"far-{DIGITS.sha256[:8]}.safetensors"
    entry.file().write_bytes(CONTENT[:-1] + b"x")
    assert gac.load_pretrained("far").card == DIGITS.card
    assert any("is damaged: downloading it again" in message for message in caplog.messages)
    assert entry.file().read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_what_several_want_at_once_is_downloaded_once(server, tmp_path) -> None:
    server.cuts = [1000] * 5
    path = tmp_path / "w"
    threads = [
        threading.Thread(target=download, args=([server.url], path, DIGITS.sha256, DIGITS.size)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DIGITS.sha256
    assert len(server.requests) == 6
