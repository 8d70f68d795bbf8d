//! Tensors as `torch.save` writes a state dict: a zip archive of a pickle and the tensors' bytes.
//!
//! The pickle is the program that builds `{name: torch._utils._rebuild_tensor_v2(storage, 0, shape,
//! strides, False, OrderedDict())}`, every storage a persistent id `("storage", torch.FloatStorage,
//! "0", "cpu", elements)`: nothing that `torch.load(weights_only=True)` refuses.

use std::io::{self, Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// The archive's folder.
const FOLDER: &str = "router";
/// Where `torch.save` begins the bytes of tensors.
const ALIGNMENT: u16 = 64;

/// A `.pth` file of `f32` tensors: name, shape and little-endian values.
pub(super) fn file(tensors: &[(String, Vec<usize>, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    // The format's own zero: the archive is a function of its content.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .with_alignment(ALIGNMENT);
    let mut add = |name: &str, bytes: &[u8]| -> io::Result<()> {
        zip.start_file(format!("{FOLDER}/{name}"), options)?;
        zip.write_all(bytes)
    };
    add("data.pkl", &pickle(tensors))?;
    add("byteorder", b"little")?;
    for (index, (_, _, bytes)) in tensors.iter().enumerate() {
        add(&format!("data/{index}"), bytes)?;
    }
    add("version", b"3\n")?;
    Ok(zip.finish()?.into_inner())
}

/// Protocol 2, without memo: nothing is referred to twice.
fn pickle(tensors: &[(String, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let mut out = vec![0x80, 2, b'}', b'('];
    for (index, (name, shape, bytes)) in tensors.iter().enumerate() {
        string(&mut out, name);
        global(&mut out, "torch._utils", "_rebuild_tensor_v2");
        out.push(b'(');
        out.push(b'(');
        string(&mut out, "storage");
        global(&mut out, "torch", "FloatStorage");
        string(&mut out, &index.to_string());
        string(&mut out, "cpu");
        number(&mut out, bytes.len() / 4);
        out.extend(b"tQ");
        number(&mut out, 0);
        out.push(b'(');
        for size in shape {
            number(&mut out, *size);
        }
        out.extend(b"t(");
        for dimension in 0..shape.len() {
            number(&mut out, shape[dimension + 1..].iter().product());
        }
        // False, then OrderedDict(), then the call.
        out.extend(b"t\x89");
        global(&mut out, "collections", "OrderedDict");
        out.extend(b")RtR");
    }
    out.extend(b"u.");
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    out.extend(format!("c{module}\n{name}\n").as_bytes());
}

/// A four-byte integer; router sizes are far under its end.
fn number(out: &mut Vec<u8>, value: usize) {
    out.push(b'J');
    out.extend((value as u32).to_le_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::checkpoint::pth;
    use crate::sources;

    #[test]
    fn what_is_written_reads_back() {
        let mut bytes = Vec::new();
        let values = [1.0, -2.5, 3.0, f32::MIN_POSITIVE, 5.0, 6.0];
        sources::encode(&values, skipgpt_passes::ir::DType::F32, &mut bytes);
        let tensors = [
            ("a.weight".to_owned(), vec![2, 3], bytes.clone()),
            ("a.bias".to_owned(), vec![2], bytes[..8].to_vec()),
        ];
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("router.pth");
        std::fs::write(&path, file(&tensors).unwrap()).unwrap();
        let found = pth::read(&path).unwrap();
        let flat = |name: &str| found[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(found["a.weight"].dims(), [2, 3]);
        assert_eq!(flat("a.weight"), values);
        assert_eq!(flat("a.bias"), values[..2]);
        assert_eq!(file(&tensors).unwrap(), file(&tensors).unwrap());
    }
}
