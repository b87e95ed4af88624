"""The text of a card from its rendering to the Hub: whose words it holds, what it lacks, and where it will stand."""

from __future__ import annotations

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import yaml
from huggingface_hub import ModelCard


CARD = "README.md"
LIBRARY = "transformers"
TAGS = ("hf_nose",)
TASKS = {"ForImageClassification": "image-classification", "Model": "image-feature-extraction"}
# Stands for the owner of the repository in the card of a checkpoint that has none yet.
NOBODY = "YOUR_NAME"
PLACE = re.compile(rf"{NOBODY}/\w(?:[\w.-]*\w)?")
MARK = re.compile(r"\n<!-- Written by hf_nose; yours, and kept, once you change it: ([a-p]{32}) -->\n\Z")


def repository_name(name: str) -> str:
    """What of a folder's name the name of a repository can hold."""
    return re.sub(r"[^\w.-]+|\.{2,}", "-", name, flags=re.ASCII).strip("-.") or "nose-vit"


def marked(text: str) -> str:
    """A rendered card under a last line by which [`is_own`] can tell that nobody has changed it."""
    return f"{text}\n<!-- Written by hf_nose; yours, and kept, once you change it: {seal(text)} -->\n"


def seal(text: str) -> str:
    """A hash in letters alone: every number of a card is one of its record's."""
    return sha256(text.encode()).hexdigest()[:32].translate(str.maketrans("0123456789", "ghijklmnop"))


def is_own(text: str) -> bool:
    """Whether a person has written or changed a card: then no template takes its place."""
    found = MARK.search(text)
    return found is None or found[1] != seal(text[: found.start()])


def has_words(text: str) -> bool:
    """Whether a card says anything: the web page for a new repository leaves one of metadata alone."""
    return bool(re.sub(r"\A---\n.*?^---$", "", text, count=1, flags=re.DOTALL | re.MULTILINE).strip())


def own_card(folder: Path) -> str | None:
    """The card in `folder` where a person has written or changed it; never one that a link leads to."""
    path = folder / CARD
    if path.is_symlink() or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return text if is_own(text) else None


def drop_exports(folder: Path) -> list[Path]:
    """Deletes the exports in `folder`, all but the cards that somebody has written or changed; returns those."""
    if folder.is_symlink():
        folder.unlink()
        return []
    kept = []
    for path in sorted(folder.iterdir()):
        doomed = [path]
        if path.is_dir() and not path.is_symlink() and own_card(path) is not None:
            kept.append(path / CARD)
            doomed = [part for part in path.iterdir() if part.name != CARD]
        for part in doomed:
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    if not kept:
        folder.rmdir()
    return kept


def completed_card(text: str, base_model: str | None, architecture: str) -> str:
    """
    A card with the metadata that the Hub files models by: what the card itself says stays, and so does every word of
    its text. `ValueError` where its metadata cannot be read.
    """
    try:
        card = ModelCard(text)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"The metadata of {CARD} are not plain YAML: {error}") from error
    facts = {"library_name": LIBRARY, "base_model": base_model}
    facts["pipeline_tag"] = next((task for end, task in TASKS.items() if architecture.endswith(end)), None)
    missing = {name: value for name, value in facts.items() if value is not None and card.data.get(name) is None}
    tags = list(card.data.get("tags") or [])
    if not missing and set(TAGS) <= set(tags):
        return text
    for name, value in missing.items():
        card.data[name] = value
    card.data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    return remarked(str(card), text)


def addressed_card(text: str, repo_id: str, revision: str | None = None) -> str:
    """A card whose lines of code load `repo_id`, of a variant its `revision`, where they said `YOUR_NAME/...`."""
    filled = text
    if revision not in (None, "main"):
        added = f", revision={json.dumps(revision, ensure_ascii=False)}"
        filled = re.sub(rf'"{PLACE.pattern}"(?!, revision=)', lambda found: found[0] + added, filled)
    return remarked(PLACE.sub(repo_id, filled), text)


def remarked(text: str, before: str) -> str:
    """What has become of the card `before`, marked as rendered if that was."""
    return text if is_own(before) else marked(MARK.sub("", text))
