#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::train::tests::tiny;

struct Files {
    directory: TempDir,
    tokenizer: Tokenizer,
}

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Self { directory, tokenizer: Tokenizer::open(&tiny()).unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self, names: &[&str]) -> Result<Corpus, Error> {
        self.open_field(names, FIELD)
    }

    fn open_field(&self, names: &[&str], field: &str) -> Result<Corpus, Error> {
        let paths: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        let (model, cache) = (tiny(), self.path("cache"));
        let how = Tokenisation {
            tokenizer: &self.tokenizer,
            directory: &model,
            vocab: 264,
            cache: &cache,
            field,
        };
        Corpus::open(&paths, how, &mut |_| ControlFlow::Continue(()))
    }

    fn message(&self, names: &[&str]) -> String {
        let root = format!("{}/", self.directory.path().display());
        self.open(names).unwrap_err().to_string().replace(&root, "")
    }

    /// The text of the corpus, `|` for the end-of-text token.
    fn text(&self, corpus: &Corpus) -> String {
        let tokens = corpus.read(0, corpus.tokens() as usize).unwrap();
        let decode = |id: u32| match id {
            256 => "|".to_owned(),
            id => self.tokenizer.decode(&[i64::from(id)]).unwrap(),
        };
        tokens.into_iter().map(decode).collect()
    }
}

#[test]
fn files_lines_and_directories_become_one_text() {
    let files = Files::new(&[
        ("a.txt", "one\ntwo"),
        ("b.jsonl", "{\"text\": \"three\"}\n\n{\"text\": \"\"}\n{\"id\": 1, \"text\": \"four\"}\n"),
        ("more/d.txt", "six"),
        ("more/c/e.md", "five"),
        ("more/image.png", "no text"),
    ]);
    let corpus = files.open(&["a.txt", "b.jsonl", "more"]).unwrap();
    assert_eq!(files.text(&corpus), "one\ntwo|three|four|five|six|");
    assert_eq!(corpus.place(0), Place { path: files.path("a.txt"), offset: 0, rows: false });
    assert_eq!(corpus.place(15), Place { path: files.path("b.jsonl"), offset: 32, rows: false });
    assert_eq!(corpus.place(25).path, files.path("more/d.txt"));
}

#[test]
fn places_are_near() {
    let files = Files::new(&[("a.txt", &"0123456789".repeat(100))]);
    let corpus = files.open(&["a.txt"]).unwrap();
    assert_eq!(corpus.place(127).offset, 0);
    assert_eq!(corpus.place(128).offset, 128);
    assert_eq!(corpus.place(999).offset, 896);
}

#[test]
fn texts_are_tokenised_once() {
    let files = Files::new(&[("a.txt", "some text")]);
    let keys = files.open(&["a.txt"]).unwrap().keys();
    let cached = || {
        let mut entries: Vec<_> =
            fs::read_dir(files.path("cache")).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        entries
    };
    let path = cached().remove(0);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(files.open(&["a.txt"]).unwrap().keys(), keys);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), modified);
    // A cache that was cut short is made again, and another text has one of its own.
    fs::write(&path, &fs::read(&path).unwrap()[..100]).unwrap();
    let corpus = files.open(&["a.txt"]).unwrap();
    assert_eq!(files.text(&corpus), "some text|");
    fs::write(files.path("a.txt"), "other").unwrap();
    assert_ne!(files.open(&["a.txt"]).unwrap().keys(), keys);
    assert_eq!(cached().len(), 2);
}

/// The same bytes are other tokens as another kind of file, and with another token at the end.
#[test]
fn a_cache_is_of_a_kind_of_text_and_of_an_end() {
    let line = "{\"text\": \"some\"}";
    let mut files = Files::new(&[("a.txt", line), ("a.jsonl", line)]);
    let [plain, fields] = ["a.txt", "a.jsonl"].map(|name| files.open(&[name]).unwrap());
    assert_eq!(files.text(&plain), format!("{line}|"));
    assert_eq!(files.text(&fields), "some|");

    let model = files.path("model");
    fs::create_dir(&model).unwrap();
    fs::copy(tiny().join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
    fs::write(model.join("generation_config.json"), "{\"eos_token_id\": 63}").unwrap();
    files.tokenizer = Tokenizer::open(&model).unwrap();
    let other = files.text(&files.open(&["a.jsonl"]).unwrap());
    assert_eq!(other, format!("some{}", files.tokenizer.decode(&[63]).unwrap()));
}

#[cfg(unix)]
#[test]
fn a_directory_that_links_to_itself_is_read_once() {
    let files = Files::new(&[("all/a.txt", "one"), ("all/more/b.txt", "two")]);
    let all = files.path("all");
    std::os::unix::fs::symlink(&all, all.join("more/again")).unwrap();
    std::os::unix::fs::symlink(all.join("more"), all.join("other")).unwrap();
    assert_eq!(files.text(&files.open(&["all"]).unwrap()), "one|two|");
}

#[test]
fn a_damaged_cache_gives_no_token_the_model_lacks() {
    let files = Files::new(&[("a.txt", "some text")]);
    let corpus = files.open(&["a.txt"]).unwrap();
    let path = fs::read_dir(files.path("cache")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&path).unwrap();
    bytes[90] = 9;
    fs::write(&path, bytes).unwrap();
    let message = corpus.read(0, 2).unwrap_err().to_string();
    assert!(message.contains("token 0 is ") && message.contains("264 tokens"), "{message}");
}

#[test]
fn windows_cover_the_text_and_the_last_are_held_out() {
    let files = Files::new(&[("a.txt", "abcdefghij"), ("b.txt", "klmnopqrstu")]);
    let corpus = files.open(&["a.txt", "b.txt"]).unwrap();
    let windows = Windows::new(&corpus, 4, Cut::Packed, 1).unwrap();
    assert_eq!(windows.len(), 5);
    let (training, held_out) = windows.clone().hold_out(0.2).unwrap();
    assert_eq!((training.len(), held_out.len()), (4, 1));
    let text = |windows: &Windows<'_>, index| {
        let ids: Vec<i64> = windows.tokens(index).unwrap().into_iter().map(i64::from).collect();
        files.tokenizer.decode(&ids).unwrap()
    };
    assert_eq!(text(&training, 0), "abcd");
    assert_eq!(text(&training, 2), "ij".to_owned() + "k");
    assert_eq!(text(&held_out, 0), "pqrs");
    assert_eq!(training.place(3), Place { path: files.path("b.txt"), offset: 0, rows: false });
    assert!(windows.hold_out(0.95).is_err());
}

