"""What a model is: the config that fixes its function, and the parameters that it declares.

A family is a choice of these switches (``families``). Layers may differ in two ways, which
``pattern`` says layer by layer: whether attention slides, and whether the feed-forward is of
experts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.models.families import FAMILIES
from opd_jax.models.params import ParamSpec, Specs
from opd_jax.models.rope import Rope

REMAT = ("none", "full", "dots")
ATTENTION = ("auto", "blocks")
INIT_STD = 0.02  # initializer_range of all families' published configs
DENSE = ("gate", "up", "down")
# Of each weight that rows are multiplied by, how many dimensions are inputs.
NUM_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 3, "gate": 1, "up": 1, "down": 1}
SPARSE = ("router", "expert_gate", "expert_up", "expert_down")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets a layer apart from the others of its model.

    Attributes:
      is_sliding: it reads the last ``window`` tokens only, under ``local_rope``.
      is_sparse: its feed-forward is of experts.
    """

    is_sliding: bool = False
    is_sparse: bool = False


@dataclasses.dataclass(frozen=True)
class Experts:
    """A feed-forward of which each token uses a part.

    Attributes:
      num: how many there are.
      top_k: how many a token uses.
      ffn: width of each.
      is_normalised: the weights of the chosen ones sum to 1; else they are their probabilities
        among all.

    Raises:
      ValueError: more are to be chosen than there are.
    """

    num: int
    top_k: int
    ffn: int
    is_normalised: bool = True

    def __post_init__(self):
        if not 1 <= self.top_k <= self.num:
            raise ValueError(
                f"{self.top_k} experts per token of {self.num}: expected between 1 and all; fix "
                "num_experts_per_tok / num_experts"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the function computed by a set of parameters.

    Attributes:
      model_type: a name of ``FAMILIES``; names the weights on export, no more.
      tied: the head is the embedding.
      qkv_bias: queries, keys and values have biases.
      qk_norm: queries and keys are normalised, each head or, with ``qk_norm_whole``, all heads
        together.
      max_positions: that the model was made for.
      dtype: compute dtype, kept by name so that the config hashes; a dtype object is accepted.
      remat: what the backward pass keeps: ``dots`` the results of weight multiplications, and it
        recomputes what is cheap, at half the memory of ``none``, which keeps everything, and in no
        more time (LOG.md); ``full`` keeps layer inputs only.
      attention: of whole sequences and over caches: by the kernel of the devices where there is
        one that fits (``auto``), or everywhere by products of our own (``blocks``).
      pattern: a kind for each layer; empty where all are plain.
      window: tokens that a sliding layer reads, the query's own included.
      local_rope: of sliding layers, where it is another than that of full ones.
      experts: of sparse layers.
      norms: where a block's norms are: before it (``pre``), on what it adds (``post``), or both.
      norm_offset: norm weights are stored as their difference from 1.
      activation: of the feed-forward's gate.
      query_scalar: scores are divided by its square root; None: by that of ``head_dim``.
      scaled_embed: embeddings are multiplied by the square root of the width.

    Raises:
      ValueError: an unknown name, query heads that do not divide over key/value heads, or a pattern
        that does not fit.
    """

    model_type: str
    vocab_size: int
    width: int
    ffn: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: Rope = Rope()  # noqa: RUF009 (Rope is frozen)
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "dots"
    attention: Literal["auto", "blocks"] = "auto"
    pattern: tuple[LayerKind, ...] = ()
    window: int | None = None
    local_rope: Rope | None = None
    experts: Experts | None = None
    qk_norm_whole: bool = False
    norms: Literal["pre", "post", "both"] = "pre"
    norm_offset: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    query_scalar: int | None = None
    scaled_embed: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        if all(kind == LayerKind() for kind in self.pattern):
            object.__setattr__(self, "pattern", ())
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported: expected one of "
                f"{', '.join(FAMILIES)}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is not known: expected one of {REMAT}")
        if self.attention not in ATTENTION:
            raise ValueError(
                f"attention {self.attention!r} is not known: expected one of {ATTENTION}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} key/value "
                "heads: expected a multiple; fix num_heads / num_kv_heads"
            )
        self._check_pattern()

    def _check_pattern(self) -> None:
        if self.pattern and len(self.pattern) != self.num_layers:
            raise ValueError(
                f"the pattern has {len(self.pattern)} layers, the model {self.num_layers}: "
                "expected as many; fix layer_types / num_hidden_layers"
            )
        if any(kind.is_sliding for kind in self.pattern) and (self.window or 0) < 1:
            raise ValueError(
                f"layers slide over a window of {self.window} tokens: expected at least 1; fix "
                "sliding_window / layer_types"
            )
        if any(kind.is_sparse for kind in self.pattern) and self.experts is None:
            raise ValueError(
                "layers have experts that are not described: expected ModelConfig.experts"
            )

    @property
    def compute_dtype(self):
        """The compute dtype as a dtype object."""
        return jnp.dtype(self.dtype)

    @property
    def num_groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.pattern or (LayerKind(),) * self.num_layers

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward of any layer is of experts."""
        return any(kind.is_sparse for kind in self.kinds)

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5


def layers_with(cfg: ModelConfig, leaf: str) -> tuple[int, ...]:
    """The layers that have a leaf of ``layers``: its array is stacked by them."""
    if leaf in DENSE:
        return tuple(i for i, kind in enumerate(cfg.kinds) if not kind.is_sparse)
    if leaf in SPARSE:
        return tuple(i for i, kind in enumerate(cfg.kinds) if kind.is_sparse)
    return tuple(range(cfg.num_layers))


def specs(cfg: ModelConfig) -> Specs:
    """Declare the parameters: embed [V, D], layers [L, ...], final_norm [D], head [V, D]."""
    D, V = cfg.width, cfg.vocab_size
    one = 0.0 if cfg.norm_offset else 1.0
    layers = {**_attention(cfg, one), **_norms(cfg, one), **_feed_forward(cfg)}
    stacked = {}
    for name, spec in layers.items():
        if num := len(layers_with(cfg, name)):
            shape, axes = (num, *spec.shape), (None, *spec.axes)
            stacked[name] = dataclasses.replace(spec, shape=shape, axes=axes)
    tree = {
        "embed": ParamSpec((V, D), ("model", "fsdp"), INIT_STD),
        "layers": stacked,
        "final_norm": ParamSpec((D,), ("fsdp",), mean=one),
    }
    if not cfg.tied:
        tree["head"] = ParamSpec((V, D), ("model", "fsdp"), INIT_STD)
    return tree


def check_mesh(cfg: ModelConfig, mesh: Mesh, who: str = "the model", key: str = "") -> None:
    """Check that a mesh divides a model, in the words of its config.json.

    Args:
      cfg: of the model.
      mesh: devices.
      who: the model, in words.
      key: of the config, that sets the axis; default: the axis's own.

    Raises:
      ValueError: it does not; names all sizes that an axis does not divide, and what would do.
    """
    for axis, sizes in _split(cfg).items():
        shards = mesh.shape[axis]
        found = [f"{size} {what}" for what, size in sizes.items() if size % shards]
        if found:
            raise ValueError(
                f"{who} has {' and '.join(found)}, which does not divide over {shards} shards of "
                f"mesh axis '{axis}': expected a divisor of {math.gcd(*sizes.values())}; choose "
                f"--config.mesh.{key or axis}"
            )


def _split(cfg: ModelConfig) -> dict[str, dict[str, int]]:
    """What of a model each axis of a mesh splits: :func:`specs` in words."""
    found = {
        "key/value heads (num_key_value_heads)": cfg.num_kv_heads,
        "rows of the vocabulary (vocab_size)": cfg.vocab_size,
    }
    if layers_with(cfg, "gate"):
        found["features of the feed-forward (intermediate_size)"] = cfg.ffn
    if cfg.experts is not None and layers_with(cfg, "router"):
        found["experts (num_experts)"] = cfg.experts.num
    return {"model": found, "fsdp": {"features of the residual stream (hidden_size)": cfg.width}}


def _out_std(cfg: ModelConfig) -> float:
    # Residual writers are drawn smaller, so that the stream's variance does not grow with depth.
    return INIT_STD / (2 * cfg.num_layers) ** 0.5


def _attention(cfg: ModelConfig, one: float) -> dict[str, ParamSpec]:
    D, K, G, H = cfg.width, cfg.num_kv_heads, cfg.num_groups, cfg.head_dim
    leaves = {
        "q": ParamSpec((D, K, G, H), ("fsdp", "model", None, None), INIT_STD),
        "k": ParamSpec((D, K, H), ("fsdp", "model", None), INIT_STD),
        "v": ParamSpec((D, K, H), ("fsdp", "model", None), INIT_STD),
        "o": ParamSpec((K, G, H, D), ("model", None, None, "fsdp"), _out_std(cfg)),
    }
    if cfg.qkv_bias:
        leaves["q_bias"] = ParamSpec((K, G, H), ("model", None, None))
        leaves["k_bias"] = ParamSpec((K, H), ("model", None))
        leaves["v_bias"] = ParamSpec((K, H), ("model", None))
    if cfg.qk_norm and cfg.qk_norm_whole:
        leaves["q_norm"] = ParamSpec((K, G, H), ("model", None, None), mean=one)
        leaves["k_norm"] = ParamSpec((K, H), ("model", None), mean=one)
    elif cfg.qk_norm:
        leaves["q_norm"] = ParamSpec((H,), (None,), mean=one)
        leaves["k_norm"] = ParamSpec((H,), (None,), mean=one)
    return leaves


def _norms(cfg: ModelConfig, one: float) -> dict[str, ParamSpec]:
    names = {
        "pre": ("attn_norm", "ffn_norm"),
        "post": ("attn_post_norm", "ffn_post_norm"),
    }
    both = (*names["pre"], *names["post"])
    norm = ParamSpec((cfg.width,), ("fsdp",), mean=one)
    return dict.fromkeys(names.get(cfg.norms, both), norm)


def _feed_forward(cfg: ModelConfig) -> dict[str, ParamSpec]:
    D, F = cfg.width, cfg.ffn
    leaves = {
        "gate": ParamSpec((D, F), ("fsdp", "model"), INIT_STD),
        "up": ParamSpec((D, F), ("fsdp", "model"), INIT_STD),
        "down": ParamSpec((F, D), ("model", "fsdp"), _out_std(cfg)),
    }
    if cfg.experts is None:
        return leaves
    X, E = cfg.experts.num, cfg.experts.ffn
    return leaves | {
        "router": ParamSpec((D, X), ("fsdp", None), INIT_STD),
        "expert_gate": ParamSpec((X, D, E), ("model", "fsdp", None), INIT_STD),
        "expert_up": ParamSpec((X, D, E), ("model", "fsdp", None), INIT_STD),
        "expert_down": ParamSpec((X, E, D), ("model", None, "fsdp"), _out_std(cfg)),
    }
