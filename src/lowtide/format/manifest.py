"""The manifest `lowtide.json`: one validated type that says everything about an artifact. Nothing by-passes it.

A `Manifest` cannot exist in an invalid state: the reader builds one from untrusted JSON, the writer from its caller's
values, and both go through `__post_init__`. docs/format.md lists the JSON fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypedDict

from lowtide.arch import GroupSpec, ModelConfig, group_specs, norm_specs
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GROUP_FIELDS, IPN_FIELDS, LINEAR_FIELDS, ipn_shapes
from lowtide.format.strictjson import parse_object, short

FORMAT_VERSION = 3
"""The newest version that this code reads. Written is 3 with an IPN and 2 without, so that older readers go on."""
MANIFEST_NAME = "lowtide.json"
DIGEST_NAME = "lowtide.json.sha256"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MAX_MANIFEST_BYTES = 1 << 28

CODINGS = ("packed", "entropy")
Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Tensors' names -> (dtype, shape)."""
_SINCE_2 = ("zero", "coding", "image", "prefixes")
"""Fields that version 1 does not have; their defaults say what it was."""
MAX_FEATURES = 64
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
    """Of an artifact's IPN: features H of a probe, and the range of bits_read_body that it was trained for."""

    features: int
    low: float
    high: float


def has_ipn(policies: list[str]) -> bool:
    """Whether one of the policies is the rule `ipn`: then, and only then, its tensors are stored."""
    return any(policy.partition(":")[0] == "ipn" for policy in policies)


