//! Sliding windows on a CUDA device (kernels/window.cu).

use super::hull;
use crate::device::cuda::{Act, Buf, Cuda, Elem, In, InOut, Kernel, Launch, Out, size_class};
use crate::error::{Error, Result};
use crate::tensor::{PendingArgs, Shape, View};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;
use std::sync::Arc;

/// Background and organ.
const CLASSES: usize = 2;

const THREADS: u32 = 256;

/// `Windows` of kernels/window.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct WindowsArgs {
    starts: In<i32>,
    count: [u32; 3],
    roi: [u32; 3],
    shape: [u32; 3],
    first: u32,
}

/// `Gather` of kernels/window.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GatherArgs {
    windows: WindowsArgs,
    image: In<Elem>,
    batch: Out<Elem>,
    slab: u32,
    row: u32,
    first: u64,
}

/// `Blend` of kernels/window.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BlendArgs {
    windows: WindowsArgs,
    logits: In<Elem>,
    map: PendingArgs,
    weights: In<f32>,
    sums: InOut<f32>,
    n: u32,
    box_start: [u32; 3],
    box_len: [u32; 3],
    unused: u32,
}

/// `Softmax` of kernels/window.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SoftmaxArgs {
    windows: WindowsArgs,
    weights: In<f32>,
    sums: InOut<f32>,
    mask: Out<u8>,
}

static GATHER: Kernel<GatherArgs> = Kernel::new("window.cu", "window_gather");
static BLEND: Kernel<BlendArgs> = Kernel::new("window.cu", "window_blend");
static SOFTMAX: Kernel<SoftmaxArgs> = Kernel::new("window.cu", "window_softmax");

/// A volume of one channel on the device: a box of a larger one.
#[derive(Clone, Debug)]
pub struct Image {
    /// All voxels of the larger one, C order, and room beyond.
    pub data: Act,
    /// Its shape (D, H, W).
    pub whole: [usize; 3],
    /// First voxel of the box.
    pub start: [usize; 3],
    /// Shape of the box, which lies within.
    pub shape: [usize; 3],
}

/// The windows over one volume.
#[derive(Debug)]
pub struct Tiling {
    starts: [Vec<i32>; 3],
    on_device: Buf<i32>,
    weights: Option<Buf<f32>>,
    roi: [usize; 3],
    shape: [usize; 3],
}

