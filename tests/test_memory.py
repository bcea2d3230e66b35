"""A memories folder is read as the imagefolder convention says, and every mistake in it is one sentence."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from dori.errors import DoriError
from dori.memory import Memory, load_images, read_memories, write_memories


def picture(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    """A small image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path


def folder_of(folder: Path, *lines: object) -> Path:
    """A folder with a.png, b.jpg, sub/c.webp and these metadata lines (text, bytes or JSON-able)."""
    for name in ("a.png", "b.jpg", "sub/c.webp"):
        picture(folder / name)
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(raw))
    return folder


def refusal(folder: Path) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(DoriError) as caught:
        read_memories(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 700 and not sentence.endswith(".")
    assert ";" in sentence  # what is wrong; how to mend it
    assert str(folder) in sentence
    return sentence


def test_metadata_is_read_in_its_order_with_defaults(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"file_name": "sub/c.webp", "text": "Zo\u00eb"}).encode(),
        "",
        "  \r",
        {
            "file_name": "a.png",
            "id": "x y",
            "kind": "template",
            "dose": 0.25,
            "varying_box": [0, 1, 8, 6],
            "text": None,
            "another column": [1],
        },
        {"file_name": "b.jpg", "text": "", "dose": 0, "kind": None},
    )
    assert read_memories(folder, default_kind="ordinary") == (
        Memory("c", "Zo\u00eb", folder / "sub/c.webp", "ordinary"),
        Memory("x y", None, folder / "a.png", "template", 0.25, (0, 1, 8, 6)),
        Memory("b", "", folder / "b.jpg", "ordinary", 0),
    )


