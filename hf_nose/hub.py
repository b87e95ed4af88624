"""A checkpoint's folder to the Hub: checked first, then sent in one commit, so that a push can be repeated at will."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from .card_text import CARD, addressed_card, completed_card, has_words, is_own
from .configuration_nose_vit import NoseViTConfig, __version__
from .export_source import check_model
from .privacy import check_publishable


# Loading one of these runs what is in it.
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# What an earlier push may have left beside new weights, and `from_pretrained` would take instead of them.
STALE = ("*.safetensors", "*.safetensors.index.json", "*_nose_vit.py")
NO_TOKEN = "There is no token: log in with `hf auth login`, or set HF_TOKEN, then try again."


class PushError(RuntimeError):
    """The Hub refused a push, or could not be reached: why, and what to do, in one line without the token."""


@dataclass(frozen=True)
class Push:
    """
    What was pushed: the repository with its owner, branch and commit, the pages to look at, bytes by file, whether
    there was anything new in them, and whether the card that is there stays, because somebody wrote it there.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    pull_request: str | None
    files: dict[str, int]
    is_new: bool
    is_card_kept: bool


def listed_files(folder: str | os.PathLike[str]) -> dict[str, int]:
    """
    The files of a checkpoint's folder that a push sends, by path inside it, with their sizes in bytes.

    Raises:
        `ValueError`: where the folder is no checkpoint with a card, or holds what must not be published: a link, a
            pickle, the access token of this machine.
    """
    folder = Path(folder)
    for name in ("config.json", CARD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: `hf-nose export` makes a folder that can be pushed.")
    files, token = {}, get_token()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{name} in {folder} is a link, which may lead out of the folder: put the file there.")
        if path.is_dir():
            continue
        if path.suffix.lower() in PICKLES:
            raise ValueError(f"{name} in {folder} may hold a pickle, whose loading runs code: take it out.")
        if token is not None and holds(path, token.encode()):
            raise ValueError(f"{name} in {folder} holds the access token of this machine: take it out.")
        files[name] = path.stat().st_size
    return files


def holds(path: Path, secret: bytes) -> bool:
    """Whether a file's bytes hold `secret`, read piece by piece."""
    tail = b""
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            if secret in tail + piece:
                return True
            tail = piece[-len(secret) :]
    return False


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
) -> Push:
    """
    Sends a checkpoint's folder to the Hub in one commit; nothing is sent twice and nothing in the folder is changed,
    so a push that failed is repeated by the same call. The token is that of `hf auth login` or `HF_TOKEN`.

    Args:
        folder (`str` or `os.PathLike`):
            What `hf-nose export` left: configuration, code, weights, image processor and card. The card is sent as it
            is, but for metadata that it lacks and for `YOUR_NAME/...`, where `repo_id` is put in. One that nobody has
            changed does not take the place of words that somebody has written on the Hub.
        repo_id (`str`):
            `OWNER/NAME`, or `NAME` for the token's owner. Made where there is none.
        private (`bool`, *optional*, defaults to `False`):
            Makes the repository private; refused where it exists and is public.
        create_pr (`bool`, *optional*, defaults to `False`):
            Opens a pull request in an existing repository, or adds to the one that an earlier push has opened;
            excludes `revision`.
        revision (`str`, *optional*):
            Branch of a variant, made where there is none; `main` otherwise.
        base_model (`str`, *optional*):
            Hub id of the dense model, for a card that names none.

    Raises:
        `ValueError`: as [`listed_files`] and [`~hf_nose.export_source.check_model`], before anything is sent.
        [`PushError`]: where the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    files = check_push(folder, repo_id, create_pr, revision)
    if get_token() is None:
        raise PushError(NO_TOKEN)
    card, variant = card_to_send(folder, base_model), revision
    api = HfApi(library_name="hf_nose", library_version=__version__)
    if not create_pr:
        with calling("making the repository", repo_id):
            repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    title = f"Upload {repo_id.split('/')[-1]} with hf_nose {__version__}"
    opened = None
    if create_pr:
        with calling("looking for its pull request", repo_id):
            opened = open_pull_request(api, repo_id, title)
        revision = None if opened is None else opened.git_reference
    elif revision not in (None, "main"):
        with calling(f"making the branch {revision}", repo_id):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    with calling("looking what is there", repo_id):
        there = api.model_info(repo_id, revision=revision)
    if private and not there.private:
        raise ValueError(
            f"{repo_id} exists and is public: make it private in its settings, or push without `private`."
        )
    names = [file.rfilename for file in there.siblings or []]
    is_kept = CARD in names and not is_own(card) and is_own_there(api, repo_id, str(there.sha))
    stale = [name for name in names if name not in files and is_stale(name)]
    operations = additions(folder, files, None if is_kept else addressed_card(card, repo_id, variant))
    with calling("sending the files", repo_id):
        done = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(name) for name in stale)],
            commit_message=title,
            revision=revision,
            create_pr=create_pr and opened is None,
            parent_commit=there.sha,
        )
    page = done.pr_url if opened is None else opened.url
    branch = done.pr_revision or revision or "main"
    return Push(repo_id, branch, done.oid, str(done.commit_url), page, files, done.oid != there.sha, is_kept)


def is_stale(name: str) -> bool:
    """Whether a file is in `STALE`: at the top of the repository, whence checkpoints are loaded, not below."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in STALE)


