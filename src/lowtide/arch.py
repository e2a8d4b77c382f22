"""The one declarative file about model architectures.

`ARCHITECTURES` is a table of plain data: the names a decoder has in a Hugging Face config and in a GGUF file, and the
few ways in which its members differ. Adding a Llama-like model means adding a row. Nothing here reads a file;
`lowtide.format.hfvalues` knows how a Hugging Face config says what `ModelConfig` holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowtide.errors import LowtideError
from lowtide.format import hfvalues
from lowtide.format.strictjson import short

# Upper bounds on a config's numbers. They are far above any real model; they exist so that a hostile config cannot make
# us enumerate a billion layers before the sizes are compared with the file.
MAX_LAYERS = 1024
MAX_DIMENSION = 1 << 24
MAX_POSITION = 1 << 31

EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"
FINAL_NORM = "model.norm.weight"

#: Group name -> the linear modules (suffixes below `model.layers.N.`) that share one input, in stored order.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

# GGUF tensor names, the same for every Llama-like architecture. `{n}` is the layer.
_GGUF_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_GGUF_QKV_BIAS = {f"attn_{p}.bias": f"self_attn.{p}_proj.bias" for p in "qkv"}

#: ModelConfig field -> GGUF metadata key; `{arch}` is the GGUF architecture name.
GGUF_KEYS: dict[str, str] = {
    "hidden_size": "{arch}.embedding_length",
    "intermediate_size": "{arch}.feed_forward_length",
    "num_layers": "{arch}.block_count",
    "num_heads": "{arch}.attention.head_count",
    "num_kv_heads": "{arch}.attention.head_count_kv",
    "head_dim": "{arch}.attention.key_length",
    "rms_eps": "{arch}.attention.layer_norm_rms_epsilon",
    "rope_theta": "{arch}.rope.freq_base",
    "max_position": "{arch}.context_length",
    "vocab_size": "{arch}.vocab_size",
    "rope_scaling": "{arch}.rope.scaling.type",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


@dataclass(frozen=True)
class Architecture:
    """What tells one decoder from the others.

    Attributes:
        name: our name, also Hugging Face's `model_type`.
        hf_names: entries of `architectures` in a Hugging Face config.
        gguf_name: `general.architecture` in a GGUF file.
        qkv_bias: q, k and v projections have a bias.
        gguf_permuted: the GGUF converter permuted the rows of q and k (interleaved RoPE); undo it for half rotation.
        default_rope_theta: used where a config leaves it out.
        refused: Hugging Face config keys that must be absent, null or false.
    """

    name: str
    hf_names: tuple[str, ...]
    gguf_name: str
    qkv_bias: bool
    gguf_permuted: bool
    default_rope_theta: float
    refused: tuple[str, ...]

    def gguf_tensor_map(self, num_layers: int) -> dict[str, str]:
        """GGUF tensor name -> Hugging Face tensor name, for every tensor the model may have."""
        names = dict(_GGUF_GLOBAL)
        layer = _GGUF_LAYER | (_GGUF_QKV_BIAS if self.qkv_bias else {})
        for n in range(num_layers):
            names |= {f"blk.{n}.{theirs}": f"model.layers.{n}.{ours}" for theirs, ours in layer.items()}
        return names

    def gguf_key(self, field: str) -> str:
        """GGUF metadata key of one of the fields in `GGUF_KEYS`."""
        return GGUF_KEYS[field].format(arch=self.gguf_name)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        name="llama",
        hf_names=("LlamaForCausalLM",),
        gguf_name="llama",
        qkv_bias=False,
        gguf_permuted=True,
        default_rope_theta=10000.0,
        refused=("attention_bias", "mlp_bias"),
    ),
    "qwen2": Architecture(
        name="qwen2",
        hf_names=("Qwen2ForCausalLM",),
        gguf_name="qwen2",
        qkv_bias=True,
        gguf_permuted=False,
        default_rope_theta=10000.0,
        refused=("use_sliding_window", "use_mrope"),
    ),
}


def architecture_from_hf(hf_name: object, where: str) -> Architecture:
    """The architecture with this Hugging Face class name; `where` names the file in the error."""
    for architecture in ARCHITECTURES.values():
        if hf_name in architecture.hf_names:
            return architecture
    known = ", ".join(name for a in ARCHITECTURES.values() for name in a.hf_names)
    raise LowtideError(f"{where}: unknown architecture {short(hf_name)}; known ones: {known}")


def architecture_from_gguf(gguf_name: object, where: str) -> Architecture:
    """The architecture with this `general.architecture`; `where` names the file in the error."""
    for architecture in ARCHITECTURES.values():
        if gguf_name == architecture.gguf_name:
            return architecture
    known = ", ".join(a.gguf_name for a in ARCHITECTURES.values())
    raise LowtideError(f"{where}: unknown GGUF architecture {short(gguf_name)}; known ones: {known}")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a decoder. Validated on construction (LowtideError).

    Attributes:
        architecture: key of `ARCHITECTURES`.
        rms_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary embedding (half rotation, as in Hugging Face).
        max_position: longest context the model was made for, in tokens.
        tied: the output head is the embedding.
        qkv_bias: q, k and v projections have a bias.
        eos_token_ids: any of these ends generation; may be empty.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    max_position: int
    tied: bool
    qkv_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise LowtideError(f"config: unknown architecture {short(self.architecture)}; known ones: {known}")
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            _check_int(field, getattr(self, field), 1, MAX_DIMENSION)
        _check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        _check_int("max_position", self.max_position, 1, MAX_POSITION)
        if self.num_heads % self.num_kv_heads:
            raise LowtideError(f"config: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise LowtideError(f"config: head_dim {self.head_dim} is odd; rotary embeddings need an even one")
        for field in ("num_heads", "num_kv_heads"):
            _check_int(f"{field} * head_dim", getattr(self, field) * self.head_dim, 1, MAX_DIMENSION)
        for field in ("rms_eps", "rope_theta"):
            _check_positive(field, getattr(self, field))
        for field in ("tied", "qkv_bias"):
            if not isinstance(getattr(self, field), bool):
                raise LowtideError(f"config: {field} must be true or false, not {short(getattr(self, field))}")
        if self.qkv_bias != ARCHITECTURES[self.architecture].qkv_bias:
            raise LowtideError(f"config: qkv_bias {self.qkv_bias} does not fit architecture {self.architecture}")
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        if not isinstance(self.eos_token_ids, tuple):
            raise LowtideError(f"config: eos_token_ids must be a tuple, not {short(self.eos_token_ids)}")
        for token in self.eos_token_ids:
            _check_int("eos_token_id", token, 0, self.vocab_size - 1)

    @property
    def q_size(self) -> int:
        """Outputs of q_proj, inputs of o_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> ModelConfig:
        """Read a Hugging Face `config.json` (as written by transformers 4 or 5).

        Args:
            config: the parsed file.
            where: its name, for errors.

        Raises:
            LowtideError: unknown architecture, missing number, or a feature that is not supported.
        """
        architecture = architecture_from_hf(hfvalues.class_name(config, where), where)
        values = hfvalues.read(config, architecture, where)
        try:
            return cls(architecture=architecture.name, qkv_bias=architecture.qkv_bias, **values)
        except LowtideError as error:
            if not str(error).startswith("config: "):
                raise
            raise LowtideError(f"{where}: {str(error).removeprefix('config: ')}") from None

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model, readable by transformers 4 and 5 and by `from_hf`."""
        return hfvalues.write(self, ARCHITECTURES[self.architecture])


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer: its Hugging Face module name and its shape, weight [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class GroupSpec:
    """The linear layers that share one input. `name` is `layers.N.<group>`, `head` or `embed`."""

    name: str
    in_features: int
    linears: tuple[LinearSpec, ...]

    @property
    def is_body(self) -> bool:
        """True for the decoder's own linear layers: all groups but head and embed."""
        return self.name not in ("head", "embed")

    @property
    def has_thresholds(self) -> bool:
        """False for `embed`, which is looked up and never multiplied."""
        return self.name != "embed"

    @property
    def weights(self) -> int:
        """Number of weights in the member layers."""
        return sum(linear.weights for linear in self.linears)


