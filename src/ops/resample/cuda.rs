//! Resampling on a CUDA device (kernels/resample.cu).

use super::{Plan, TILE, countable, plan};
use crate::config::Preprocess;
use crate::data::preprocess::{CropBox, Geometry};
use crate::data::resample::{Positions, Resampling};
use crate::data::transpose::Strides;
use crate::data::volume::FileVoxels;
use crate::device::cuda::{Act, Buf, Cuda, Elem, In, Kernel, Launch, Out, size_class};
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// `Mapping` of kernels/resample.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Mapping {
    along: In<f64>,
    theta: [[f64; 4]; 3],
    oblique: u32,
    out: [u32; 3],
    grid: [u32; 3],
    start: [i32; 3],
    stored: [u32; 3],
    from_first: u32,
    from_step: [i32; 3],
    to_first: u32,
    to_step: [i32; 3],
    lane_axis: u32,
    row_axis: u32,
    turn: u32,
}

/// `Scan` of kernels/resample.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ScanArgs {
    map: Mapping,
    integers: In<i16>,
    floats: In<f32>,
    slope: f64,
    inter: f64,
    image: Out<Elem>,
    exact: Out<f32>,
    floor: f32,
    width: f32,
}

/// `Mask` of kernels/resample.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MaskArgs {
    map: Mapping,
    probabilities: In<f32>,
    mask: Out<u8>,
}

/// `Foreground` of kernels/resample.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ForegroundArgs {
    image: In<f32>,
    boxes: Out<u32>,
    rows: u32,
    row_len: u32,
}

static SCAN: Kernel<ScanArgs> = Kernel::new("resample.cu", "resample_scan");
static MASK: Kernel<MaskArgs> = Kernel::new("resample.cu", "resample_mask");
static FOREGROUND: Kernel<ForegroundArgs> = Kernel::new("resample.cu", "resample_foreground");

const THREADS: u32 = 256;

/// A turned tile has a column to spare, so that no two lanes meet in a bank.
const TILE_BYTES: u32 = (TILE * (TILE + 1) * 4) as u32;

/// A preprocessed scan on the device.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Scaled intensities of the whole resampled grid, (D, H, W) = `geometry.resampling.out_shape` and room beyond:
    /// what a crop keeps of it is not copied.
    pub image: Act,
    /// The way back, with the crop.
    pub geometry: Geometry,
}

/// The deterministic chain of [`crate::data::preprocess::preprocess`], bit for bit before the rounding to the device's
/// precision; voxels that are NaN or infinite count as the window's floor. `geometry` is the plan for these voxels.
///
/// Waits for the device only to learn the crop.
///
/// # Errors
/// [`Error::Shape`] when there are not as many voxels as planned, [`Error::Usage`] for more than a device can count, and
/// those of the device.
pub fn prepare(
    cuda: &Arc<Cuda>,
    voxels: &FileVoxels,
    mut geometry: Geometry,
    p: &Preprocess,
) -> Result<Prepared> {
    let native = geometry.native_shape;
    countable(native)?;
    if voxels.len() != native.iter().product::<usize>() {
        let (want, got) = (format!("{native:?} voxels"), format!("{}", voxels.len()));
        return Err(Error::Shape { op: "prepare", want, got });
    }
    let file_order = [1, native[0] as isize, (native[0] * native[1]) as isize];
    let from = geometry.orientation.ras_strides(native, file_order);
    let [d, h, w] = geometry.resampling.out_shape;
    let to = Strides { first: 0, step: row_major([d, h, w]) };
    let whole = CropBox { start: [0; 3], end: geometry.resampling.in_shape.map(|n| n as i64) };
    let (map, plan, _tables) = mapping(cuda, &geometry.resampling, &whole, &from, &to)?;

    let image = cuda.act(size_class(d * h * w))?;
    let exact = if p.crop_foreground { Some(cuda.buffer(size_class(d * h * w))?) } else { None };
    let [floor, ceiling] = p.hu_window;
    let mut args = ScanArgs {
        map,
        integers: In::NULL,
        floats: In::NULL,
        slope: 1.0,
        inter: 0.0,
        image: image.write(),
        exact: exact.as_ref().map_or(Out::NULL, Buf::write),
        floor,
        width: ceiling - floor,
    };
    match voxels {
        FileVoxels::I16 { stored, slope, inter } => {
            let stored = upload(cuda, stored)?;
            args = ScanArgs { integers: stored.read(), slope: *slope, inter: *inter, ..args };
            cuda.launch(&SCAN, tiles(plan), &args)?;
        }
        FileVoxels::F32(values) => {
            let values = upload(cuda, values)?;
            args.floats = values.read();
            cuda.launch(&SCAN, tiles(plan), &args)?;
        }
    }
    if let Some(exact) = exact {
        geometry.crop = foreground(&exact, [d, h, w])?;
    }
    Ok(Prepared { image, geometry })
}

