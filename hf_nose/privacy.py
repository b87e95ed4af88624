"""What must not be published: nothing leaves that names the machine it was made on, or holds a key to anything."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path


# Folders at the top of file systems. Any name after a slash would be too much: SUN397 has a class "/a/abbey".
TOPS = (
    "home|root|Users|Volumes|tmp|var|mnt|media|opt|srv|etc|usr|private|scratch|work|workspace|workspaces|data|datasets"
    "|content|kaggle|proc|dev|run|lustre|gpfs|nfs"
)
BEFORE = r"(?<![\w./<~-])"
LONG = {
    "an absolute path": rf"{BEFORE}/(?:{TOPS})/[\w.@-]+",
    "an access token": r"\bhf_[A-Za-z0-9]{30,}",
    "the address of a file": r"\bfile:/+[\w.@-]",
}
# So short that chance puts them into compressed pixels.
SHORT = {
    # In JSON a backslash is two.
    "an absolute path": r"\b[A-Za-z]:\\{1,2}[\w.@-]+",
    "a path that leads out of the folder": r"(?<![\w.])\.\./|(?<![\w~])~/",
}
# Chance puts anything into numbers; what else such files hold is written by this package.
NUMBERS = (".safetensors", ".onnx", ".data")
PIXELS = (".png",)


def check_publishable(folder: Path) -> None:
    """
    Looks into every file below `folder`, weights left out, for absolute paths, paths that lead out, and tokens.

    Raises:
        `ValueError`: naming the file and what was found in it (a token only by its first letters).
    """
    # Wherever this Python and its user live, whatever the top folder is called there.
    places = {str(path) for path in (Path.home(), Path.cwd(), sys.prefix, tempfile.gettempdir())} - {"/"}
    own = rf"{BEFORE}(?:{'|'.join(map(re.escape, sorted(places)))})(?!\w)"
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in NUMBERS):
        kinds = [*LONG.items(), ("an absolute path", own), *(() if file.suffix in PIXELS else SHORT.items())]
        content = file.read_bytes()
        for what, pattern in kinds:
            found = re.search(pattern.encode(), content)
            if found:
                text = found[0].decode()
                raise ValueError(
                    f"{file.relative_to(folder).as_posix()} would hold {what}, "
                    f"{text[:6] + '...' if what == 'an access token' else text!r}, which is not to be published. "
                    "Name models and data sets by their Hub ids (base_model_id, dataset_id) and mend the source."
                )
