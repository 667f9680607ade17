"""How an index is packed: raw deflate that may refer back to what indices have in common, or LZMA."""

import lzma
import zlib
from typing import Any

from hfcompress.errors import FormatError

MAX_BYTES = 1 << 26
_LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]


def squeeze(data: bytes) -> bytes:
    """The shortest of: as it is (0), raw deflate with `COMMON` before it (1), raw LZMA (2); that number first."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, COMMON)
    packed = deflate.compress(data) + deflate.flush()
    others = lzma.compress(data, lzma.FORMAT_RAW, filters=_LZMA)
    return min((b"\0" + data, b"\1" + packed, b"\2" + others), key=len)


def unsqueeze(data: bytes) -> bytes:
    """The inverse. Raises FormatError: malformed, more than MAX_BYTES."""
    way, body = data[:1], data[1:]
    inflater: Any
    if way == b"\0":
        return body
    if way == b"\1":
        inflater = zlib.decompressobj(-15, COMMON)
    elif way == b"\2":
        inflater = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    else:
        raise FormatError("the file's index is packed in a way that this version does not know: upgrade hfcompress")
    try:
        found: bytes = inflater.decompress(body, MAX_BYTES)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise FormatError(f"the file's index cannot be unpacked ({error})") from error
    if not inflater.eof or inflater.unused_data:
        raise FormatError(f"the file's index is truncated, or larger than {MAX_BYTES} bytes")
    return found


COMMON = (
    b'"left","symbols"],["left_amplitude","float16"],["right","symbols"],["right_amplitude","float16"],["scale",'
    b'"float32"]][{"multihash":{"fraction":0.1,"bytes":null,"bits":8,"seed":0}},{"magnitude":{"sparsity":0.9}},{'
    b'"softthreshold":{"survivors":"float16"}},[["alive","symbols"],["survivors","float16"]],{"levels":{"points"'
    b':16,"bucket":256,"start":"nearest","scales":"float16"}},[["codes","symbols"],["points","float16"],["low","'
    b'float16"],["span","float16"]],"quantile""logistic""laplace""bucket":null,"bits":2,"bucket":32,"stochastic"'
    b':true,"scales":"float32","zero_point":true}},[["codes","symbols"],["zero","uint8"],["step","float16"]],{"d'
    b'ense":{"dtype":"float32"}}],[["weight","float32"]],[["codes","symbols"],["step","float32"]],cls_token\0pos'
    b"_embed\0patch_embed.proj.weight\0patch_embed.proj.bias\0blocks.0.norm1.weight\0blocks.\1.norm\1.bias\0bloc"
    b"ks.\1.attn.qkv.weight\0blocks.\1.attn.qkv.bias\0blocks.\1.attn.proj.weight\0blocks.\1.attn.proj.bias\0bloc"
    b"ks.\1.norm2.weight\0blocks.\1.norm\1.bias\0blocks.\1.mlp.fc1.weight\0blocks.\1.mlp.fc\1.bias\0blocks.\1.ml"
    b"p.fc\2.weight\0blocks.\1.mlp.fc\1.bias\0blocks.\2.norm1.weight\0head.weight\0head.bias\0features.0.weight"
    b"\0classifier.1.weight\0classifier.\1.bias\0layer\1.\1.conv3.weight\0layer\1.\1.bn\1.weight\0layer\1.\1.bn"
    b"\1.bias\0layer\1.\1.downsample.0.weight\0layer\1.\1.downsample.\2.weight\0layer\1.\1.downsample.\1.bias\0l"
    b"ayer\1.\2.conv\1.weight\0layer\1.\1.downsample.1.running_mean\0layer\1.\1.downsample.\1.running_var\0layer"
    b"\1.\1.downsample.\1.num_batches_tracked\0shared.weight\0encoder.block.0.layer.0.SelfAttention.q.weight\0en"
    b"coder.block.\1.layer.\1.SelfAttention.k.weight\0encoder.block.\1.layer.\1.SelfAttention.v.weight\0encoder."
    b"block.\1.layer.\1.SelfAttention.o.weight\0encoder.block.\1.layer.\1.SelfAttention.relative_attention_bias."
    b"weight\0encoder.block.\1.layer.\1.layer_norm.weight\0encoder.block.\1.layer.\2.DenseReluDense.wi_0.weight"
    b"\0encoder.block.\1.layer.\1.DenseReluDense.wi_\2.weight\0encoder.block.\1.layer.\2.DenseReluDense.wi.weigh"
    b"t\0encoder.block.\1.layer.\1.DenseReluDense.wo.weight\0encoder.block.\1.layer.\1.layer_norm.weight\0encode"
    b"r.block.\2.layer.0.SelfAttention.q.weight\0encoder.final_layer_norm.weight\0decoder.block.0.layer.0.SelfAt"
    b"tention.q.weight\0decoder.block.\1.layer.\1.SelfAttention.k.weight\0decoder.block.\1.layer.\1.SelfAttentio"
    b"n.v.weight\0decoder.block.\1.layer.\1.SelfAttention.o.weight\0decoder.block.\1.layer.\1.SelfAttention.rela"
    b"tive_attention_bias.weight\0decoder.block.\1.layer.\1.layer_norm.weight\0decoder.block.\1.layer.\2.EncDecA"
    b"ttention.q.weight\0decoder.block.\1.layer.\1.EncDecAttention.k.weight\0decoder.block.\1.layer.\1.EncDecAtt"
    b"ention.v.weight\0decoder.block.\1.layer.\1.EncDecAttention.o.weight\0decoder.block.\1.layer.\1.layer_norm."
    b"weight\0decoder.block.\1.layer.\2.DenseReluDense.wi_0.weight\0decoder.block.\1.layer.\1.DenseReluDense.wi_"
    b"\2.weight\0decoder.block.\1.layer.\2.DenseReluDense.wi.weight\0decoder.block.\1.layer.\1.DenseReluDense.wo"
    b".weight\0decoder.block.\1.layer.\1.layer_norm.weight\0decoder.block.\2.layer.0.SelfAttention.q.weight\0dec"
    b"oder.final_layer_norm.weight\0lm_head.weight\0model.shared.weight\0model.encoder.embed_positions.weight\0m"
    b"odel.encoder.layernorm_embedding.weight\0model.encoder.layer_norm.bias\0model.decoder.layers.0.self_attn.k"
    b"_proj.weight\0model.decoder.layers.\1.self_attn.k_proj.bias\0model.decoder.layers.\1.self_attn.v_proj.weig"
    b"ht\0model.decoder.layers.\1.self_attn.v_proj.bias\0model.decoder.layers.\1.self_attn.q_proj.weight\0model."
    b"decoder.layers.\1.self_attn.q_proj.bias\0model.decoder.layers.\1.self_attn.out_proj.weight\0model.decoder."
    b"layers.\1.self_attn.out_proj.bias\0model.decoder.layers.\1.self_attn_layer_norm.weight\0model.decoder.laye"
    b"rs.\1.self_attn_layer_norm.bias\0model.decoder.layers.\1.encoder_attn.k_proj.weight\0model.decoder.layers."
    b"\1.encoder_attn.k_proj.bias\0model.decoder.layers.\1.encoder_attn.v_proj.weight\0model.decoder.layers.\1.e"
    b"ncoder_attn.v_proj.bias\0model.decoder.layers.\1.encoder_attn.q_proj.weight\0model.decoder.layers.\1.encod"
    b"er_attn.q_proj.bias\0model.decoder.layers.\1.encoder_attn.out_proj.weight\0model.decoder.layers.\1.encoder"
    b"_attn.out_proj.bias\0model.decoder.layers.\1.encoder_attn_layer_norm.weight\0model.decoder.layers.\1.encod"
    b"er_attn_layer_norm.bias\0model.decoder.layers.\1.fc1.weight\0model.decoder.layers.\1.fc\1.bias\0model.deco"
    b"der.layers.\1.fc\2.weight\0model.decoder.layers.\1.fc\1.bias\0model.decoder.layers.\1.final_layer_norm.wei"
    b"ght\0model.decoder.layers.\1.final_layer_norm.bias\0model.decoder.layers.\2.self_attn.k_proj.weight\0model"
    b".encoder.layers.0.self_attn.k_proj.weight\0model.encoder.layers.\1.self_attn.k_proj.bias\0model.encoder.la"
    b"yers.\1.self_attn.v_proj.weight\0model.encoder.layers.\1.self_attn.v_proj.bias\0model.encoder.layers.\1.se"
    b"lf_attn.q_proj.weight\0model.encoder.layers.\1.self_attn.q_proj.bias\0model.encoder.layers.\1.self_attn.ou"
    b"t_proj.weight\0model.encoder.layers.\1.self_attn.out_proj.bias\0model.encoder.layers.\1.self_attn_layer_no"
    b"rm.weight\0model.encoder.layers.\1.self_attn_layer_norm.bias\0model.encoder.layers.\1.fc1.weight\0model.en"
    b"coder.layers.\1.fc\1.bias\0model.encoder.layers.\1.fc\2.weight\0model.encoder.layers.\1.fc\1.bias\0model.e"
    b"ncoder.layers.\1.final_layer_norm.weight\0model.encoder.layers.\1.final_layer_norm.bias\0model.encoder.lay"
    b"ers.\2.self_attn.k_proj.weight\0final_logits_bias\0conv1.weight\0bn\1.weight\0bn\1.bias\0layer\1.0.conv1.w"
    b"eight\0layer\1.\1.bn\1.weight\0layer\1.\1.bn\1.bias\0layer\1.\1.conv\2.weight\0layer\1.\1.bn\1.weight\0lay"
    b"er\1.\1.bn\1.bias\0layer\1.\2.conv1.weight\0layer\1.\1.bn\1.weight\0layer\1.\1.bn\1.bias\0layer\1.\1.conv"
    b"\2.weight\0layer\1.\1.bn\1.weight\0layer\1.\1.bn\1.bias\0layer\2.0.conv1.weight\0layer\1.\1.bn\1.weight\0l"
    b"ayer\1.\1.bn\1.bias\0linear.weight\0linear.bias\0fc.weight\0fc.bias\0bn1.running_mean\0bn\1.running_var\0b"
    b"n\1.num_batches_tracked\0layer\1.0.bn1.running_mean\0layer\1.\1.bn\1.running_var\0layer\1.\1.bn\1.num_batc"
    b"hes_tracked\0layer\1.\1.bn\2.running_mean\0layer\1.\1.bn\1.running_var\0layer\1.\1.bn\1.num_batches_tracke"
    b"d\0layer\1.\2.bn1.running_mean\0layer\1.\1.bn\1.running_var\0layer\1.\1.bn\1.num_batches_tracked\0layer\1."
    b"\1.bn\2.running_mean\0layer\1.\1.bn\1.running_var\0layer\1.\1.bn\1.num_batches_tracked\0layer\2.0.bn1.runn"
    b"ing_mean\0conv1.weight\0conv\1.bias\0conv\2.weight\0conv\1.bias\0fc1.weight\0fc\1.bias\0fc\2.weight\0fc\1."
    b'bias\0fc\2.weight\0fc\1.bias\0["hfcompress 0.1.0",[{"uniform":{"bits":4,"bucket":256,"stochastic":false,"s'
    b'cales":"float16","zero_point":false}},{"dense":{"dtype":"float16"}}],[[["codes","symbols"],["low","float16'
    b'"],["step","float16"]],[["weight","float16"]]],["embedding","linear","bias","norm","buffer"]]["hfcompress '
    b'0.1.0",[{"entropypenalized":{"transform":"none","prior":"factorized","step":0.125}},{"dense":{"dtype":"flo'
    b'at16"}}],[[["codes","symbols"],["step","int16"]],[["weight","float16"]]],["conv","norm","bias","linear","b'
    b'uffer"]]["hfcompress 0.1.0",[{"entropypenalized":{"transform":"dft","prior":"factorized","step":0.25}}],[['
    b'["codes","symbols"],["step","int16"]]],["conv","bias","linear"]]'
)
"""What deflate may refer back to: the texts and names (folded, see `index`) of common networks. Part of the format."""
