#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use serde_json::json;
use tempfile::TempDir;

use super::*;

/// A byte-level tokenizer whose vocabulary is the 256 bytes, ids in the order of GPT-2's alphabet,
/// and two special tokens.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<String, Value> =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": false, "use_regex": false});
    let special = |id, content| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "normalizer": null, "post_processor": null,
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
            "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [special(256, "<|start|>"), special(257, "<|end|>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

#[test]
fn text_survives_and_leftover_truncation_does_not_apply() {
    let folder = directory(&[]);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let text = "naïve 東京 😀!";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(ids.len(), text.len());
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
}

#[test]
fn a_stream_never_tears_a_character() {
    let folder = directory(&[]);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let text = "é東😀z";
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = tokenizer
        .encode(text, false)
        .unwrap()
        .into_iter()
        .map(|id| stream.push(id).unwrap())
        .collect();
    assert_eq!(pieces, ["", "é", "", "", "東", "", "", "", "😀", "z"]);
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn the_end_of_a_stream_gives_what_is_left() {
    let folder = directory(&[]);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let mut stream = tokenizer.stream();
    let ids = tokenizer.encode("a東", false).unwrap();
    assert_eq!(stream.push(ids[0]).unwrap(), "a");
    assert_eq!(stream.push(ids[1]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn special_tokens_are_recognised_and_not_shown() {
    let folder = directory(&[]);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let ids = tokenizer.encode("a<|end|>", false).unwrap();
    assert_eq!(ids.last(), Some(&257));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a");
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(pieces, ["a", ""]);
}

#[test]
fn end_ids_come_from_the_first_file_that_has_them() {
    let generation = ("generation_config.json", r#"{"eos_token_id": [257, 3]}"#);
    let config = ("config.json", r#"{"eos_token_id": 7}"#);
    let genai = ("genai_config.json", r#"{"model": {"eos_token_id": 9}}"#);
    let eos =
        |files: &[(&str, &str)]| Tokenizer::open(directory(files).path()).unwrap().eos().to_vec();
    assert_eq!(eos(&[generation, config, genai]), [257, 3]);
    assert_eq!(eos(&[("generation_config.json", "{}"), config, genai]), [7]);
    assert_eq!(eos(&[genai]), [9]);
    assert_eq!(eos(&[]), [0_i64; 0]);
}

#[test]
fn a_wrong_end_id_is_named() {
    let folder = directory(&[("config.json", r#"{"eos_token_id": "</s>"}"#)]);
    let error = Tokenizer::open(folder.path()).unwrap_err().to_string();
    let expected = r#"config.json: eos_token_id is "</s>"; expected a token id or a list of them"#;
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn missing_and_broken_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json: cannot be read"), "{error}");
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json: is not a tokenizer"), "{error}");
    let folder = directory(&[("tokenizer_config.json", "{")]);
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer_config.json: is not JSON"), "{error}");
}

/// The form of `SmolLM2` and Qwen2, with the constructs that need Jinja2's trimming.
const CHATML: &str = "{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
<|start|>system
Be brief.<|end|>
    {% endif %}
<|start|>{{ message['role'].strip() }}
{{ message.content | trim }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}
";

#[test]
fn a_template_is_trimmed_as_jinja2_does() {
    let folder = directory(&[("chat_template.jinja", CHATML)]);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let prompt = tokenizer.chat(&[message("user", " Hi ")]).unwrap();
    let expected =
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n";
    assert_eq!(prompt, expected);
}

#[test]
fn a_template_sees_tokens_python_methods_and_loop_controls() {
    let config = json!({
        "bos_token": {"content": "<|start|>"}, "eos_token": "<|end|>", "unk_token": null,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{% for m in messages %}\
                {% if m.role.startswith('skip') %}{% continue %}{% endif %}\
                {% generation %}{{ m.content.split(' ')[0].upper() }}{% endgeneration %}\
                {% endfor %}{{ eos_token }}{{ unk_token }}{% if tools is none %}.{% endif %}"},
        ],
    });
    let folder = directory(&[("tokenizer_config.json", &config.to_string())]);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let messages = [message("user", "one two"), message("skip", "x"), message("user", "three")];
    assert_eq!(tokenizer.chat(&messages).unwrap(), "<|start|>ONETHREE<|end|>.");
}

#[test]
fn json_in_a_template_is_pythons() {
    let template = "{{ {'a': [1, 2.5, '<é>'], 'b': none} | tojson }}|{{ [1] | tojson(indent=2) }}";
    let folder = directory(&[("chat_template.jinja", template)]);
    let prompt = Tokenizer::open(folder.path()).unwrap().chat(&[]).unwrap();
    assert_eq!(prompt, "{\"a\": [1, 2.5, \"<é>\"], \"b\": null}|[\n  1\n]");
}

#[test]
fn a_template_may_refuse() {
    let template = "{{ raise_exception('roles must alternate') }}";
    let folder = directory(&[("chat_template.jinja", template)]);
    let error = Tokenizer::open(folder.path()).unwrap().chat(&[]).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja: the chat template fails"), "{error}");
    assert!(error.contains("roles must alternate"), "{error}");
}

#[test]
fn a_broken_or_absent_template_is_named() {
    let folder = directory(&[("chat_template.jinja", "{% for %}")]);
    let error = Tokenizer::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja: the chat template fails"), "{error}");
    let folder = directory(&[]);
    let error = Tokenizer::open(folder.path()).unwrap().chat(&[]).unwrap_err().to_string();
    assert!(error.contains("there is no chat template"), "{error}");
}

#[test]
fn a_date_in_a_template_is_todays() {
    let folder = directory(&[("chat_template.jinja", "{{ strftime_now('%Y') }}")]);
    let prompt = Tokenizer::open(folder.path()).unwrap().chat(&[]).unwrap();
    assert!(prompt.parse::<u32>().is_ok_and(|year| year >= 2025), "{prompt}");
}
