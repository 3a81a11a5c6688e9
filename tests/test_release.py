"The photographs of profile release: fetched, verified, named in the model card."

import dataclasses
import hashlib
import http.server
import io
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tocsr
from tocsr.core.config import DataConfig
from tocsr.core.download import FetchError
from tocsr.core.image import ImageError, read_image
from tocsr.data import release as R
from tocsr.data.images import EMBEDDED, load_photos
from tocsr.evaluation.model_card import render_model_card

FREE = (
    "CC0",
    "public domain",
    "Unlicense",
    "MIT",
    "BSD-3-Clause",
    "Apache-2.0",
    "CDLA-Permissive-1.0",
)


def photo(seed, w=200, h=150):
    "Bytes of a made-up JPEG."
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


class Server:
    "Answers GitHub's blob requests; the first `cuts` answers end half-way, of known length or not."

    def __init__(self, blobs, cuts=0, length=True, refuse=()):
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(
                    (self.path, self.headers.get("Accept"), self.headers.get("Authorization"))
                )
                if len(outer.asked) in dict(refuse):
                    status, headers = dict(refuse)[len(outer.asked)]
                    self.send_response(status)
                    for k, v in headers.items():
                        self.send_header(k, v)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = blobs.get(self.path.removeprefix("/repos/some/one/git/blobs/"))
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                if length:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if len(outer.asked) <= cuts else body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def two(tmp_path, monkeypatch):
    "Two photographs by blob, and their csv. One embedded photograph stands for all, to be quick."
    monkeypatch.setattr(R, "EMBEDDED", EMBEDDED[:1])
    blobs = {R.git_blob_hash(b): b for b in (photo(1), photo(2, 1700, 30))}
    lines = [f"p_{i}.x,some/one,{b},CC BY 2.0,README,Zoë" for i, b in enumerate(blobs)]
    (tmp_path / "list.csv").write_text(
        "name,repository,git_blob,license,evidence,credit\n" + "\n".join(lines) + "\n",
        encoding="utf-8",
    )
    return blobs, tmp_path / "list.csv", tmp_path / "photos"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_list_names_280_photographs_without_doubt():
    found = R.list_release_photos()
    assert len(found) == 280 == len({p.git_blob for p in found})
    assert len({p.name for p in (*found, *EMBEDDED)}) == 280 + len(EMBEDDED)
    for p in found:
        assert (
            re.fullmatch(r"[0-9a-f]{40}", p.git_blob)
            and re.fullmatch(r"[\w.-]+/[\w.-]+|https://deb.debian.org/.*\.deb", p.repository)
            and re.fullmatch(r"(?!b_)[\w.-]+", p.name)
        )
        assert p.evidence and p.credit and (p.license in FREE or p.license.startswith("CC BY "))


def make_package(files):
    "Bytes of a Debian package with these contents."
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n1"), ("data.tar.xz", data.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def test_a_photograph_comes_out_of_a_debian_package(tmp_path):
    package = tmp_path / "some_1.0_all.deb"
    package.write_bytes(make_package({"./usr/a.jpg": photo(1), "./usr/b.jpg": photo(2)}))
    place = package.as_uri()
    entry = R.RepositoryPhoto("b", place, R.git_blob_hash(photo(2)), "CC0", "copyright", "Zoë")
    assert R.fetch_original(entry) == photo(2)
    assert R.photo_origin(entry).startswith(place)
    lacking = dataclasses.replace(entry, git_blob=R.git_blob_hash(photo(3)))
    with pytest.raises(FetchError, match="no file with this content") as e:
        R.fetch_original(lacking)
    assert "api.github.com" not in str(e.value)
    (tmp_path / "cut.deb").write_bytes(package.read_bytes()[:-40])
    cut = dataclasses.replace(entry, repository=(tmp_path / "cut.deb").as_uri())
    with pytest.raises(FetchError, match="damaged package"):
        R.fetch_original(cut)


