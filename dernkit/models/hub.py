"""Checkpoints by name: a directory, or an id on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from dernkit.errors import CheckpointError
from dernkit.sentences import reason


def resolve(model: str) -> Path:
    """A local directory as it is; anything else is a hub id that huggingface_hub downloads (or finds in its cache)."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(f"--model: must be a directory or a hub id. Got '{model}', which is neither, instead.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"]
    try:
        others = ["*/*"]  # folders hold the same weights in other formats
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=others))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"--model: must be a directory or a hub id that can be reached. Got '{model}' instead ({reason(error)})"
        ) from None
