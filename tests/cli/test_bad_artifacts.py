"""Damaged and hostile artifacts through the commands: one line that names the file or tensor, exit code 2."""

import numpy as np
import pytest
from support import tamper
from support.tiny import make_artifact

ROW_SCALE = "model.layers.0.mlp.gate_proj.row_scale"


def flip_a_byte(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def overlap(folder):
    def change(header):
        header[ROW_SCALE]["data_offsets"] = next(v for k, v in header.items() if k.endswith(".weight"))["data_offsets"]

    tamper.edit_header(folder, change)


DAMAGE = {
    "byte": (flip_a_byte, "model.safetensors"),
    "truncated": (truncate, "model.safetensors"),
    "overlap": (overlap, "row_scale"),
    "nan": (lambda f: tamper.edit_tensor(f, ROW_SCALE, lambda v: v.__setitem__(0, np.nan)), ROW_SCALE),
    "infinite": (lambda f: tamper.edit_tensor(f, ROW_SCALE, lambda v: v.__setitem__(0, np.inf)), ROW_SCALE),
    "newer": (lambda f: tamper.edit_manifest(f, lambda m: m.update(format_version=99)), "format_version"),
    "escape": (
        lambda f: tamper.edit_manifest(f, lambda m: m["files"].update({"../out": {"bytes": 0, "sha256": "0" * 64}})),
        "../out",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", [("verify",), ("inspect",), ("generate", "--prompt", "a"), ("bench",)])
def test_a_bad_artifact_is_refused_in_one_line(refused, tmp_path, damage, command):
    change, named = DAMAGE[damage]
    folder = make_artifact(tmp_path / "a")
    change(folder)
    assert named in refused(command[0], folder, *command[1:])
