//! The weights of a Hugging Face directory: one safetensors file, or shards and their index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::catalog::{self, Catalog};
use super::files;

/// The file of a checkpoint that is not sharded.
const SINGLE: &str = "model.safetensors";
/// The index of one that is.
const INDEX: &str = "model.safetensors.index.json";
/// Most bytes an index may have: some hundred thousand tensors.
const INDEX_LIMIT: u64 = 64 << 20;

/// What is wrong with a checkpoint's weight files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened or is not JSON.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A file's tensors are not what they should be.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// The directory has no weights in a form that is read.
    #[error("{}: neither {SINGLE} nor {INDEX} is there; save the model with save_pretrained (safetensors), or make a checkpoint of a .gguf or .pth with `skipgpt-export import`", directory.display())]
    NoWeights {
        /// The checkpoint.
        directory: PathBuf,
    },
    /// The index has no `weight_map` from names to files.
    #[error("{}: expected \"weight_map\", an object from tensor names to file names", path.display())]
    Index {
        /// The index.
        path: PathBuf,
    },
    /// The index names a file that is not in its directory.
    #[error("{}: tensor {tensor} is said to lie in {shard:?}; a shard is a plain file name in the checkpoint's own directory", path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the index says.
        shard: String,
    },
    /// A shard is a link to somewhere else.
    #[error("{}: a link to {}, outside the checkpoint; copy the file into the directory", path.display(), target.display())]
    ShardLink {
        /// The shard.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A shard is missing.
    #[error("{}: shard {shard} is missing; the index says that it holds {tensor}. Fetch it again", path.display())]
    MissingShard {
        /// The index.
        path: PathBuf,
        /// The file it names.
        shard: String,
        /// The first tensor it should hold.
        tensor: String,
    },
    /// A shard lacks a tensor.
    #[error("{}: tensor {tensor} is said to lie in {shard}, which does not hold it", path.display())]
    Absent {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it should be.
        shard: String,
    },
    /// A shard holds a tensor the index does not place there.
    #[error("{}: {shard} holds tensor {tensor}, which the index does not place there", path.display())]
    Unlisted {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it is.
        shard: String,
    },
}

/// The tensors of the checkpoint in `directory`, and the files read: index first, shards by name.
pub(super) fn read(directory: &Path) -> Result<(Catalog, Vec<PathBuf>), Error> {
    let mut catalog = Catalog::new(directory);
    let (single, index) = (directory.join(SINGLE), directory.join(INDEX));
    if single.exists() {
        catalog.add_safetensors(&single)?;
        return Ok((catalog, vec![single]));
    }
    if !index.exists() {
        return Err(Error::NoWeights { directory: directory.to_owned() });
    }
    let map = weight_map(&index)?;
    let mut files = vec![index.clone()];
    // Each shard with the first tensor it is said to hold.
    let mut shards = BTreeMap::new();
    for (tensor, shard) in &map {
        shards.entry(shard).or_insert(tensor);
    }
    for (shard, tensor) in shards {
        let path = shard_path(directory, &index, shard, tensor)?;
        let held = catalog.add_safetensors(&path)?;
        if let Some(tensor) = held.iter().find(|tensor| map.get(*tensor) != Some(shard)) {
            let (tensor, shard) = (tensor.clone(), shard.clone());
            return Err(Error::Unlisted { path: index, tensor, shard });
        }
        let held: BTreeSet<&String> = held.iter().collect();
        if let Some((tensor, _)) = map.iter().find(|(t, s)| *s == shard && !held.contains(t)) {
            let (tensor, shard) = (tensor.clone(), shard.clone());
            return Err(Error::Absent { path: index, tensor, shard });
        }
        files.push(path);
    }
    Ok((catalog, files))
}

/// Which shard holds which tensor.
fn weight_map(index: &Path) -> Result<BTreeMap<String, String>, Error> {
    let invalid = || Error::Index { path: index.to_owned() };
    let json = files::json(index, INDEX_LIMIT)?;
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(invalid)?;
    map.iter()
        .map(|(tensor, shard)| Some((tensor.clone(), shard.as_str()?.to_owned())))
        .collect::<Option<_>>()
        .ok_or_else(invalid)
}

/// The path of a shard, which lies in `directory` and nowhere else.
fn shard_path(directory: &Path, index: &Path, shard: &str, tensor: &str) -> Result<PathBuf, Error> {
    let mut components = Path::new(shard).components();
    let (Some(Component::Normal(name)), None) = (components.next(), components.next()) else {
        return Err(shard_name(index, shard, tensor));
    };
    if name != shard {
        return Err(shard_name(index, shard, tensor));
    }
    let path = directory.join(shard);
    let Ok(target) = path.canonicalize() else {
        let (shard, tensor) = (shard.to_owned(), tensor.to_owned());
        return Err(Error::MissingShard { path: index.to_owned(), shard, tensor });
    };
    let directory = directory
        .canonicalize()
        .map_err(|source| files::Error::Read { path: directory.to_owned(), source })?;
    if target.starts_with(&directory) || in_hub_cache(&directory, &target) {
        Ok(path)
    } else {
        Err(Error::ShardLink { path, target })
    }
}

fn shard_name(index: &Path, shard: &str, tensor: &str) -> Error {
    let (tensor, shard) = (tensor.to_owned(), shard.to_owned());
    Error::ShardName { path: index.to_owned(), tensor, shard }
}

/// Whether both lie where the Hugging Face cache keeps them: `M/snapshots/<revision>` is a
/// directory of links into `M/blobs`.
fn in_hub_cache(directory: &Path, target: &Path) -> bool {
    let Some(snapshots) = directory.parent().filter(|p| p.ends_with("snapshots")) else {
        return false;
    };
    snapshots.parent().is_some_and(|model| target.parent() == Some(&model.join("blobs")))
}
