"""Patches on the Hugging Face hub: one file and a model card with the figures that were measured."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelpatch.errors import PatchError
from modelpatch.patch.inspect import Inspection
from modelpatch.tasks.kind import kind_of
from modelpatch.text import count_of, first_line

FILE = "patch.safetensors"


def upload(data: bytes, card: str, repo_id: str, message: str, *, private: bool, token: str | None) -> str:
    """Upload a patch file and its card, to a new repository if need be. Returns the commit's URL. Raises `PatchError`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    operations = [CommitOperationAdd(FILE, data), CommitOperationAdd("README.md", card.encode())]
    with _hub_errors(f"push {FILE} to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)


def download(repo_id: str, *, revision: str | None, token: str | None) -> bytes:
    """The bytes of a repository's patch file. Raises `PatchError` if the hub refuses or cannot be reached."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"download {FILE} from {repo_id}"):
        return Path(hf_hub_download(repo_id, FILE, revision=revision, token=token)).read_bytes()


@contextmanager
def _hub_errors(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise PatchError(f"cannot {action}: {first_line(error)}") from error


def _spell(value: Any) -> str:
    """An option of a task as the card says it."""
    return ", ".join(f"{one:.4g}" for one in value) if isinstance(value, list) else str(value)


def model_card(patch: Inspection, classes: Sequence[str], repo_id: str) -> str:
    """The repository's README: what the patch is, what was measured, how to use it."""
    front = {
        "library_name": "modelpatch",
        "tags": ["modelpatch", patch.method, patch.kind],
        "base_model_spec": patch.backbone,
    }
    facts = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    figures = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in patch.metrics.items()}
    rows = "".join(f"\n| {name.replace('_', ' ')} | {value} |" for name, value in figures.items())
    kind = kind_of(patch.kind)
    names = ", ".join(name.replace("|", "\\|") for name in classes)
    told = "".join(
        f"\n{name.replace('_', ' ').capitalize()}: {_spell(value)}\n" for name, value in patch.options.items()
    )
    return f"""---
{facts}
---

# {patch.task}

A [modelpatch](https://pypi.org/project/modelpatch/) patch: `{patch.method}` over the frozen backbone `{patch.backbone}`, \
{count_of(patch.classes, kind.noun, kind.nouns)}, {patch.file_bytes:,} bytes.

| measured | value |
|---|---:|{rows}

```python
import modelpatch as mp

patch = mp.Patch.from_pretrained("{repo_id}")
backbone = mp.load_backbone("{patch.backbone}")
model = backbone.patched(patch)
```

Base fingerprint `{patch.fingerprint}`; content hash `{patch.content_hash}`.

{kind.nouns.capitalize()}: {names}
{told}"""
