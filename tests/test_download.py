"""Open-i's archive over a bad line: servers that cut, lie, ignore and change; a killed download; hostile archives."""
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from cxrvlm import download as module
from cxrvlm.download import DownloadError, download, download_openi, main, unpack_openi
from cxrvlm.openi import load_openi, read_reports

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(310_000)


class Server:
    "An HTTP server whose `answers` (functions of the handler and the first byte asked for) are used in turn; the last one stays."

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                answer(self, int(asked[6:-1]) if asked else 0)

            def log_message(self, *_):
                "Say nothing."

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.tgz"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    started = []

    def start(*answers):
        started.append(Server(*answers))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def send(status, body, headers=(), length=None):
    "Answer with these bytes, and say what length is wanted."

    def answer(handler, start):
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        if length != "none":
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def ranged(content=CONTENT, most=10**9, tag='"first"', pause=0.0, honour=True):
    "A good server, that cuts the line after `most` bytes."

    def answer(handler, start):
        fits = honour and handler.headers.get("If-Range", tag) == tag
        start = start if fits else 0
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", tag)
        handler.send_header("Content-Length", str(len(content) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        for place in range(start, min(len(content), start + most), 10_000):
            handler.wfile.write(content[place : min(place + 10_000, start + most)])
            handler.wfile.flush()
            time.sleep(pause)

    return answer


def test_a_whole_file(serve, tmp_path):
    server = serve(ranged())
    assert download(server.url, tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None] and [path.name for path in tmp_path.iterdir()] == ["x"]
    download(server.url, tmp_path / "x")
    assert server.asked == [None]  # it is there


@pytest.mark.parametrize("most", [120_000, 7, 299_999])
def test_a_line_that_is_cut_goes_on_where_it_was(serve, tmp_path, most):
    server = serve(*[ranged(most=most)] * 3, ranged())
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    starts = [0 if asked is None else int(asked[6:-1]) for asked in server.asked]
    assert starts == sorted(starts) and starts[1] == most


def test_a_line_that_brings_nothing_gives_up_and_says_how_far_it_came(serve, tmp_path):
    server = serve(ranged(most=100_000), ranged(most=0))
    with pytest.raises(DownloadError, match="100,000 bytes are here; the same command goes on"):
        download(server.url, tmp_path / "x", attempts=3, wait=0)
    assert server.asked[1:] == ["bytes=100000-"] * 3
    server.answers = [ranged()]
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_sends_all_and_nothing_is_doubled(serve, tmp_path):
    server = serve(ranged(most=50_000, honour=False), ranged(honour=False))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=50000-"]


def test_a_file_that_changes_meanwhile_is_begun_anew(serve, tmp_path):
    server = serve(ranged(most=50_000), ranged(OTHER, tag='"second"'))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == OTHER


def test_a_file_without_a_mark_is_begun_anew(serve, tmp_path):
    "Nobody can know whether its rest belongs to what is here."
    server = serve(send(200, CONTENT[:1000], length=len(CONTENT)), send(200, CONTENT))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    assert server.asked == [None, None]


def test_a_length_that_is_too_large_is_noticed(serve, tmp_path):
    server = serve(send(200, CONTENT, length=len(CONTENT) + 5))
    with pytest.raises(DownloadError, match="bytes are here"):
        download(server.url, tmp_path / "x", attempts=2, wait=0)
    assert not (tmp_path / "x").exists()


def test_a_range_that_was_not_asked_for_is_refused(serve, tmp_path):
    wrong = send(206, CONTENT[9:], [("Content-Range", f"bytes 9-{len(CONTENT) - 1}/{len(CONTENT)}"), ("ETag", '"first"')])
    server = serve(ranged(most=50_000), wrong)
    with pytest.raises(DownloadError, match="asked for bytes from 50000, and the server sends bytes 9-"):
        download(server.url, tmp_path / "x", wait=0)


def test_a_range_beyond_the_end_begins_anew(serve, tmp_path):
    server = serve(ranged(most=50_000), send(416, b""), ranged())
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT


def test_an_error_that_passes_and_one_that_does_not(serve, tmp_path):
    server = serve(send(500, b""), send(503, b""), ranged())
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    server = serve(send(404, b"not here"))
    with pytest.raises(DownloadError, match="the server answers 404"):
        download(server.url, tmp_path / "y", wait=0)
    assert len(server.asked) == 1


def test_nobody_answers(tmp_path):
    with pytest.raises(DownloadError, match="0 bytes are here"):
        download("http://127.0.0.1:9/x", tmp_path / "x", attempts=2, wait=0)


def test_a_checksum(serve, tmp_path):
    import hashlib
    server = serve(ranged())
    with pytest.raises(DownloadError, match="was expected: it was removed"):
        download(server.url, tmp_path / "x", sha256="ab" * 32)
    assert not list(tmp_path.glob("x*part")) and not (tmp_path / "x").exists()
    assert download(server.url, tmp_path / "x", sha256=hashlib.sha256(CONTENT).hexdigest().upper()).exists()


def test_a_disk_that_is_full(serve, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "attempt", full)
    with pytest.raises(DownloadError, match="No space left on device.: make room"):
        download("http://x", tmp_path / "x")


def test_a_killed_download_goes_on(serve, tmp_path):
    server = serve(ranged(pause=0.05))
    program = f"from cxrvlm.download import download; download({server.url!r}, {str(tmp_path / 'x')!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    part = tmp_path / "x.part"
    while not part.exists() or part.stat().st_size < 50_000:
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(CONTENT)
    assert download(server.url, tmp_path / "x").read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={have}-"


# Unpacking

NAMES = ["CXR1001_IM-0004-1001.png", "CXR7_IM-2263-1001.png", "CXR25_IM-1024-2001.png"]


def png(shade=0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (60, 50), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def archive(path, members, links=()):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for name, target in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            file.addfile(link)
    return path


@pytest.fixture(scope="module")
def known():
    return set(read_reports().images.explode().dropna())


def test_hostile_members_are_counted_and_stay_outside(tmp_path, known):
    members = [(name, png(i)) for i, name in enumerate(NAMES)]
    members += [("CXR54_IM-2145-1001.png", png()[:150]), ("../../up.png", png()), ("../" + "CXR303_IM-1404-1001.png", png()), ("cat.png", png())]
    path = archive(tmp_path / "a.tgz", members, [("CXR1000_IM-0003-1001.png", "/etc/passwd")])
    found = unpack_openi(path, tmp_path / "in/images", known)
    assert {what: len(names) for what, names in found.items()} == {"unpacked": 4, "here already": 0, "damaged": 1, "strange": 3}
    assert found["damaged"] == ["CXR54_IM-2145-1001.png"]
    assert sorted(p.name for p in (tmp_path / "in/images").iterdir()) == sorted([*NAMES, "CXR303_IM-1404-1001.png"])
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ".png") == sorted([*NAMES, "CXR303_IM-1404-1001.png"])


def test_an_image_that_was_cut_off_on_disk_is_unpacked_again(tmp_path, known):
    path = archive(tmp_path / "a.tgz", [(name, png()) for name in NAMES])
    unpack_openi(path, tmp_path / "images", known)
    (tmp_path / "images" / NAMES[0]).write_bytes(png()[:99])
    found = unpack_openi(path, tmp_path / "images", known)
    assert found["unpacked"] == [NAMES[0]] and len(found["here already"]) == 2


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no archive", lambda b: b"", lambda b: b[:40] + bytes(40) + b[80:]])
def test_a_damaged_archive_is_named(tmp_path, known, damage):
    path = archive(tmp_path / "a.tgz", [(name, png(i)) for i, name in enumerate(NAMES)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DownloadError, match=r"a\.tgz is damaged .* delete it"):
        unpack_openi(path, tmp_path / "images", known)


def test_from_the_server_to_the_studies(serve, tmp_path, capsys):
    content = archive(tmp_path / "served.tgz", [(name, png(i)) for i, name in enumerate(NAMES)]).read_bytes()
    server = serve(ranged(content, most=len(content) // 2), ranged(content))
    counts = download_openi(tmp_path / "images", server.url, wait=0).set_index("images")["count"]
    assert counts["unpacked"] == 3 and counts["named in a report, and not in the archive"] == 7470 - 3
    studies, exclusions = load_openi(tmp_path / "images")
    assert len(studies) == 3 and len(studies) + len(exclusions) == 3955
    assert main([str(tmp_path / "images"), "--url", server.url]) == 0 and "set data = " in capsys.readouterr().out
