//! The zip archive `torch.save` writes: a folder with the pickle, its byte order and the storages.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::{Error, PICKLE_LIMIT, scan};

/// An archive's directory.
pub(super) struct Container<'a> {
    path: &'a Path,
    archive: ZipArchive<BufReader<File>>,
}

impl<'a> Container<'a> {
    pub(super) fn open(path: &'a Path, mut file: File) -> Result<Self, Error> {
        let io = |source| Error::Read { path: path.to_owned(), source };
        let mut magic = Vec::new();
        file.by_ref().take(2).read_to_end(&mut magic).map_err(io)?;
        match magic[..] {
            [b'P', b'K'] => {}
            // The protocol mark every pickle begins with.
            [0x80, ..] => return Err(Error::Legacy { path: path.to_owned() }),
            _ => return Err(Error::NotPth { path: path.to_owned() }),
        }
        let archive = ZipArchive::new(BufReader::new(file))
            .map_err(|source| Error::Zip { path: path.to_owned(), source })?;
        Ok(Self { path, archive })
    }

    /// The folder `torch.save` put everything in, and the one pickle.
    pub(super) fn pickle(&mut self) -> Result<(String, Vec<u8>), Error> {
        let names: Vec<String> = self
            .archive
            .file_names()
            .map(|name| name.map(std::borrow::Cow::into_owned))
            .collect::<Result<_, _>>()
            .map_err(|source| Error::Zip { path: self.path.to_owned(), source })?;
        // candle's reader takes every entry that ends so.
        let pickles: Vec<_> = names.iter().filter(|name| name.ends_with("data.pkl")).collect();
        let invalid = || Error::Pickles { path: self.path.to_owned(), found: pickles.len() };
        let [pickle] = pickles[..] else { return Err(invalid()) };
        let prefix = pickle.strip_suffix("/data.pkl").ok_or_else(invalid)?.to_owned();
        let pickle = pickle.clone();
        let size = self.size(&pickle)?.unwrap_or_default();
        if size > PICKLE_LIMIT {
            return Err(Error::PickleTooLarge { path: self.path.to_owned(), size });
        }
        Ok((prefix, self.entry(&pickle, PICKLE_LIMIT)?))
    }

    /// Size of a plainly stored entry; `None` if there is none of that name.
    fn size(&mut self, name: &str) -> Result<Option<u64>, Error> {
        let zip = |source| Error::Zip { path: self.path.to_owned(), source };
        let Some(index) = self.archive.index_for_name(name) else { return Ok(None) };
        let entry = self.archive.by_index_raw(index).map_err(zip)?;
        let plain = entry.compression() == CompressionMethod::Stored
            && entry.size() == entry.compressed_size()
            && !entry.encrypted();
        if plain {
            Ok(Some(entry.size()))
        } else {
            Err(Error::Compressed { path: self.path.to_owned(), entry: name.to_owned() })
        }
    }

    /// The bytes of an entry, `limit` at most.
    fn entry(&mut self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let zip = |source| Error::Zip { path: self.path.to_owned(), source };
        let entry = self.archive.by_name(name).map_err(zip)?;
        let mut bytes = Vec::new();
        entry
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::Read { path: self.path.to_owned(), source })?;
        Ok(bytes)
    }

    pub(super) fn check_byte_order(&mut self, prefix: &str) -> Result<(), Error> {
        let name = format!("{prefix}/byteorder");
        if self.size(&name)?.is_none() {
            return Ok(()); // PyTorch 2.0 and older do not write it, and write little-endian.
        }
        let found = self.entry(&name, 16)?;
        if found == b"little" {
            return Ok(());
        }
        let found = String::from_utf8_lossy(&found).into_owned();
        Err(Error::ByteOrder { path: self.path.to_owned(), found })
    }

    /// Whether the archive holds the bytes of `tensor`, which is allocated before it is read.
    pub(super) fn check_storage(
        &mut self,
        prefix: &str,
        tensor: &scan::Tensor,
    ) -> Result<(), Error> {
        let entry = format!("{prefix}/data/{}", tensor.storage);
        let (expected, found) = (tensor.end, self.size(&entry)?.unwrap_or_default());
        if expected <= found {
            return Ok(());
        }
        let (path, name) = (self.path.to_owned(), tensor.name.clone());
        Err(Error::Storage { path, name, entry, expected, found })
    }
}
