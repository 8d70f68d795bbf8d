//! The model card: what a person who finds the directory needs to know.

use std::fmt::{self, Write as _};

use skipgpt_passes::ir::ModuleId;

use super::manifest::{Format, GraphFacts, Manifest, Options};
use crate::decoder::{Logits, Sequences};

/// The text of `README.md`. `manifest.outputs` need not be filled in.
pub fn text(manifest: &Manifest) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = write_card(&mut text, manifest);
    text
}

fn write_card(text: &mut String, manifest: &Manifest) -> fmt::Result {
    let model = &manifest.model;
    writeln!(text, "---\ntags:\n- skipgpt\npipeline_tag: text-generation")?;
    if manifest.graph.is_some() {
        writeln!(text, "library_name: onnx")?;
    }
    writeln!(text, "---\n")?;
    let format = match manifest.options.format {
        Format::Onnx => "ONNX",
        Format::Safetensors => "Hugging Face",
    };
    writeln!(
        text,
        "# A {} language model, exported to {format} by {} {}\n",
        model.architecture, manifest.tool.name, manifest.tool.version
    )?;
    writeln!(
        text,
        "{} layers, hidden size {}, {} query and {} key/value heads of {}, {} tokens, context of {}; \
         weights in {}.\n",
        model.num_hidden_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.vocab_size,
        model.max_position_embeddings,
        manifest.precision()
    )?;
    routing(text, manifest)?;
    if let Some(graph) = &manifest.graph {
        running(text, graph, &manifest.options)?;
    }
    writeln!(text, "## Where it comes from\n")?;
    writeln!(text, "| read | bytes | sha256 |\n|---|---|---|")?;
    for input in &manifest.inputs {
        writeln!(text, "| `{}` | {} | `{}` |", input.name, input.size, input.sha256)?;
    }
    writeln!(text, "\n`manifest.json` has every option and decision, and the hash of every file.")
}

fn routing(text: &mut String, manifest: &Manifest) -> fmt::Result {
    let routing = &manifest.routing;
    writeln!(text, "## Routing\n")?;
    if routing.routed.is_empty() && routing.removed.is_empty() {
        return writeln!(text, "None: every module runs for every token.\n");
    }
    writeln!(
        text,
        "For each token, a router decides for each of {} modules (attention or MLP of a layer) \
         whether it runs. Keys and values are computed for every token, so skipped tokens can be \
         attended to.\n",
        routing.routed.len()
    )?;
    for (kind, dispatch) in
        [("attention", routing.attention_dispatch), ("MLP", routing.mlp_dispatch)]
    {
        if let Some(dispatch) = dispatch {
            writeln!(text, "- {kind} modules skip by `{dispatch}` dispatch")?;
        }
    }
    names(text, "removed", &routing.removed)?;
    names(text, "run for every token, without their router", &routing.always)?;
    let work = &manifest.work;
    let share = 100.0 * work.skippable as f64 / work.total().multiply_adds.max(1) as f64;
    writeln!(
        text,
        "- {share:.1} % of the multiply-adds of a token can be skipped, the attention core apart; \
         how many are depends on the text\n"
    )
}

fn names(text: &mut String, what: &str, modules: &[ModuleId]) -> fmt::Result {
    if modules.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = modules.iter().map(|module| format!("`{module}`")).collect();
    writeln!(text, "- {what}: {}", list.join(", "))
}

fn running(text: &mut String, graph: &GraphFacts, options: &Options) -> fmt::Result {
    writeln!(text, "## Running it\n")?;
    writeln!(
        text,
        "ONNX Runtime {} or later. With optimum:\n\n```python\n\
         from optimum.onnxruntime import ORTModelForCausalLM\n\n\
         model = ORTModelForCausalLM.from_pretrained(\".\")\n```\n\n\
         With onnxruntime-genai:\n\n```python\n\
         import onnxruntime_genai as og\n\n\
         model = og.Model(\".\")\n```\n",
        graph.min_onnxruntime
    )?;
    if options.sequences == Sequences::One {
        writeln!(
            text,
            "It takes one sequence at a time, without padding; ONNX Runtime refuses more. For batches it \
             must be exported with `--sequences any`.\n"
        )?;
    }
    match options.logits {
        Logits::All => Ok(()),
        Logits::Last => writeln!(
            text,
            "A step gives the logits of its last position alone, `[batch, 1, vocab]`: enough to write \
             text. For those of every position (perplexity, the likelihood of a given text) it must be \
             exported with `--logits all`.\n"
        ),
    }
}
