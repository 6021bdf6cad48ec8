//! What all kernels for weight gradients are given (kernels/wgrad.cuh).

use super::cuda_wgrad::Problem;
use crate::device::cuda::{Buf, Elem, In, Out};
use crate::tensor::{PendingArgs, View};
use bytemuck::{Pod, Zeroable};

/// Channels of a plane in shared memory, and rows or columns of a block's sums.
pub const CHUNK: usize = 16;

/// `Operand` of kernels/wgrad.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Operand {
    data: In<Elem>,
    map: PendingArgs,
    channels: u32,
    chunks: u32,
}

impl Operand {
    fn new(view: &View) -> Self {
        Operand {
            data: view.data.read(),
            map: view.pending_args(),
            channels: view.shape.c as u32,
            chunks: view.shape.c.div_ceil(CHUNK) as u32,
        }
    }

    /// One or two of them.
    fn pair(views: &[&View]) -> [Self; 2] {
        [Operand::new(views[0]), views.get(1).map_or(Operand::zeroed(), |v| Operand::new(v))]
    }
}

/// `Sums` of kernels/wgrad.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Sums {
    x: Operand,
    y: [Operand; 2],
    partials: Out<f32>,
    x_volume: [u32; 3],
    y_volume: [u32; 3],
    tile: [u32; 3],
    tiles: [u32; 3],
    tile_count: u32,
    unused: u32,
}

impl Sums {
    /// Of `x` and one or two `dys`, by tiles of this size, so many along each axis.
    pub fn new(
        p: &Problem,
        x: &View,
        dys: &[&View],
        partials: &Buf<f32>,
        (tile, tiles): ([usize; 3], [usize; 3]),
    ) -> Self {
        Sums {
            x: Operand::new(x),
            y: Operand::pair(dys),
            partials: partials.write(),
            x_volume: small(if p.kernel == 1 { p.space } else { x.shape.space() }),
            y_volume: small(p.space),
            tile: small(tile),
            tiles: small(tiles),
            tile_count: (p.n * tiles.iter().product::<usize>()) as u32,
            unused: 0,
        }
    }
}

/// As the kernels have sizes.
pub fn small(sizes: [usize; 3]) -> [u32; 3] {
    sizes.map(|s| s as u32)
}