#[test]
fn documents_can_stay_apart() {
    let files = Files::new(&[
        ("a.jsonl", "{\"text\": \"abcdefghi\"}\n{\"text\": \"jkl\"}\n{\"text\": \"m\"}\n"),
        ("b.txt", &"0123456789".repeat(30)),
    ]);
    let corpus = files.open(&["a.jsonl", "b.txt"]).unwrap();
    let windows = Windows::new(&corpus, 4, Cut::Apart, 1).unwrap();
    let text = |index| {
        let tokens = windows.tokens(index).unwrap();
        assert_eq!(tokens.len(), windows.length(index));
        let decode = |id: u32| match id {
            256 => "|".to_owned(),
            id => files.tokenizer.decode(&[i64::from(id)]).unwrap(),
        };
        tokens.into_iter().map(decode).collect::<String>()
    };
    let first: Vec<_> = (0..6).map(text).collect();
    assert_eq!(first, ["abcd", "efgh", "i|", "jkl|", "m|", "0123"]);
    // Recorded places within a document begin none; the one token that is left is no window.
    assert_eq!(windows.len(), 5 + 75);
    assert_eq!(text(79), "6789");
    assert_eq!(windows.place(3).offset, 22);
    let (training, held_out) = windows.clone().hold_out(0.5).unwrap();
    assert_eq!((training.len(), held_out.len(), held_out.length(39)), (40, 40, 4));
}

#[test]
fn every_epoch_visits_every_window_once() {
    let mut order = Order::new(5, 10);
    let mut epoch = |number: u64| -> Vec<usize> {
        (0..10).map(|sample| order.window(number * 10 + sample)).collect()
    };
    let (first, second) = (epoch(0), epoch(1));
    assert_ne!(first, second);
    for mut visited in [first.clone(), second] {
        visited.sort_unstable();
        assert_eq!(visited, (0..10).collect::<Vec<_>>());
    }
    assert_eq!(Order::new(5, 10).window(3), first[3]);
}

#[test]
fn what_is_no_text_is_refused_by_name() {
    let files = Files::new(&[
        ("empty.txt", ""),
        ("blank.jsonl", "\n\n"),
        ("bad.jsonl", "{\"text\": \"fine\"}\n{\"text\": 3}\n"),
        ("other.jsonl", "{\"txt\": \"fine\"}\n"),
        ("table.json", "{}"),
        ("none/picture.png", ""),
    ]);
    fs::write(files.path("binary.txt"), b"abc\xff\xfe").unwrap();
    for (name, message) in [
        ("empty.txt", "empty.txt: holds no text"),
        ("blank.jsonl", "blank.jsonl: holds no text"),
        (
            "bad.jsonl",
            "bad.jsonl: line 2: \"text\" is not a string; expected an object with a string \"text\"",
        ),
        (
            "other.jsonl",
            "other.jsonl: line 1: there is no \"text\"; expected an object with a string \"text\"",
        ),
        (
            "table.json",
            "table.json: .json files are not read; give plain text, or JSONL with a \"text\" field",
        ),
        ("none", "none: holds no .txt, .md, .jsonl or .parquet file"),
        ("binary.txt", "binary.txt: is not UTF-8 text: the bytes from 3 on are not"),
        ("missing.txt", "missing.txt: cannot read: No such file or directory (os error 2)"),
    ] {
        assert_eq!(files.message(&[name]), message);
    }
    let corpus = Files::new(&[("a.txt", "short")]);
    let error = Windows::new(&corpus.open(&["a.txt"]).unwrap(), 32, Cut::Packed, 1)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "the text has 6 tokens, 0 windows of 32; 1 are needed");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let files = Files::new(&[("a.txt", "text")]);
    let model = tiny();
    for vocab in [100, 1000] {
        let cache = files.path("cache");
        let tokenizer = &files.tokenizer;
        let how = Tokenisation { tokenizer, directory: &model, vocab, cache: &cache, field: FIELD };
        let paths = [files.path("a.txt")];
        let error = Corpus::open(&paths, how, &mut |_| ControlFlow::Continue(())).unwrap_err();
        let path = model.join("tokenizer.json");
        assert_eq!(
            error.to_string(),
            format!(
                "{}: has 257 tokens and the model {vocab}; it is the tokenizer of another model",
                path.display()
            )
        );
    }
}

