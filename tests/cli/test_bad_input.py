"""Bad input: one clear line, exit code 2, nothing half-written."""

import resource
import shutil
import subprocess
import sys

import pytest
from support.tiny import make_artifact

from lowtide.cli import app
from lowtide.errors import LowtideError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A tiny artifact to read: budgets 4 to 6, one policy."""
    return make_artifact(tmp_path_factory.mktemp("bad") / "a")


def contents(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*"))


@pytest.fixture
def compress_refused(refused, tmp_path):
    """`lowtide compress MODEL OUT` must be refused and leave the folder around OUT as it was."""

    def run(model, *options):
        before = contents(tmp_path)
        line = refused("compress", model, tmp_path / "out", *options)
        assert contents(tmp_path) == before
        return line

    return run


def test_a_missing_model(compress_refused, tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such model" in compress_refused(tmp_path / "nowhere")


def test_an_empty_model_folder(compress_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in compress_refused(tmp_path / "empty")


def test_an_empty_gguf_file(compress_refused, tmp_path):
    (tmp_path / "empty.gguf").touch()
    assert "the file is empty" in compress_refused(tmp_path / "empty.gguf")


def test_an_unknown_demo(compress_refused):
    assert "demo:gpt5" in compress_refused("demo:gpt5")


def test_an_unknown_architecture(compress_refused, new_hf_model):
    line = compress_refused(new_hf_model(architectures=["MambaForCausalLM"], model_type="mamba"))
    assert "MambaForCausalLM" in line
    assert "LlamaForCausalLM" in line
    assert "Qwen2ForCausalLM" in line


def test_a_missing_tokenizer(compress_refused, new_hf_model):
    assert "tokenizer.json is missing" in compress_refused(new_hf_model(tokenizer=False))


def test_a_model_cut_short(compress_refused, new_hf_model):
    weights = new_hf_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in compress_refused(weights.parent)


def test_out_exists(refused, hf_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "--force" in refused("compress", hf_model, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


@pytest.mark.parametrize("bits", [0, 5, 10])
def test_bits_max_out_of_range(compress_refused, hf_model, bits):
    assert f"--bits-max {bits}" in compress_refused(hf_model, "--bits-max", bits)


def test_a_calibration_text_that_is_missing_or_short(compress_refused, hf_model, tmp_path):
    assert "none.txt" in compress_refused(hf_model, "--calibration", tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("too short")
    assert "short.txt" in compress_refused(hf_model, "--calibration", tmp_path / "short.txt")


def test_a_full_disk_during_compress(process_refused, hf_model, tmp_path):
    """A limit on file sizes stands in for the full disk: the same OSError at the same write."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    line = process_refused("compress", hf_model, tmp_path / "out", preexec_fn=limit)
    assert "File too large" in line
    assert not (tmp_path / "out").exists()


def test_a_full_disk_under_stdout(artifact):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lowtide.cli", "verify", str(artifact)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "lowtide: error: No space left on device\n"


READERS = {
    "eval": ("--reference", "nowhere", "--text", "nowhere.txt"),
    "generate": ("--prompt", "x"),
    "chat": (),
    "bench": (),
    "inspect": (),
    "explain": ("--prompt", "x"),
    "pack": ("out",),
    "verify": (),
}


@pytest.mark.parametrize("command", READERS)
def test_an_artifact_that_is_none(refused, process_refused, tmp_path, command):
    line = process_refused(command, tmp_path / "nowhere", *READERS[command])
    assert "no such folder" in line
    assert line == refused(command, tmp_path / "nowhere", *READERS[command])
    (tmp_path / "empty").mkdir()
    assert "lowtide.json" in refused(command, tmp_path / "empty", *READERS[command])


@pytest.mark.parametrize("command", READERS)
def test_a_flipped_byte(refused, artifact, tmp_path, command):
    path = tmp_path / "copy"
    shutil.copytree(artifact, path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert "damaged" in refused(command, path, *READERS[command])


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_a_budget_outside_the_grid(refused, artifact, command):
    line = budget_line(refused, artifact, command, "--bits", "3.5")
    assert "--bits 3.5: this artifact stores budgets from 4 to 6" in line
    assert "--bits x" in budget_line(refused, artifact, command, "--bits", "x")


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "inspect"])
def test_an_unknown_mask_rule(refused, artifact, command):
    line = budget_line(refused, artifact, command, "--policy", "waterline", "--bits", "5")
    assert "unknown mask rule 'waterline'" in line
    assert "channel-norm" in line
    line = budget_line(refused, artifact, command, "--policy", "gate", "--bits", "5")
    assert "--policy gate: this artifact stores no thresholds" in line


def budget_line(refused, artifact, command, *options):
    """The refusal of a command whose other arguments are fine."""
    return refused(command, artifact, *READERS[command], *options, stdin="hi\n")


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_a_head_that_is_no_pair(refused, artifact, command):
    assert "--head 3: give" in budget_line(refused, artifact, command, "--head", "3")


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_an_instruction_set_this_machine_lacks(refused, artifact, command, monkeypatch):
    line = refused(command, artifact, *READERS[command], "--isa", "sse9")
    assert "sse9: not available on this machine" in line
    assert "portable" in line
    monkeypatch.setenv("LOWTIDE_ISA", "sse9")
    assert "LOWTIDE_ISA=sse9: not available" in refused(command, artifact, *READERS[command])


