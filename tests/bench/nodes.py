"""What does one more node cost, alone and in a step that streams weights?

Usage: nodes.py [--weights MB ...] [--threads N] [--rounds N]
Needs onnx, onnxruntime and numpy.

A model of 30 layers, each two matrix products over `MB` megabytes of f32 weights, with and without
eight further `Relu` of one row of 576 per layer. Rounds alternate the two; what is printed is the
difference of the medians, divided by the 240 nodes. With 0 MB the layers are an `Add` each and everything stays in
the first caches.
"""

import argparse
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

LAYERS, EXTRA, HIDDEN = 30, 8, 576


def session(megabytes, extra, threads):
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    bias = numpy_helper.from_array(np.full(HIDDEN, 0.5, np.float32), "bias")

    def op(kind, inputs, name):
        nodes.append(helper.make_node(kind, inputs, [name], name=f"/{name}"))
        return name

    for layer in range(LAYERS):
        width = int(megabytes * 1e6 / 8 / HIDDEN)
        shapes = [(HIDDEN, width), (width, HIDDEN)] if width else []
        for i, shape in enumerate(shapes):
            name = f"layers.{layer}.{i}.weight"
            data = rng.standard_normal(shape, np.float32) / shape[0]
            weights.append(numpy_helper.from_array(data, name))
            value = op("MatMul", [value, name], f"layers.{layer}.{i}")
        value = op("Add", [value, "bias"], f"layers.{layer}.add")
        for i in range(extra):
            value = op("Relu", [value], f"layers.{layer}.extra.{i}")
    op("Identity", [value], "y")
    row = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["tokens", HIDDEN]) for n in "xy"]
    graph = helper.make_graph(nodes, "nodes", row[:1], row[1:], [bias, *weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def step(session, runs):
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.ones((1, HIDDEN), np.float32))
    binding.bind_output("y")
    laps = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        laps.append(time.perf_counter() - start)
    return np.median(laps[runs // 5 :]) * 1e6


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--weights", type=float, nargs="*", default=[0, 2, 14], metavar="MB")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    for megabytes in a.weights:
        times = {0: [], EXTRA: []}
        for _ in range(a.rounds):
            for extra in times:
                times[extra].append(step(session(megabytes, extra, a.threads), 60))
        bare, more = (np.median(times[extra]) for extra in (0, EXTRA))
        print(
            f"{megabytes:g} MB a layer: step {bare / 1e3:.2f} ms; "
            f"one more node {(more - bare) / LAYERS / EXTRA:.2f} µs"
        )


main()
