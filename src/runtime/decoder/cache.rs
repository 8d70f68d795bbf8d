//! The cache as ONNX Runtime holds it.

use ndarray::{Axis, Ix4, Slice};
use ort::memory::{AllocationDevice, Allocator};
use ort::value::{DynTensor, DynValue};

use super::{Error, feed, memory};
use crate::decoder::CacheEntry;
use crate::runtime::interface::{Half, Interface};
use crate::runtime::tensor::{fill, to_ranked};
use crate::runtime::{Provider, Session};

/// Keys and values of every layer that has a cache.
#[derive(Debug)]
pub(super) struct Cache {
    /// Rows.
    pub(super) batch: usize,
    /// Cached tokens per row.
    pub(super) length: usize,
    /// Tokens the values have room for, if that is more than they hold.
    pub(super) room: Option<usize>,
    /// Keys and values in the order of the interface's layers.
    pub(super) layers: Vec<[DynValue; 2]>,
}

impl Cache {
    /// No tokens, with room for some.
    pub(super) fn with_room(
        session: &Session,
        interface: &Interface,
        batch: usize,
        room: usize,
    ) -> Result<Self, Error> {
        let allocator = match session.provider() {
            Provider::Cpu => Allocator::default(),
            Provider::Cuda => Allocator::new(&session.inner, memory(AllocationDevice::CUDA)?)
                .map_err(Error::Run)?,
        };
        let value = |half: &Half| {
            DynTensor::new(&allocator, half.element, half.shape(batch, room))
                .map(DynTensor::into_dyn)
                .map_err(feed(&half.past))
        };
        let layers = interface.layers.iter();
        let layers = layers
            .map(|layer| Ok([value(&layer.key)?, value(&layer.value)?]))
            .collect::<Result<_, Error>>()?;
        Ok(Self { batch, length: 0, room: Some(room), layers })
    }

    /// The same tokens with room for more, on the host.
    pub(super) fn moved(
        &self,
        session: &Session,
        interface: &Interface,
        room: usize,
    ) -> Result<Self, Error> {
        let entries = self.read(interface)?;
        let mut moved = Self::with_room(session, interface, self.batch, room)?;
        for ((layer, [keys, values]), entry) in
            interface.layers.iter().zip(&mut moved.layers).zip(&entries)
        {
            fill(&layer.key.past, keys, &entry.key)?;
            fill(&layer.value.past, values, &entry.value)?;
        }
        Ok(Self { length: self.length, ..moved })
    }

    /// A copy on the host.
    pub(super) fn read(&self, interface: &Interface) -> Result<Vec<CacheEntry>, Error> {
        let read = |half: &Half, value| {
            let mut all = to_ranked::<Ix4>(&half.present, value)?;
            if self.room.is_some() {
                all.slice_axis_inplace(Axis(2), Slice::from(..self.length));
            }
            Ok::<_, Error>(all)
        };
        let layers = interface.layers.iter().zip(&self.layers);
        layers
            .map(|(layer, [key, value])| {
                let (key, value) = (read(&layer.key, key)?, read(&layer.value, value)?);
                Ok(CacheEntry { layer: layer.index, key, value })
            })
            .collect()
    }
}
