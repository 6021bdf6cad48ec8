//! The one memory layout: NDHWC, contiguous, channels last.

/// Batch, depth, height, width, channels; channels are the fastest axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Samples.
    pub n: usize,
    /// Depth: NIfTI's i.
    pub d: usize,
    /// Height: NIfTI's j.
    pub h: usize,
    /// Width: NIfTI's k, the fastest spatial axis.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// `n` samples of `space` = (D, H, W) voxels with `c` channels.
    pub fn new(n: usize, space: [usize; 3], c: usize) -> Self {
        let [d, h, w] = space;
        Shape { n, d, h, w, c }
    }

    /// (D, H, W).
    pub fn space(&self) -> [usize; 3] {
        [self.d, self.h, self.w]
    }

    /// Voxels of one sample.
    pub fn voxels(&self) -> usize {
        self.d * self.h * self.w
    }

    /// Number of floats.
    pub fn len(&self) -> usize {
        self.n * self.voxels() * self.c
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same voxels with another number of channels.
    pub fn with_channels(self, c: usize) -> Self {
        Shape { c, ..self }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}, {}, {}, {}]", self.n, self.d, self.h, self.w, self.c)
    }
}
