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
//! Where the kernel is 3 and the stride 1, sums of up to four neighbouring planes share what they read ([`micro`]).
//! Where channels are too few for rows, K or columns, taps or neighbouring voxels fill them ([`mod@scheme`], [`fold`],
//! [`planes`]). There, and wherever K runs over voxels, a value that is infinite or no number may reach sums that would
//! have left it out.
//!
//! Sums have one order, whatever the number of threads, but another one than on the vector units.

mod ahead;
mod calls;
mod cover;
mod fold;
mod gather;
mod halo;
mod micro;
mod pack;
mod planes;
mod scheme;
mod wgrad;
mod write;

pub use fold::Fold;
pub use gather::correlate;
pub use scheme::Depth;
pub use wgrad::wgrad;

use super::plan::{LANES, Map};
use super::run::THIN_CHANNELS;
use super::{Head, Problem, Source};
use crate::device::bf16::Operands;
use crate::device::cpu::amx;
use crate::device::list::List;
use scheme::{MIN_CHANNELS, Scheme};

/// Lane blocks that a kernel takes at most.
const LANE_BLOCKS: usize = 2;

/// Whether AMX is in use for these operands.
fn on(problem: &Problem) -> bool {
    problem.operands == Operands::Bf16 && amx()
}

/// The scheme by which [`correlate`] computes this pass, `None` where it does not.
pub fn scheme(problem: &Problem, sources: &[Source], heads: &[Head]) -> Option<Scheme> {
    if !on(problem) {
        return None;
    }
    let sources: List<usize> = sources.iter().map(|s| s.channels).collect();
    let heads: List<usize> = heads.iter().map(|h| h.channels).collect();
    Scheme::of(problem.map, &sources, &heads, problem.out_space)
}

/// Whether [`wgrad()`] computes this pass.
pub fn multiplies(problem: &Problem, sources: &[Source], lane_sources: &[Source]) -> bool {
    on(problem)
        && (is_thin(problem.map, sources) || sources.iter().any(|s| s.channels >= MIN_CHANNELS))
        && lane_sources.iter().any(|s| s.channels > THIN_CHANNELS)
}

/// Whether [`wgrad()`] makes channels of the only source's taps.
fn is_thin(map: Map, sources: &[Source]) -> bool {
    map.kernel() == 3 && sources.len() == 1 && sources[0].channels < MIN_CHANNELS
}

/// Rows of a halo tile on their way into it, of which nothing is kept.
#[derive(Default)]
struct Lines {
    /// Mapped ones.
    row: Vec<f32>,
    /// What was widened.
    widened: Vec<f32>,
    /// What was narrowed.
    narrowed: Vec<u16>,
}

/// A pointer's bytes.
fn bytes(p: *const f32) -> *const u8 {
    p.cast()
}

const _: () = assert!(LANES * 4 == crate::device::amx::ROW_BYTES);