def test_the_hash_is_gits():
    assert (
        R.git_blob_hash(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    )  # the example in the book Pro Git
    assert R.git_blob_hash(b"x") != hashlib.sha1(b"x").hexdigest()


def test_a_folder_is_filled_and_nothing_else_is_left(two):
    blobs, listing, dest = two
    with Server(blobs) as s:
        assert R.fetch_release_photos(dest, s.url + "/", listing) == dest
    assert [a[1] for a in s.asked] == ["application/vnd.github.raw+json"] * 2
    assert names(dest) == ["astronaut.png", "p_0.x.png", "p_1.x.png"]
    assert (read_image(dest / "p_0.x.png") == read_image(io.BytesIO(photo(1)))).all()
    with Image.open(dest / "p_1.x.png") as im:
        assert (
            im.size == (1600, 28)
            and im.info["Author"] == "Zoë"
            and im.info["Copyright"] == "CC BY 2.0"
            and im.info["Source"].endswith(list(blobs)[1])
        )
    assert (read_image(dest / "astronaut.png") == read_image(R.embedded_path(EMBEDDED[0]))).all()
    assert len(load_photos(DataConfig(source=str(dest)))) == 2  # the third is smaller than a crop


def test_what_is_there_is_not_asked_for_again(two):
    blobs, listing, dest = two
    with Server(blobs) as s:
        R.fetch_release_photos(dest, s.url, listing)
        stamps = {p: p.stat().st_mtime_ns for p in dest.iterdir()}
        R.fetch_release_photos(dest, s.url, listing)
        assert len(s.asked) == 2 and {p: p.stat().st_mtime_ns for p in dest.iterdir()} == stamps
        (dest / "p_1.x.png").unlink()
        R.fetch_release_photos(dest, s.url, listing)
    assert len(s.asked) == 3 and s.asked[2][0].endswith(list(blobs)[1]) and len(names(dest)) == 3


def test_a_changed_list_replaces_the_photograph(two):
    blobs, listing, dest = two
    new = photo(3)
    blobs[R.git_blob_hash(new)] = new
    with Server(blobs) as s:
        R.fetch_release_photos(dest, s.url, listing)
        listing.write_text(
            listing.read_text(encoding="utf-8").replace(list(blobs)[0], R.git_blob_hash(new)),
            encoding="utf-8",
        )
        R.fetch_release_photos(dest, s.url, listing)
    assert (read_image(dest / "p_0.x.png") == read_image(io.BytesIO(new))).all()


@pytest.mark.parametrize("length", [True, False])
def test_a_cut_connection_is_tried_again(two, length):
    blobs, listing, dest = two
    with Server(blobs, cuts=2, length=length) as s:
        R.fetch_release_photos(dest, s.url, listing)
    assert len(s.asked) == 4 and len(names(dest)) == 3


def test_an_interrupted_run_goes_on_where_it_stopped(two):
    blobs, listing, dest = two
    second = list(blobs)[1]
    with (
        Server({k: v for k, v in blobs.items() if k != second}) as s,
        pytest.raises(FetchError, match="p_1.x.*404"),
    ):
        R.fetch_release_photos(dest, s.url, listing)
    assert names(dest) == ["astronaut.png", "p_0.x.png"]
    with Server(blobs) as s:
        R.fetch_release_photos(dest, s.url, listing)
    assert [a[0].rsplit("/", 1)[1] for a in s.asked] == [second] and len(names(dest)) == 3


def test_other_content_is_refused(two):
    blobs, listing, dest = two
    first = list(blobs)[0]
    with Server(blobs | {first: photo(9)}) as s, pytest.raises(FetchError) as e:
        R.fetch_release_photos(dest, s.url, listing)
    assert all(
        w in str(e.value)
        for w in ("p_0.x", first, "some/one", "other content", R.git_blob_hash(photo(9))[:12])
    )
    assert names(dest) == ["astronaut.png"]


def test_offline_names_photograph_and_hint(two):
    _, listing, dest = two
    with pytest.raises(FetchError) as e:
        R.fetch_release_photos(dest, "http://127.0.0.1:9", listing)
    assert (
        all(w in str(e.value) for w in ("p_0.x", "some/one", "Go online", "kept"))
        and str(e.value).count("refused") == 1
    )


def test_the_hourly_limit_says_when_and_what_helps(two):
    blobs, listing, dest = two
    limit = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000000"}
    with (
        Server(blobs, refuse=[(1, (403, limit))]) as s,
        pytest.raises(FetchError, match="22:13 UTC, or set GITHUB_TOKEN"),
    ):
        R.fetch_release_photos(dest, s.url, listing)
    assert len(s.asked) == 1
    with Server(blobs, refuse=[(1, (403, {}))]) as s, pytest.raises(FetchError, match="HTTP 403"):
        R.fetch_release_photos(dest, s.url, listing)
    with Server(blobs, refuse=[(1, (502, {}))]) as s:
        R.fetch_release_photos(dest, s.url, listing)
    assert len(s.asked) == 3


def test_the_token_goes_to_github_only(two, monkeypatch):
    blobs, listing, dest = two
    monkeypatch.setenv("GITHUB_TOKEN", "example")
    with Server(blobs) as s:
        R.fetch_release_photos(dest, s.url, listing)
    assert [a[2] for a in s.asked] == [None, None]
    ours = R._make_request("https://api.github.com/repos/a/b")
    assert (
        ours.get_header("Authorization") == "Bearer example" and "Authorization" not in ours.headers
    )  # headers are what a redirect keeps


@pytest.mark.parametrize("content", [b"dear diary", None], ids=["text", "another image"])
def test_a_file_in_the_way_is_left_alone(two, content):
    blobs, listing, dest = two
    dest.mkdir()
    if content is None:
        Image.new("RGB", (200, 200)).save(dest / "p_0.x.png")
    else:
        (dest / "p_0.x.png").write_bytes(content)
    before = (dest / "p_0.x.png").read_bytes()
    with (
        Server(blobs) as s,
        pytest.raises(
            ImageError, match="p_0.x.png: not written by fetch_release_photos; move it away"
        ),
    ):
        R.fetch_release_photos(dest, s.url, listing)
    assert (dest / "p_0.x.png").read_bytes() == before and not s.asked


def test_a_destination_that_is_a_file(two):
    _, listing, dest = two
    dest.write_text("")
    with pytest.raises(ImageError, match="choose another"):
        R.fetch_release_photos(dest, "http://127.0.0.1:9", listing)


# the model card


def record(**changes):
    w = dict(
        name="teacher",
        files=["teacher/unet.safetensors"],
        params=123_456,
        steps=dict(base=10, expand=20),
        hours=1.25,
        threads=2,
        config=dict(lr=0.5),
        curve=[(i, 1 / (i + 1)) for i in range(100)],
        results=dict(loss=dict(val=0.123456)),
    )
    found = R.list_release_photos()
    photos = dict(
        train=[f"{p.name}.png" for p in found[1:]] + ["chelsea.png"],
        val=[f"{found[0].name}.png", "coffee"],
        manifest_hash="f00d",
    )
    return (
        dict(
            weights=[w],
            photos=photos,
            joint_steps=0,
            machine=dict(cpu="Some CPU", cores=2),
            versions=dict(torch="2.0"),
        )
        | changes
    )


def test_the_card_names_every_photograph_author_and_number():
    card = render_model_card(record())
    for p in R.list_release_photos():
        assert f"| {p.name} |" in card and p.credit in card and p.git_blob[:12] in card
    for w in (
        "TANAKA Juuyoh",
        "DreamyPixel",
        "Andesine",
        "Edoardo Brogiolo",
        "Stefan van der Walt",
        "123,456",
        "1.25 h on 2 CPU threads",
        "base: 10; expand: 20",
        "| loss, val | 0.1235 |",
        "(0, 1)",
        "(99, 0.01)",
        "Some CPU",
        "f00d",
        "280 photographs trained",
        "2 were held out",
        "Apache-2.0",
        '{"lr": 0.5}',
    ):
        assert w in card, w
    assert card.count("| held out |") == 2 and "**not run**" in card and card.endswith("|\n")
    assert card.split("as (step, loss): ")[1].split("\n")[0].count("(") == 10


def test_the_card_follows_the_record():
    card = render_model_card(record(joint_steps=500))
    assert "ran for 500 steps" in card and "not run" not in card
    w = record()["weights"][0]
    assert "Not evaluated." in render_model_card(record(weights=[w | dict(results={}, curve=[])]))
    assert "1.25 h |" in render_model_card(record(weights=[w | dict(threads=0)]))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(photos=dict(train=["IMG_1.jpg"], val=[], manifest_hash="")),
            "IMG_1.jpg.*cannot be published",
        ),
        (
            dict(photos=dict(train=["b_budgie_serene.png"], val=[], manifest_hash="")),
            "b_budgie_serene.*cannot be published",
        ),
        (dict(photos=dict(train=[])), "photos lacks 'val'"),
        (dict(weights=[dict(name="teacher")]), r"weights\[0\] lacks 'files'"),
        (dict(weights=[record()["weights"][0] | dict(name="codec5")]), "unknown weights codec5"),
    ],
)
def test_a_record_that_cannot_be_published_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        render_model_card(record(**changes))
    with pytest.raises(ValueError, match="record lacks 'versions'"):
        render_model_card({k: v for k, v in record().items() if k != "versions"})


def test_bundled_configurations_name_no_folder_of_a_machine():
    configs = sorted((Path(tocsr.__file__).parent / "weights").rglob("*.json"))
    assert any(c.name == "config.json" for c in configs)
    for c in configs:
        assert "_name_or_path" not in c.read_text(), c
