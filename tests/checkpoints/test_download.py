"""Downloads from a real HTTP server on loopback, whose answers are those that go wrong in practice."""

import contextlib
import http.server
import io
import os
import threading
import time
import zipfile

import pytest

from ffnet.checkpoints import download
from ffnet.checkpoints.download import download_published, published_file
from ffnet.checkpoints.loading import InvalidCheckpointError
from ffnet.system.files import sha256_of
from ffnet.variants import VARIANTS

ZOO = VARIANTS["segmentation_ffnet78S_dBBB_mobile"]
OTHER = VARIANTS["segmentation_ffnet46NS_CCC_mobile"]
ZOO_BASE = "https://github.com/quic/aimet-model-zoo/releases/download/torch_segmentation_ffnet/"
RELEASE_BASE = "https://github.com/Qualcomm-AI-research/FFNet/releases/download/models/"
PAGE = b"<!DOCTYPE html><html>sign in</html>"


def zip_file(text="weights", compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("a", text * 20_000)
    return stream.getvalue()


GOOD = zip_file()
DEFLATED = zip_file(compression=zipfile.ZIP_DEFLATED)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every request as the server's plan says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        plan = self.server.plan
        self.server.plan = "good" if isinstance(plan, str) and plan.startswith("http:") else plan
        status, body, headers = 200, GOOD, {}
        if isinstance(plan, str) and ":" in plan:
            status, body, headers = 302, b"", {"Location": plan}
        elif isinstance(plan, bytes):
            body = plan
        elif isinstance(plan, int):
            status, body = plan, PAGE
        headers = {"Content-Type": "application/octet-stream"} | headers
        size = {"no number": "abc", "huge": 2**40, "endless": None}.get(plan, len(body))
        headers |= {"Transfer-Encoding": "chunked"} if plan == "endless" else {"Content-Length": str(size)}
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while plan == "endless":
                self.wfile.write(b"1\r\nx\r\n")
                time.sleep(0.001)
            self.wfile.write(body[: len(body) // 2] if plan == "cut" else body)
        self.close_connection = True

    def log_message(self, *args):
        """Keeps the requests out of the tests' output."""


@pytest.fixture
def server(monkeypatch):
    """A server at both published addresses; `plan` says how it answers, `asked` has the paths that were asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.plan, server.asked = "good", []
        base = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(download, "ZOO", base + "zoo/")
        monkeypatch.setattr(download, "RELEASES", base + "releases/")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refusal(folder, variant=ZOO):
    with pytest.raises(InvalidCheckpointError) as caught:
        download_published(variant, folder)
    return str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_addresses_are_the_published_ones():
    assert published_file(ZOO) == (ZOO_BASE + f"prepared_{ZOO.name}.pth", f"prepared_{ZOO.name}.pth")
    assert published_file(OTHER) == (RELEASE_BASE + "ffnet46NS.zip", "ffnet46NS.zip")
    published = [published_file(variant)[0] for variant in VARIANTS.values() if not variant.is_demo]
    assert sum(url.startswith(ZOO_BASE) for url in published) == 5 and len(published) == 66


def test_demo_variants_have_no_published_file(tmp_path):
    assert "Add --checkpoint" in refusal(tmp_path, VARIANTS["segmentation_ffnet14T_dBBB_mobile"])


@pytest.mark.parametrize("variant", [ZOO, OTHER])
def test_file_is_downloaded_with_one_request_and_its_sha256_is_recorded(server, variant, tmp_path):
    folder = tmp_path / "new" / "cache"
    path = download_published(variant, folder)
    name = published_file(variant)[1]
    assert path == folder / name and path.read_bytes() == GOOD
    assert (folder / f"{name}.sha256").read_text() == f"{sha256_of(path)}  {name}\n"
    assert download_published(variant, folder) == path and len(server.asked) == 1
    assert names(folder) == [name, f"{name}.sha256"]


def test_a_quiet_download_shows_no_progress(server, tmp_path, capsys):
    download_published(ZOO, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr().err == ""
    download_published(ZOO, tmp_path / "shown")
    assert f"\rprepared_{ZOO.name}.pth: 100%" in capsys.readouterr().err


def read_only(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_complete_file_in_a_folder_that_can_not_be_written_is_read(server, monkeypatch, tmp_path):
    path = download_published(ZOO, tmp_path)
    monkeypatch.setattr("ffnet.checkpoints.download.FileLock", read_only)
    monkeypatch.setattr("ffnet.checkpoints.download.write_atomically", read_only)
    assert download_published(ZOO, tmp_path) == path
    path.with_name(path.name + ".sha256").unlink()  # as if it was put there by hand
    assert f"Permission denied). Give --checkpoint {path}." in refusal(tmp_path, ZOO)
    path.unlink()
    assert "Set TORCH_HOME, or name another --cache-dir." in refusal(tmp_path, ZOO)


@pytest.mark.parametrize("plan", ["redirect", "no number"])
def test_file_is_downloaded_after_redirects_and_without_a_length(server, plan, tmp_path):
    server.plan = f"http://127.0.0.1:{server.server_port}/other" if plan == "redirect" else plan
    assert download_published(ZOO, tmp_path).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("cut", "not a zip file"),
        (GOOD[:-50], "not a zip file"),
        (GOOD.replace(b"weights", b"weightz", 1), "arrived damaged"),
        (DEFLATED[:31] + b"\xff" + DEFLATED[32:], "decompressing"),
        (404, "Not Found"),
        (500, "Internal Server Error"),
        (PAGE, "not a zip file"),
    ],
)
def test_anything_but_the_whole_file_is_refused_and_no_file_is_left(server, plan, reason, tmp_path):
    server.plan = plan
    message = refusal(tmp_path)
    assert message.startswith(f"{published_file(ZOO)[0]}: ") and reason in message and "--checkpoint" in message
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "plan, name, limit", [("endless", "MAX_FILE", 100), ("endless", "MAX_SECONDS", 0.3), ("huge", "MAX_FILE", 2**32)]
)
def test_a_download_without_an_end_is_refused_after_one_request(server, plan, name, limit, monkeypatch, tmp_path):
    server.plan = plan
    monkeypatch.setattr(download, name, limit)
    assert "the file cannot be downloaded (more than" in refusal(tmp_path)
    assert len(server.asked) == 1 and names(tmp_path) == []


@pytest.mark.parametrize("address", ["https://127.0.0.1/x", "ftp://127.0.0.1/x"])
def test_a_redirect_to_another_scheme_is_refused_at_once(server, address, tmp_path):
    server.plan = address
    message = refusal(tmp_path)
    assert address in message and "\n" not in message
    assert len(server.asked) == 1 and names(tmp_path) == []


def test_without_a_network_the_error_names_address_and_path(server, monkeypatch, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        closed = other.server_port
    monkeypatch.setattr(download, "ZOO", f"http://127.0.0.1:{closed}/")
    message = refusal(tmp_path)
    assert message.startswith(f"http://127.0.0.1:{closed}/prepared_") and "refused" in message
    assert f"put it at {tmp_path / published_file(ZOO)[1]}" in message


def test_a_file_that_changed_here_or_on_the_server_is_refused(server, tmp_path):
    path = download_published(ZOO, tmp_path)
    server.plan = zip_file("other")
    path.write_bytes(zip_file("other"))
    for _ in range(2):  # the first download's sha256 stays
        assert "from the first download" in refusal(tmp_path)
        path.unlink()


def test_sha256_of_a_file_that_was_put_there_by_hand_is_recorded(server, tmp_path):
    path = tmp_path / published_file(ZOO)[1]
    path.write_bytes(GOOD)
    assert download_published(ZOO, tmp_path) == path and server.asked == []
    assert (tmp_path / f"{path.name}.sha256").exists()


@pytest.mark.parametrize("suffix", ("", ".sha256"))
def test_a_pipe_in_the_cache_is_refused(server, tmp_path, suffix):
    path = download_published(ZOO, tmp_path)
    pipe = path.with_name(f"{path.name}{suffix}")
    pipe.unlink()
    os.mkfifo(pipe)
    assert f"it is a pipe, not a file: '{pipe}'" in refusal(tmp_path)


def test_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in message and "--cache-dir" in message
