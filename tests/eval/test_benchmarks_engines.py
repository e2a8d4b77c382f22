"""benchmarks/engines.py: what OpenVINO's worker asks of its engine, bad input, and the table."""

import json
import sys
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from support.twin import make_twins  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 12

OPENVINO = """
    from types import SimpleNamespace
    import numpy as np
    log = []
    class Request:
        def __init__(self): self.state = []
        def reset_state(self): self.state = []
        def infer(self, given):
            new = given["input_ids"][0].tolist()
            assert given["attention_mask"].shape == (1, len(self.state) + len(new))
            assert given["position_ids"][0].tolist() == list(range(len(self.state), len(self.state) + len(new)))
            self.state += new
            log.append(len(new))
            logits = np.zeros((1, len(new), 104), np.float32)
            self.output = SimpleNamespace(data=logits)
        def get_output_tensor(self, index): return self.output
    class Compiled:
        def create_infer_request(self): return Request()
        def get_property(self, name): return SimpleNamespace(to_string=lambda: "f32")
    class Core:
        def read_model(self, path): return str(path)
        def compile_model(self, path, device, options):
            log.append(options["INFERENCE_NUM_THREADS"])
            return Compiled()
    def save_model(model, path):
        import pathlib
        for end in (".xml", ".bin"): pathlib.Path(path).with_suffix(end).write_bytes(b"12345")
"""
OTHERS = {
    "nncf": """
    from types import SimpleNamespace
    CompressWeightsMode = SimpleNamespace(INT8_ASYM=8, INT4_ASYM=4)
    Dataset = list
    def compress_weights(model, mode, group_size=None, ratio=None, dataset=(), **options):
        assert mode == 8 or (group_size == 64 and ratio == 1.0 and len(list(dataset)) in (0, 32))
        return model
    """,
    "openvino_genai": "def LLMPipeline(path, device, enable_save_ov_model): pass",
}


@pytest.fixture
def openvino(tmp_path, monkeypatch, llama):
    """Stand-ins for OpenVINO and NNCF, here and in processes started from here."""
    folder = tmp_path / "stand-in"
    for name, text in ({"openvino": OPENVINO} | OTHERS).items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    yield
    for name in ("openvino", "nncf", "openvino_genai"):
        sys.modules.pop(name, None)


def test_openvino_decodes_from_a_place_and_keeps_what_it_has(load, openvino):
    engine = load("openvino_worker").OpenVino()
    assert engine.open("model.xml", 2, 64) == {"version": "1 / 1", "precision": "f32"}
    import openvino as stand_in

    ids = list(range(40))
    assert engine.decode_at(ids, 20, 4)["tokens"] == 4
    assert engine.request.state == ids[:24] and stand_in.log == [2, 20, 1, 1, 1, 1]
    engine.decode_at(ids, 24, 2)  # what is there is where it goes on
    assert engine.request.state == ids[:26] and stand_in.log[6:] == [1, 1]
    engine.decode_at(ids, 20, 1)  # a state cannot be cut: all again
    assert engine.request.state == ids[:21] and stand_in.log[8:] == [20, 1]
    assert engine.prefill(ids[:7])["tokens"] == 7 and engine.request.state == ids[:7]


def test_logits_are_those_of_every_token(load, openvino, tmp_path):
    engine = load("openvino_worker").OpenVino()
    engine.open("model.xml", 1, 64)
    engine.logits(list(range(9)), str(tmp_path / "out.npy"))
    assert np.load(tmp_path / "out.npy").shape == (9, 104)


@pytest.mark.parametrize(("mode", "calibration"), [("int8", []), ("int4-64", []), ("int4-64", [[1, 2]] * 32)])
def test_a_gguf_becomes_openvinos_form(load, openvino, tmp_path, mode, calibration):
    reply = load("openvino_worker").OpenVino().convert("model.gguf", str(tmp_path / "model.xml"), mode, calibration)
    assert reply == {"bytes": 5}
    assert sorted(p.name for p in tmp_path.glob("model.*")) == ["model.bin", "model.xml"]


def test_only_an_f16_gguf_is_compared(load, tmp_path, capsys):
    make_twins(tmp_path / "plain", folder=tmp_path / "model", budgets=(3.0, 4.5, 6.0))
    (tmp_path / "text").write_text(TEXT)
    given = [str(tmp_path / "plain"), str(tmp_path / "model"), "--text", str(tmp_path / "text")]
    assert load("engines").main([*given, "--openvino-python", sys.executable]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"engines: error: {tmp_path / 'model'}: must be an F16")


def test_the_table_has_everyone(load):
    rows = [
        {"threads": 1, "engine": engine, "setting": setting, "kl": 0.1, "ppl": 20.0, "decode_tps": 50.0}
        | {"decode_tps_sd": 1.0, "prefill_tps": 300.0, "file_bytes": 5e6}
        for engine, setting in (("lowtide", "3 bits"), ("OpenVINO", "int4-64-tuned"))
    ]
    lines = load("engines").table(json.loads(json.dumps(rows))).splitlines()
    assert len(lines) == 4 and "int4-64-tuned" in lines[3] and "0.1000" in lines[3]