def test_chat_without_a_template(refused, tmp_path):
    path = make_artifact(tmp_path / "a", tokenizer=False)
    assert "no tokenizer.json" in refused("chat", path)


class TestEval:
    """What evaluation refuses: budgets, rules, the text, the reference."""

    def refuse(self, refused, compressed, reference, text, *options, bits="dense"):
        return refused("eval", compressed, "--reference", reference, "--text", text, "--bits", bits, *options)

    def test_a_budget_outside_the_grid(self, refused, compressed, hf_model, tmp_path):
        line = self.refuse(refused, compressed, hf_model, tmp_path / "x.txt", bits="0.5,100")
        assert "--bits 0.5: this artifact stores budgets from" in line

    def test_an_unknown_mask_rule(self, refused, compressed, hf_model, tmp_path):
        line = self.refuse(refused, compressed, hf_model, tmp_path / "x.txt", "--policy", "waterline")
        assert "unknown mask rule 'waterline'" in line

    def test_a_text_shorter_than_one_window(self, refused, compressed, hf_model, tmp_path):
        text = tmp_path / "short.txt"
        text.write_text("The sea went out.")
        line = self.refuse(refused, compressed, hf_model, text, "--window", 64)
        assert f"{text}: holds 1" in line
        assert "one window needs 64" in line

    def test_a_missing_text(self, refused, compressed, hf_model, tmp_path):
        assert "none.txt" in self.refuse(refused, compressed, hf_model, tmp_path / "none.txt", "--window", 64)

    def test_a_text_that_is_none(self, refused, compressed, hf_model, tmp_path):
        (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
        assert "not UTF-8" in self.refuse(refused, compressed, hf_model, tmp_path / "b.txt", "--window", 64)

    def test_a_window_larger_than_the_context(self, refused, compressed, hf_model, tmp_path):
        assert "--window 512" in self.refuse(refused, compressed, hf_model, tmp_path / "x.txt", "--window", 512)

    def test_a_reference_of_another_model(self, refused, compressed, new_hf_model, tmp_path):
        line = self.refuse(refused, compressed, new_hf_model(seed=9), tmp_path / "x.txt", "--window", 64)
        assert "made from other weights" in line

    def test_a_reference_that_is_missing(self, refused, compressed, tmp_path):
        assert "no such model" in self.refuse(refused, compressed, tmp_path / "no", tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("verify",), "Missing argument"),
        (("verify", "a", "--wat"), "No such option: --wat"),
        (("eval", "a"), "Missing option '--reference'"),
        (("generate", "a", "--prompt", "x", "-n", "many"), "'-n' / '--max-tokens': Input should be a valid integer"),
    ],
)
def test_wrong_usage_is_one_line_that_points_to_the_help(refused, arguments, message):
    line = refused(*arguments)
    assert message in line
    assert "--help`)" in line


class TestOneDoor:
    """cli.app.run is the only place that turns errors into lines and codes."""

    @pytest.fixture
    def failing(self, monkeypatch):
        def arrange(error):
            def fail(*args, **kwargs):
                raise error

            monkeypatch.setattr("lowtide.format.reader.open_artifact", fail)

        return arrange

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (LowtideError("two\n  lines"), "two lines"),
            (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
            (OSError(28, "No space left on device"), "No space left on device"),
            (MemoryError(), "not enough memory for this model"),
            (ModuleNotFoundError("No module named 'torch'", name="torch"), "this command needs torch: pip install"),
        ],
    )
    def test_bad_input_is_a_line_and_two(self, failing, capsys, error, line):
        failing(error)
        assert app.run(["verify", "x"]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"lowtide: error: {line}")
        assert captured.err.count("\n") == 1
        assert captured.out == ""

    def test_an_interrupt_is_130_and_silent(self, failing, capsys):
        failing(KeyboardInterrupt())
        assert app.run(["verify", "x"]) == 130
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("error", [ZeroDivisionError(), ModuleNotFoundError("no", name="numpy")])
    def test_our_own_mistakes_keep_their_traceback(self, failing, error):
        failing(error)
        with pytest.raises(type(error)):
            app.run(["verify", "x"])


@pytest.mark.parametrize("command", ["compress", "eval"])
def test_without_torch_the_upper_floor_says_what_to_install(artifact, tmp_path, command):
    arguments = {
        "compress": ["compress", "demo:smollm2", str(tmp_path / "out")],
        "eval": ["eval", str(artifact), "--reference", "demo:smollm2", "--text", "x"],
    }
    code = "import sys; sys.modules['torch'] = None; from lowtide.cli.app import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments[command]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "lowtide: error: this command needs torch: pip install 'lowtide[compress]'\n"
    assert not (tmp_path / "out").exists()


def test_generate_wants_prompts(refused, artifact, tmp_path):
    assert "nothing to continue: give --prompt TEXT or --prompts FILE" in refused("generate", artifact)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n')
    assert "p.jsonl: line 2" in refused("generate", artifact, "--prompts", tmp_path / "p.jsonl")
    long = ["-p", "a", "-p", "x" * 99, "--bits", 5]
    assert "prompt 2: the prompt has 99 tokens" in refused("generate", artifact, *long)
    assert "--parallel 0" in refused("generate", artifact, *long[:4], "--parallel", 0)
