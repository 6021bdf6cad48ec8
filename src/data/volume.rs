//! A volume of voxels and where it lies in the world.

/// Voxel to world: RAS+ millimetres = affine · (i, j, k, 1).
pub type Affine = [[f64; 4]; 4];

/// Voxels in C order, `shape` = (i, j, k) = (D, H, W): k is the fastest axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Volume<T> {
    /// Number of voxels along i, j, k.
    pub shape: [usize; 3],
    /// `shape[0] * shape[1] * shape[2]` values, k fastest.
    pub data: Vec<T>,
    /// Where the voxels lie.
    pub affine: Affine,
}

/// Voxels in the order of a NIfTI file, i fastest: what a device takes that does the rest itself.
#[derive(Clone, Debug, PartialEq)]
pub enum FileVoxels {
    /// Integers as they are stored; a voxel is stored · slope + inter in float64, rounded to a finite float32.
    I16 {
        /// One integer a voxel.
        stored: Vec<i16>,
        /// Factor, 1 where the file has none.
        slope: f64,
        /// Summand, 0 where the file has none.
        inter: f64,
    },
    /// Scaled values.
    F32(Vec<f32>),
}

impl FileVoxels {
    /// Number of voxels.
    pub fn len(&self) -> usize {
        match self {
            FileVoxels::I16 { stored, .. } => stored.len(),
            FileVoxels::F32(values) => values.len(),
        }
    }

    /// Whether there is no voxel.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Volume<T> {
    /// Number of voxels.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there is no voxel.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Voxel size in mm along each axis: the column norms of the affine.
    pub fn spacing_mm(&self) -> [f64; 3] {
        std::array::from_fn(|c| (0..3).map(|r| self.affine[r][c].powi(2)).sum::<f64>().sqrt())
    }
}
