"""Uploading is asked for by name, private, and a hub's refusal is one sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from data.cli import UserError
from launch.export import build_parser
from launch.exporting import hub_upload


class Hub:
    """Stands in for `HfApi`: remembers what it was asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - emptied by the fixture
    refusal: Exception | None = None
    private = True

    def create_repo(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        return f"https://hub/{name}"

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(("upload", options))


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.asked, Hub.refusal = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_off_by_default() -> None:
    assert build_parser().parse_args(["--checkpoint", "r", "--output", "o"]).push_to_hub is None


def test_a_private_repository_gets_the_folder(hub: type[Hub], tmp_path: Path) -> None:
    assert hub_upload.upload(tmp_path, "me/model") == "https://hub/me/model"
    assert hub.asked == [
        ("me/model", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/model", "folder_path": tmp_path, "delete_patterns": hub_upload.WEIGHTS}),
    ]
    # Weights of an earlier export go, whatever the files are called now.
    old = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"]
    assert list(filter_repo_objects(old, allow_patterns=hub_upload.WEIGHTS)) == old[:3]


def test_nothing_goes_to_a_public_repository(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there already, and `create_repo` leaves it as it is."""
    monkeypatch.setattr(hub, "private", False)
    with pytest.raises(UserError, match="that repository is public"):
        hub_upload.upload(tmp_path, "me/model")
    assert [name for name, _ in hub.asked] == ["me/model"]


def test_a_refusal_is_one_sentence(hub: type[Hub], tmp_path: Path) -> None:
    hub.refusal = OfflineModeIsEnabled("no network\nhere")
    with pytest.raises(UserError, match="is written, but the hub did not take it: no network here"):
        hub_upload.upload(tmp_path, "me/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/../x", "me/ model", "/"])
def test_a_wrong_name_is_refused_before_anything_is_done(name: str) -> None:
    with pytest.raises(UserError, match="give OWNER/NAME"):
        hub_upload.check_name(name)