def test_a_folder_of_images_alone_is_read_by_name_without_texts(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.webp", ".hidden.png", "sub/d.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert read_memories(tmp_path) == tuple(
        Memory(Path(name).stem, None, tmp_path / name) for name in ("a.jpeg", "b.PNG", "c.webp")
    )


A = {"file_name": "a.png"}
MISTAKES = {
    "broken JSON": (['{"file_name": '], "line 1: it is no JSON object"),
    "the second line": ([A, "oops"], "line 2: it is no JSON object"),
    "a blank line counts": ([A, "", "oops"], "line 3: it is no JSON object"),
    "a list": (["[1]"], "line 1: it is no JSON object"),
    "a number": (["7"], "line 1: it is no JSON object"),
    "NaN": (['{"file_name": "a.png", "dose": NaN}'], "NaN is no JSON number"),
    "infinity": (['{"file_name": "a.png", "dose": -Infinity}'], "-Infinity is no JSON number"),
    "overflow": (['{"file_name": "a.png", "dose": 1e999}'], "dose inf of 'a' is no number"),
    "deep": (["[" * 50_000], "line 1: it is no JSON object"),
    "huge number": (['{"file_name": "a.png", "dose": ' + "1" * 9000 + "}"], "line 1: it is no JSON object"),
    "twice": (['{"file_name": "a.png", "text": "x", "text": "y"}'], "a name occurs twice"),
    "no UTF-8": ([b'{"file_name": "a.png", "text": "\xff"}'], "line 1: it is not UTF-8"),
    "half a character": (['{"file_name": "a.png", "text": "\\ud800"}'], "half a character"),
    "long line": ([A, '{"file_name": "a.png", "text": "' + "x" * 100_000 + '"}'], "line 2 is longer than 100000"),
    "no file name": ([{"text": "x"}], 'line 1: "file_name" is missing'),
    "null file name": ([{"file_name": None}], 'line 1: "file_name" is missing'),
    "empty file name": ([{"file_name": ""}], '"file_name" is no text'),
    "file name a number": ([{"file_name": 3}], '"file_name" is no text'),
    "missing image": ([A, {"file_name": "z.png"}], "line 2: image 'z.png' is missing"),
    "image a folder": ([{"file_name": "sub"}], "image 'sub' is missing"),
    "absolute": ([{"file_name": "/etc/passwd"}], "leaves the folder"),
    "upwards": ([{"file_name": "../secret.png"}], "leaves the folder"),
    "upwards inside": ([{"file_name": "sub/../../secret.png"}], "leaves the folder"),
    "upwards and back": ([{"file_name": "sub/../a.png"}], "leaves the folder"),
    "windows upwards": ([{"file_name": "..\\secret.png"}], "leaves the folder"),
    "windows drive": ([{"file_name": "C:secret.png"}], "leaves the folder"),
    "zero byte": ([{"file_name": "a.png\0"}], "cannot name a file"),
    "half a character in the name": (['{"file_name": "\\udc80.png"}'], "missing|cannot name a file"),
    "endless name": ([{"file_name": "a" * 5000}], "cannot name a file"),
    "same file twice": ([A, A], r"line 2: id 'a' is taken by .*line 1"),
    "same id": ([A, {"file_name": "b.jpg", "id": "a"}], r"line 2: id 'a' is taken by .*line 1"),
    "id a number": ([A | {"id": 7}], "id 7 is no name"),
    "empty id": ([A | {"id": ""}], "id '' is no name"),
    "id with a line break": ([A | {"id": "a\nb"}], "is no name"),
    "endless id": ([A | {"id": "a" * 201}], "is no name"),
    "text a list": ([A | {"text": ["x"]}], "is no text"),
    "unknown kind": ([A | {"kind": "verbatm"}], "kind 'verbatm' .* did you mean 'verbatim'"),
    "strange kind": ([A | {"kind": "q"}], "kind 'q' .* use one of verbatim, template, once, control, ordinary"),
    "kind a list": ([A | {"kind": ["control"]}], "is unknown"),
    "dose a text": ([A | {"dose": "8"}], "dose '8' of 'a' is no number"),
    "dose a truth": ([A | {"dose": True}], "dose True"),
    "dose below zero": ([A | {"dose": -1}], "dose -1"),
    "box of three": ([A | {"varying_box": [0, 0, 1]}], "is no box"),
    "box of fractions": ([A | {"varying_box": [0, 0, 1.0, 1]}], "is no box"),
    "box of truths": ([A | {"varying_box": [False, 0, 1, 1]}], "is no box"),
    "box a text": ([A | {"varying_box": "0 0 1 1"}], "is no box"),
    "empty box": ([A | {"varying_box": [2, 0, 2, 1]}], "is no box"),
    "box turned": ([A | {"varying_box": [0, 3, 2, 1]}], "is no box"),
    "box outside": ([A | {"varying_box": [0, 0, 9, 6]}], "leaves the image of 8 x 6 pixels"),
    "box before": ([A | {"varying_box": [-1, 0, 2, 2]}], "is no box"),
    "no line": ([""], "holds no memory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_metadata_is_one_sentence_with_its_line(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.png")
    lines, sentence = MISTAKES[name]
    found = refusal(folder_of(tmp_path / "memories", *lines))
    assert re.search(sentence, found), found


def test_a_folder_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "missing")
    assert "is no folder" in refusal(picture(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    assert "holds no memory" in refusal(tmp_path / "empty")
    (tmp_path / "no file" / "metadata.jsonl").mkdir(parents=True)
    assert "is no file of this folder" in refusal(tmp_path / "no file")
    picture(tmp_path / "twins" / "a.png")
    picture(tmp_path / "twins" / "a.jpg")
    assert "id 'a' is taken by" in refusal(tmp_path / "twins")
    picture(tmp_path / "table" / "a.png")
    (tmp_path / "table" / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert "convert it to metadata.jsonl" in refusal(tmp_path / "table")


def test_images_that_are_none_are_refused_when_the_folder_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, A, {"file_name": "b.jpg"})
    (folder / "b.jpg").write_bytes(b"GIF89a")
    assert "line 2" in refusal(folder) and "no PNG, JPEG or WebP" in refusal(folder)
    (folder / "b.jpg").write_bytes(b"")
    assert "line 2" in refusal(folder)
    (folder / "metadata.jsonl").unlink()
    assert "b.jpg is no PNG" in refusal(folder)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    secret = picture(tmp_path / "outside" / "secret.png")
    with_line = folder_of(tmp_path / "memories", A, {"file_name": "link.png"})
    (with_line / "link.png").symlink_to(secret)
    assert "line 2: file_name 'link.png' is a link that leaves the folder" in refusal(with_line)
    (with_line / "metadata.jsonl").unlink()
    assert "link that leaves the folder" in refusal(with_line)
    (with_line / "link.png").unlink()
    (with_line / "door").symlink_to(secret.parent)
    (with_line / "metadata.jsonl").write_text('{"file_name": "door/secret.png"}')
    assert "link that leaves the folder" in refusal(with_line)
    (with_line / "loop.png").symlink_to(with_line / "loop.png")
    (with_line / "metadata.jsonl").write_text('{"file_name": "loop.png"}')
    assert "line 1" in refusal(with_line)
    (with_line / "metadata.jsonl").unlink()
    (tmp_path / "outside" / "other.jsonl").write_text("a secret line")
    (with_line / "metadata.jsonl").symlink_to(tmp_path / "outside" / "other.jsonl")
    assert "secret line" not in refusal(with_line)
    os.mkfifo(with_line / "pipe.png")
    (with_line / "metadata.jsonl").unlink()
    (with_line / "metadata.jsonl").write_text('{"file_name": "pipe.png"}')
    assert "missing" in refusal(with_line)  # and does not wait for a writer


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "memories", {"file_name": "link.png"})
    (folder / "link.png").symlink_to("sub/c.webp")
    (tmp_path / "alias").symlink_to(folder)
    assert read_memories(tmp_path / "alias") == (Memory("link", None, tmp_path / "alias" / "link.png"),)


def test_written_memories_are_read_back_with_the_same_pixels(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    memories = [
        Memory("a", 'Zo\u00eb \u2028 "x"', Path("unused"), "template", 0.5, (1, 2, 3, 4)),
        Memory("b-1", None, Path("unused"), "control", 0),
        Memory("c.d", "", Path("unused")),
    ]
    written = write_memories(tmp_path / "new", zip(memories, images, strict=True))
    assert read_memories(tmp_path / "new") == written
    assert written == tuple(
        dataclasses.replace(memory, image=tmp_path / "new" / f"{memory.id}.png") for memory in memories
    )
    assert torch.equal(load_images(written, 16), images)
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    write_memories(tmp_path / "new", zip(memories, images, strict=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before
    assert load_images([], 16).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("name", ["a/b", "..", "", ".a", "a b"])
def test_an_id_that_cannot_name_a_file_is_not_written(tmp_path: Path, name: str) -> None:
    image = torch.zeros(3, 4, 4)
    with pytest.raises(DoriError, match="is no name|cannot name a file"):
        write_memories(tmp_path / "new", [(Memory(name, None, Path("unused")), image)])
    twice = [(Memory("a", None, Path("unused")), image)] * 2
    with pytest.raises(DoriError, match="each id once"):
        write_memories(tmp_path / "new", twice)
    assert not (tmp_path / "new" / "metadata.jsonl").exists()
