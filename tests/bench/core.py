"""What the attention core of one layer costs: all at once, or a block of queries at a time.

Usage: core.py [--tokens N ...] [--kept SHARE ...] [--block N ...] [--threads N]
Needs onnx, onnxruntime and numpy.

SmolLM2-135M's shape (9 heads of 64 on 3) in f32, one sequence on an empty cache: `GroupQueryAttention` of every
token; `MultiHeadAttention` of the kept tokens, at once, and by a `Loop` over equal blocks of at most so many
queries with the keys up to the last of them. The results of the last two are compared. Medians, ms.
"""

import argparse
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HEADS, GROUPS, WIDTH = 9, 3, 64
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def node(op, inputs, outputs, **attributes):
    domain = "com.microsoft" if op.endswith("Attention") else ""
    return helper.make_node(op, inputs.split(","), outputs.split(","), domain=domain, **attributes)


def value(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def constants(**values):
    return [numpy_helper.from_array(np.array(v), name) for name, v in values.items()]


SHARED = constants(
    axis2=[2], copies=[1, 1, HEADS // GROUPS, 1, 1], joined=[0, HEADS, -1, WIDTH], zero=[0], one=[1], three=[3], one_=1
)


def session(nodes, inputs, more, threads):
    graph = helper.make_graph(nodes, "core", inputs, [value("o", None)], SHARED + more)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def for_every_head(x):
    return [
        node("Unsqueeze", f"{x},axis2", f"{x}.column"),
        node("Expand", f"{x}.column,copies", f"{x}.copies"),
        node("Reshape", f"{x}.copies,joined", f"{x}.all"),
    ]


def grouped(threads):
    inputs = "q,k,v,past_k,past_v,last,total,cos,sin,rows"
    nodes = [node("GroupQueryAttention", inputs, "o,k_,v_", num_heads=HEADS, kv_num_heads=GROUPS, do_rotary=1)]
    cache = [1, GROUPS, "past", WIDTH]
    new = [1, "tokens", GROUPS * WIDTH]
    table = ["tokens", WIDTH // 2]
    values = [value("q", [1, "tokens", HEADS * WIDTH]), value("k", new), value("v", new)]
    values += [value("past_k", cache), value("past_v", cache), value("last", [1], TensorProto.INT32)]
    values += [value("total", [], TensorProto.INT32), value("cos", table), value("sin", table)]
    return session(nodes, values + [value("rows", [1, "tokens"], INT)], [], threads)


KEPT = [
    value("q", [1, "kept", HEADS * WIDTH]),
    value("k", [1, GROUPS, "tokens", WIDTH]),
    value("v", [1, GROUPS, "tokens", WIDTH]),
    value("bias", [1, 1, "tokens", "tokens"]),
    value("columns", ["kept"], INT),
]


def at_once(threads):
    nodes = for_every_head("k") + for_every_head("v") + [node("Gather", "bias,columns", "b", axis=2)]
    nodes.append(node("MultiHeadAttention", "q,k.all,v.all,,,b", "o", num_heads=HEADS))
    return session(nodes, KEPT, [], threads)


def in_blocks(most, threads):
    before = [
        node("Size", "columns", "n"),
        node("Add", "n,but_one", "n_up"),
        node("Div", "n_up,most", "count"),
        node("Sub", "n,one_", "last"),
        node("Add", "last,count", "last_up"),
        node("Div", "last_up,count", "size"),
    ]
    body = [
        node("Identity", "go_on", "going"),
        node("Mul", "number,size", "from"),
        node("Add", "from,size", "to"),
        node("Range", "from,to,one_", "range"),
        node("Min", "range,last", "rows"),
        node("Gather", "q,rows", "qb", axis=1),
        node("Gather", "columns,rows", "of_block"),
        node("ReduceMax", "of_block", "last_key", keepdims=1),
        node("Add", "last_key,one", "end"),
        node("Slice", "k,zero,end,axis2", "kb"),
        node("Slice", "v,zero,end,axis2", "vb"),
        *for_every_head("kb"),
        *for_every_head("vb"),
        node("Gather", "bias,of_block", "bias_rows", axis=2),
        node("Slice", "bias_rows,zero,end,three", "bb"),
        node("MultiHeadAttention", "qb,kb.all,vb.all,,,bb", "ob", num_heads=HEADS),
    ]
    inputs = [value("number", [], INT), value("go_on", [], TensorProto.BOOL)]
    outputs = [value("going", [], TensorProto.BOOL), value("ob", [1, None, HEADS * WIDTH])]
    after = [
        node("Loop", "count,", "stacked", body=helper.make_graph(body, "body", inputs, outputs)),
        node("Transpose", "stacked", "sorted", perm=[1, 0, 2, 3]),
        node("Reshape", "sorted,rows_joined", "long"),
        node("Reshape", "n,flat", "n_vector"),
        node("Slice", "long,zero,n_vector,one", "o"),
    ]
    more = constants(most=most, but_one=most - 1, flat=[-1], rows_joined=[1, -1, HEADS * WIDTH])
    return session(before + after, KEPT, more, threads)


def timed(core, feeds, runs):
    feeds = {i.name: feeds[i.name] for i in core.get_inputs()}
    result, times = core.run(["o"], feeds)[0], []
    for _ in range(runs):
        start = time.perf_counter()
        core.run(["o"], feeds)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times)), result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--kept", type=float, nargs="+", default=[1.0, 0.62])
    parser.add_argument("--block", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    for tokens in options.tokens:
        runs = max(5, 20 * 1024**2 // tokens**2)
        q, table, none = draw(1, tokens, HEADS * WIDTH), draw(tokens, WIDTH // 2), draw(1, GROUPS, 0, WIDTH)
        feeds = {"q": q, "k": draw(1, tokens, GROUPS * WIDTH), "v": draw(1, tokens, GROUPS * WIDTH), "cos": table}
        feeds |= {"sin": table, "past_k": none, "past_v": none, "rows": np.arange(tokens)[None]}
        feeds |= {"last": np.array([tokens - 1], np.int32), "total": np.array(tokens, np.int32)}
        print(f"{tokens} tokens: GroupQueryAttention {timed(grouped(options.threads), feeds, runs)[0]:.2f}")
        order = np.arange(tokens)
        bias = np.where(order[None] <= order[:, None], 0, np.float32(-3e38))[None, None]
        cache = {"k": draw(1, GROUPS, tokens, WIDTH), "v": draw(1, GROUPS, tokens, WIDTH), "bias": bias}
        for share in options.kept:
            columns = np.sort(rng.permutation(tokens)[: int(tokens * share)])
            feeds = cache | {"q": q[:, columns], "columns": columns}
            whole, expected = timed(at_once(options.threads), feeds, runs)
            line = f"  {len(columns)} kept: at once {whole:.2f}"
            for most in options.block:
                took, found = timed(in_blocks(most, options.threads), feeds, runs)
                assert np.abs(found - expected).max() < 1e-3
                line += f", at most {most}: {took:.2f}"
            print(line, flush=True)


main()