#[test]
fn the_field_can_be_named() {
    let files =
        Files::new(&[("a.jsonl", "{\"text\": \"one\", \"body\": \"two\"}\n"), ("b.txt", "three")]);
    let usual = files.open(&["a.jsonl", "b.txt"]).unwrap();
    let named = files.open_field(&["a.jsonl", "b.txt"], "body").unwrap();
    assert_eq!(files.text(&usual), "one|three|");
    assert_eq!(files.text(&named), "two|three|");
    // Another field is another text of the same file; a plain text has no fields.
    let (usual, named) = (usual.keys(), named.keys());
    assert!(usual[0] != named[0] && usual[1] == named[1]);
    let error = files.open_field(&["a.jsonl"], "none").unwrap_err().to_string();
    assert!(
        error.ends_with("there is no \"none\"; expected an object with a string \"none\""),
        "{error}"
    );
}

#[cfg(not(feature = "parquet"))]
#[test]
fn tables_are_refused_by_a_build_that_does_not_read_them() {
    let files = Files::new(&[("more/table.parquet", "PAR1")]);
    for name in ["more", "more/table.parquet"] {
        assert_eq!(
            files.message(&[name]),
            "more/table.parquet: this build does not read Parquet; build it with --features parquet, or give plain text or JSONL"
        );
    }
}

#[cfg(feature = "parquet")]
mod tables {
    use super::*;
    use crate::train::data::parquet::testing::write;
    use ::parquet::basic::{Compression, ZstdLevel};

    #[test]
    fn rows_of_every_group_become_documents() {
        let files = Files::new(&[("a.txt", "zero")]);
        let zstd = Compression::ZSTD(ZstdLevel::try_new(3).unwrap());
        for (name, compression) in
            [("plain", Compression::UNCOMPRESSED), ("snappy", Compression::SNAPPY), ("zstd", zstd)]
        {
            fs::create_dir_all(files.path(name)).unwrap();
            let path = format!("{name}/table.parquet");
            let groups = [&[Some("one"), None, Some("")][..], &[Some("two"), Some("three")]];
            write(&files.path(&path), "text", &groups, compression);
            let corpus = files.open(&["a.txt", name]).unwrap();
            assert_eq!(files.text(&corpus), "zero|one|two|three|", "{name}");
            let place = corpus.place(13);
            assert_eq!(place, Place { path: files.path(&path), offset: 4, rows: true });
            assert!(place.to_string().ends_with("table.parquet from row 4 on"));
        }
    }

    #[test]
    fn the_column_can_be_named_and_must_hold_text() {
        let files = Files::new(&[]);
        write(&files.path("a.parquet"), "body", &[&[Some("one")]], Compression::SNAPPY);
        let corpus = files.open_field(&["a.parquet"], "body").unwrap();
        assert_eq!(files.text(&corpus), "one|");
        assert_eq!(
            files.message(&["a.parquet"]),
            "a.parquet: has no column text; its columns are id, body; name one with --text-field"
        );
        let error = files.open_field(&["a.parquet"], "id").unwrap_err().to_string();
        assert!(error.ends_with("cannot be read as Parquet: column id holds no text"), "{error}");
    }

    #[test]
    fn damaged_and_empty_tables_are_refused() {
        let files = Files::new(&[("no.parquet", "PAR1"), ("text.parquet", &"words ".repeat(20))]);
        for name in ["no.parquet", "text.parquet"] {
            let message = files.message(&[name]);
            assert!(
                message.starts_with(&format!("{name}: cannot be read as Parquet: ")),
                "{message}"
            );
        }
        write(&files.path("empty.parquet"), "text", &[&[None, Some("")]], Compression::SNAPPY);
        assert_eq!(files.message(&["empty.parquet"]), "empty.parquet: holds no text");
        // Cut short, and with bytes turned over in the middle.
        let good = files.path("good.parquet");
        let long = "a long text ".repeat(200);
        write(&good, "text", &[&[Some(&long)]], Compression::SNAPPY);
        let bytes = fs::read(&good).unwrap();
        fs::write(files.path("short.parquet"), &bytes[..bytes.len() / 2]).unwrap();
        let message = files.message(&["short.parquet"]);
        assert!(message.starts_with("short.parquet: cannot be read as Parquet: "), "{message}");
    }
}
