"""Does skipped work become saved time? Decode of one sequence of real text, dense beside routed.

Usage: decode.py DENSE ROUTED WATCHED TEXT [--rounds N] [--steps N] [--prompt N] [--threads N]
Needs onnxruntime, numpy and tokenizers. WATCHED is ROUTED exported with --emit-routing: it says what
was skipped, and is not timed.

Every round loads the artifacts anew, one at a time (where memory lands matters as much as what is
computed, and two sessions' threads disturb each other), runs the same prompt and then the same
following tokens, one at a time. A round's time is the median over its steps; what is printed is the
median over rounds, whose order alternates.

The share of multiply-adds skipped is that of the very tokens timed: projections, head and routers of
the dense model, from each artifact's manifest, and the attention core at the cached length.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


class Decoder:
    """An artifact with its own cache; copies nothing but what ONNX Runtime copies."""

    def __init__(self, path, threads):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            str(path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values")
        }

    def step(self, ids):
        past = next(iter(self.cache.values())).shape[2]
        total = past + len(ids)
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            **self.cache,
        }
        start = time.perf_counter()
        results = dict(zip(self.outputs, self.session.run(None, feed)))
        seconds = time.perf_counter() - start
        self.cache = {
            name: results[name.replace("past_key_values", "present")] for name in self.cache
        }
        return seconds, results.get("routing_margins")


def skippable(facts, cached):
    """Multiply-adds of one attention and one MLP module that a skipped token does not need, and of
    the whole dense step at this cached length."""
    m, w = facts["model"], facts["work"]
    layers = m["num_hidden_layers"]
    core = 2 * m["num_attention_heads"] * m["head_dim"] * (cached + 1)
    attention = w["attention"]["multiply_adds"] / layers + core
    mlp = w["mlp"]["multiply_adds"] / layers
    dense = ["key_value", "attention", "mlp", "head"]
    return attention, mlp, sum(w[part]["multiply_adds"] for part in dense) + core * layers


def main():
    p = argparse.ArgumentParser()
    p.add_argument("dense", type=pathlib.Path)
    p.add_argument("routed", type=pathlib.Path)
    p.add_argument("watched", type=pathlib.Path)
    p.add_argument("text", type=pathlib.Path)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()

    tokenizer = Tokenizer.from_file(str(a.dense / "tokenizer.json"))
    tokens = tokenizer.encode(a.text.read_text()[-200_000:], add_special_tokens=False).ids
    facts = manifest(a.routed)
    modules = facts["routing"]["routed"]
    medians, shares, rates = {"dense": [], "routed": []}, [], []
    for round_ in range(a.rounds):
        start = 1000 * round_
        window = tokens[start : start + a.prompt + a.steps]
        for name in ("dense", "routed") if round_ % 2 else ("routed", "dense"):
            decoder = Decoder(getattr(a, name), a.threads)
            decoder.step(window[: a.prompt])
            laps = [decoder.step([token])[0] for token in window[a.prompt :]]
            medians[name].append(np.median(laps) * 1e3)
            del decoder
        decoder = Decoder(a.watched, a.threads)
        decoder.step(window[: a.prompt])
        for i, token in enumerate(window[a.prompt :]):
            keep = decoder.step([token])[1][:, 0, 0] >= 0
            attention, mlp, whole = skippable(facts, a.prompt + i)
            skipped = sum(
                attention if module.endswith("attention") else mlp
                for module, kept in zip(modules, keep)
                if not kept
            )
            shares.append(skipped / whole)
            rates.append(1 - keep.mean())
    dense, routed = (np.median(medians[name]) for name in ("dense", "routed"))
    ratios = [r / d for d, r in zip(medians["dense"], medians["routed"])]
    saved, share = 1 - np.median(ratios), float(np.mean(shares))
    print(f"dense  {dense:.2f} ms a token, rounds {min(medians['dense']):.2f} to {max(medians['dense']):.2f}")
    print(f"routed {routed:.2f} ms a token, rounds {min(medians['routed']):.2f} to {max(medians['routed']):.2f}")
    print(f"modules skipped {100 * np.mean(rates):.1f} %, multiply-adds skipped {100 * share:.1f} %")
    print(f"time saved {100 * saved:.1f} %: {saved / share:.2f} of the share of multiply-adds skipped")


main()
