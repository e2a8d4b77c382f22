"""The manifest `lowtide.json`: one validated type that says everything about an artifact. Nothing by-passes it.

A `Manifest` cannot exist in an invalid state: the reader builds one from untrusted JSON, the writer from its caller's
values, and both go through `__post_init__`. docs/format.md lists the JSON fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from lowtide.arch import GroupSpec, ModelConfig, group_specs, norm_specs
from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.groups import GROUP_FIELDS, IPN_FIELDS, LINEAR_FIELDS, ipn_shapes
from lowtide.format.manifest_fields import (
    CONFIG_NAME,
    DIGEST_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    WEIGHTS_NAME,
    FileEntry,
    GroupSummary,
    IpnInfo,
    LinearSummary,
    Shapes,
    TensorEntry,
    bad,
    check_budgets,
    check_count,
    check_digest,
    check_file_name,
    check_files,
    check_groups,
    check_ipn,
    check_json,
    check_keys,
    check_policies,
    check_shapes,
    check_tensors,
    check_version,
    has_ipn,
    ipn_sizes,
    version_for,
)
from lowtide.format.strictjson import parse_object, short

# What others take from here: a manifest and what it is made of. The checks themselves are `manifest_fields`' affair.
__all__ = [
    "CODINGS",
    "CONFIG_NAME",
    "DIGEST_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "WEIGHTS_NAME",
    "FileEntry",
    "GroupSummary",
    "IpnInfo",
    "LinearSummary",
    "Manifest",
    "Shapes",
    "TensorEntry",
    "check_file_name",
    "check_shapes",
    "digest_line",
    "has_ipn",
    "ipn_sizes",
    "version_for",
]

CODINGS = ("packed", "entropy")
_SINCE_2 = ("zero", "coding", "image", "prefixes")
"""Fields that version 1 does not have; their defaults say what it was."""
_SINCE = {4: {"centroids", "key_channels"}, 5: {"factors"}}
"""Fields of `ipn` that versions before these do not have: 0 of each."""


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
        format_version: 1, 2, or, with an IPN, 3 or, if it has centroids, 4, and if it has factors 5.

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
        check_version(self.format_version)
        check_count("slices", self.slices, 1, codec.MAX_SLICES)
        check_budgets(self.budgets)
        check_policies(self.policies)
        check_ipn(self.ipn, self.policies, self.format_version)
        check_digest("model_id", self.model_id)
        if not isinstance(self.lowtide_version, str) or not 0 < len(self.lowtide_version) <= 64:
            raise bad("lowtide_version", f"must be a short text, not {short(self.lowtide_version)}")
        check_files(self.files)
        specs = group_specs(self.config)
        check_groups(self.groups, specs)
        self._check_coding()
        if not isinstance(self.stats, dict):
            raise bad("stats", f"must be an object, not {short(self.stats)}")
        check_json(self.stats, "stats", 8)

    def _check_coding(self) -> None:
        if not isinstance(self.zero, bool):
            raise bad("zero", f"must be true or false, not {short(self.zero)}")
        if self.coding not in CODINGS:
            raise bad("coding", f"must be one of {', '.join(CODINGS)}, not {short(self.coding)}")
        coded = self.coding == "entropy"
        if (self.image is not None) != coded or len(self.prefixes) != (self.slices if coded else 0):
            raise bad("coding", "does not fit image and prefixes")
        check_tensors(self.tensors, {} if coded else self.expected_tensors())
        entries = [] if self.image is None else [("image", self.image)]
        for name, entry in [*entries, *((f"prefix {i + 1}", p) for i, p in enumerate(self.prefixes))]:
            check_count(f"{name} bytes", entry.bytes)
            check_digest(f"{name} sha256", entry.sha256)
        sizes = [p.bytes for p in self.prefixes]
        if sizes != sorted(sizes) or (sizes and sizes[-1] != self.files[WEIGHTS_NAME].bytes):
            raise bad("prefixes", f"do not end with {WEIGHTS_NAME}")

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
            shapes |= ipn_shapes(spec.name, inputs, *ipn_sizes(self.ipn, len(self.budgets)))
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
        else:
            later = _fields_after(self.format_version)
            body["ipn"] = {name: value for name, value in self.ipn.items() if name not in later}
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
        check_version(body.get("format_version"))
        fields = {f.name for f in dataclasses.fields(cls)}
        if body["format_version"] < 3 or "ipn" not in body:
            fields.remove("ipn")
        check_keys("manifest", body, fields if body["format_version"] > 1 else fields.difference(_SINCE_2))
        body = dict(body)
        if isinstance(body.get("ipn"), dict):
            later = _fields_after(body["format_version"])
            odd = sorted(later & body["ipn"].keys())
            if odd:
                raise bad("ipn", f"has an unknown field {short(odd[0])}")
            body["ipn"] = body["ipn"] | dict.fromkeys(later, 0)
        config = check_keys("config", body["config"], {f.name for f in dataclasses.fields(ModelConfig)})
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
            body["image"] = FileEntry(**check_keys("image", body["image"], {"bytes", "sha256"}))
        prefixes = body.get("prefixes", [])
        if not isinstance(prefixes, list):
            raise bad("prefixes", f"must be a list, not {short(prefixes)}")
        body["prefixes"] = [FileEntry(**check_keys("prefix", p, {"bytes", "sha256"})) for p in prefixes]
        return cls(**body)


def digest_line(manifest: bytes) -> bytes:
    """Content of `lowtide.json.sha256`, as `sha256sum` writes it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_NAME}\n".encode()


def _dump(value: object) -> str:
    return json.dumps(value, default=dataclasses.asdict, allow_nan=False)


def _lines(value: object) -> str:
    """An object with one line for each of its entries; anything else on one line."""
    if not isinstance(value, dict) or not value:
        return _dump(value)
    return "{\n" + ",\n".join(f" {_dump(key)}: {_dump(item)}" for key, item in value.items()) + "\n}"


def _entries(field: str, value: object, names: set[str]) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict):
        raise bad(field, f"must be an object, not {short(value)}")
    return [(name, check_keys(f"{field} {short(name)}", entry, names)) for name, entry in value.items()]


def _fields_after(version: int) -> set[str]:
    """Fields of `ipn` that came after a format version."""
    return {name for since, names in _SINCE.items() if version < since for name in names}


def _shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise bad(f"tensor {short(name)}", f"shape must be a list, not {short(value)}")
    return tuple(value)
