"""Patches on the Hugging Face hub: one file and a model card with the figures that were measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from modelpatch.errors import PatchError
from modelpatch.patch.file import decode_patch, encode_patch

if TYPE_CHECKING:
    from modelpatch.patch.contents import Patch

FILE = "patch.safetensors"


def push_to_hub(patch: Patch, repo_id: str, *, private: bool, token: str | None) -> str:
    """Create the repository if need be and upload the patch and its card in one commit. Returns the commit's URL.

    Raises `PatchError` with the hub's own words if it refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    operations = [
        CommitOperationAdd(FILE, encode_patch(patch)),
        CommitOperationAdd("README.md", model_card(patch, repo_id).encode()),
    ]
    with _hub_errors(f"push {patch.task.name} to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = f"Add the patch {patch.task.name} ({patch.method.name})"
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)


def from_pretrained(repo_id: str, *, revision: str | None, token: str | None) -> Patch:
    """Download a patch and check it like any file. Raises `PatchError`, or a `PatchFileError` for what is in the file."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"download {FILE} from {repo_id}"):
        path = hf_hub_download(repo_id, FILE, revision=revision, token=token)
    with open(path, "rb") as stream:
        return decode_patch(stream.read(), f"{repo_id}/{FILE}")


class _hub_errors:  # noqa: N801 (a context manager, named as one reads it)
    """Turns whatever the hub's client raises into one clear error."""

    def __init__(self, action: str) -> None:
        self.action = action

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PatchError(f"cannot {self.action}: {first}") from error


def model_card(patch: Patch, repo_id: str) -> str:
    """The repository's README: what the patch is, what was measured, how to use it."""
    inspection = patch.inspect()
    front = {
        "library_name": "modelpatch",
        "tags": ["modelpatch", patch.method.name, patch.task.kind],
        "base_model_spec": patch.backbone.spec,
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {patch.task.name}", ""]
    lines += [
        f"A [modelpatch](https://pypi.org/project/modelpatch/) patch: `{patch.method.name}` over the frozen backbone "
        f"`{patch.backbone.spec}`, {len(patch.task.classes)} classes, {inspection.file_bytes:,} bytes.",
        "",
        "| measured | value |",
        "|---|---:|",
    ]
    lines += [f"| {name.replace('_', ' ')} | {_figure(value)} |" for name, value in patch.metrics.items()]
    lines += [
        "",
        "```python",
        "import modelpatch as mp",
        "",
        f'patch = mp.Patch.from_pretrained("{repo_id}")',
        f'backbone = mp.load_backbone("{patch.backbone.spec}")',
        "model = backbone.patched(patch)",
        "```",
        "",
        f"Base fingerprint `{patch.backbone.fingerprint.whole}`; content hash `{patch.content_hash}`.",
        "",
        "Classes: " + ", ".join(name.replace("|", "\\|") for name in patch.task.classes),
        "",
    ]
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
