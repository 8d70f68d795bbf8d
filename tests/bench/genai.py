"""Times artifacts in onnxruntime-genai, in turn: what its users wait for a token, and for a prompt.

    python tests/bench/genai.py --cached 128 --text wikitext2-test.txt BASELINE ARTIFACT...

Each artifact reads the same tokens of the text, then writes greedily; in every round each is loaded, timed and
closed before the next. Medians over rounds and tokens; the ratio is the baseline's time through the artifact's.
Needs onnxruntime-genai and tokenizers.
"""

import argparse
import gc
import pathlib
import statistics
import time

import onnxruntime_genai as og
import tokenizers


def generator(model, length, shared):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, do_sample=False, past_present_share_buffer=shared)
    return og.Generator(model, params)


def timed(path, ids, options):
    """Milliseconds of the prompt and of each token after it."""
    config = og.Config(path)
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": %d}}}}' % options.threads)
    model = og.Model(config)
    # The end of the text is no end of the run.
    end = options.tokens + options.warmup
    g = generator(model, len(ids) + end + 1, not options.growing)
    start = time.perf_counter()
    g.append_tokens(ids)
    prompt = 1e3 * (time.perf_counter() - start)
    steps = []
    for _ in range(end):
        if g.is_done():
            break
        start = time.perf_counter()
        g.generate_next_token()
        steps.append(1e3 * (time.perf_counter() - start))
    del g, model
    gc.collect()
    return prompt, steps[options.warmup :]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--cached", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growing", action="store_true", help="past and present apart, copied every step")
    options = parser.parse_args()

    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(options.artifacts[0], "tokenizer.json")))
    text = pathlib.Path(options.text).read_text(encoding="utf-8")[: 40 * options.cached]
    ids = tokenizer.encode(text).ids[: options.cached]
    assert len(ids) == options.cached, "the text is too short"

    prompts = {path: [] for path in options.artifacts}
    steps = {path: [] for path in options.artifacts}
    for number in range(options.rounds):
        order = options.artifacts if number % 2 == 0 else options.artifacts[::-1]
        for path in order:
            prompt, tokens = timed(path, ids, options)
            prompts[path].append(prompt)
            steps[path].append(statistics.median(tokens))
    base = options.artifacts[0]
    print(f"{options.cached} tokens read, ms; median of {options.rounds} rounds, ratio of each round")
    for path in options.artifacts:
        ratios = sorted(b / a for a, b in zip(steps[path], steps[base]))
        print(
            f"{path}: prompt {statistics.median(prompts[path]):.0f}, token {statistics.median(steps[path]):.2f}"
            f" ({statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}])"
        )


main()
