#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Cursor;

use expect_test::{Expect, expect};

use super::*;

const ENCODINGS: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/gguf/encodings.gguf"));
const LLAMA: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/gguf/llama.gguf"));

fn read(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, Error> {
    Ok(parse(Cursor::new(bytes), bytes.len() as u64)?.1)
}

/// A file in the making.
#[derive(Clone)]
struct File(Vec<u8>);

impl File {
    fn new(tensors: u64, entries: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(entries)
    }

    fn u32(self, n: u32) -> Self {
        self.raw(&n.to_le_bytes())
    }

    fn u64(self, n: u64) -> Self {
        self.raw(&n.to_le_bytes())
    }

    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// An entry of the tensor list: dimensions as the file has them, fastest first.
    fn tensor(self, name: &str, dims: &[u64], encoding: u32, offset: u64) -> Self {
        let file = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(file, |file, &d| file.u64(d)).u32(encoding).u64(offset)
    }

    /// Zeros up to the alignment, then `bytes` of tensor data.
    fn data(mut self, bytes: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 0);
        self
    }
}

fn check(file: &File, expected: &Expect) {
    expected.assert_eq(&read(&file.0).unwrap_err().to_string());
}

#[test]
fn a_whole_file_is_read() {
    let tensors = read(ENCODINGS).unwrap();
    assert_eq!(tensors["Q4_K"].shape, [2, 256]);
    assert_eq!(tensors["Q4_K"].bytes(), 288);
    assert_eq!((tensors["Q4_K"].rows(), tensors["Q4_K"].columns()), (2, 256));
}

#[test]
fn every_cut_is_noticed() {
    for length in (0..4000).chain((4000..LLAMA.len()).step_by(997)) {
        assert!(read(&LLAMA[..length]).is_err(), "{length} bytes");
    }
}

/// No outcome is asserted: a flipped byte may make another valid file. It must only return.
#[test]
fn no_flipped_byte_is_fatal() {
    for at in 0..ENCODINGS.len().min(3000) {
        for flip in [0xff, 0x80, 0x01] {
            let mut bytes = ENCODINGS.to_vec();
            bytes[at] ^= flip;
            let _ = read(&bytes);
        }
    }
}

#[test]
fn other_files_are_told_apart() {
    check(
        &File(b"PK\x03\x04....".to_vec()),
        &expect![[r#"the file begins with [50, 4b, 03, 04], not with "GGUF": it is no GGUF file"#]],
    );
    check(
        &File(b"GGUF".to_vec()).u32(1),
        &expect!["GGUF version 1 is not read; versions 2 and 3 are"],
    );
    check(
        &File(b"GGUF".to_vec()).u32(3_u32.swap_bytes()),
        &expect![
            "the file is big-endian; convert it with gguf-py's `gguf-convert-endian FILE little` first"
        ],
    );
}

#[test]
fn lengths_are_not_believed() {
    check(
        &File::new(0, u64::MAX),
        &expect![
            "the metadata at byte 24 needs 18446744073709551615 more bytes, the file has 0: it is cut short or damaged; fetch it again"
        ],
    );
    check(
        &File::new(1 << 60, 0),
        &expect![
            "the list of tensors at byte 24 needs 18446744073709551615 more bytes, the file has 0: it is cut short or damaged; fetch it again"
        ],
    );
    check(
        &File::new(0, 1).u64(1 << 40).raw(&[0; 16]),
        &expect![
            "a metadata key at byte 32 needs 1099511627776 more bytes, the file has 16: it is cut short or damaged; fetch it again"
        ],
    );
    check(
        &File::new(0, 1).string("tokens").u32(9).u32(8).u64(1 << 40),
        &expect![
            "tokens at byte 54 needs 8796093022208 more bytes, the file has 0: it is cut short or damaged; fetch it again"
        ],
    );
}

#[test]
fn metadata_is_well_formed() {
    check(
        &File::new(0, 2).string("a").u32(4).u32(1).string("a").u32(4).u32(2),
        &expect![[r#"the metadata key "a" stands in the file twice"#]],
    );
    check(
        &File::new(0, 1).string("a").u32(13).u32(0),
        &expect!["a at byte 33 has value type 13, which is not read"],
    );
    check(
        &File::new(0, 1).string("a").u32(9).u32(9).u64(0),
        &expect!["a at byte 37 has value type 9, which is not read"],
    );
    check(
        &File::new(0, 1).string("a").u32(8).u64(2).raw(&[0xc3, 0x28]),
        &expect!["a at byte 45 is not UTF-8"],
    );
    for alignment in [0, 12] {
        let file = File::new(0, 1).string("general.alignment").u32(4).u32(alignment);
        assert!(matches!(read(&file.0), Err(Error::Alignment { .. })), "{alignment}");
    }
}

#[test]
fn tensors_lie_in_the_file_and_apart() {
    check(
        &File::new(1, 0).tensor("w", &[0, 4], 0, 0).data(64),
        &expect![[r#"tensor "w" has the impossible dimensions [0, 4]"#]],
    );
    check(
        &File::new(1, 0).tensor("w", &[1 << 33, 1 << 33], 0, 0).data(64),
        &expect![[r#"tensor "w" has the impossible dimensions [8589934592, 8589934592]"#]],
    );
    check(
        &File::new(1, 0).tensor("w", &[1; 5], 0, 0).data(64),
        &expect![[r#"tensor "w" has 5 dimensions; expected 1 to 4"#]],
    );
    check(
        &File::new(1, 0).tensor("w", &[256, 1], 20, 0).data(4096),
        &expect![[
            r#"tensor "w" is stored as IQ4_NL, which cannot be dequantised here; take a file with F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K instead"#
        ]],
    );
    check(
        &File::new(1, 0).tensor("w", &[48, 2], 8, 0).data(4096),
        &expect![[
            r#"tensor "w" has rows of 48 values, not a multiple of the 32 in a block of Q8_0"#
        ]],
    );
    check(
        &File::new(1, 0).tensor("w", &[4], 0, 4).data(64),
        &expect![[r#"tensor "w" begins at offset 4, not a multiple of the alignment 32"#]],
    );
    check(
        &File::new(1, 0).tensor("w", &[16], 0, 32).data(64),
        &expect![[
            r#"tensor "w" takes 64 bytes from byte 96, the file has 128: it is cut short or damaged; fetch it again"#
        ]],
    );
    check(
        &File::new(2, 0).tensor("v", &[16], 0, 0).tensor("w", &[8], 0, 32).data(64),
        &expect![[r#"the tensors "v" and "w" overlap"#]],
    );
    check(
        &File::new(2, 0).tensor("w", &[8], 0, 0).tensor("w", &[8], 0, 32).data(64),
        &expect![[r#"the tensor "w" stands in the file twice"#]],
    );
    let whole = File::new(2, 0).tensor("v", &[8], 0, 0).tensor("w", &[8], 0, 32).data(64);
    assert_eq!(read(&whole.0).unwrap().len(), 2);
}