def group_specs(config: ModelConfig) -> list[GroupSpec]:
    """Every group of the model in stored order: the layers' qkv, o, gate_up, down; then head; then embed if untied."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "qkv": (hidden, (config.q_size, config.kv_size, config.kv_size)),
        "o": (config.q_size, (hidden,)),
        "gate_up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }
    specs = []
    for n in range(config.num_layers):
        for group, members in GROUPS.items():
            inputs, outputs = shapes[group]
            linears = (LinearSpec(f"model.layers.{n}.{m}", inputs, o) for m, o in zip(members, outputs, strict=True))
            specs.append(GroupSpec(f"layers.{n}.{group}", inputs, tuple(linears)))
    embedding = LinearSpec(EMBEDDING, hidden, config.vocab_size)
    head = embedding if config.tied else LinearSpec(LM_HEAD, hidden, config.vocab_size)
    specs.append(GroupSpec("head", hidden, (head,)))
    if not config.tied:
        specs.append(GroupSpec("embed", hidden, (embedding,)))
    return specs


def norm_specs(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """(Hugging Face tensor name, length) of every RMSNorm weight, in stored order."""
    for n in range(config.num_layers):
        for norm in LAYER_NORMS:
            yield f"model.layers.{n}.{norm}", config.hidden_size
    yield FINAL_NORM, config.hidden_size


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise LowtideError(f"config: {field} must be a whole number from {low} to {high}, not {short(value)}")


def _check_positive(field: str, value: object) -> None:
    # The comparison refuses NaN too, and unlike math.isfinite takes integers of any size.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1e30:
        raise LowtideError(f"config: {field} must be a number above zero, not {short(value)}")
