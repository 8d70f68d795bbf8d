"""Loads an artifact, unmodified, in optimum and in onnxruntime-genai, and compares their greedy text
with this tool's. Checks the graph with onnx.checker.

    python tests/peers/clients.py ARTIFACT SKIPGPT_EXPORT
"""

import json
import subprocess
import sys

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
TOKENS = 32


def own(path, tool, prompt):
    arguments = ["generate", path, "--prompt", prompt, "--max-new-tokens", str(TOKENS)]
    report = subprocess.run([tool, *arguments, "--json", "-"], check=True, capture_output=True)
    return json.loads(report.stdout)["text"]


def optimum(path):
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    model = ORTModelForCausalLM.from_pretrained(path, use_io_binding=False)
    tokenizer = AutoTokenizer.from_pretrained(path)

    def generate(prompt):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0]
        return tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return generate


def genai(path):
    import onnxruntime_genai as og

    model = og.Model(path)
    tokenizer = og.Tokenizer(model)

    def generate(prompt):
        ids = tokenizer.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return tokenizer.decode(generator.get_sequence(0)[len(ids) :])

    return generate


def main():
    path, tool = sys.argv[1:]
    import onnx

    onnx.checker.check_model(f"{path}/model.onnx", full_check=True)
    print(f"{path}: onnx.checker passes")
    clients = {"optimum": optimum(path), "onnxruntime-genai": genai(path)}
    failed = False
    for prompt in PROMPTS:
        expected = own(path, tool, prompt)
        for name, generate in clients.items():
            found = generate(prompt)
            if found != expected:
                failed = True
                print(f"{name}, {prompt!r}: expected {expected!r}, found {found!r}")
    print(f"{path}: {'DIFFERENT' if failed else 'the same'} greedy text in {', '.join(clients)}")
    sys.exit(failed)


main()
