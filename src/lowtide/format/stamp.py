"""Stamps: a note in the user's cache that a folder's bytes were verified, so that a warm start need not hash them.

A stamp holds the identity of every file (device, inode, size, times) and the manifest's digest. If any of these differ,
or the stamp cannot be read, the folder is verified again. Losing stamps costs time, never safety.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

STAMP_VERSION = 1

#: A file changed within this time of being stamped could change again without a new time stamp (the clocks of file
#: systems are coarse), so it gets no stamp yet.
QUIET_NS = 2_000_000_000

Identity = dict[str, list[int]]


def identity(stats: dict[str, os.stat_result]) -> Identity:
    """What a stamp remembers of each file."""
    return {name: [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in sorted(stats.items())}


def is_stamped(folder: Path, manifest_sha256: str, files: Identity) -> bool:
    """True if exactly these files of this folder were verified before."""
    try:
        stored = json.loads(_stamp_path(folder).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return bool(stored == _content(folder, manifest_sha256, files))


def write_stamp(folder: Path, manifest_sha256: str, files: Identity) -> None:
    """Remember that the files were verified; silently does nothing where the cache cannot be written."""
    newest = max((times[-1] for times in files.values()), default=0)
    if newest > time.time_ns() - QUIET_NS:
        return
    target = _stamp_path(folder)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_content(folder, manifest_sha256, files)))
        os.replace(temporary, target)


def _content(folder: Path, manifest_sha256: str, files: Identity) -> dict[str, object]:
    return {"version": STAMP_VERSION, "folder": str(folder), "manifest": manifest_sha256, "files": files}


def cache_folder() -> Path:
    """The user's cache of lowtide: `$XDG_CACHE_HOME/lowtide` or `~/.cache/lowtide`."""
    # The XDG specification says to ignore a relative path.
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "lowtide"


def _stamp_path(folder: Path) -> Path:
    return cache_folder() / "verified" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()}.json"
