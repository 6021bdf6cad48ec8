//! A host tensor of any safetensors type, held as f64.
//!
//! f64 holds every value of f16, bf16, f32, i8..i32, u8..u32 and bool exactly, and integers to 2^53: one
//! representation for all comparisons.

use half::{bf16, f16};
pub use safetensors::Dtype;

/// Values in C order (last axis fastest) and the type in which they are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

/// Rust types that a tensor can be made from.
pub trait Elem: Copy {
    const DTYPE: Dtype;
    fn to_f64(self) -> f64;
}

macro_rules! elems {
    ($($t:ty => $d:ident),*) => { $(impl Elem for $t {
        const DTYPE: Dtype = Dtype::$d;
        fn to_f64(self) -> f64 { self as f64 }
    })* };
}
elems!(u8 => U8, i16 => I16, i32 => I32, u32 => U32, i64 => I64, f32 => F32, f64 => F64);

impl Tensor {
    /// A tensor from `values` in C order.
    pub fn new<T: Elem>(shape: &[usize], values: &[T]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "shape {shape:?} does not fit the values");
        Tensor { dtype: T::DTYPE, shape: shape.to_vec(), data: values.iter().map(|v| v.to_f64()).collect() }
    }

    /// Integers, such as a shape or window starts, as i64.
    pub fn ints(shape: &[usize], values: &[usize]) -> Self {
        let values: Vec<i64> = values.iter().map(|&v| v as i64).collect();
        Tensor::new(shape, &values)
    }

    /// A 4x4 affine.
    pub fn affine(a: &[[f64; 4]; 4]) -> Self {
        Tensor::new(&[4, 4], a.as_flattened())
    }

    /// The values as f32; exact where the tensor was f32 or narrower.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&v| v as f32).collect()
    }

    /// The values as u8.
    pub fn to_u8(&self) -> Vec<u8> {
        self.data.iter().map(|&v| v as u8).collect()
    }

    /// The values as non-negative integers.
    pub fn to_usize(&self) -> Vec<usize> {
        self.data.iter().map(|&v| v as usize).collect()
    }

    /// Every `step`-th voxel of the last three axes (`*_s2`, `*_s3` of the goldens).
    pub fn strided(&self, step: usize) -> Self {
        let (lead, space) = self.shape.split_at(self.shape.len() - 3);
        let [d, h, w] = [space[0], space[1], space[2]];
        let mut data = Vec::new();
        for block in self.data.chunks_exact(d * h * w) {
            for (i, j) in (0..d).step_by(step).flat_map(|i| (0..h).step_by(step).map(move |j| (i, j))) {
                data.extend(block[(i * h + j) * w..][..w].iter().step_by(step));
            }
        }
        let shape = lead.iter().copied().chain(space.iter().map(|n| n.div_ceil(step))).collect();
        Tensor { dtype: self.dtype, shape, data }
    }

    /// Decodes little-endian safetensors bytes.
    pub fn decode(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<Self, String> {
        fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|&b| f(b)).collect()
        }
        let data = match dtype {
            Dtype::BOOL | Dtype::U8 => each(bytes, |b: [u8; 1]| f64::from(b[0])),
            Dtype::I8 => each(bytes, |b| f64::from(i8::from_le_bytes(b))),
            Dtype::I16 => each(bytes, |b| f64::from(i16::from_le_bytes(b))),
            Dtype::U16 => each(bytes, |b| f64::from(u16::from_le_bytes(b))),
            Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
            Dtype::U32 => each(bytes, |b| f64::from(u32::from_le_bytes(b))),
            Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
            Dtype::U64 => each(bytes, |b| u64::from_le_bytes(b) as f64),
            Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f64()),
            Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f64()),
            Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
            Dtype::F64 => each(bytes, f64::from_le_bytes),
            other => return Err(format!("tensors of type {other} are not read")),
        };
        Ok(Tensor { dtype, shape: shape.to_vec(), data })
    }

    /// Little-endian bytes as `dtype`; types that cannot be written keep f64.
    pub fn encode(&self, dtype: Dtype) -> (Dtype, Vec<u8>) {
        fn each<const N: usize>(data: &[f64], f: impl Fn(f64) -> [u8; N]) -> Vec<u8> {
            data.iter().flat_map(|&v| f(v)).collect()
        }
        let d = &self.data;
        let bytes = match dtype {
            Dtype::BOOL | Dtype::U8 => each(d, |v| [v as u8]),
            Dtype::I8 => each(d, |v| (v as i8).to_le_bytes()),
            Dtype::I16 => each(d, |v| (v as i16).to_le_bytes()),
            Dtype::U16 => each(d, |v| (v as u16).to_le_bytes()),
            Dtype::I32 => each(d, |v| (v as i32).to_le_bytes()),
            Dtype::U32 => each(d, |v| (v as u32).to_le_bytes()),
            Dtype::I64 => each(d, |v| (v as i64).to_le_bytes()),
            Dtype::U64 => each(d, |v| (v as u64).to_le_bytes()),
            Dtype::F16 => each(d, |v| f16::from_f64(v).to_le_bytes()),
            Dtype::BF16 => each(d, |v| bf16::from_f64(v).to_le_bytes()),
            Dtype::F32 => each(d, |v| (v as f32).to_le_bytes()),
            _ => return (Dtype::F64, each(d, f64::to_le_bytes)),
        };
        (dtype, bytes)
    }
}