impl Tiling {
    /// Windows of `roi` voxels at every combination of the first voxels `starts` along D, H, W, over a volume of `shape`;
    /// each covers part of it. `weights` are those of a window's voxels; without them all count 1.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not one weight a voxel, and those of the device.
    pub fn new(
        cuda: &Arc<Cuda>,
        shape: [usize; 3],
        roi: [usize; 3],
        starts: [Vec<i32>; 3],
        weights: Option<&[f32]>,
    ) -> Result<Self> {
        if let Some(weights) = weights.filter(|w| w.len() != roi.iter().product::<usize>()) {
            let (want, got) = (format!("{roi:?} weights"), format!("{}", weights.len()));
            return Err(Error::Shape { op: "window", want, got });
        }
        let weights = weights.map(|w| cuda.upload(w)).transpose()?;
        let on_device = cuda.upload(&starts.concat())?;
        Ok(Tiling { starts, on_device, weights, roi, shape })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.starts.iter().map(Vec::len).product()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Zeros for the weighted sums of logits, (D, H, W, 2), and room beyond.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn zero_sums(&self) -> Result<Buf<f32>> {
        let sums = self.on_device.cuda().buffer(size_class(self.voxels() * CLASSES))?;
        sums.fill(0)?;
        Ok(sums)
    }

    /// The windows of these numbers, in C order of their starts, as (n, roi, 1); 0 outside the volume.
    ///
    /// # Errors
    /// [`Error::Shape`] when `image` is not the tiled one, and those of the device.
    pub fn gather(&self, image: &Image, numbers: Range<usize>) -> Result<View> {
        let [_, h, w] = image.whole;
        if image.shape != self.shape {
            let (want, got) = (format!("{:?} voxels", self.shape), format!("{:?}", image.shape));
            return Err(Error::Shape { op: "window_gather", want, got });
        }
        let cuda = image.data.cuda();
        let shape = Shape::new(numbers.len(), self.roi, 1);
        let batch = cuda.act(shape.len())?;
        let [d0, h0, w0] = image.start;
        let args = GatherArgs {
            windows: self.args(numbers.start),
            image: image.data.read(),
            batch: batch.write(),
            slab: (h * w) as u32,
            row: w as u32,
            first: ((d0 * h + h0) * w + w0) as u64,
        };
        // A thread writes 16 bytes, or one element where rows do not end with 16.
        let vector = 16 / cuda.precision().bytes();
        let each = if self.roi[2].is_multiple_of(vector) { vector } else { 1 };
        let mut launch = Launch::over(shape.voxels() / each, THREADS);
        launch.grid[1] = shape.n as u32;
        cuda.launch(&GATHER, launch, &args)?;
        Ok(View::plain(batch, shape))
    }

    /// Adds the weighted logits (n, roi, 2) of the windows from number `first` on to `sums`.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits of another size, and those of the device.
    pub fn blend(&self, logits: &View, first: usize, sums: &Buf<f32>) -> Result<()> {
        let n = logits.shape.n;
        if logits.shape != Shape::new(n, self.roi, CLASSES) || first + n > self.len() {
            return Err(Error::Shape {
                op: "window_blend",
                want: format!("{} of {:?} voxels and {CLASSES} channels", self.len() - first, self.roi),
                got: logits.shape.to_string(),
            });
        }
        let corners: Vec<_> = (first..first + n).map(|number| self.corner(number)).collect();
        let (start, len) = hull(&corners, self.roi, self.shape);
        let args = BlendArgs {
            windows: self.args(first),
            logits: logits.data.read(),
            map: logits.pending_args(),
            weights: self.weights(),
            sums: sums.both(),
            n: n as u32,
            box_start: start.map(|v| v as u32),
            box_len: len.map(|v| v as u32),
            unused: 0,
        };
        sums.cuda().launch(&BLEND, Launch::over(len.iter().product(), THREADS), &args)
    }

    /// Turns sums into probabilities, (D, H, W, 2), in place.
    ///
    /// # Errors
    /// Those of the device.
    pub fn softmax(&self, sums: &Buf<f32>) -> Result<()> {
        self.finish(sums, Out::NULL)
    }

    /// The mask that sums stand for, (D, H, W): 1 where the organ's probability is above the background's.
    ///
    /// # Errors
    /// Those of the device.
    pub fn argmax(&self, sums: &Buf<f32>) -> Result<Buf<u8>> {
        let mask = sums.cuda().buffer(size_class(self.voxels()))?;
        self.finish(sums, mask.write())?;
        Ok(mask.slice(0, self.voxels()))
    }

    fn finish(&self, sums: &Buf<f32>, mask: Out<u8>) -> Result<()> {
        let args = SoftmaxArgs { windows: self.args(0), weights: self.weights(), sums: sums.both(), mask };
        sums.cuda().launch(&SOFTMAX, Launch::over(self.voxels(), THREADS), &args)
    }

    fn voxels(&self) -> usize {
        self.shape.iter().product()
    }

    fn corner(&self, number: usize) -> [i32; 3] {
        let [d, h, w] = &self.starts;
        [d[number / w.len() / h.len()], h[number / w.len() % h.len()], w[number % w.len()]]
    }

    fn weights(&self) -> In<f32> {
        self.weights.as_ref().map_or(In::NULL, Buf::read)
    }

    fn args(&self, first: usize) -> WindowsArgs {
        WindowsArgs {
            starts: self.on_device.read(),
            count: self.starts.each_ref().map(|s| s.len() as u32),
            roi: self.roi.map(|v| v as u32),
            shape: self.shape.map(|v| v as u32),
            first: first as u32,
        }
    }
}