def version_for(policies: list[str]) -> int:
    """The format version of an artifact with these policies."""
    return 3 if has_ipn(policies) else 2


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact but its tensors' values.

    Attributes:
        config: the model, repeated in `config.json`.
        slices: S, the 2-bit slices stored.
        budgets: the grid of bits_read_body for which thresholds are stored, ascending.
        policies: mask rules with levels (`rule` or `rule:levels`), first axis of the thresholds.
        groups: per group, how much of it is irregular; everything else follows from `config`.
        tensors: every tensor of `model.safetensors`; empty where it is coded.
        files: every file but the manifest and its digest, by path relative to the folder.
        model_id: SHA-256 fingerprint of the source model's weights.
        lowtide_version: version that wrote the artifact.
        stats: free figures for people (JSON values).
        zero: one digit of each slice means exactly zero (see `codec.centres`).
        coding: of `model.safetensors`: `packed`, the tensors as the engine reads them, or `entropy` (see `coded`).
        image: if coded, size and digest of the runtime image, the same tensors packed.
        prefixes: if coded, size and digest of the beginning of `model.safetensors` that holds the first 1, 2, .. S
            slices: enough of a partial download to read that many.
        ipn: what there is to know about the IPN if the policies have the rule `ipn`, else None.
        format_version: 1, 2, or, with an IPN, 3.

    Raises:
        LowtideError: on construction, if anything is out of range or does not fit the rest.
    """

    config: ModelConfig
    slices: int
    budgets: list[float]
    policies: list[str]
    groups: dict[str, GroupSummary]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    model_id: str
    lowtide_version: str
    stats: dict[str, Any]
    zero: bool = False
    coding: str = "packed"
    image: FileEntry | None = None
    prefixes: list[FileEntry] = dataclasses.field(default_factory=list)
    ipn: IpnInfo | None = None
    format_version: int = 2

    def __post_init__(self) -> None:
        _check_version(self.format_version)
        _count("slices", self.slices, 1, codec.MAX_SLICES)
        _check_budgets(self.budgets)
        _check_policies(self.policies)
        _check_ipn(self.ipn, self.policies, self.format_version)
        _digest("model_id", self.model_id)
        if not isinstance(self.lowtide_version, str) or not 0 < len(self.lowtide_version) <= 64:
            raise _bad("lowtide_version", f"must be a short text, not {short(self.lowtide_version)}")
        _check_files(self.files)
        specs = group_specs(self.config)
        _check_groups(self.groups, specs)
        self._check_coding()
        if not isinstance(self.stats, dict):
            raise _bad("stats", f"must be an object, not {short(self.stats)}")
        _check_json(self.stats, "stats", 8)

    def _check_coding(self) -> None:
        if not isinstance(self.zero, bool):
            raise _bad("zero", f"must be true or false, not {short(self.zero)}")
        if self.coding not in CODINGS:
            raise _bad("coding", f"must be one of {', '.join(CODINGS)}, not {short(self.coding)}")
        coded = self.coding == "entropy"
        if (self.image is not None) != coded or len(self.prefixes) != (self.slices if coded else 0):
            raise _bad("coding", "does not fit image and prefixes")
        _check_tensors(self.tensors, {} if coded else self.expected_tensors())
        entries = [] if self.image is None else [("image", self.image)]
        for name, entry in [*entries, *((f"prefix {i + 1}", p) for i, p in enumerate(self.prefixes))]:
            _count(f"{name} bytes", entry.bytes)
            _digest(f"{name} sha256", entry.sha256)
        sizes = [p.bytes for p in self.prefixes]
        if sizes != sorted(sizes) or (sizes and sizes[-1] != self.files[WEIGHTS_NAME].bytes):
            raise _bad("prefixes", f"do not end with {WEIGHTS_NAME}")

    def expected_tensors(self) -> Shapes:
        """Name -> (dtype, shape) of exactly the tensors an artifact holds, as the engine reads them."""
        expected: Shapes = {name: ("F32", (length,)) for name, length in norm_specs(self.config)}
        for spec in group_specs(self.config):
            expected |= self._expected_group(spec, self.groups[spec.name])
        return expected

    def _expected_group(self, spec: GroupSpec, summary: GroupSummary) -> Shapes:
        inputs, exact, slices = spec.in_features, summary.exact, self.slices
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (inputs,),
            "col_scale": (inputs,),
            "importance": (inputs,),
            "shrink": (slices,),
            "exact_channels": (exact,),
            "thresholds": (len(self.policies), len(self.budgets), slices),
        }
        if not spec.has_thresholds:
            del shapes["thresholds"]
        if self.ipn is not None:
            shapes |= ipn_shapes(spec.name, inputs, self.ipn["features"], len(self.budgets))
        known = GROUP_FIELDS | IPN_FIELDS
        expected = {f"lowtide.{spec.name}.{field}": (known[field], shape) for field, shape in shapes.items()}
        for linear in spec.linears:
            out, entries = linear.out_features, summary.linears[linear.name].entries
            shapes = {
                "weight": codec.packed_shape(out, inputs, slices),
                "row_scale": (out,),
                "bias": (out,),
                "exact": (exact, out),
                "outlier_ptr": (len(codec.tiles(out)) + 1,),
                "outlier_row": (entries,),
                "outlier_gap": (entries,),
                "outlier_value": (entries,),
            }
            expected |= {f"{linear.name}.{field}": (LINEAR_FIELDS[field], shape) for field, shape in shapes.items()}
        return expected

    def to_json(self) -> bytes:
        """The file's bytes: UTF-8 JSON, one line for each field, tensor, file and group; `format_version` first."""
        body = {"format_version": self.format_version, "lowtide_version": self.lowtide_version}
        body |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in body}
        if self.ipn is None:
            del body["ipn"]
        return ("{\n" + ",\n".join(f"{_dump(key)}: {_lines(value)}" for key, value in body.items()) + "\n}\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check the bytes of `lowtide.json`.

        Raises:
            LowtideError: one line, with `where` as the file's name.
        """
        try:
            return cls._from_object(parse_object(data, where))
        except LowtideError as error:
            message = str(error)
            if message.startswith(where):
                raise
            raise LowtideError(f"{where}: {message.removeprefix(f'{MANIFEST_NAME}: ')}") from None

    @classmethod
    def _from_object(cls, body: dict[str, Any]) -> Manifest:
        # The version comes first: a newer format may have any other fields.
        _check_version(body.get("format_version"))
        fields = {f.name for f in dataclasses.fields(cls)}
        if body["format_version"] < 3 or "ipn" not in body:
            fields.remove("ipn")
        _keys("manifest", body, fields if body["format_version"] > 1 else fields.difference(_SINCE_2))
        body = dict(body)
        config = _keys("config", body["config"], {f.name for f in dataclasses.fields(ModelConfig)})
        eos = config["eos_token_ids"]
        body["config"] = ModelConfig(**(config | {"eos_token_ids": tuple(eos) if isinstance(eos, list) else eos}))
        body["tensors"] = {
            name: TensorEntry(**(entry | {"shape": _shape(name, entry["shape"])}))
            for name, entry in _entries("tensors", body["tensors"], {"dtype", "shape", "sha256"})
        }
        body["files"] = {
            name: FileEntry(**entry) for name, entry in _entries("files", body["files"], {"bytes", "sha256"})
        }
        body["groups"] = {
            name: GroupSummary(
                entry["exact"],
                {
                    linear: LinearSummary(**counts)
                    for linear, counts in _entries("linears", entry["linears"], {"outliers", "entries"})
                },
            )
            for name, entry in _entries("groups", body["groups"], {"exact", "linears"})
        }
        if body.get("image") is not None:
            body["image"] = FileEntry(**_keys("image", body["image"], {"bytes", "sha256"}))
        prefixes = body.get("prefixes", [])
        if not isinstance(prefixes, list):
            raise _bad("prefixes", f"must be a list, not {short(prefixes)}")
        body["prefixes"] = [FileEntry(**_keys("prefix", p, {"bytes", "sha256"})) for p in prefixes]
        return cls(**body)


def digest_line(manifest: bytes) -> bytes:
    """Content of `lowtide.json.sha256`, as `sha256sum` writes it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_NAME}\n".encode()


