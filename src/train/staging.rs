//! Patches that the host cut, on their way to the device while it computes.
//!
//! They are copied by a stream of their own, to one of two places in turn, so that a step's patches arrive while the step
//! before them runs. The host waits for nothing but the copy before, which has to leave page-locked memory first.

use crate::device::cuda::driver::{Event, Stream};
use crate::device::cuda::{Act, Buf, Cuda, Pinned};
use crate::error::Result;
use std::sync::Arc;

/// The stream and the host's side of the copies.
pub struct Staging {
    cuda: Arc<Cuda>,
    copies: Stream,
    images: Pinned<u8>,
    labels: Pinned<u8>,
}

impl Staging {
    /// Room for batches of up to `voxels` voxels.
    ///
    /// # Errors
    /// When the driver refuses a stream or page-locked memory.
    pub fn new(cuda: &Arc<Cuda>, voxels: usize) -> Result<Self> {
        Ok(Staging {
            copies: cuda.driver().new_stream()?,
            images: Pinned::new(cuda, voxels * cuda.precision().bytes())?,
            labels: Pinned::new(cuda, voxels)?,
            cuda: cuda.clone(),
        })
    }

    /// Voxels of the largest batch.
    pub fn voxels(&self) -> usize {
        self.labels.len()
    }

    /// Queues the copies of `from` (intensities, labels) to `to`, which nobody uses any more after `free`, or after what
    /// is queued by now. Kernels that are queued from now on find them there.
    ///
    /// # Errors
    /// When the driver refuses, or work queued before went wrong.
    pub fn bring(&mut self, from: (&[f32], &[u8]), to: (&Act, &Buf<u8>), free: Option<Event>) -> Result<()> {
        let (driver, kernels) = (self.cuda.driver(), self.cuda.stream());
        driver.synchronize(self.copies)?;
        let bytes = self.cuda.precision().bytes() * from.0.len();
        self.cuda.precision().encode(from.0, &mut self.images.values_mut()[..bytes]);
        self.labels.values_mut()[..from.1.len()].copy_from_slice(from.1);
        let free = free.map_or_else(|| driver.record(kernels), Ok)?;
        driver.wait(self.copies, free)?;
        self.images.queue_to(self.copies, 0, to.0.bytes())?;
        self.labels.queue_to(self.copies, 0, to.1)?;
        driver.wait(kernels, driver.record(self.copies)?)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Page-locked memory must outlive the copies; those of failed work do not run any more.
        let _ = self.cuda.driver().synchronize(self.copies);
    }
}
