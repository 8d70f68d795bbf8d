//! Where candle computes: the processor, or an NVIDIA GPU.
//!
//! A build without the `cuda` feature knows the name and refuses it; a build with it asks the
//! driver. Neither ever computes on the processor in place of a GPU that was asked for.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use serde::{Deserialize, Serialize};

/// Where training and the reference run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, device 0.
    Cuda,
}

/// Why it is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program was built without it.
    #[error(
        "this build of skipgpt-export computes on the processor alone (its feature `cuda` is off); \
         `make cuda` builds one that runs on a GPU, as target/cuda/release/skipgpt-export"
    )]
    NotBuilt,
    /// The driver, or the GPU, does not answer.
    #[error(
        "the GPU does not answer: {}; expected an NVIDIA driver for CUDA 13 (580 or later) and a \
         device 0, which `nvidia-smi` shows",
        first_line(.0)
    )]
    NoDevice(#[source] candle_core::Error),
}

/// Candle's message without the place in its own code where it was made.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl Compute {
    /// The device.
    ///
    /// # Errors
    ///
    /// [`Error::NotBuilt`] or [`Error::NoDevice`].
    pub fn open(self) -> Result<Device, Error> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda if !candle_core::utils::cuda_is_available() => Err(Error::NotBuilt),
            Self::Cuda => Device::new_cuda(0).map_err(Error::NoDevice),
        }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// A name that is no device's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a device; expected cpu or cuda")]
pub struct Unknown(String);

impl FromStr for Compute {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => Err(Unknown(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for device in [Compute::Cpu, Compute::Cuda] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        let error = "gpu".parse::<Compute>().unwrap_err().to_string();
        assert_eq!(error, "\"gpu\" is not a device; expected cpu or cuda");
    }

    #[test]
    fn a_build_without_a_gpu_says_what_to_build() {
        assert!(Compute::Cpu.open().unwrap().is_cpu());
        if candle_core::utils::cuda_is_available() {
            return;
        }
        let error = Compute::Cuda.open().unwrap_err().to_string();
        assert!(error.contains("`make cuda`"), "{error}");
    }
}
