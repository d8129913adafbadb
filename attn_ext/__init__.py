"""attn_ext: fused attention for recurrent encoder-decoders."""

from attn_ext.backend import use_backend
from attn_ext.decoder import AttentionDecoder, DecoderState
from attn_ext.functional import additive_attention, dot_attention, luong_attention
from attn_ext.memory import AttentionMemory
from attn_ext.modules import Attention, LuongAttention

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionDecoder",
    "AttentionMemory",
    "DecoderState",
    "LuongAttention",
    "additive_attention",
    "dot_attention",
    "luong_attention",
    "use_backend",
]
