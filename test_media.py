"""Tests of media that somebody made to do harm, or that are only odd: what comes out is a picture, or a ValueError.

    pytest test_media.py

Everything is injected for real: files that Pillow wrote and files that were damaged since, a program that must not be
started, a web server in a thread that drips, lies and redirects, memory that runs out in a process of its own.
"""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import os
import random
import re
import shutil
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import certifi
import numpy as np
import pytest
import torch
import verifiers as vf
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

import adapters
import media
from adapters import ProcessorAdapter, load_model
from conftest import make_tiny, make_trainer, message, picture
from media import FORMATS, MediaRules, load_audio, load_image, load_part, load_video
from mm_grpo import MultimodalRLConfig

HERE = Path(__file__).parent


def uri(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(file).decode()


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def refusal(url: str, rules: MediaRules | None = None) -> str:
    """What load_image says of this; the source comes first, cut short, and none of its data."""
    with pytest.raises(ValueError) as error:
        load_image(url, rules or MediaRules())
    said = str(error.value)
    assert said.startswith("image_url='") and len(said) < 400
    assert re.match(r"image_url='data:[^,]*': " if url.startswith("data:") else r"image_url='[^']{0,60}': ", said)
    return said


def part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


PNG = file_of(noise())

# ---------------------------------------------------------------- formats


def test_no_program_is_started_for_a_postscript_file(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the URI says that it is."""
    mark, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f'#!/bin/sh\necho "$@" >> {mark}\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    postscript = file_of(noise(), "EPS")
    for kind in ("png", "jpeg", "eps", "x-eps"):
        assert "expected PNG, JPEG, WEBP, GIF, BMP" in refusal(uri(postscript, kind))
    assert not mark.exists()
    with contextlib.suppress(Exception):  # so it would have been
        Image.open(io.BytesIO(postscript)).load()
    assert mark.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_that_are_named_are_read(kind):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    image = noise().quantize(64) if kind == "GIF" else noise()
    loaded = load_image(uri(file_of(image, kind, **lossless)))
    assert loaded.mode == "RGB" and loaded.size == (40, 30)
    difference = np.abs(np.asarray(loaded).astype(int) - np.asarray(image.convert("RGB"))).mean()
    assert difference == 0 or (kind == "JPEG" and difference < 60)


FRACTIONS = Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40))
DEEP = {  # what Pillow would read, and convert to other pixels
    "16 bits of grey": (file_of(Image.fromarray(np.full((30, 40), 1000, dtype=np.uint16))), "expected 8 bit"),
    "a TIFF of whole numbers": (file_of(noise(mode="L").convert("I"), "TIFF"), "expected PNG, JPEG"),
    "a TIFF of fractions": (file_of(FRACTIONS, "TIFF"), "expected PNG, JPEG"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused_and_not_turned_white(name):
    file, text = DEEP[name]
    assert text in refusal(uri(file))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_refused_and_one_frame_of_it_is_a_picture(kind):
    """The first frame was taken, without a word."""
    others = dict(save_all=True, append_images=[noise(seed=1), noise(seed=2)])
    assert "expected one, got an animation" in refusal(uri(file_of(noise(), kind, **others)))
    assert load_image(uri(file_of(noise(), kind, save_all=True))).size == (40, 30)


def test_a_cameras_jpeg_with_a_preview_behind_it_is_the_first_picture():
    file = file_of(noise(), "MPO", save_all=True, append_images=[noise(8, 6)])
    assert Image.open(io.BytesIO(file), formats=FORMATS).n_frames == 2
    assert load_image(uri(file)).size == (40, 30)


def test_a_damaged_exif_block_turns_nothing_and_running_out_of_memory_is_no_damage(monkeypatch):
    upright = load_image(uri(PNG))
    rubbish = file_of(noise(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)))
    assert load_image(uri(rubbish)).tobytes() == upright.tobytes()
    for raised, escapes in ((struct.error(), False), (RecursionError(), False), (MemoryError(), True)):

        def transpose(image, raised=raised):
            raise raised

        monkeypatch.setattr(ImageOps, "exif_transpose", transpose)
        with pytest.raises(MemoryError) if escapes else contextlib.nullcontext():
            assert load_image(uri(PNG)).tobytes() == upright.tobytes()
    monkeypatch.undo()
    monkeypatch.setattr(Image, "open", lambda *_, **__: transpose(None))  # nor is it in a decoder
    with pytest.raises(MemoryError):
        load_image(uri(PNG))


@pytest.mark.parametrize("raised", [NotImplementedError("x"), RuntimeError(), SyntaxError("x"), KeyError("x")])
def test_whatever_a_decoder_raises_is_a_value_error(raised, monkeypatch):
    def load(self):
        raise raised

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert "(x)" in (said := refusal(uri(PNG))) or repr(raised) in said or "('x')" in said


# ---------------------------------------------------------------- sizes


def test_the_limit_of_pixels_is_the_last_size_that_is_taken():
    rules = MediaRules(max_image_pixels=1200)
    assert load_image(uri(PNG), rules).size == (40, 30)
    said = refusal(uri(file_of(noise(41, 30))), rules)
    assert "pixels: expected at most max_image_pixels=1200, got 1 x 41 x 30" in said


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG that ends before its first pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\1IDAT"
    )


@pytest.mark.parametrize(
    ("width", "height", "text"),
    [
        (4001, 4000, "max_image_pixels=16000000, got 1 x 4001 x 4000"),
        (1, 201, "sides: expected at most 200 times as long as the other, got 1 x 201"),
        (2001, 10, "sides: expected at most 200 times"),
        (0, 0, ""),
        (0, 10, ""),
        (50_000, 50_000, "exceeds limit of 178956970 pixels"),  # Pillow's own, above which ours cannot go
    ],
)
def test_a_size_is_refused_before_anything_is_decoded(width, height, text):
    assert text in (said := refusal(uri(png_that_claims(width, height)))) and "truncated" not in said
    assert "image file is truncated" in refusal(uri(png_that_claims(4000, 4000)))  # what comes next


def test_pillow_does_not_warn_of_sizes_for_which_there_is_a_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # it warns from here on, and refuses from the double on
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_image(uri(PNG)).size == (40, 30)
        refusal(uri(PNG), MediaRules(max_image_pixels=1000))
    assert said == []


def test_a_picture_of_a_few_bytes_does_not_become_gigabytes_in_a_llava():
    """Its processor enlarges the short side: of 1 x 2,000 pixels, 336 x 672,000. One of 1 x 60,000 took the machine."""
    adapter, strip = make_tiny("llava")[1], file_of(Image.new("L", (1, 2000)))
    assert len(strip) < 150
    with pytest.raises(ValueError, match="image_url='data:image/png;base64': .*at most 200 times .* got 1 x 2000"):
        adapter.encode_prompt(message(part(uri(strip)), "red ?"))
    longest = adapter.encode_prompt(message(part(uri(file_of(Image.new("L", (1, 200))))), "red ?"))
    assert longest.media.tensors["pixel_values"].shape == (1, 3, 56, 56)


CHILD = """
import json, resource, sys
import conftest, media
files = [file.strip() for file in sys.stdin]
model, adapter = conftest.make_tiny("llava")
adapter.processor.image_processor.size = {"shortest_edge": 336}  # as LLaVA 1.5's
ask = lambda url: adapter.encode_prompt(conftest.message({"type": "image_url", "image_url": {"url": url}}, "red ?"))
ask(files[0])  # what is loaded when it is first needed
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
result, peak = [], lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for url in files[1:] + files[-1:]:
    before = peak()
    try:
        ask(url)
        result.append(["taken", 0])
    except Exception as error:
        result.append([f"{type(error).__name__}: {error}", (peak() - before) / 1024])
    if len(result) == len(files) - 1:
        media.MAX_ASPECT = media.MediaRules.__dataclass_fields__["max_image_pixels"].default  # once more, without it
print(json.dumps(result))
"""


def test_what_is_refused_takes_little_memory():
    """In a process that may have 512 MB more than it has. Of the last file the rule is taken away: its memory ends."""
    # 177 million pixels: a little less than Pillow refuses
    big = [uri(file_of(Image.new("1", (13_300, 13_300)))), uri(gif_that_claims(13_300, 13_300))]
    tall = uri(file_of(Image.new("L", (1, 60_000))))
    lines = "\n".join([uri(PNG), *big, tall])
    how = dict(cwd=HERE, input=lines, capture_output=True, text=True, timeout=100)
    done = subprocess.run([sys.executable, "-c", CHILD], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for said, megabytes in results[:-1]:
        assert said.startswith("ValueError: image_url=") and ("max_image_pixels" in said or "200 times" in said)
        assert megabytes < 16
    assert "MemoryError" in results[-1][0]


def gif_that_claims(width: int, height: int) -> bytes:
    """A GIF that ends after its first byte of pixels."""
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + bytes(3)
        + b","
        + struct.pack("<HHHHBB", 0, 0, width, height, 0, 2)
    )


def video(*images: Image.Image) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(file_of(image)).decode() for image in images)


def test_the_frames_of_a_video_count_together():
    rules = MediaRules(max_image_pixels=3 * 224 * 224)
    assert load_video(video(*3 * [noise()]), rules).shape == (3, 30, 40, 3)
    assert load_video(video(*2 * [noise(250, 300)]), rules).shape == (2, 300, 250, 3)
    for frames, text in (
        (4 * [noise()], "video_url: .*at most max_image_pixels=150528, got 4 x 224 x 224"),
        (3 * [noise(250, 300)], "at most max_image_pixels=150528, got 3 x 250 x 300"),
        ([noise(), noise(), noise(1, 30_000)], "max_image_pixels|200 times"),
    ):
        with pytest.raises(ValueError, match=text):
            load_video(video(*frames), rules)
        with pytest.raises(ValueError, match=text):
            load_part({"type": "video_url", "video_url": {"url": video(*frames)}}, None, rules)


def test_ten_million_frames_of_nothing_are_counted_and_not_looked_at():
    start = time.monotonic()
    with pytest.raises(ValueError, match="got 10000001 x 224 x 224"):
        load_video("data:video/jpeg;base64," + 10_000_000 * ",")
    assert time.monotonic() - start < 1


# ---------------------------------------------------------------- base64


def test_more_bytes_than_the_limit_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(media, "MAX_BYTES", len(PNG) + 2)  # base64 counts by threes
    assert load_image(uri(PNG)).size == (40, 30)
    monkeypatch.setattr(media, "MAX_BYTES", len(PNG) - 3)
    assert f"at most {len(PNG) - 3} bytes" in refusal(uri(PNG))
    with pytest.raises(ValueError, match=f"input_audio: .*at most {len(PNG) - 3} bytes"):
        load_audio({"data": base64.b64encode(PNG).decode(), "format": "wav"}, 16000)


@pytest.mark.parametrize("gap", ["\n", "\r\n", " ", "\t"])
def test_base64_with_gaps_is_refused_with_the_reason_as_vllm_refuses_it(gap):
    url = uri(PNG)
    assert "no spaces, no line breaks" in refusal(url[:60] + gap + url[60:])


# ---------------------------------------------------------------- anything at all


@cache
def written() -> dict[str, bytes]:
    """A small file of every format and mode that Pillow can write here."""
    Image.init()
    files = {}
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16", "F", "I"):
            with contextlib.suppress(Exception):  # not every format has every mode
                image = noise(16, 12, "L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
                files[f"{kind} {mode}"] = file_of(image, kind)
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        files[f"{kind} of two"] = file_of(noise(16, 12), kind, save_all=True, append_images=[noise(16, 12, seed=1)])
    return files


def damaged(file: bytes, seed: int) -> bytes:
    """Some bytes changed, most near the beginning, where the sizes are; sometimes cut off, or with more behind."""
    rng, data = random.Random(seed), bytearray(file)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
        data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
    if rng.random() < 0.1:
        data += rng.randbytes(50)
    return bytes(data)


def test_a_damaged_file_is_a_picture_within_the_limits_or_a_value_error():
    """90,000 of them had raised NotImplementedError, RuntimeError and errors of Pillow's own."""
    rules, seen = MediaRules(max_image_pixels=20_000), Counter()

    @settings(max_examples=1500)
    @given(st.sampled_from(sorted(written())), st.integers(0, 2**32), st.sampled_from(["png", "jpeg", "x-anything"]))
    @example("PNG RGB", 2, "png")
    def check(name, seed, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = load_image(uri(damaged(written()[name], seed), kind), rules)
            except ValueError as error:
                seen["refused"] += 1
                assert str(error).startswith("image_url='data:image/")
            else:
                seen[name.split()[0]] += 1
                assert image.mode == "RGB" and 0 < image.width * image.height <= 20_000
                image.tobytes()

    check()
    # they were of many formats and some of them pictures, or this has shown little
    assert len({name.split()[0] for name in written()}) >= 20
    assert seen["refused"] > 500 and {*seen} == {"refused", *FORMATS, "MPO"} and min(seen.values()) >= 5, seen


# ---------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path):
    """The folder below which files may be read, and what lies in it and beside it."""
    inside = tmp_path / "media"
    (inside / "deep").mkdir(parents=True)
    (tmp_path / "media-not").mkdir()
    for path in ("media/one.png", "media/deep/späte Blüte 100%.png", "secret.png", "media-not/one.png"):
        (tmp_path / path).write_bytes(PNG)
    (inside / "link.png").symlink_to(inside / "one.png")
    (inside / "out.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    (inside / "zero.png").symlink_to("/dev/zero")
    return inside


def test_no_file_is_read_where_no_folder_is_named(folder):
    assert "allowed_local_media_path=None" in refusal(f"file://{folder}/one.png")


SPELLED = ("one.png", "deep/../one.png", "deep/sp%C3%A4te%20Bl%C3%BCte%20100%25.png", "deep/späte Blüte 100%25.png")


@pytest.mark.parametrize("path", [*SPELLED, "link.png"])
def test_a_file_below_the_folder_is_read(folder, path):
    assert load_image(f"file://{folder}/{path}", MediaRules(allowed_local_media_path=str(folder))).size == (40, 30)


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.png", "deep/../../secret.png", "%2e%2e/secret.png", "..%2Fsecret.png", "out.png", "up/secret.png"),
        *("../media-not/one.png", "zero.png", "../media/../secret.png", ".."),
    ],
)
def test_a_file_outside_of_the_folder_is_refused_however_it_is_spelled(folder, path):
    said = refusal(f"file://{folder}/{path}", MediaRules(allowed_local_media_path=str(folder)))
    assert "path: expected one below allowed_local_media_path=" in said


@pytest.mark.parametrize("url", ["file://localhost{}/one.png", "file://elsewhere{}/one.png", "{}/one.png", "{}"])
def test_a_file_of_another_machine_and_a_bare_path_are_refused(folder, url):
    refusal(url.format(folder), MediaRules(allowed_local_media_path=str(folder)))


def test_what_is_no_file_or_too_large_is_not_opened(folder):
    os.mkfifo(folder / "pipe.png")
    with open(folder / "sparse.png", "wb") as sparse:
        sparse.truncate(2**36)
    writer = threading.Thread(target=lambda: open(folder / "pipe.png", "wb").close(), daemon=True)
    writer.start()  # waits until somebody opens the pipe
    rules, start = MediaRules(allowed_local_media_path=str(folder)), time.monotonic()
    for name in ("pipe.png", "sparse.png", "deep", "none.png", "one.png/x"):
        assert "size: expected a file of at most 67108864 bytes" in refusal(f"file://{folder}/{name}", rules)
    assert "a file of at most" in refusal("file:///dev/zero", MediaRules(allowed_local_media_path="/dev"))
    assert writer.is_alive() and time.monotonic() - start < 2
    reader = os.open(folder / "pipe.png", os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)


@pytest.mark.parametrize("path", ["", "/no/such/folder", __file__])
def test_a_folder_that_is_none_is_refused_with_the_settings_name(path):
    with pytest.raises(ValueError, match=f"allowed_local_media_path: expected a folder that exists, got '{path}'"):
        MediaRules(allowed_local_media_path=path)


# ---------------------------------------------------------------- web addresses


class Hostile(http.server.BaseHTTPRequestHandler):
    """A web server that means harm; `server.seen` are the requests. What it does is the path's first word."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        with contextlib.suppress(OSError):  # the client has gone
            getattr(self, self.path.strip("/").split("?")[0])()
        self.close_connection = True

    def patient(self):
        """Endless is twenty seconds here: without a limit a test fails, and does not hang."""
        self.until = getattr(self, "until", time.monotonic() + 20)
        return time.monotonic() < self.until

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def one(self):
        self.answer(self.server.picture, Content_Type="text/html")  # what it says that it is plays no part

    def to_another_host(self):
        self.answer(status=302, Location=f"http://localhost:{self.server.server_port}/one")

    def to_a_private_address(self):
        self.answer(status=307, Location="http://169.254.169.254/latest/meta-data/")

    def to_a_file(self):
        self.answer(status=301, Location="file:///etc/hostname")

    def to_itself(self):
        self.answer(status=302, Location="/to_itself")

    def missing(self):
        self.answer(PNG, status=404)

    def partial(self):
        self.answer(PNG, status=206)

    def no_picture(self):
        self.answer(b"<html><body>Please log in</body></html>")

    def empty(self):
        self.answer()

    def half(self):
        self.answer(PNG[: len(PNG) // 2])

    def less_than_it_says(self):
        self.answer(PNG, Content_Length=10**6)

    def a_length_in_words(self):
        self.answer(PNG, Content_Length="many")

    def packed(self):
        self.answer(zlib.compress(bytes(2**24), 9), Content_Encoding="deflate")

    def no_http(self):
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(100))

    def endless(self):
        self.answer(Content_Length=10**12)
        while self.patient():
            self.wfile.write(bytes(2**16))

    def endless_chunks(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while self.patient():
            self.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")

    def endless_header(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while self.patient():
            self.wfile.write(b"X-More: " + 1000 * b"x" + b"\r\n")

    def slow_body(self):
        self.answer(Content_Length=10**6)
        self.drip(b"\0")

    def slow_header(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.drip(b"x")

    def not_yet(self):
        self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")

    def drip(self, what):
        while self.patient():
            self.wfile.write(what)
            time.sleep(0.05)

    def silence(self):
        time.sleep(20)


def serve(address: str = "127.0.0.1", port: int = 0) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer((address, port), Hostile)
    server.daemon_threads, server.seen, server.picture = True, [], PNG
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


@pytest.fixture
def web():
    server = serve()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


HERE_ALONE = MediaRules(allowed_media_domains=("127.0.0.1",))


def test_a_picture_comes_from_a_host_that_is_listed_and_from_no_other(web):
    assert "allowed_media_domains=()" in refusal(web.url + "/one") and web.seen == []
    loaded = load_image(web.url + "/one?of=two", HERE_ALONE)
    assert np.array_equal(np.asarray(loaded), np.asarray(noise()))
    assert load_part(part(web.url + "/one"), None, HERE_ALONE)["image"].tobytes() == loaded.tobytes()
    (path, headers), _ = web.seen
    assert path == "/one?of=two" and headers["Host"] == web.url.removeprefix("http://")
    assert headers["Accept-Encoding"] == "identity" and not {"Cookie", "Authorization"} & {*headers}


def test_nothing_of_the_surroundings_is_used_on_the_way(web, monkeypatch, tmp_path):
    """A proxy would see what is fetched, and look up names where nobody checks the addresses; .netrc has passwords."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    load_image(web.url + "/one", HERE_ALONE)
    assert "Authorization" not in web.seen[0][1]


def test_a_picture_comes_where_an_event_loop_runs(web):
    """The server in this process encodes prompts inside of one."""

    async def load():
        return load_image(web.url + "/one", HERE_ALONE)

    assert asyncio.run(load()).size == (40, 30)


TRICKS = {  # what the server does; what is said of it
    **dict.fromkeys(("to_another_host", "to_itself"), "status: expected 200 .redirects are not followed., got 302"),
    "to_a_private_address": "status: expected 200 .*got 307",
    "to_a_file": "status: expected 200 .*got 301",
    "missing": "status: expected 200 .*got 404",
    "partial": "status: expected 200 .*got 206",
    **dict.fromkeys(("no_picture", "empty"), "expected PNG, JPEG, WEBP, GIF, BMP, undamaged"),
    "half": "truncated",
    "less_than_it_says": "peer closed connection",
    "a_length_in_words": "Content-Length",
    "packed": "Content-Encoding: expected none.*deflate",
    "no_http": "Server disconnected",
    **dict.fromkeys(("endless", "endless_chunks"), "body: expected at most 1048576 bytes"),
    "endless_header": "",
    **dict.fromkeys(("slow_body", "slow_header", "not_yet", "silence"), "expected within 0.5 s"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_server_that_means_harm_gets_one_request_and_little_time(web, trick, monkeypatch):
    # where something else than time is wrong, a busy machine has time to say so
    monkeypatch.setattr(media, "FETCH_SECONDS", 0.5 if "0.5 s" in TRICKS[trick] else 10.0)
    monkeypatch.setattr(media, "MAX_BYTES", 2**20)
    start = time.monotonic()
    said = refusal(f"{web.url}/{trick}", HERE_ALONE)
    assert re.search(TRICKS[trick], said), said
    assert said.startswith(f"image_url='{web.url}/{trick}': ") and time.monotonic() - start < 10  # and not all its 20 s
    assert [path for path, _ in web.seen] == [f"/{trick}"]


def test_a_refused_connection_and_a_name_that_nobody_knows_are_value_errors():
    assert "(" in refusal("http://127.0.0.1:9/one", HERE_ALONE)
    assert "(" in refusal("https://no.such.invalid/", MediaRules(allowed_media_domains="no.such.invalid"))


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "LOCALHOST"])
def test_a_name_that_leads_to_a_private_address_is_refused_though_it_is_listed(web, host):
    said = refusal(f"http://{host}:{web.server_port}/one", MediaRules(allowed_media_domains=(host,)))
    assert "expected a public address" in said and "allowed_media_domains" in said and web.seen == []


def resolving(monkeypatch, *answers: list[str]) -> list[str]:
    """From now on names lead to these addresses, to others each time; returns the names that are asked for."""
    asked, real = [], media.asyncio.base_events.socket.getaddrinfo

    def look_up(host, port, *args, **more):
        if str(host)[0].isdigit() or ":" in str(host):
            return real(host, port, *args, **more)
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [entry for address in found for entry in real(address, port, *args, **more)]

    monkeypatch.setattr(media.asyncio.base_events.socket, "getaddrinfo", look_up)
    return asked


PRIVATE = ["10.0.0.1", "192.168.1.1", "172.16.0.1", "127.0.0.9", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
PRIVATE += ["240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_every_address_of_a_name_must_be_public(address, monkeypatch):
    resolving(monkeypatch, ["8.8.8.8", address])
    said = refusal("https://pictures.example/a.png", MediaRules(allowed_media_domains="pictures.example"))
    assert "expected a public address" in said and address in said


OTHERS = ("other.example", "evilpictures.example", "more.pictures.example", "pictures.example.evil")
OTHERS += ("pictures.example.", "pictures.example@other.example", "", "[::1]")
SAME = ("pictures.example", "PICTURES.Example", "xn--mnchen-3ya.example", "münchen.example")


@pytest.mark.parametrize(("host", "listed"), [(host, hosts is SAME) for hosts in (OTHERS, SAME) for host in hosts])
def test_hosts_are_compared_whole_and_without_case(host, listed, monkeypatch):
    """Those that are listed come as far as their address, which is a private one here."""
    resolving(monkeypatch, ["10.0.0.1"])
    for domains in ("Pictures.example, xn--mnchen-3ya.example", ("pictures.EXAMPLE", "xn--mnchen-3ya.example")):
        said = refusal(f"https://{host}/a.png", MediaRules(allowed_media_domains=domains))
        assert ("expected a public address" in said) == listed
        assert ("host: expected one of allowed_media_domains=" in said) != listed


def test_a_user_and_password_in_the_address_are_refused_and_not_repeated(web):
    url = f"http://me:secret@127.0.0.1:{web.server_port}/one"
    assert "secret" not in (said := refusal(url, HERE_ALONE)) and "no password" in said and web.seen == []


@pytest.fixture
def taken_for_public(monkeypatch):
    """127.0.0.1 is public and 127.0.0.2 is not, as far as media.py can see: there is no network here."""
    look = lambda ip: SimpleNamespace(is_global=ip == "127.0.0.1")
    monkeypatch.setattr(media, "ipaddress", SimpleNamespace(ip_address=look))


def test_a_name_that_leads_elsewhere_when_it_is_asked_for_again_does_not_lead_there(web, taken_for_public, monkeypatch):
    """DNS rebinding: a public address for the check, a private one for the connection."""
    private = serve("127.0.0.2", web.server_port)
    private.picture = file_of(noise(8, 8))
    asked = resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    url = f"http://pictures.example:{web.server_port}/one"
    assert load_image(url, MediaRules(allowed_media_domains="pictures.example")).size == (40, 30)
    assert web.seen[0][1]["Host"] == f"pictures.example:{web.server_port}" and private.seen == []
    assert asked == ["pictures.example"]
    private.shutdown()
    private.server_close()


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_must_be_the_names_though_the_connection_is_to_an_address(
    web, taken_for_public, monkeypatch, tmp_path
):
    key, certificate, name = tmp_path / "key.pem", tmp_path / "certificate.pem", "pictures.example"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9".split()
    make += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", certificate]
    subprocess.run(make, check=True, capture_output=True)
    context, names = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda connection, name, _: names.append(name)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    resolving(monkeypatch, ["127.0.0.1"])
    rules = MediaRules(allowed_media_domains=(name, "other.example"))
    url = f"https://{name}:{web.server_port}/one"
    assert "certificate verify failed" in refusal(url, rules)  # of an authority that nobody knows
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    assert load_image(url, rules).size == (40, 30)
    assert "other.example" in refusal(url.replace(name, "other.example"), rules)  # not the name of the certificate
    assert names == [name, name, "other.example"] and len(web.seen) == 1


# ---------------------------------------------------------------- into the adapter and the trainer


def test_the_settings_of_a_run_are_the_rules_of_its_media(folder):
    named = dict(allowed_local_media_path=str(folder), allowed_media_domains="127.0.0.1, Example.org")
    small, usual = MultimodalRLConfig(max_image_pixels=1199, **named), MultimodalRLConfig()
    for family in ("auto", "qwen", "llava"):
        _, _, adapter = load_model(family, None, small)
        assert adapter.media_rules == MediaRules(1199, str(folder), ("127.0.0.1", "example.org"))
        with pytest.raises(ValueError, match="max_image_pixels=1199"):
            adapter.encode_prompt(message(part(f"file://{folder}/one.png"), "red ?"))
        _, _, adapter = load_model(family, None, usual)
        assert adapter.media_rules == MediaRules() == MediaRules(16_000_000, None, None)
        with pytest.raises(ValueError, match="allowed_local_media_path=None"):
            adapter.encode_prompt(message(part(f"file://{folder}/one.png"), "red ?"))
    with pytest.raises(ValueError, match="allowed_local_media_path: expected a folder"):
        load_model("qwen", "no-such-checkpoint", MultimodalRLConfig(allowed_local_media_path="/no/such/folder"))


def environment(*pictures: dict) -> vf.Environment:
    rows = Dataset.from_list([{"prompt": message(picture, "red ?"), "answer": ""} for picture in pictures])
    return vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[lambda completion: len(str(completion)) % 3]))


SMALL = dict(rollouts_per_step=8, rollouts_per_example=4, max_tokens=3)
REFUSED = {
    "a strip": (uri(file_of(Image.new("L", (1, 2000)))), "sides: expected at most 200 times as long as the other"),
    "a large one": (uri(file_of(Image.new("1", (4001, 4000)))), "pixels: expected at most max_image_pixels=16000000"),
    "a web address": ("https://example.org/a.png", r"host: expected one of allowed_media_domains=\(\)"),
    "a file": ("file:///etc/hostname", "path: expected one below allowed_local_media_path=None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_goes_on_without_the_prompt_whose_picture_is_refused_and_says_why(name):
    url, text = REFUSED[name]
    trainer = make_trainer(env=environment(picture(), part(url)), **SMALL)
    with pytest.warns(UserWarning, match=rf"4 of 8 rollouts .*example 1.*400.*image_url='.*{text}"):
        metrics = trainer.step()
    assert metrics["rollouts_dropped"] == 4 and metrics["trained_tokens"] > 0


def test_a_picture_that_only_the_server_took_costs_its_rollout_and_says_why():
    """vLLM has rules of its own: without --allowed-media-domains it fetches from anywhere."""
    trainer = make_trainer(env=environment(picture()), **SMALL)
    outputs = trainer.rollouts.collect()
    outputs["outputs"][3]["trajectory"][0]["prompt"] = message(part("https://example.org/a.png"), "red ?")
    address = r"rollout 3 .*: image_url='https://example.org/a.png': .*allowed_media_domains"
    with pytest.warns(UserWarning, match=address):
        batch = trainer.adapter.build_batch(outputs)
    assert 3 not in batch.rollout_ids and outputs["outputs"][3]["dropped"] == "media"


def web_adapter(**more):
    model, adapter = make_tiny("qwen")
    return model, ProcessorAdapter(adapter.processor, model.config, media_rules=HERE_ALONE, **more)


def test_a_web_picture_is_fetched_once_for_the_server_and_the_batches(web):
    policy = web_adapter()
    trainer = make_trainer(env=environment(part(web.url + "/one")), tiny=policy, **SMALL)
    for _ in range(2):
        assert trainer.step()["rollouts_dropped"] == 0
    assert len(web.seen) == 1
    drawn = policy[1].processor.image_processor(images=[noise()], return_tensors="pt")["pixel_values"]
    (kept,) = policy[1].kept.values()
    assert torch.equal(kept.media.tensors["pixel_values"], drawn)


def test_an_address_where_another_size_stands_the_next_time_is_an_error_and_no_mixture(web):
    """A later turn asks for it anew; its placeholders would belong to another picture than its pixels."""
    _, adapter = web_adapter()
    adapter.encode_prompt(message(part(web.url + "/one"), "red ?"))
    web.picture = file_of(noise(200, 100))
    with pytest.raises(ValueError, match="another size"):
        adapter.encode_prompt(message(part(web.url + "/one"), "green ?"))


def test_large_pictures_do_not_pile_up_beyond_the_bound(monkeypatch):
    """64 prompts with pictures were kept, of any size: 288 MB each of a telephone's photos."""
    model, adapter = make_tiny("qwen")
    adapter = ProcessorAdapter(adapter.processor, model.config, {"max_pixels": 2_000_000})
    made, bound = [], 2**26
    monkeypatch.setattr(adapters, "KEPT_BYTES", bound)
    real = adapter._call_processor

    def remembered(*args):
        inputs = real(*args)
        made.append(weakref.ref(inputs["pixel_values"]))
        return inputs

    monkeypatch.setattr(adapter, "_call_processor", remembered)
    for seed in range(4):  # each by itself well below the bound
        prompt = message(part(uri(file_of(Image.new("RGB", (1200, 1000), (seed, 0, 0))))), "red ?")
        adapter.encode_prompt(prompt)
        adapter.encode_prompt([*prompt, {"role": "assistant", "content": "red"}, *message("sure ?")])
        alive = [tensor().nbytes for tensor in made if tensor() is not None]
        assert sum(alive) <= bound and max(alive) > bound / 4
    assert adapter.kept_bytes <= bound