def check_file_name(name: str) -> None:
    """A file of an artifact must lie inside its folder and must not be the manifest.

    Raises:
        LowtideError: it does not.
    """
    if len(name) > 200 or not all(_FILE_PART.fullmatch(part) for part in name.split("/")):
        raise _bad("files", f"path {short(name)} is not a plain relative path inside the artifact's folder")
    if name.lower() in (MANIFEST_NAME, DIGEST_NAME):
        raise _bad("files", f"path {short(name)} is the manifest's own")


def _dump(value: object) -> str:
    return json.dumps(value, default=dataclasses.asdict, allow_nan=False)


def _lines(value: object) -> str:
    """An object with one line for each of its entries; anything else on one line."""
    if not isinstance(value, dict) or not value:
        return _dump(value)
    return "{\n" + ",\n".join(f" {_dump(key)}: {_dump(item)}" for key, item in value.items()) + "\n}"


def _bad(field: str, problem: str) -> LowtideError:
    return LowtideError(f"{MANIFEST_NAME}: {field} {problem}")


def _keys(field: str, value: object, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(field, f"must be an object, not {short(value)}")
    if value.keys() != names:
        odd = sorted(value.keys() ^ names)[0]
        raise _bad(field, f"{'lacks' if odd in names else 'has an unknown'} field {short(odd)}")
    return value


def _entries(field: str, value: object, names: set[str]) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict):
        raise _bad(field, f"must be an object, not {short(value)}")
    return [(name, _keys(f"{field} {short(name)}", entry, names)) for name, entry in value.items()]


def _shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _bad(f"tensor {short(name)}", f"shape must be a list, not {short(value)}")
    return tuple(value)


def _count(field: str, value: object, low: int = 0, high: int = _COUNT_LIMIT) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(field, f"must be a whole number from {low} to {high}, not {short(value)}")


def _digest(field: str, value: object) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _bad(field, f"must be 64 hexadecimal digits, not {short(value)}")


def _check_version(version: object) -> None:
    _count("format_version", version, 1)
    assert isinstance(version, int)
    if version > FORMAT_VERSION:
        raise _bad("format_version", f"{version} is newer than {FORMAT_VERSION}; update lowtide to read this artifact")


def _check_budgets(budgets: object) -> None:
    if not isinstance(budgets, list) or not 0 < len(budgets) <= 256:
        raise _bad("budgets", "must be a list of 1 to 256 numbers")
    for budget in budgets:
        if not isinstance(budget, (int, float)) or isinstance(budget, bool):
            raise _bad("budgets", f"must be numbers, not {short(budget)}")
        if not 0 < budget <= 1024:
            raise _bad("budgets", f"must lie in 0 to 1024 bits, not {short(budget)}")
    if any(a >= b for a, b in itertools.pairwise(budgets)):
        raise _bad("budgets", "must ascend")


