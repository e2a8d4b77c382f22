"""The fields of a manifest: what an entry of each is, and the checks that refuse any other.

A check takes a value that may be anything JSON has, and raises a `LowtideError` that names the field. `Manifest` runs
all of them when it is made.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, TypedDict

from lowtide.arch import GroupSpec
from lowtide.errors import LowtideError
from lowtide.format.strictjson import short

FORMAT_VERSION = 5
"""The newest version that this code reads. Written is 5 with an IPN that has factors, 4 with one that has centroids and
no factors, 3 with one that has neither and 2 without one, so that older readers go on."""
MANIFEST_NAME = "lowtide.json"
DIGEST_NAME = "lowtide.json.sha256"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MAX_MANIFEST_BYTES = 1 << 28

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Tensors' names -> (dtype, shape)."""
MAX_FEATURES = 64
"""Of a probe of the IPN; the engine has room for that many."""
MAX_CENTROIDS, MAX_KEY_CHANNELS = 1024, 128
"""Of a group's inputs, and channels that tell them apart; the same."""
_COUNT_LIMIT = 1 << 53
_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLICY = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*(:[0-9]+(,[0-9]+)*)?")
# A plain name or a few of them: no empty, hidden or parent parts, so a file cannot lie outside the folder.
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TensorEntry:
    """dtype (safetensors name), shape and SHA-256 (of its bytes in the file) of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class LinearSummary:
    """Outliers of a linear layer, and stored entries: outliers and fillers together."""

    outliers: int
    entries: int


@dataclass(frozen=True)
class GroupSummary:
    """Exact channels of a group, and its member layers."""

    exact: int
    linears: dict[str, LinearSummary]


class IpnInfo(TypedDict):
    """Of an artifact's IPN: features H of a probe, the range of bits_read_body that it was trained for, K centroids of
    every group's inputs and C channels that tell them apart (0 of both in version 3, which does not have them), and
    whether q, k and v have thresholds of their own (1 in version 5, 0 in others, which do not have it)."""

    features: int
    low: float
    high: float
    centroids: int
    key_channels: int
    factors: int


def ipn_sizes(info: IpnInfo, budgets: int) -> tuple[int, int, int, int, bool]:
    """What `groups.ipn_shapes` asks for beside a group."""
    return info["features"], budgets, info["centroids"], info["key_channels"], bool(info["factors"])


def has_ipn(policies: list[str]) -> bool:
    """Whether one of the policies is the rule `ipn`: then, and only then, its tensors are stored."""
    return any(policy.partition(":")[0] == "ipn" for policy in policies)


def version_for(policies: list[str], ipn: IpnInfo | None = None) -> int:
    """The format version of an artifact with these policies and this IPN."""
    if not has_ipn(policies):
        return 2
    if ipn is None:
        return 3
    return 5 if ipn["factors"] else 4 if ipn["centroids"] else 3


def bad(field: str, problem: str) -> LowtideError:
    """The error, not yet raised: one line with file, field and problem."""
    return LowtideError(f"{MANIFEST_NAME}: {field} {problem}")


def check_keys(field: str, value: object, names: set[str]) -> dict[str, Any]:
    """The value, which must be an object with exactly these keys."""
    if not isinstance(value, dict):
        raise bad(field, f"must be an object, not {short(value)}")
    if value.keys() != names:
        odd = sorted(value.keys() ^ names)[0]
        raise bad(field, f"{'lacks' if odd in names else 'has an unknown'} field {short(odd)}")
    return value


def check_count(field: str, value: object, low: int = 0, high: int = _COUNT_LIMIT) -> None:
    """A whole number from low to high, both included."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise bad(field, f"must be a whole number from {low} to {high}, not {short(value)}")


