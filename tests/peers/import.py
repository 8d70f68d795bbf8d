"""Opens an imported checkpoint directory in the tools it is meant for, and compares them.

    python tests/peers/import.py IMPORTED_DIR TEXT [PERPLEXITY]

Needs transformers, torch and onnxruntime-genai; a second transformers in `transformers5` beside the
interpreter's `bin` is asked too. Fails unless

* transformers loads model and tokenizer, and every text below comes back from encode and decode;
* transformers 5, tokenizers alone and onnxruntime-genai encode every text to the same ids;
* the perplexity over the first 8 windows of 512 tokens of the last 200,000 characters of TEXT is
  within 1 % of PERPLEXITY, where it is given.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "two  blanks,   three\tand a tab",
    "lines\n\nand\r\n\r\nmore \n \n lines\n",
    "numbers 1 12 123 1234 1234567 3.14159 1e-5 \u0967\u0968\u0969 \u00bd \u2163",
    "I'm you're he'll WE'VE they'd it's IT'S",
    "na\u00efve caf\u00e9, cafe\u0301 (decomposed), \u00c5ngstr\u00f6m",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \u4e2d\u6587\u3002\ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00a0 nbsp \u3000 wide",
    "def f(x):\n    return x ** 2  # comment\n\n\tif (a != b && c || !d) { }",
    "C:\\path\\to\\file.txt https://example.com/?q=1&r=%20",
    "!!! ??? ... --- ___ ### $$$ 100% (a) [b] {c} <d> 'e' \"f\"",
    "a" * 300,
    " ",
    "\n",
    # No NUL: onnxruntime-genai's texts end at one.
    "x\u0001y\u007fz",
]

IN_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(sys.stdin)
chat = tokenizer.chat_template and tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
ids = [tokenizer(text)["input_ids"] for text in texts]
json.dump({
    "ids": ids,
    "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    "chat": chat,
    "roles": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
}, sys.stdout)
"""


def in_transformers(directory, texts, path=None):
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if path:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS, directory],
        input=json.dumps(texts), capture_output=True, text=True, env=environment,
    )
    if run.returncode:
        sys.exit(f"transformers at {path or 'its place'} failed:\n{run.stderr}")
    return json.loads(run.stdout)


def in_tokenizers(directory, texts):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    return [tokenizer.encode(text).ids for text in texts]


def in_genai(directory, texts):
    import onnxruntime_genai as genai

    config = json.loads(Path(directory, "config.json").read_text())
    wanted = {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"}
    model = {key: value for key, value in config.items() if key in wanted and value is not None}
    model |= {"type": config["model_type"], "context_length": config["max_position_embeddings"]}
    with tempfile.TemporaryDirectory() as place:
        for file in Path(directory).glob("*token*.json"):
            shutil.copy(file, place)
        Path(place, "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
        tokenizer = genai.Tokenizer(place)
        tokenizer.update_options(add_special_tokens="true")
        return [tokenizer.encode(text).tolist() for text in texts]


def perplexity(directory, path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    text = Path(path).read_text(encoding="utf-8")[-200_000:]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    losses = []
    with torch.no_grad():
        for window in ids[: 8 * 512].view(8, 1, 512):
            logits = model(window).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def compare(name, ids, expected):
    wrong = [text for text, a, b in zip(TEXTS, ids, expected) if a != b]
    for text in wrong:
        at = TEXTS.index(text)
        print(f"  {text!r}\n    {name}: {ids[at]}\n    expected: {expected[at]}")
    print(f"{name}: {len(TEXTS) - len(wrong)} of {len(TEXTS)} texts encode alike")
    return not wrong


def main():
    directory, text, *expected = sys.argv[1:]
    ours = in_transformers(directory, TEXTS)
    passed = True
    lost = [text for text, back in zip(TEXTS, ours["texts"]) if back != text]
    composed = [text for text in lost if "cafe\u0301" not in text]
    if composed:
        print(f"these texts do not come back: {composed}")
        passed = False
    print(f"ids of bos, eos, pad: {ours['roles']}")
    print(f"chat: {ours['chat']!r}")

    passed &= compare("tokenizers", in_tokenizers(directory, TEXTS), ours["ids"])
    second = Path(sys.prefix, "transformers5")
    if second.exists():
        theirs = in_transformers(directory, TEXTS, second)
        passed &= compare("transformers 5", theirs["ids"], ours["ids"])
        for key in ("texts", "chat", "roles"):
            if theirs[key] != ours[key]:
                print(f"transformers 5: {key} differ: {theirs[key]!r}")
                passed = False
    passed &= compare("onnxruntime-genai", in_genai(directory, TEXTS), ours["ids"])

    if text != "-":
        found = perplexity(directory, text)
        print(f"perplexity: {found:.2f}")
        if expected:
            passed &= abs(found / float(expected[0]) - 1) < 0.01
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


main()
