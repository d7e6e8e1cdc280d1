"""Manifests: any change to a folder is found, and said with the file, what was expected and what was found."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from srde.artifacts import MANIFEST_NAME, atomic_folder, read_manifest, verify, write_manifest
from srde.artifacts.manifest import _digest
from srde.errors import ArtifactError

ONE, TWO = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))


@pytest.fixture
def folder(tmp_path):
    with atomic_folder(tmp_path / "adapter", {"base": "tiny"}) as folder:
        (folder / "a.txt").write_text("one")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("two")
    return tmp_path / "adapter"


def rewrite(folder, **changes):
    """Changes the manifest as somebody would who also mends its own hash."""
    content = json.loads((folder / MANIFEST_NAME).read_text()) | changes
    del content["sha256"]
    (folder / MANIFEST_NAME).write_text(json.dumps(content | {"sha256": _digest(content)}))


def test_the_manifest_is_plain_json(folder):
    content = json.loads((folder / MANIFEST_NAME).read_text())
    assert content.pop("sha256") == _digest(content)
    assert content == {
        "format": "srde-folder",
        "format_version": 1,
        "files": [
            {"file": "a.txt", "bytes": 3, "sha256": ONE},
            {"file": "sub/b.txt", "bytes": 3, "sha256": TWO},
        ],
        "metadata": {"base": "tiny"},
    }


def test_a_folder_written_by_others_gets_its_manifest(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert write_manifest(tmp_path) == verify(tmp_path)
    assert write_manifest(tmp_path, {"x": 1}) == verify(tmp_path)


@pytest.mark.faults
def test_every_single_flipped_bit_is_found(folder):
    for path in (folder / MANIFEST_NAME, folder / "a.txt", folder / "sub" / "b.txt"):
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                verify(folder)
        path.write_bytes(whole)
    verify(folder)


def test_a_changed_file_is_named_with_both_hashes(folder):
    (folder / "a.txt").write_text("two")
    with pytest.raises(
        ArtifactError, match=rf"a.txt: sha256='{TWO}': MANIFEST.json expects {ONE}. Restore the folder"
    ):
        verify(folder)


def test_a_truncated_file_is_named_with_both_sizes(folder):
    for size in (0, 1, 2):
        os.truncate(folder / "sub" / "b.txt", size)
        with pytest.raises(
            ArtifactError, match=rf"sub/b.txt: bytes={size}: MANIFEST.json expects 3. Restore the folder"
        ):
            verify(folder)


def test_a_missing_file_is_named(folder):
    (folder / "a.txt").unlink()
    with pytest.raises(
        ArtifactError, match=r"file='.*/a.txt': the folder should hold it, and there is no such plain file"
    ):
        verify(folder)
    (folder / "a.txt").mkdir()
    with pytest.raises(ArtifactError, match="no such plain file"):
        verify(folder)


def test_a_truncated_manifest_is_never_taken_for_whole(folder):
    whole = (folder / MANIFEST_NAME).read_bytes()
    for size in range(len(whole) - 1):  # the last byte is the line's end
        (folder / MANIFEST_NAME).write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="must be JSON in UTF-8"):
            verify(folder)


def test_no_folder_and_no_manifest(tmp_path):
    with pytest.raises(ArtifactError, match=r"folder='.*nowhere': there is no such folder. Check the path."):
        verify(tmp_path / "nowhere")
    with pytest.raises(
        ArtifactError, match=r"a complete folder holds a MANIFEST.json, and this one has none. Restore"
    ):
        verify(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version(folder, version):
    rewrite(folder, format_version=version)
    with pytest.raises(
        ArtifactError, match=rf"format_version={version!r}: this srde reads version 1. Use the srde release"
    ):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "zip"}', '"x"', "null"])
def test_json_of_another_kind(folder, text):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ArtifactError, match='must be an object with "format": "srde-folder"'):
        verify(folder)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, b"\xff\xfe"], ids=range(6)
)
def test_broken_json(folder, text):
    (folder / MANIFEST_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError, match=rf"manifest='.*{MANIFEST_NAME}': must be JSON in UTF-8: "):
        verify(folder)


def test_a_changed_metadata_value(folder):
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace("tiny", "huge"))
    with pytest.raises(
        ArtifactError, match=r"sha256='[0-9a-f]{64}': the manifest's own content has sha256 [0-9a-f]{64}"
    ):
        verify(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": [1]},
        {"files": [{"file": "a.txt"}]},
        {"files": [{"file": "a.txt", "bytes": "3", "sha256": ONE}]},
        {"files": [{"file": "a.txt", "bytes": 3, "sha256": ONE, "mode": 7}]},
        {"metadata": []},
    ],
)
def test_a_manifest_of_another_shape(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(
        ArtifactError, match=r"must hold a list `files` of {file, bytes, sha256} and an object `metadata`"
    ):
        verify(folder)


@pytest.mark.security
@pytest.mark.parametrize(
    "name", ["../a.txt", "/etc/passwd", "sub/../../a.txt", "", ".", "..\\a.txt", "C:a.txt", "//x/a", "sub/.."]
)
def test_names_that_lead_outside(folder, name):
    rewrite(folder, files=[{"file": name, "bytes": 3, "sha256": ONE}])
    with pytest.raises(
        ArtifactError, match=r"a listed name must stay inside the folder. Do not use this folder"
    ):
        read_manifest(folder)


@pytest.mark.security
def test_links_are_not_followed(folder, tmp_path):
    (tmp_path / "secret").write_text("one")
    for name, target in (("a.txt", tmp_path / "secret"), ("sub", tmp_path)):
        kept = folder / name
        kept.rename(tmp_path / "kept")
        kept.symlink_to(target)
        with pytest.raises(
            ArtifactError, match=rf"file='.*/{name}': a listed file must not be a symbolic link"
        ):
            verify(folder)
        kept.unlink()
        (tmp_path / "kept").rename(kept)
    manifest = folder / MANIFEST_NAME
    manifest.rename(tmp_path / "elsewhere")
    manifest.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="must not be a symbolic link"):
        verify(folder)


@pytest.mark.security
def test_links_are_not_saved(tmp_path):
    (tmp_path / "secret").write_text("one")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(ArtifactError, match=rf"file='.*/{name}': a saved folder holds plain files only"):
            with atomic_folder(tmp_path / "adapter") as folder:
                if name == "pipe":
                    os.mkfifo(folder / name)
                else:
                    (folder / name).symlink_to(tmp_path / "secret" if name == "link" else tmp_path)
        assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.security
def test_the_links_of_a_hub_cache_are_followed_to_its_own_blobs_only(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot / "sub").mkdir()
    for number, name in enumerate(["a.txt", "sub/b.txt", MANIFEST_NAME]):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    assert verify(snapshot).metadata == {"base": "tiny"}
    (tmp_path / "secret").write_text("one")
    (snapshot / "a.txt").unlink()
    (snapshot / "a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="must not be a symbolic link"):
        verify(snapshot)


def test_a_manifest_of_absurd_size_is_not_read(folder):
    os.truncate(folder / MANIFEST_NAME, 2**40)
    with pytest.raises(ArtifactError, match="bytes=1099511627776: a manifest has at most 16777216"):
        verify(folder)


def test_metadata_must_be_json(tmp_path):
    for value, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error), atomic_folder(tmp_path / "adapter", {"x": value}) as folder:
            (folder / "a.txt").write_text("one")
    assert os.listdir(tmp_path) == []


def test_files_that_are_not_listed_are_no_concern(folder):
    (folder / "notes.md").write_text("mine")
    assert [entry.file for entry in verify(folder).files] == ["a.txt", "sub/b.txt"]


def test_only_what_is_about_to_be_read(folder):
    (folder / "a.txt").write_text("new")
    assert verify(folder, only=["sub/b.txt"]).metadata == {"base": "tiny"}
    with pytest.raises(ArtifactError, match=r"a.txt: sha256="):
        verify(folder, only=["a.txt"])
    with pytest.raises(
        ArtifactError, match=r"file='.*/c.txt': MANIFEST.json does not list it, so it was not saved"
    ):
        verify(folder, only=["sub/b.txt", "c.txt"])
    with pytest.raises(ArtifactError, match=r"file='.*/c.txt': the folder should hold it"):
        write_manifest(folder, only=["a.txt", "c.txt"])
    (folder / "link").symlink_to(folder)
    manifest = write_manifest(folder, only=["a.txt"])
    assert [entry.file for entry in manifest.files] == ["a.txt"]
    (folder / "sub" / "b.txt").write_text("free to change")
    assert verify(folder) == manifest
