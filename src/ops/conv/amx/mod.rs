//! bfloat16 convolutions on AMX: the same passes as the vector units', as products of 16 x 32 by 32 x 16 tiles.
//!
//! | | gather core | outer-product core |
//! |---|---|---|
//! | 16 rows of A | output voxels | source channels |
//! | K = 32 | channels of a tap, or 16 channels of two neighbouring taps | voxels |
//! | 16 columns of B | output channels | lane channels |
//!
//! Both multiply shifted views of a halo tile in memory: a tile register's rows may begin anywhere, at one distance from
//! each other, so that a tap is nothing but an offset. Rows of fewer voxels than a register has are laid end to end with
//! their halo between them; what the halo's rows of A give is thrown away, what its columns give is multiplied by 0.
//! Values that are no numbers or infinite may so reach sums that would have left them out, in the outer-product core.
//!
//! Sums have one order, whatever the number of threads, but another one than on the vector units.

mod cover;
mod fold;
mod gather;
mod micro;
mod pack;
mod planes;
mod wgrad;

use fold::Fold;
pub use gather::correlate;
pub use wgrad::wgrad;

use super::plan::LANES;
use super::run::THIN_CHANNELS;
use super::{Head, Problem, Source};
use crate::device::bf16::Operands;
use crate::device::cpu::amx;

/// Channels of a row of A at most: one K.
const DEPTH: usize = 32;

/// Lane blocks that a kernel takes at most.
const LANE_BLOCKS: usize = 2;

/// Fewer source channels than this leave three quarters of every product to zeros: the vector units are as fast then.
const MIN_CHANNELS: usize = 4;

/// Whether AMX is in use and multiplies what these sources hold.
fn takes(operands: Operands, sources: &[Source]) -> bool {
    operands == Operands::Bf16 && amx() && sources.iter().any(|s| s.channels >= MIN_CHANNELS)
}

/// Whether [`correlate`] computes this pass.
pub fn gathers(problem: &Problem, sources: &[Source], heads: &[Head]) -> bool {
    let channels = || heads.iter().map(|h| h.channels);
    takes(problem.operands, sources)
        && (channels().any(|c| c > THIN_CHANNELS)
            || Fold::of(problem.map, channels(), problem.out_space).is_some())
}

/// Whether [`wgrad`] computes this pass.
pub fn multiplies(problem: &Problem, sources: &[Source], lane_sources: &[Source]) -> bool {
    takes(problem.operands, sources) && lane_sources.iter().any(|s| s.channels > THIN_CHANNELS)
}

/// A pointer's bytes.
fn bytes(p: *const f32) -> *const u8 {
    p.cast()
}

const _: () =
    assert!(LANES * 4 == crate::device::amx::ROW_BYTES && DEPTH * 2 == crate::device::amx::ROW_BYTES);