def check_push(folder: Path, repo_id: str, create_pr: bool, revision: str | None) -> dict[str, int]:
    """The files that a push would send, see [`listed_files`]; `ValueError` where it can be refused on this machine."""
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("create_pr and revision exclude each other: a pull request is made against main.")
    if create_pr and "/" not in repo_id:
        raise ValueError(f"repo_id of a pull request must be OWNER/NAME, got {repo_id!r}.")
    files = listed_files(folder)
    check_model(folder)
    check_code(folder)
    card_to_send(folder, None)
    check_publishable(folder)
    return files


def check_code(folder: Path) -> None:
    """`ValueError` where a NoseViT would reach the Hub without the code that loads it for strangers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != NoseViTConfig.model_type:
        return
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict) or not all(isinstance(reference, str) for reference in auto_map.values()):
        raise ValueError(f"auto_map in config.json of {folder} must be names by class, got {auto_map!r}.")
    # `OWNER/NAME--FILE.CLASS` is the code of another repository.
    named = {reference.split("--")[-1].split(".")[0] for reference in auto_map.values()}
    missing = sorted(f"{name}.py" for name in named if not (folder / f"{name}.py").is_file())
    if missing or not named:
        raise ValueError(
            f"{folder} holds no code to load it by ({', '.join(missing) or 'no auto_map in config.json'}): "
            "`hf-nose export` makes a folder that anyone can load."
        )


def check_token() -> None:
    """[`PushError`] where there is no token, or one that the Hub does not know or lets only read."""
    if get_token() is None:
        raise PushError(NO_TOKEN)
    with calling("asking whose token this is", "The Hub"):
        user = HfApi(library_name="hf_nose", library_version=__version__).whoami()
    # A login through the browser has no access token, and may write.
    if user["auth"].get("accessToken", {}).get("role") == "read":
        raise PushError("The token may only read: take one with write access, log in with it, and start again.")


def card_to_send(folder: Path, base_model: str | None) -> str:
    """The card with its metadata completed, in memory only; `ValueError` where that cannot be read."""
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return completed_card((folder / CARD).read_text(encoding="utf-8"), base_model, architecture)


def additions(folder: Path, files: Iterable[str], card: str | None) -> list[CommitOperationAdd]:
    """The files as parts of a commit, with `card` for theirs, or with none."""
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in files if name != CARD}
    if card is not None:
        contents[CARD] = card.encode()
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def is_own_there(api: HfApi, repo_id: str, commit: str) -> bool:
    """Whether somebody has written or changed the text of the card in a repository; then no template replaces it."""
    with calling("reading its card", repo_id):
        text = Path(api.hf_hub_download(repo_id, CARD, revision=commit)).read_text(encoding="utf-8")
    return is_own(text) and has_words(text)


def open_pull_request(api: HfApi, repo_id: str, title: str) -> Discussion | None:
    """The open pull request of this name that the token's owner has made."""
    author = api.whoami()["name"]
    found = api.get_repo_discussions(repo_id, author=author, discussion_type="pull_request", discussion_status="open")
    return next((pull for pull in found if pull.title == title), None)


@contextmanager
def calling(doing: str, repo_id: str) -> Iterator[None]:
    """Turns what a call to the Hub may raise into a [`PushError`]."""
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, json.JSONDecodeError, RuntimeError, LocalEntryNotFoundError) as error:
        # The client wraps what happens in the upload of a large file, and in a download.
        cause = error.__cause__ if isinstance(error, RuntimeError | LocalEntryNotFoundError) else error
        if cause is None:
            raise
        text = " ".join(f"{repo_id}: {doing} failed: {reason(cause)} {advice(cause, repo_id)}".split())
        token = get_token()
        # Not chained: a server may have put the token into its message.
        raise PushError(text if token is None else text.replace(token, "***")) from None


def reason(error: BaseException) -> str:
    """What happened, as the Hub or the connection tells it."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or error.response.reason_phrase
        return f"{error.response.status_code}, {said.strip().rstrip('.')}."
    if isinstance(error, json.JSONDecodeError):
        return "the answer was not the Hub's."
    return f"{str(error).strip().rstrip('.') or type(error).__name__}."


def advice(error: BaseException, repo_id: str) -> str:
    """What the person who pushes can do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE and push again."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then push again."
    if status == 401:
        return "The token is not valid: log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"The token may not write to {repo_id}: take one with write access."
    if status == 404:
        return f"{repo_id} does not exist, or this token cannot see it."
    if status in (409, 412):
        return "Somebody else has changed it meanwhile: look, then push again."
    if status is not None and status < 500 and status != 429:
        return "Nothing was committed."
    # Of a commit nobody knows whether it has landed; the next push finds out.
    return "Nothing has changed here; push again: what has arrived is not sent twice."
