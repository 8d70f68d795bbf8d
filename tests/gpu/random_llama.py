"""A llama of about a billion parameters with random weights, as a Hugging Face directory.

Usage: python random_llama.py OUT TOKENIZER_DIR [LAYERS HIDDEN INTERMEDIATE HEADS KV_HEADS]

Speed does not depend on the values. TOKENIZER_DIR is a checkpoint whose tokenizer files are copied
and whose vocabulary size is taken. Needs numpy alone.
"""

import json
import pathlib
import shutil
import struct
import sys

import numpy as np


def tensors(layers, hidden, intermediate, heads, kv_heads, vocab):
    width = hidden // heads
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_heads * width, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_heads * width, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)


def main():
    out, source = map(pathlib.Path, sys.argv[1:3])
    shape = [int(n) for n in sys.argv[3:]] or [16, 2048, 8192, 32, 8]
    layers, hidden, intermediate, heads, kv_heads = shape
    base = json.loads((source / "config.json").read_text())
    vocab = base["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": base.get("bos_token_id"),
        "eos_token_id": base.get("eos_token_id"),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copy(source / name, out / name)
    every = list(tensors(*shape, vocab))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dims in every:
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    random = np.random.default_rng(0)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)))
        file.write(head)
        for name, dims in every:
            if len(dims) == 1:
                values = np.ones(dims, np.float32)
            else:
                values = random.standard_normal(dims, np.float32) * 0.02
            # The upper half of an f32 is the bf16 below it.
            (values.view(np.uint32) >> 16).astype("<u2").tofile(file)
    print(f"{out}: {at // 2} parameters")


main()
