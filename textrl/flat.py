"""A forward of our own over the weights of GPT-2 and Llama: a flat list of tokens, without padding or framework.

The weights stay in the `PreTrainedModel` and are read where they lie, so that what an optimiser does to them is seen at
once. Architectures and settings that are not known here keep the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Model, LlamaModel, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.pytorch_utils import Conv1D

Angles = tuple[Tensor, Tensor] | None
"""Cosines and sines of the rotary positions, (n, 1, D) each."""
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, queries (n, H, D), keys and values (n, G, D) -> what the tokens attended to, (n, H * D)."""


class Flat:
    """A trunk's forward over n tokens of any rows, in any order; who attends to whom is the caller's.

    Attributes:
        layers: how many blocks there are.
        groups: G, the heads of keys and values.
        head_dim: D.
        recompute: whether blocks run again in the backward pass, so that memory holds what one of them made.
    """

    layers: int
    groups: int
    head_dim: int
    recompute: bool = False

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads: (n,), (n,) -> (n, d)."""
        raise NotImplementedError

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """What turns queries and keys at these positions (n,); None where positions are embedded."""
        raise NotImplementedError

    def qkv(self, layer: int, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, H, D), keys and values (n, G, D) of a block."""
        raise NotImplementedError

    def mix(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block: (n, d), (n, H * D) -> (n, d)."""
        raise NotImplementedError

    def norm(self, x: Tensor) -> Tensor:
        """The last norm: (n, d) -> (n, d)."""
        raise NotImplementedError

    def run(self, x: Tensor, positions: Tensor, attend: Attend, places: Tensor | None = None, first: int = 0) -> Tensor:
        """The blocks from `first` on and the last norm.

        Args:
            x: (n, d), what the block `first` reads.
            positions: (n,), each token's place in its row.
            attend: the attention.
            places: (m,) tokens whose last states are asked for; None for all. The last block works for them alone.
            first: the first block that runs.

        Returns:
            (m, d).
        """
        angles = self.angles(positions, x.dtype)

        def block(layer: int, x: Tensor) -> Tensor:
            attended = attend(layer, *self.qkv(layer, x, angles))
            if places is not None and layer == self.layers - 1:
                x, attended = x.index_select(0, places), attended.index_select(0, places)
            return self.mix(layer, x, attended)

        for layer in range(first, self.layers):
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, layer, x, use_reentrant=False) if again else block(layer, x)
        return self.norm(x)


class FlatGPT2(Flat):
    """GPT-2."""

    def __init__(self, trunk: GPT2Model) -> None:
        self.trunk = trunk
        self.layers, self.groups = len(trunk.h), trunk.config.n_head
        self.head_dim = trunk.config.n_embd // self.groups
        self.recompute = trunk.gradient_checkpointing

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token and position embeddings."""
        return _embedding(tokens, self.trunk.wte) + _embedding(positions, self.trunk.wpe)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """None: positions are embedded."""
        return None

    def qkv(self, layer: int, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """The first norm and the projections."""
        block = self.trunk.h[layer]
        both = _conv(_layer_norm(x, block.ln_1), block.attn.c_attn).view(len(x), 3, self.groups, self.head_dim)
        q, k, v = both.unbind(1)  # its backward pass is one copy; that of three slices is three and two sums
        return q, k, v

    def mix(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The output projection, the second norm and the MLP."""
        block = self.trunk.h[layer]
        x = x + _conv(attended, block.attn.c_proj)
        inner = functional.gelu(_conv(_layer_norm(x, block.ln_2), block.mlp.c_fc), approximate="tanh")
        return x + _conv(inner, block.mlp.c_proj)

    def norm(self, x: Tensor) -> Tensor:
        """The last norm."""
        return _layer_norm(x, self.trunk.ln_f)


class FlatLlama(Flat):
    """Llama, with plain rotary positions."""

    def __init__(self, trunk: LlamaModel) -> None:
        self.trunk = trunk
        self.layers, self.groups = len(trunk.layers), trunk.config.num_key_value_heads
        self.head_dim = trunk.config.head_dim
        self.recompute = trunk.gradient_checkpointing

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings."""
        return _embedding(tokens, self.trunk.embed_tokens)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """The turn of the rotary positions."""
        turns = positions[:, None].float() * self.trunk.rotary_emb.inv_freq.float()  # (n, D / 2)
        turns = torch.cat([turns, turns], -1)[:, None]  # (n, 1, D)
        return turns.cos().to(dtype), turns.sin().to(dtype)

    def qkv(self, layer: int, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """The first norm, the projections and the turn."""
        assert angles is not None
        block = self.trunk.layers[layer]
        x = _rms_norm(x, block.input_layernorm)
        attn = block.self_attn
        q, k, v = (_linear(x, part).view(len(x), -1, self.head_dim) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        return _turn(q, angles), _turn(k, angles), v

    def mix(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The output projection, the second norm and the MLP."""
        block = self.trunk.layers[layer]
        x = x + _linear(attended, block.self_attn.o_proj)
        normed, mlp = _rms_norm(x, block.post_attention_layernorm), block.mlp
        inner = functional.silu(_linear(normed, mlp.gate_proj)) * _linear(normed, mlp.up_proj)
        return x + _linear(inner, mlp.down_proj)

    def norm(self, x: Tensor) -> Tensor:
        """The last norm."""
        return _rms_norm(x, self.trunk.norm)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What queries attend to: (B, H, Q, D), (B, H, K, D) twice -> (B, H, Q, D).

    PyTorch's own, but for bfloat16 on a CPU, where its backward pass is slower than the matrix products; these hold the
    (B, H, Q, K) weights, which for short texts is less than what the rest of a block holds.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: bool, broadcast to (B, H, Q, K): who may be attended to; None for all.
        causal: query i attends to the keys up to i; Q = K.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or q.shape[2] > 4 * q.shape[3]:
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    if causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    scores = torch.matmul(q * q.shape[3] ** -0.5, k.transpose(2, 3)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def _embedding(ids: Tensor, layer: Any) -> Tensor:
    return functional.embedding(ids, layer.weight, layer.padding_idx)


def _conv(x: Tensor, layer: Any) -> Tensor:
    return torch.addmm(layer.bias, x, layer.weight)


def _linear(x: Tensor, layer: Any) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    """In float32, rounded before the weight is multiplied in, as the model does."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * scaled.to(x.dtype)


def _turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: (n, H, D) -> (n, H, D)."""
    first, second = x.chunk(2, -1)
    return x * angles[0] + torch.cat([-second, first], -1) * angles[1]


# ---- which models are known ----------------------------------------------------------------------------------------

_PLAIN: tuple[type, ...] = (nn.Embedding, nn.Linear, nn.Dropout, nn.ModuleList, Conv1D, nn.LayerNorm)
_GPT2: tuple[type, ...] = (GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, NewGELUActivation, GELUTanh)
_LLAMA: tuple[type, ...] = (
    LlamaModel,
    LlamaDecoderLayer,
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    SiLUActivation,
    nn.SiLU,
)


def flat_of(model: PreTrainedModel) -> Flat | None:
    """The flat forward of a model's trunk; None where the model's own forward must run.

    Known are GPT-2 and Llama as transformers has them, whose every module is of the expected class (a LoRA layer is
    not), without hooks, without dropout that is on, and with the settings whose mathematics is written here.
    """
    trunk = model.base_model
    kinds = {GPT2Model: _GPT2, LlamaModel: _LLAMA}.get(type(trunk))
    if kinds is None or touched(model) or (model.training and _drops(model)):
        return None
    known = {*_PLAIN, *kinds}
    if any(type(module) not in known or touched(module) for module in trunk.modules()):
        return None
    config = trunk.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return None
    if isinstance(trunk, GPT2Model):
        unknown = (
            config.scale_attn_by_inverse_layer_idx,
            config.reorder_and_upcast_attn,
            config.add_cross_attention,
            not config.scale_attn_weights,
        )
        return None if any(unknown) or not len(trunk.h) else FlatGPT2(trunk)
    rotary = config.rope_parameters or {}
    plain = rotary.get("rope_type") == "default" and rotary.get("partial_rotary_factor", 1.0) in (None, 1.0)
    return FlatLlama(trunk) if plain and len(trunk.layers) == config.num_hidden_layers else None


def touched(module: nn.Module) -> bool:
    """Whether somebody changed what calling a module does."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _drops(model: PreTrainedModel) -> bool:
    config = model.config
    rates = (getattr(config, name, 0.0) for name in ("attn_pdrop", "attention_dropout"))
    return any(rates) or any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))
