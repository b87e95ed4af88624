"""What a Hub keeps: repositories with commits, branches and pull requests, and large files by their hash."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".parquet")


class Refused(Exception):
    """An answer other than 200: its status, the Hub's code for it, and its message."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, {"error": message, **body}


def is_large(path: str) -> bool:
    """Whether a file goes to the storage of large files, as a new repository's .gitattributes say."""
    return path.endswith(LARGE_SUFFIXES)


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_id(path: str, content: bytes) -> str:
    """What the Hub compares files by: git's hash, of large files the SHA-256."""
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)


def change(files: dict[str, bytes], key: str, value: dict[str, Any], large: dict[str, bytes]) -> None:
    """Carries out one line of a commit in a tree of files."""
    path = value["path"]
    if key == "file":
        files[path] = value["content"]
    elif key == "lfsFile":
        if value["oid"] not in large:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
        files[path] = large[value["oid"]]
    elif key == "deletedFile":
        if path not in files:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    else:
        raise Refused(400, f"Unknown operation {key}")


@dataclass
class Commit:
    """A whole tree of files, and where it came from."""

    sha: str
    title: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository as its owner sees it."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.refs["main"] = self.add("initial commit", None, {".gitattributes": b"*.safetensors filter=lfs\n"}).sha

    def add(self, title: str, parent: str | None, files: dict[str, bytes]) -> Commit:
        """A commit that no branch names yet."""
        seed = f"{self.id} {len(self.commits)} {title} {parent}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, parent, dict(files))
        self.commits[commit.sha] = commit
        return commit

    def at(self, revision: str = "main") -> Commit:
        """The commit of a branch, a pull request or a hash."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content, without what the Hub itself has put there."""
        return {path: content for path, content in self.at(revision).files.items() if path != ".gitattributes"}

    def titles(self, revision: str = "main") -> list[str]:
        """Titles of the commits of a branch, the first one first."""
        found: list[str] = []
        sha: str | None = self.at(revision).sha
        while sha is not None:
            found.insert(0, self.commits[sha].title)
            sha = self.commits[sha].parent
        return found

    def branch(self, name: str, start: str) -> None:
        """A new branch; the Hub refuses names inside refs/."""
        if name.startswith("refs/"):
            raise Refused(400, f"Invalid reference for a branch: {name}")
        if name in self.refs:
            raise Refused(409, "Reference already exists")
        self.refs[name] = self.at(start).sha

    def commit(self, revision: str, lines: Iterable[dict[str, Any]], large: dict[str, bytes], author: str | None):
        """Carries out the lines of a commit; `author` is that of a pull request, `None` for a commit to a branch."""
        before = self.at(revision)
        if author is None and revision not in self.refs:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, title = dict(before.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", before.sha) != before.sha:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            else:
                change(files, line["key"], value, large)
        commit = self.add(title, before.sha, files)
        if author is None:
            self.refs[revision] = commit.sha
            return commit, None
        number = len(self.pull_requests) + 1
        self.refs[f"refs/pr/{number}"] = commit.sha
        self.pull_requests.append({"num": number, "title": title, "author": author, "status": "open"})
        return commit, number
