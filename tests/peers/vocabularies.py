"""Imports llama.cpp's test vocabularies and compares every encoding with the recorded one.

    python tests/peers/vocabularies.py VOCABULARIES skipgpt-export import

VOCABULARIES is a folder with `ggml-vocab-NAME.gguf`, `.inp` and `.out` (texts, and the ids that the
model's own tokenizer gives them). Where it does not exist it is filled from the source package of
PyPI's `llama-cpp-python`, which carries them. A vocabulary file has no tensors, so a tiny model is
put around each; what follows is the command that imports it, called as `… FILE -o DIR`.

Needs gguf, numpy, tokenizers and onnxruntime-genai; network only for the download.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import gguf
import numpy as np
import onnxruntime_genai as genai
from tokenizers import Tokenizer

PACKAGE = "llama-cpp-python==0.3.36"
# By the name of the vocabulary: those whose pre-tokenizer a llama or qwen model can have.
IMPORTED = [
    "command-r", "deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "phi-3",
    "qwen2", "refact", "starcoder",
]
REFUSED = ["aquila", "bert-bge", "falcon", "gpt-neox", "mpt"]
SEPARATOR = "\n__ggml_vocab_test__\n"
HIDDEN = 32


def download(folder):
    """The source package, unpacked without being built; pip asks it for its metadata, which takes
    its build system."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [f"{place}/bin/python", "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "scikit-build-core", "cmake", "ninja"], check=True)
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:",
             "--dest", place, PACKAGE],
            check=True, env={"PATH": f"{place}/bin:/usr/bin:/bin"},
        )
        [archive] = Path(place).glob("*.tar.gz")
        folder.mkdir(parents=True)
        with tarfile.open(archive) as package:
            for member in package:
                if "/llama.cpp/models/ggml-vocab-" in member.name:
                    data = package.extractfile(member).read()
                    (folder / Path(member.name).name).write_bytes(data)


def model_around(vocabulary, place):
    """A llama model of one tiny layer with the metadata of a vocabulary file."""
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(place, "llama")
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    square = np.zeros((HIDDEN, HIDDEN), np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((tokens, HIDDEN), np.float16))
    writer.add_tensor("output_norm.weight", square[0])
    for name in ["attn_norm", "ffn_norm"]:
        writer.add_tensor(f"blk.0.{name}.weight", square[0])
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
        writer.add_tensor(f"blk.0.{name}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_genai(directory, texts):
    (directory / "genai_config.json").write_text(json.dumps({
        "model": {"type": "llama", "context_length": 4096, "vocab_size": 1, "pad_token_id": 0,
                  "eos_token_id": 0, "bos_token_id": 0},
        "search": {},
    }))
    tokenizer = genai.Tokenizer(str(directory))
    tokenizer.update_options(add_special_tokens="true")
    return [tokenizer.encode(text).tolist() for text in texts]


def check(name, folder, command):
    file = folder / f"ggml-vocab-{name}.gguf"
    with tempfile.TemporaryDirectory() as place:
        model, directory = Path(place, "model.gguf"), Path(place, "imported")
        model_around(file, model)
        run = subprocess.run(
            [*command, model, "-o", directory], capture_output=True, text=True,
        )
        if name in REFUSED:
            print(f"{name}: {'refused' if run.returncode else 'IMPORTED'}: {run.stderr.strip()}")
            return run.returncode != 0
        if run.returncode:
            print(f"{name}: NOT IMPORTED: {run.stderr.strip()}")
            return False
        # A separator follows every text, the last one too.
        texts = Path(f"{file}.inp").read_bytes().decode().split(SEPARATOR)[:-1]
        recorded = Path(f"{file}.out").read_text().splitlines()
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        wrong = 0
        for text, expected in zip(texts, recorded, strict=True):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if ids != [int(id) for id in expected.split()]:
                wrong += 1
                print(f"  {text!r}\n    here:     {ids}\n    recorded: {expected}")
        whole = [tokenizer.encode(text).ids for text in texts]
        try:
            differ = [t for t, a, b in zip(texts, in_genai(directory, texts), whole) if a != b]
            other = f"{len(differ)} differ in onnxruntime-genai{': ' + repr(differ[:3]) if differ else ''}"
        except RuntimeError as error:
            other = f"onnxruntime-genai refuses it: {error}"
        print(f"{name}: {len(texts) - wrong} of {len(texts)} as recorded; {other}")
        return not wrong


def main():
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    if not folder.exists():
        download(folder)
    results = [check(name, folder, command) for name in IMPORTED + REFUSED]
    print("passed" if all(results) else "FAILED")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