def _check_policies(policies: object) -> None:
    if not isinstance(policies, list) or not 0 < len(policies) <= 64:
        raise _bad("policies", "must be a list of 1 to 64 texts")
    for policy in policies:
        if not isinstance(policy, str) or len(policy) > 64 or not _POLICY.fullmatch(policy):
            raise _bad("policies", f"must be 'rule' or 'rule:levels', not {short(policy)}")
    if len(set(policies)) != len(policies):
        raise _bad("policies", "lists one twice")


def _check_ipn(ipn: object, policies: list[str], version: int) -> None:
    if (version == 3) != has_ipn(policies):
        raise _bad("format_version", f"must be 3 if the rule ipn is one of the policies and less if not, not {version}")
    if (ipn is not None) != has_ipn(policies):
        raise _bad("ipn", "does not fit the policies: it is there if the rule ipn is one of them, and only then")
    if ipn is None:
        return
    info = _keys("ipn", ipn, {"features", "low", "high"})
    _count("ipn features", info["features"], 1, MAX_FEATURES)
    low, high = info["low"], info["high"]
    if any(not isinstance(v, (int, float)) or isinstance(v, bool) for v in (low, high)) or not 0 < low < high <= 1024:
        raise _bad("ipn", f"low and high must ascend within 0 to 1024 bits, not {short(low)} and {short(high)}")


def _check_files(files: dict[str, FileEntry]) -> None:
    if len(files) > 256:
        raise _bad("files", "lists more than 256")
    seen: set[str] = set()
    for name, entry in files.items():
        check_file_name(name)
        if name.lower() in seen:
            raise _bad("files", f"path {short(name)} is taken")
        seen.add(name.lower())
        _count(f"file {name} bytes", entry.bytes)
        _digest(f"file {name} sha256", entry.sha256)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in files:
            raise _bad("files", f"lacks {name}")


def _check_groups(groups: dict[str, GroupSummary], specs: list[GroupSpec]) -> None:
    if groups.keys() != {spec.name for spec in specs}:
        odd = sorted(groups.keys() ^ {spec.name for spec in specs})[0]
        raise _bad("groups", f"do not fit the config: {short(odd)} is {'not in it' if odd in groups else 'missing'}")
    for spec in specs:
        summary = groups[spec.name]
        _count(f"group {spec.name} exact", summary.exact, 0, spec.in_features)
        if summary.linears.keys() != {linear.name for linear in spec.linears}:
            raise _bad(f"group {spec.name}", "linears do not fit the config")
        for linear in spec.linears:
            counts = summary.linears[linear.name]
            _count(f"{linear.name} entries", counts.entries, 0, (1 << 32) - 1)
            _count(f"{linear.name} outliers", counts.outliers, 0, min(counts.entries, linear.weights))


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Tensors' names, dtypes and shapes must be those expected.

    Raises:
        LowtideError: they are not.
    """
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        raise _bad(f"tensor {short(odd)}", "is not part of this model" if odd in found else "is missing")
    for name, (dtype, shape) in expected.items():
        lengths = found[name][1]
        if any(type(length) is not int for length in lengths):
            raise _bad(f"tensor {name}", f"shape {short(lengths)} is not made of whole numbers")
        if found[name] != (dtype, shape):
            wrong = f"{short(found[name][0])} {short(list(lengths))}"
            raise _bad(f"tensor {name}", f"must be {dtype} {list(shape)}, not {wrong}")


def _check_tensors(tensors: dict[str, TensorEntry], expected: Shapes) -> None:
    check_shapes({name: (entry.dtype, entry.shape) for name, entry in tensors.items()}, expected)
    for name, entry in tensors.items():
        _digest(f"tensor {name} sha256", entry.sha256)


def _check_json(value: object, field: str, depth: int) -> None:
    """Free figures: JSON values, finite, not nested beyond reason."""
    if depth < 0:
        raise _bad(field, "is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _bad(field, f"has a key that is no text: {short(key)}")
            _check_json(item, f"{field}.{short(key)}", depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, field, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _bad(field, "is not finite")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise _bad(field, f"holds a {type(value).__name__}, which JSON has no form for")
