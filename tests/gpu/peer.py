"""Router tuning in PyTorch, eager: what `train router` is measured against.

Usage: python peer.py MODEL_DIR --device cuda --dtype bfloat16 --batch B --window W --steps N

The frozen model of transformers, a linear router before every module that reads the layer's input in
f32, hard Gumbel-softmax straight through, cross entropy and a pull towards the share to keep, AdamW
on the routers: the computation of `train router`, written as one would. Prints JSON.
"""

import argparse
import inspect
import json
import statistics
import time

import torch
import transformers


class Routed(torch.nn.Module):
    """A decoder layer with two routers."""

    def __init__(self, layer, hidden, noise):
        super().__init__()
        self.layer, self.noise = layer, noise
        self.routers = torch.nn.ModuleList(torch.nn.Linear(hidden, 2) for _ in range(2))
        self.keeps = []

    def keep(self, router, x):
        scores = router(x.float())
        margin = scores[..., 0] - scores[..., 1]
        share = torch.rand_like(margin).clamp(1e-7, 1 - 1e-7)
        noisy = margin + torch.log(share / (1 - share))
        soft = torch.sigmoid(noisy / self.noise["tau"])
        hard = (noisy >= 0).float()
        keep = hard + soft - soft.detach()
        self.keeps.append(keep.mean())
        return keep.unsqueeze(-1)

    def forward(self, hidden_states, **arguments):
        x, layer = hidden_states, self.layer
        self.keeps = []
        keeps = [self.keep(router, x).to(x.dtype) for router in self.routers]
        # What transformers hands a layer changes with its version; nothing of the cache is needed.
        known = inspect.signature(layer.self_attn.forward).parameters
        cache = ("past_key_values", "past_key_value", "use_cache")
        arguments = {k: v for k, v in arguments.items() if k in known and k not in cache}
        seen = layer.self_attn(hidden_states=layer.input_layernorm(x), **arguments)[0]
        x = x + keeps[0] * seen
        return x + keeps[1] * layer.mlp(layer.post_attention_layernorm(x))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    model.requires_grad_(False).to(options.device)
    hidden, noise = model.config.hidden_size, {"tau": 5.0}
    layers = model.model.layers
    for at in range(len(layers)):
        layers[at] = Routed(layers[at], hidden, noise).to(options.device)
        # Where transformers asks a layer what kind it is.
        layers[at].attention_type = getattr(layers[at].layer, "attention_type", "full_attention")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    speeds = []
    for step in range(options.steps + options.warmup):
        ids = torch.randint(0, model.config.vocab_size, (options.batch, options.window))
        wait()
        started = time.perf_counter()
        ids = ids.to(options.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        keep = torch.stack([k for layer in layers for k in layer.keeps]).mean()
        (loss + 8.0 * (keep - 0.75).abs()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        seconds = time.perf_counter() - started
        if step >= options.warmup:
            speeds.append(options.batch * options.window / seconds)
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokens_per_second": statistics.median(speeds),
                "steps": len(speeds),
                "peak_device_bytes": torch.cuda.max_memory_allocated()
                if options.device == "cuda"
                else None,
            }
        )
    )


main()
