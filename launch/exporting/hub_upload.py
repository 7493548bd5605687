"""`--push_to_hub`: an exported folder to a private repository of the Hugging Face hub. Never done unless asked for."""

from __future__ import annotations

from pathlib import Path

from data.cli import UserError, sentence

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_name(name: str) -> None:
    """Raises UserError before anything is exported where the hub would refuse the name afterwards."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
        known = name.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise UserError(f"--push_to_hub {name} is no repository's name; give OWNER/NAME")


def upload(folder: Path, name: str) -> str:
    """The repository's address. Raises UserError with what the hub answered; the folder stays as it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        if not api.repo_info(name).private:  # it was there, and keeps what it was
            raise UserError(f"--push_to_hub {name}: {folder} is written, but that repository is public; name a private one")
        # Of an earlier export in files of other names: transformers would take one whole file before an index of several.
        api.upload_folder(repo_id=name, folder_path=folder, delete_patterns=WEIGHTS)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        said = sentence(error)[:300]
        raise UserError(f"--push_to_hub {name}: {folder} is written, but the hub did not take it: {said}") from error
    return str(repository)
