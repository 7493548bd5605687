"""Uploading is asked for by name, private, and a hub's refusal is one sentence."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from data.cli import UserError
from launch.export import build_parser
from launch.exporting import hub_upload


class Hub:
    """Stands in for `HfApi`: remembers what it was asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - emptied by the fixture
    refusal: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        return f"https://hub/{name}"

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
        ("upload", {"repo_id": "me/model", "folder_path": tmp_path}),
    ]


def test_a_refusal_is_one_sentence(hub: type[Hub], tmp_path: Path) -> None:
    hub.refusal = OfflineModeIsEnabled("no network\nhere")
    with pytest.raises(UserError, match="is written, but the hub did not take it: no network here"):
        hub_upload.upload(tmp_path, "me/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/../x", "me/ model", "/"])
def test_a_wrong_name_is_refused_before_anything_is_done(name: str) -> None:
    with pytest.raises(UserError, match="give OWNER/NAME"):
        hub_upload.check_name(name)