def check_digest(field: str, value: object) -> None:
    """A SHA-256 as `sha256sum` writes it."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise bad(field, f"must be 64 hexadecimal digits, not {short(value)}")


def check_file_name(name: str) -> None:
    """A file of an artifact must lie inside its folder and must not be the manifest.

    Raises:
        LowtideError: it does not.
    """
    if len(name) > 200 or not all(_FILE_PART.fullmatch(part) for part in name.split("/")):
        raise bad("files", f"path {short(name)} is not a plain relative path inside the artifact's folder")
    if name.lower() in (MANIFEST_NAME, DIGEST_NAME):
        raise bad("files", f"path {short(name)} is the manifest's own")


def check_version(version: object) -> None:
    """A format version that this code reads."""
    check_count("format_version", version, 1)
    assert isinstance(version, int)
    if version > FORMAT_VERSION:
        raise bad("format_version", f"{version} is newer than {FORMAT_VERSION}; update lowtide to read this artifact")


def check_budgets(budgets: object) -> None:
    """Bits per weight, ascending."""
    if not isinstance(budgets, list) or not 0 < len(budgets) <= 256:
        raise bad("budgets", "must be a list of 1 to 256 numbers")
    for budget in budgets:
        if not isinstance(budget, (int, float)) or isinstance(budget, bool):
            raise bad("budgets", f"must be numbers, not {short(budget)}")
        if not 0 < budget <= 1024:
            raise bad("budgets", f"must lie in 0 to 1024 bits, not {short(budget)}")
    if any(a >= b for a, b in itertools.pairwise(budgets)):
        raise bad("budgets", "must ascend")


def check_policies(policies: object) -> None:
    """Mask rules with or without levels, each once. Whether a rule exists is not asked here."""
    if not isinstance(policies, list) or not 0 < len(policies) <= 64:
        raise bad("policies", "must be a list of 1 to 64 texts")
    for policy in policies:
        if not isinstance(policy, str) or len(policy) > 64 or not _POLICY.fullmatch(policy):
            raise bad("policies", f"must be 'rule' or 'rule:levels', not {short(policy)}")
    if len(set(policies)) != len(policies):
        raise bad("policies", "lists one twice")


def check_ipn(ipn: object, policies: list[str], version: int) -> None:
    """What is known about the IPN: there with the rule `ipn` and versions 3 to 5, and only then."""
    if (version >= 3) != has_ipn(policies):
        raise bad(
            "format_version", f"must be 3 to 5 if the rule ipn is one of the policies and less if not, not {version}"
        )
    if (ipn is not None) != has_ipn(policies):
        raise bad("ipn", "does not fit the policies: it is there if the rule ipn is one of them, and only then")
    if ipn is None:
        return
    info = check_keys("ipn", ipn, {"features", "low", "high", "centroids", "key_channels", "factors"})
    check_count("ipn features", info["features"], 1, MAX_FEATURES)
    _check_centroids(info["centroids"], info["key_channels"], version)
    check_count("ipn factors", info["factors"], 0, 1)
    if bool(info["factors"]) != (version == 5):
        raise bad("ipn factors", "must be 1 in version 5")
    low, high = info["low"], info["high"]
    if any(not isinstance(v, (int, float)) or isinstance(v, bool) for v in (low, high)) or not 0 < low < high <= 1024:
        raise bad("ipn", f"low and high must ascend within 0 to 1024 bits, not {short(low)} and {short(high)}")


def _check_centroids(centroids: object, channels: object, version: int) -> None:
    check_count("ipn centroids", centroids, 0, MAX_CENTROIDS)
    check_count("ipn key_channels", channels, 0, MAX_KEY_CHANNELS)
    if bool(centroids) != bool(channels) or (version != 5 and bool(centroids) != (version == 4)):
        raise bad("ipn", "centroids and key_channels must both be there in version 4, and not in version 3")
    if isinstance(channels, int) and channels % 16:
        raise bad("ipn key_channels", f"must be a multiple of 16, not {channels}")


def check_files(files: dict[str, FileEntry]) -> None:
    """Plain paths, distinct where case is ignored; config and weights are among them."""
    if len(files) > 256:
        raise bad("files", "lists more than 256")
    seen: set[str] = set()
    for name, entry in files.items():
        check_file_name(name)
        if name.lower() in seen:
            raise bad("files", f"path {short(name)} is taken")
        seen.add(name.lower())
        check_count(f"file {name} bytes", entry.bytes)
        check_digest(f"file {name} sha256", entry.sha256)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in files:
            raise bad("files", f"lacks {name}")


def check_groups(groups: dict[str, GroupSummary], specs: list[GroupSpec]) -> None:
    """The groups and layers of the architecture, with counts that their sizes allow."""
    if groups.keys() != {spec.name for spec in specs}:
        odd = sorted(groups.keys() ^ {spec.name for spec in specs})[0]
        raise bad("groups", f"do not fit the config: {short(odd)} is {'not in it' if odd in groups else 'missing'}")
    for spec in specs:
        summary = groups[spec.name]
        check_count(f"group {spec.name} exact", summary.exact, 0, spec.in_features)
        if summary.linears.keys() != {linear.name for linear in spec.linears}:
            raise bad(f"group {spec.name}", "linears do not fit the config")
        for linear in spec.linears:
            counts = summary.linears[linear.name]
            check_count(f"{linear.name} entries", counts.entries, 0, (1 << 32) - 1)
            check_count(f"{linear.name} outliers", counts.outliers, 0, min(counts.entries, linear.weights))


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Tensors' names, dtypes and shapes must be those expected.

    Raises:
        LowtideError: they are not.
    """
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        raise bad(f"tensor {short(odd)}", "is not part of this model" if odd in found else "is missing")
    for name, (dtype, shape) in expected.items():
        lengths = found[name][1]
        if any(type(length) is not int for length in lengths):
            raise bad(f"tensor {name}", f"shape {short(lengths)} is not made of whole numbers")
        if found[name] != (dtype, shape):
            wrong = f"{short(found[name][0])} {short(list(lengths))}"
            raise bad(f"tensor {name}", f"must be {dtype} {list(shape)}, not {wrong}")


def check_tensors(tensors: dict[str, TensorEntry], expected: Shapes) -> None:
    """Exactly the tensors expected (see `check_shapes`), each with a digest."""
    check_shapes({name: (entry.dtype, entry.shape) for name, entry in tensors.items()}, expected)
    for name, entry in tensors.items():
        check_digest(f"tensor {name} sha256", entry.sha256)


def check_json(value: object, field: str, depth: int) -> None:
    """Free figures: JSON values, finite, not nested beyond reason."""
    if depth < 0:
        raise bad(field, "is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise bad(field, f"has a key that is no text: {short(key)}")
            check_json(item, f"{field}.{short(key)}", depth - 1)
    elif isinstance(value, list):
        for item in value:
            check_json(item, field, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise bad(field, "is not finite")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise bad(field, f"holds a {type(value).__name__}, which JSON has no form for")