/// Bounding box of what is above 0 in a volume of `shape`, the first values of `image`.
fn foreground(image: &Buf<f32>, [d, h, w]: [usize; 3]) -> Result<Option<CropBox>> {
    let boxes = image.cuda().buffer::<u32>(4 * d)?;
    let args =
        ForegroundArgs { image: image.read(), boxes: boxes.write(), rows: h as u32, row_len: w as u32 };
    let shared = THREADS / 32 * 16;
    image.cuda().launch(&FOREGROUND, Launch { grid: [d as u32, 1, 1], threads: THREADS, shared }, &args)?;
    let boxes = boxes.download()?;
    let slabs = boxes.chunks_exact(4).enumerate().filter(|(_, b)| b[1] > 0);
    Ok(slabs.fold(None, |found: Option<CropBox>, (i, b)| {
        let i = i as i64;
        let slab = CropBox { start: [i, b[0].into(), b[2].into()], end: [i + 1, b[1].into(), b[3].into()] };
        Some(found.map_or(slab, |found| CropBox {
            start: std::array::from_fn(|a| found.start[a].min(slab.start[a])),
            end: std::array::from_fn(|a| found.end[a].max(slab.end[a])),
        }))
    }))
}

/// The mask on the native grid, k fastest: [`Geometry::invert_argmax`] byte for byte.
///
/// `probabilities` (background, organ) are those of the preprocessed grid, k fastest, and room beyond.
///
/// # Errors
/// [`Error::Shape`] when there are fewer, and those of the device.
pub fn invert_argmax(probabilities: &Buf<f32>, geometry: &Geometry) -> Result<Buf<u8>> {
    let (cuda, native) = (probabilities.cuda(), geometry.native_shape);
    countable(native)?;
    let shape = geometry.prepared_shape();
    if probabilities.len() < 2 * shape.iter().product::<usize>() {
        let (want, got) = (format!("{shape:?} voxels"), format!("{} probabilities", probabilities.len()));
        return Err(Error::Shape { op: "invert", want, got });
    }
    let stored = geometry
        .crop
        .unwrap_or(CropBox { start: [0; 3], end: geometry.resampling.out_shape.map(|n| n as i64) });
    let from = Strides { first: 0, step: row_major(shape) };
    let to = geometry.orientation.ras_strides(native, row_major(native));
    let (map, plan, _tables) = mapping(cuda, &geometry.resampling.inverse()?, &stored, &from, &to)?;
    let voxels = native.iter().product();
    let mask = cuda.buffer(size_class(voxels))?;
    let args = MaskArgs { map, probabilities: probabilities.read(), mask: mask.write() };
    cuda.launch(&MASK, tiles(plan), &args)?;
    Ok(mask.slice(0, voxels))
}

fn upload<T: Pod>(cuda: &Arc<Cuda>, values: &[T]) -> Result<Buf<T>> {
    let buf = cuda.buffer(size_class(values.len()))?;
    buf.slice(0, values.len()).upload(values)?;
    Ok(buf)
}

fn tiles(plan: Plan) -> Launch {
    Launch { grid: [plan.blocks, 1, 1], threads: THREADS, shared: TILE_BYTES }
}

fn row_major([_, h, w]: [usize; 3]) -> [isize; 3] {
    [(h * w) as isize, w as isize, 1]
}

/// What a launch needs to know of a resampling whose source voxels `stored` lie in memory as `from` says and whose
/// result goes where `to` says; and the tables that it points to.
fn mapping(
    cuda: &Arc<Cuda>,
    to_do: &Resampling,
    stored: &CropBox,
    from: &Strides,
    to: &Strides,
) -> Result<(Mapping, Plan, Buf<f64>)> {
    countable(to_do.out_shape)?;
    countable(to_do.in_shape)?;
    let plan = plan(to_do.out_shape, from, to);
    let (oblique, along) = match to_do.positions() {
        Positions::Source(x) => (false, x),
        Positions::Normalised(base) => (true, base),
    };
    let along = cuda.upload(&along.concat())?;
    // A crop box lies within its grid, so everything below fits 32 bits as the grids do.
    let map = Mapping {
        along: along.read(),
        theta: [to_do.theta[0], to_do.theta[1], to_do.theta[2]],
        oblique: oblique.into(),
        out: to_do.out_shape.map(|n| n as u32),
        grid: to_do.in_shape.map(|n| n as u32),
        start: stored.start.map(|v| v as i32),
        stored: stored.shape().map(|n| n as u32),
        from_first: from.first as u32,
        from_step: from.step.map(|v| v as i32),
        to_first: to.first as u32,
        to_step: to.step.map(|v| v as i32),
        lane_axis: plan.lane_axis as u32,
        row_axis: plan.row_axis as u32,
        turn: plan.turn.into(),
    };
    Ok((map, plan, along))
}
