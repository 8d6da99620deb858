"""Open-i's archive over a bad line: servers that cut, lie, ignore and change; a killed download; hostile archives."""
import gzip
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxrvlm.download import OPENI_PNG, DownloadError, download, download_openi, main, unpack_openi
from cxrvlm.openi import load_openi, read_reports

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(310_000)
ARCHIVE = OPENI_PNG.rsplit("/", 1)[-1]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    "A proxy cannot reach this machine's own servers."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


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
        self.http.handle_error = lambda *_: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.tgz"
        threading.Thread(target=lambda: self.http.serve_forever(poll_interval=0.01), daemon=True).start()


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


def send(status, body=b"", headers=(), length=None):
    "Answer with these bytes, and say this length (None: the true one; -1: none)."

    def answer(handler, start):
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        if length != -1:
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def ranged(content=CONTENT, most=10**9, mark=("ETag", '"first"'), ranges=True, if_range=True):
    "A good server, that cuts the line after `most` bytes; without `ranges` or `if_range` it ignores those headers."

    def answer(handler, start):
        fits = not if_range or handler.headers.get("If-Range", mark[1]) == mark[1]
        start = start if ranges and fits else 0
        handler.send_response(206 if start else 200)
        handler.send_header(*mark)
        handler.send_header("Content-Length", str(len(content) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        for place in range(start, min(len(content), start + most), 10_000):
            handler.wfile.write(content[place : min(place + 10_000, start + most)])
            handler.wfile.flush()

    return answer


def silent_after(most):
    "A server that says no more after some bytes, and does not cut the line."

    def answer(handler, start):
        ranged(most=most)(handler, start)
        threading.Event().wait()

    return answer


def begun(folder, size=50_000):
    "What a killed download of `x` leaves."
    (folder / "x.part").write_bytes(CONTENT[:size])
    (folder / "x.mark").write_text(f'{len(CONTENT)} "first"')
    return folder / "x"


def visible(folder):
    "The files of a folder, without the lock."
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# A transfer

def test_a_whole_file(serve, tmp_path):
    server = serve(ranged())
    assert download(server.url, tmp_path / "new/folder/x").read_bytes() == CONTENT
    assert server.asked == [None] and visible(tmp_path / "new/folder") == ["x"]
    download(server.url, tmp_path / "new/folder/x")
    assert server.asked == [None]  # it is there


@pytest.mark.parametrize("content", [b"", b"x"])
def test_a_file_of_hardly_anything(serve, tmp_path, content):
    assert download(serve(ranged(content)).url, tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("mark", [("ETag", '"first"'), ("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")])
@pytest.mark.parametrize("most", [120_000, 7, 299_999])
def test_a_line_that_is_cut_goes_on_where_it_was(serve, tmp_path, most, mark):
    server = serve(*[ranged(most=most, mark=mark)] * 3, ranged(mark=mark))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    expected = [f"bytes={start}-" for start in range(most, len(CONTENT), most)][:3]
    assert server.asked == [None, *expected]


def test_attempts_that_bring_something_do_not_count(serve, tmp_path):
    server = serve(ranged(most=30_000))
    assert download(server.url, tmp_path / "x", attempts=1, wait=0).read_bytes() == CONTENT
    assert len(server.asked) == 10


def test_a_line_that_brings_nothing_gives_up_and_says_how_far_it_came(serve, tmp_path):
    server = serve(ranged(most=100_000), ranged(most=0))
    with pytest.raises(DownloadError, match="the connection was cut. 100,000 of 300,000 bytes are here; the same command goes on"):
        download(server.url, tmp_path / "x", attempts=3, wait=0)
    assert server.asked == [None] + ["bytes=100000-"] * 3
    assert visible(tmp_path) == ["x.mark", "x.part"]
    server.answers = [ranged()]
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    assert server.asked[4:] == ["bytes=100000-"]


def test_the_pauses_grow_until_something_comes(serve, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("cxrvlm.download.time.sleep", pauses.append)
    server = serve(*[send(500)] * 3, ranged(most=10), *[send(500)] * 2, ranged())
    download(server.url, tmp_path / "x", wait=2)
    assert pauses == [2, 4, 8, 2, 2, 4]


def test_silence_counts_as_a_cut(serve, tmp_path):
    server = serve(silent_after(10_000), ranged())
    assert download(server.url, tmp_path / "x", wait=0, timeout=5).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=10000-"]


def test_a_killed_download_goes_on(serve, tmp_path):
    server = serve(silent_after(100_000))
    program = f"from cxrvlm.download import download; download({server.url!r}, {str(tmp_path / 'x')!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    part = tmp_path / "x.part"
    while not part.exists() or part.stat().st_size < 50_000:
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(CONTENT) and not (tmp_path / "x").exists()
    server.answers = [ranged()]
    assert download(server.url, tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={have}-"] and visible(tmp_path) == ["x"]


def test_killed_after_the_last_byte(serve, tmp_path):
    beyond = send(416, headers=[("Content-Range", f"bytes */{len(CONTENT)}")])
    server = serve(beyond)
    assert download(server.url, begun(tmp_path, size=len(CONTENT))).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_killed_before_the_new_mark_is_written(serve, tmp_path, monkeypatch):
    "Old bytes may never lie beside a new file's mark."
    server = serve(ranged(OTHER, mark=("ETag", '"second"')))
    path = begun(tmp_path)
    for method in ("write_text", "write_bytes"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, method, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            download(server.url, path)
        assert not path.exists()
    assert download(server.url, path).read_bytes() == OTHER


# Servers that do otherwise

def test_a_server_that_ignores_ranges_sends_all_and_nothing_is_doubled(serve, tmp_path):
    server = serve(ranged(most=50_000, ranges=False), ranged(ranges=False))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=50000-"]


def test_a_server_that_ignores_ranges_and_is_always_cut_is_not_asked_for_ever(serve, tmp_path):
    cuts = [90_000, 60_000, 75_000, 60_000, 75_000, 60_000, 75_000]
    server = serve(*[ranged(most=most, ranges=False) for most in cuts], ranged())
    with pytest.raises(DownloadError, match="the connection was cut"):
        download(server.url, tmp_path / "x", attempts=3, wait=0)
    assert len(server.asked) == 4


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("content", [OTHER, OTHER[: len(CONTENT)]])
def test_a_file_that_changes_meanwhile_is_begun_anew(serve, tmp_path, content, if_range):
    "Also where the server ignores If-Range and sends the new file's rest."
    server = serve(ranged(most=50_000), ranged(content, mark=("ETag", '"second"'), if_range=if_range))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == content
    assert server.asked == [None, "bytes=50000-"] + [None] * (not if_range)


def test_a_file_whose_length_changes_under_the_same_mark_is_begun_anew(serve, tmp_path):
    server = serve(ranged(most=50_000), ranged(OTHER))
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == OTHER
    assert server.asked == [None, "bytes=50000-", None]


@pytest.mark.parametrize("headers", [[], [("ETag", 'W/"weak"')]])
def test_a_file_without_a_mark_is_begun_anew(serve, tmp_path, headers):
    "Nobody can know whether its rest belongs to what is here."
    server = serve(send(200, CONTENT[:1000], headers, length=len(CONTENT)), send(500))
    with pytest.raises(DownloadError, match="1,000 of 300,000 bytes are here; the same command begins anew"):
        download(server.url, tmp_path / "x", attempts=2, wait=0)
    server.answers = [send(200, CONTENT, headers)]
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT
    assert server.asked == [None] * 4


def test_a_length_that_is_too_large_is_noticed(serve, tmp_path):
    server = serve(send(200, CONTENT, length=len(CONTENT) + 5))
    with pytest.raises(DownloadError, match="300,000 of 300,005 bytes are here"):
        download(server.url, tmp_path / "x", attempts=2, wait=0)
    assert not (tmp_path / "x").exists()


def test_a_length_that_is_not_said(serve, tmp_path):
    assert download(serve(send(200, CONTENT, length=-1)).url, tmp_path / "x").read_bytes() == CONTENT


def test_the_rest_in_slices(serve, tmp_path):
    "A server may send less than was asked for; Content-Range says so."

    def slices(handler, start):
        piece = CONTENT[start : start + 90_000]
        where = f"bytes {start}-{start + len(piece) - 1}/{len(CONTENT)}"
        send(206, piece, [("Content-Range", where), ("ETag", '"first"')])(handler, start)

    server = serve(slices)
    assert download(server.url, begun(tmp_path), wait=0).read_bytes() == CONTENT
    assert server.asked == ["bytes=50000-", "bytes=140000-", "bytes=230000-"]


@pytest.mark.parametrize("said", ["bytes 9-299999/300000", "bytes 0-299999/300000", "bytes 50000-299999/*", "lines 1-2/3", None])
def test_a_range_that_does_not_fit_is_not_appended(serve, tmp_path, said):
    wrong = send(206, CONTENT[9:], [("Content-Range", said)] if said else [])
    server = serve(wrong)
    with pytest.raises(DownloadError, match=r"asked for the bytes from 50,000, and the server sends .* delete .*x\.part"):
        download(server.url, begun(tmp_path), attempts=2, wait=0)
    assert (tmp_path / "x.part").read_bytes() == CONTENT[:50_000]
    server.answers = [wrong, ranged()]
    assert download(server.url, tmp_path / "x", wait=0).read_bytes() == CONTENT


@pytest.mark.parametrize("said", ["bytes */300000", "bytes */50001", "bytes */7", "nonsense", None])
def test_a_range_beyond_the_end_begins_anew(serve, tmp_path, said):
    server = serve(send(416, headers=[("Content-Range", said)] if said else []), ranged())
    assert download(server.url, begun(tmp_path), wait=0).read_bytes() == CONTENT
    assert server.asked == ["bytes=50000-", None]


def test_a_server_that_has_no_bytes_at_all(serve, tmp_path):
    with pytest.raises(DownloadError, match="the server answers 416"):
        download(serve(send(416)).url, begun(tmp_path), attempts=3, wait=0)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_error_that_passes(serve, tmp_path, status):
    server = serve(send(status, b"sorry"), send(status), ranged())
    assert download(server.url, begun(tmp_path), attempts=3, wait=0).read_bytes() == CONTENT
    assert server.asked == ["bytes=50000-"] * 3


def test_an_error_that_stays(serve, tmp_path):
    server = serve(send(500, b"sorry"))
    with pytest.raises(DownloadError, match="the server answers 500 .* 50,000 of 300,000 bytes are here; the same command goes on"):
        download(server.url, begun(tmp_path), attempts=3, wait=0)
    assert len(server.asked) == 3 and (tmp_path / "x.part").read_bytes() == CONTENT[:50_000]


@pytest.mark.parametrize(("status", "text"), [(404, "the file has moved"), (403, "it refuses"), (401, "login"), (418, "check the address")])
def test_an_error_that_will_be_the_same_in_a_second(serve, tmp_path, status, text):
    server = serve(send(status, b"<html>"))
    with pytest.raises(DownloadError, match=f"the server answers {status} .*{text}"):
        download(server.url, tmp_path / "x")
    assert len(server.asked) == 1 and visible(tmp_path) == []


def test_nobody_answers(tmp_path):
    with socket.socket() as closed:  # a port that is taken, and where nobody listens
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="there is no connection to it. 50,000 of 300,000 bytes are here") as error:
            download(f"http://127.0.0.1:{closed.getsockname()[1]}/x", begun(tmp_path), attempts=2, wait=0)
    assert not re.search("urllib3|HTTPConnection|Errno", str(error.value))


@pytest.mark.parametrize("url", ["nonsense", "", "file:///etc/passwd", "http://"])
def test_no_address(tmp_path, url):
    with pytest.raises(DownloadError, match="this is no address"):
        download(url, tmp_path / "x")


# This side

def test_a_checksum(serve, tmp_path):
    server, right, wrong = serve(ranged()), hashlib.sha256(CONTENT).hexdigest(), "ab" * 32
    with pytest.raises(DownloadError, match=f"{right}, and {wrong} was expected. What came was not kept"):
        download(server.url, tmp_path / "x", sha256=wrong)
    assert visible(tmp_path) == []
    assert download(server.url, tmp_path / "x", sha256=right.upper()).exists()
    with pytest.raises(DownloadError, match=f"x was there before, and the SHA-256 is {right}, and {wrong} was expected"):
        download(server.url, tmp_path / "x", sha256=wrong)
    assert (tmp_path / "x").read_bytes() == CONTENT  # it is not ours to remove
    with pytest.raises(DownloadError, match="'abc' is no SHA-256"):
        download(server.url, tmp_path / "y", sha256="abc")
    assert len(server.asked) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's disk that is always full")
def test_a_disk_that_is_full(serve, tmp_path):
    server = serve(ranged())
    (tmp_path / "x.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"x\.part: No space left on device: make room, and the same command goes on"):
        download(server.url, tmp_path / "x", wait=0)
    assert server.asked == [None] and not (tmp_path / "x").exists()
    (tmp_path / "x.part").unlink()
    assert download(server.url, tmp_path / "x").read_bytes() == CONTENT


def test_a_disk_that_fills_in_the_middle_keeps_what_came(serve, tmp_path):
    "The process may write no file of more than 100,000 bytes."
    server = serve(ranged())
    program = f"""if True:
        import resource
        from cxrvlm.download import download
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        download({server.url!r}, {str(tmp_path / "x")!r})"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "File too large: make room, and the same command goes on" in done.stderr
    have = (tmp_path / "x.part").stat().st_size
    assert 0 < have <= 100_000
    assert download(server.url, tmp_path / "x").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={have}-"]


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(serve, tmp_path):
    server = serve(send(200, CONTENT, [("ETag", '"first"')], length=10**18))
    with pytest.raises(DownloadError, match=r"1,000,000,000,000,000,000 bytes are to come, and the disk has room for [\d,]+: make room"):
        download(server.url, tmp_path / "x")
    assert len(server.asked) == 1 and (tmp_path / "x.part").stat().st_size == 0


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="File exists|Not a directory"):
        download("http://127.0.0.1/x", tmp_path / "file" / "x")
    with pytest.raises(DownloadError, match="is a folder: name a file"):
        download("http://127.0.0.1/x", tmp_path)


def test_two_at_once(serve, tmp_path):
    server = serve(ranged())
    with FileLock(tmp_path / ".x.lock"), pytest.raises(DownloadError, match="another process is at work on .*x: wait"):
        download(server.url, tmp_path / "x")
    assert server.asked == [] and download(server.url, tmp_path / "x").read_bytes() == CONTENT


# Unpacking

NAMES = ["CXR1001_IM-0004-1001.png", "CXR7_IM-2263-1001.png", "CXR25_IM-1024-2001.png"]


def png(seed=0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 50), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


PNG = png()


def huge_png(side) -> bytes:
    "A PNG that says it has this many rows and columns."
    start, header = PNG.index(b"IHDR"), b"IHDR" + side.to_bytes(4, "big") * 2 + PNG[24:29]
    return PNG[:start] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[start + 21 :]


def archive(path, members, mode="w:gz"):
    "Members are (name, content), or (name, kind, target) for what is no file."
    with tarfile.open(path, mode) as file:
        for name, *rest in members:
            member = tarfile.TarInfo(name)
            if len(rest) == 2:
                member.type, member.linkname = rest
            content = rest[0] if len(rest) == 1 else b""
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def known():
    return set(read_reports().images.explode().dropna())


def counts_of(found):
    return {kind: len(names) for kind, names in found.items() if names and kind != "missing"}


def test_hostile_members_are_counted_and_stay_outside(tmp_path, known):
    members = [(name, png(i)) for i, name in enumerate(NAMES)]
    outside = ["/etc/CXR54_IM-2145-1001.png", "../CXR303_IM-1404-1001.png", "a/../../CXR303_IM-1404-1001.png", "../../up.png"]
    members += [(name, PNG) for name in outside]
    members += [("CXR1000_IM-0003-1001.png", kind, "/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)]
    members += [("CXR1000_IM-0003-2001.png", kind, "") for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)]
    members += [("pngs", tarfile.DIRTYPE, ""), ("cat.png", PNG), ("._CXR99_IM-2480-1001.png", PNG), ("CXR99_IM-2480-1001.txt", PNG)]
    members += [(NAMES[0], png(9)), ("..", PNG), ("", PNG)]
    path = archive(tmp_path / "a.tgz", members)
    found = unpack_openi(path, tmp_path / "in/images", known)
    assert found["unpacked"] == NAMES and found["damaged"] == []
    assert sorted(found["refused"]) == sorted([*outside, *["CXR1000_IM-0003-1001.png"] * 2, *["CXR1000_IM-0003-2001.png"] * 3, ".."])
    assert len(found["strangers"]) == 5 and len(found["missing"]) == len(known) - 3
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*NAMES, ".a.tgz.lock", "a.tgz", "images", "in"])
    assert (tmp_path / "in/images" / NAMES[0]).read_bytes() == png(0)  # the first of two


def test_other_spellings_get_the_reports_name(tmp_path, known):
    path = archive(tmp_path / "a.tgz", [("./png/1001_IM-0004-1001.PNG", PNG), ("CXR1_IM-0001-3001.png", PNG)])
    unpack_openi(path, tmp_path / "images", known)
    assert visible(tmp_path / "images") == ["CXR1001_IM-0004-1001.png", "CXR1_1_IM-0001-3001.png"]


@pytest.mark.parametrize("content", [PNG[:150], PNG[:-5], b"", b"<html>", PNG[:99] + bytes([PNG[99] ^ 1]) + PNG[100:]])
def test_an_image_that_is_damaged_is_named_and_not_kept(tmp_path, known, content):
    path = archive(tmp_path / "a.tgz", [(NAMES[0], content), (NAMES[1], PNG)])
    found = unpack_openi(path, tmp_path / "images", known)
    assert len(found["damaged"]) == 1 and re.match(rf"{NAMES[0]}: .+", found["damaged"][0])
    assert visible(tmp_path / "images") == NAMES[1:2] and NAMES[0][:-4] not in found["missing"]


@pytest.mark.parametrize("side", [10**4, 10**5])  # Pillow warns of the one, and refuses the other
def test_a_bomb_is_not_unpacked(tmp_path, known, side):
    path = archive(tmp_path / "a.tgz", [(NAMES[0], huge_png(side))])
    assert "decompression bomb" in unpack_openi(path, tmp_path / "images", known)["damaged"][0]


def test_what_is_there_is_skipped_and_what_was_cut_off_is_not(tmp_path, known):
    path = archive(tmp_path / "a.tgz", [(name, PNG) for name in NAMES])
    unpack_openi(path, tmp_path / "images", known)
    (tmp_path / "images" / NAMES[0]).write_bytes(PNG[:99])
    (tmp_path / "images" / f"{NAMES[2]}.part").write_bytes(PNG[:99])  # killed while it was written
    (tmp_path / "images" / NAMES[2]).unlink()
    before = (tmp_path / "images" / NAMES[1]).stat().st_mtime_ns
    found = unpack_openi(path, tmp_path / "images", known)
    assert found["unpacked"] == [NAMES[0], NAMES[2]] and found["already there"] == [NAMES[1]]
    assert (tmp_path / "images" / NAMES[1]).stat().st_mtime_ns == before
    assert all((tmp_path / "images" / name).read_bytes() == PNG for name in NAMES) and len(visible(tmp_path / "images")) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's disk that is always full")
def test_a_disk_that_is_full_while_unpacking(tmp_path, known):
    path = archive(tmp_path / "a.tgz", [(name, PNG) for name in NAMES])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{NAMES[1]}.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="images: No space left on device: make room, and the same command goes on"):
        unpack_openi(path, tmp_path / "images", known)
    assert visible(tmp_path / "images") == NAMES[:1]
    assert counts_of(unpack_openi(path, tmp_path / "images", known)) == {"already there": 1, "unpacked": 2}


def broken_header(tar: bytes) -> bytes:
    "Spoil the second member's header: Python's tarfile takes it for the end."
    place = 512 + -(-len(PNG) // 512) * 512
    return gzip.compress(tar[:place] + b"?" * 512 + tar[place + 512 :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: gzip.compress(tar)[: len(gzip.compress(tar)) // 2],
        lambda tar: gzip.compress(tar)[:-3],
        lambda tar: gzip.compress(tar)[:-8] + bytes(8),  # gzip's checksum
        lambda tar: gzip.compress(tar)[:40] + bytes(40) + gzip.compress(tar)[80:],
        lambda tar: gzip.compress(tar[:2000]),
        broken_header,
        lambda tar: b"<html>please log in</html>",
        lambda tar: b"",
    ],
    ids=["half", "end missing", "checksum", "zeros", "tar cut", "header", "page", "empty"],
)
def test_a_damaged_archive_is_named(tmp_path, known, damage):
    tar = archive(tmp_path / "a.tar", [(name, PNG) for name in NAMES], "w").read_bytes()
    path = tmp_path / "a.tgz"
    path.write_bytes(damage(tar))
    with pytest.raises(DownloadError, match=r"a\.tgz is damaged \(.+\): delete it, and start again"):
        unpack_openi(path, tmp_path / "images", known)
    for image in (tmp_path / "images").iterdir():
        assert image.name in NAMES and image.read_bytes() == PNG


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_or_is_counted(tmp_path_factory, known, data):
    "Whatever stands in the archive: an image is written whole and inside the folder, or not at all."
    home = tmp_path_factory.mktemp("fuzz")
    tar = bytearray(archive(home / "a.tar", [(name, PNG) for name in NAMES], "w").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(tar) - 1) | st.integers(0, 511))
        tar[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # a header whose checksum fits
        tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + sum(tar[156:512]) + 8 * 32)
    (home / "a.tgz").write_bytes(gzip.compress(bytes(tar), 1))
    try:
        found = unpack_openi(home / "a.tgz", home / "images", known)
        assert sum(counts_of(found).values()) >= 1
    except DownloadError as error:
        assert "is damaged" in str(error)
    for path in set(home.rglob("*")) - {home / "a.tar", home / "a.tgz", home / ".a.tgz.lock", home / "images"}:
        assert path.parent == home / "images" and path.stem in known and path.read_bytes() == PNG


# All of it

def test_from_the_server_to_the_studies(serve, tmp_path, capsys):
    members = [(name, png(i)) for i, name in enumerate(NAMES)] + [("CXR54_IM-2145-1001.png", PNG[:150]), ("cat.png", PNG)]
    content = archive(tmp_path / "served.tgz", members).read_bytes()
    server = serve(ranged(content, most=len(content) // 2), ranged(content))
    table = download_openi(tmp_path / "images", server.url, wait=0)
    assert table["count"].tolist() == [3, 0, 1, 1, 0, 7470 - 4]
    assert table.names[2].startswith("CXR54_IM-2145-1001.png: ")
    studies, exclusions = load_openi(tmp_path / "images")
    assert len(studies) == 3 and len(studies) + len(exclusions) == 3955
    assert server.asked == [None, f"bytes={len(content) // 2}-"]
    assert main([str(tmp_path / "images"), "--url", server.url]) == 0
    assert f"set data = {tmp_path / 'images'} in [openi] of settings.ini" in capsys.readouterr().out


def test_another_archive(serve, tmp_path):
    content = archive(tmp_path / "served.tgz", [("cat.png", PNG)]).read_bytes()
    with pytest.raises(DownloadError, match=f"{ARCHIVE} has none of Open-i's images: delete it, and check the address"):
        download_openi(tmp_path / "images", serve(ranged(content)).url)


def test_a_length_that_is_too_small_shows_in_the_archive(serve, tmp_path):
    content = archive(tmp_path / "served.tgz", [(name, PNG) for name in NAMES]).read_bytes()
    server = serve(send(200, content, length=len(content) - 9))
    with pytest.raises(DownloadError, match=f"{ARCHIVE} is damaged .* delete it"):
        download_openi(tmp_path / "images", server.url)


def test_the_command(serve, tmp_path):
    server = serve(send(404))
    command = [sys.executable, "-m", "cxrvlm.download", str(tmp_path / "images"), "--url"]
    done = subprocess.run([*command, server.url], capture_output=True, text=True)
    assert done.returncode == 1 and "404 Not Found" in done.stderr and "Traceback" not in done.stderr and not done.stdout
